"""``flowverify bench``: runs a suite into a folder; the same command goes on where a run ended.

``flowverify report``: its results as a page, as CSV and as LaTeX tables. ``flowverify plot``: certified accuracy
against radius, from whatever records there are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    FAILED,
    INTERRUPTED,
    DataDir,
    Log,
    check_device,
    check_writable,
    one_line,
    print_error,
    progress_bar,
    say,
    schema_option,
    user_errors,
)
from flowverify.errors import DataError, FlowverifyError, InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowverify.bench.pool import Backend
    from flowverify.bench.scheduler import Progress, RunReport
    from flowverify.bench.store import Store
    from flowverify.bench.suite import Suite
    from flowverify.curves import Curve

RUNNERS = ("local", "ray")
DATA_FOLDERS = ("mnist", "cifar10_sample")


def _schema() -> dict[str, Any]:
    from flowverify.bench.suite import SuiteFile
    from flowverify.settings import json_schema

    return json_schema(SuiteFile)


@user_errors
def bench(
    suite: Annotated[Path, typer.Argument(help="The suite, a YAML file; benchmarks/suites has examples.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; of this suite, or new.")],
    runner: Annotated[str, typer.Option(help="Where to compute: local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto or ray://HOST:10001; without it, one is started.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a processor, of the cluster with Ray.")
    ] = None,
    retry_timeouts: Annotated[
        bool, typer.Option("--retry-timeouts", help="Also try again what has run out of its budget.")
    ] = False,
    data_dir: DataDir = None,
    schema: Annotated[bool, schema_option(_schema)] = False,
) -> None:
    """Run the jobs of a suite, in processes of their own, and keep every result as it arrives.

    Started again with the same folder it skips what is there and tries errors again. Exit code 0: every record has
    a verdict; 1: some verdict is "error"; 2: bad input; 130: interrupted. What was computed is kept in every case.
    """
    if runner not in RUNNERS:
        raise UnknownNameError("runner", runner, RUNNERS)
    use_data_folder(data_dir)

    from flowverify.bench.scheduler import run_suite
    from flowverify.bench.store import Store
    from flowverify.bench.suite import read_suite

    chosen = read_suite(suite)
    if runner == "local":
        check_device(chosen.context.device)
    with Store(out, chosen) as store:
        say(f"{chosen.name}: {chosen.size} records in {out}, {len(store.records)} of them there")
        with progress_bar() as bar:
            show = _Display(bar, chosen.size)
            try:
                done = run_suite(
                    chosen,
                    store,
                    _backend(runner, address, workers, chosen),
                    retry_timeouts=retry_timeouts,
                    on_progress=show,
                )
            except KeyboardInterrupt:
                print_error(
                    f"interrupted with {len(store.records)} of {chosen.size} records in {out}; the same command goes on"
                )
                raise typer.Exit(INTERRUPTED) from None
        _summarise(chosen, store, done)
        if any(record["verdict"] == "error" for record in store.records.values()):
            raise typer.Exit(FAILED)


def use_data_folder(folder: Path | None) -> None:
    """Sets $FLOWVERIFY_DATA, which workers inherit; raises DataError if there are no data sets in the folder."""
    if folder is None:
        return
    if not any((folder / name).is_dir() for name in DATA_FOLDERS):
        raise DataError(f"{folder}: has no folder {' or '.join(DATA_FOLDERS)}, expected the folder that holds them")
    os.environ["FLOWVERIFY_DATA"] = str(folder.resolve())


def _backend(runner: str, address: str | None, workers: int | None, suite: Suite) -> Backend:
    if runner == "local":
        from flowverify.bench.pool import LocalBackend

        return LocalBackend(suite.context, workers, suite.budget.memory)
    from flowverify.bench.cluster import RayBackend

    return RayBackend(suite.context, workers, suite.budget.memory, address)


class _Display:
    """Progress as a bar on a terminal, and as a line now and then in a log file."""

    def __init__(self, bar: object, total: int) -> None:
        from rich.progress import Progress as Bar

        assert isinstance(bar, Bar)
        self._bar, self._task = bar, bar.add_task("records", total=total)
        self._log = Log()

    def __call__(self, progress: Progress) -> None:
        failures = f", {progress.failed} failed" if progress.failed else ""
        text = f"{progress.rate:.1f} records/s{failures}"
        self._bar.update(self._task, completed=progress.done, description=text)
        left = "" if progress.remaining is None else f", {progress.remaining:.0f} s left"
        self._log.tell(lambda: f"{progress.done} of {progress.total} records, {text}{left}")


def _summarise(suite: Suite, store: Store, done: RunReport) -> None:
    from flowverify.bench.statistics import by_task, evidence, measured

    tasks = by_task(suite.tasks, store.records.values())
    for one in tasks:
        parts = [f"{count} {verdict}" for verdict, count in sorted(one.counts().items())]
        if one.searched and one.records:
            parts.append(one.median_text())
        if one.seconds():
            parts.append(f"{1000 * one.mean_seconds():.1f} ms an image")
        typer.echo(f"{one.task.name}: {', '.join(parts) or 'no record'}")
    named = {one.task.name: one for one in tasks}
    for comparison in suite.comparisons:
        about = evidence(comparison, named)
        typer.echo(
            f"{comparison.claim}: {measured(comparison, named):.4g}; paper: {comparison.paper} ({comparison.source})"
            + (f"; {about}" if about else "")
        )
    times = done.times
    typer.echo(
        f"{done.added} records added in {done.seconds:.1f} s; starting workers {times.starting:.1f} s, jobs "
        f"{times.computing:.1f} s, overhead {times.overhead:.1%} of the jobs' own time"
    )


@user_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Of the results, as given to `flowverify bench --out`.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; by default the same folder.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write report.html, one page that needs no network, records.csv, summary.csv and tables.tex.

    A run that is not finished, or still going on, is reported as far as it is.
    """
    use_data_folder(data_dir)

    from flowverify.bench.report import write_report

    for path in write_report(folder, out):
        typer.echo(f"wrote {path}")


ENDINGS = (".svg", ".pdf", ".png")


@user_errors
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Records: what --save or --json of verify, attack and smooth certify wrote, or folders of bench.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .svg, .pdf or .png.")],
    confidence: Annotated[float, typer.Option(help="Of the bands, between 0 and 1; 0 for no bands.")] = 0.95,
) -> None:
    """Draw certified accuracy against radius, with what attacks and complete methods leave at most.

    Radii for other ground costs, caps or data sets have axes of their own. Bands are Clopper-Pearson intervals of the
    share of all images like these, at each radius by itself, if they were drawn at random.
    """
    if out.suffix.lower() not in ENDINGS:
        raise InvalidInputError(f"out {out}: expected a file name that ends in {', '.join(ENDINGS)}")
    check_writable(out, "out")
    if not 0 <= confidence < 1:
        raise InvalidInputError(f"confidence {confidence:g}: expected a number from 0 to 1, 1 excluded")
    from flowverify.curves import alike, draw_curves, figure_of

    drawn = alike(_read(files))
    figure = figure_of(drawn, lambda axes, curves: draw_curves(axes, curves, confidence or None))
    if figure is None:
        given = ", ".join(map(str, files))
        raise InvalidInputError(f"{given}: no certificate and no attack, expected records with radii")
    _write(figure, out)
    count = sum(map(len, drawn.values()))
    typer.echo(f"wrote {out}: {count} curve{'s' * (count > 1)} for {' and for '.join(drawn)}")


def _read(files: list[Path]) -> dict[str, list[Curve]]:
    """Curves by the titles of their axes."""
    from flowverify.bench.charts import accuracy_curves
    from flowverify.bench.statistics import by_task
    from flowverify.bench.store import read_folder
    from flowverify.curves import curves_of, grouped
    from flowverify.records import read_records

    found: dict[str, list[Curve]] = {}
    lines = []
    for path in files:
        if path.is_dir():
            suite, records, _ = read_folder(path)
            for title, curves in accuracy_curves(by_task(suite.tasks, records)).items():
                found.setdefault(title, []).extend(curves)
            continue
        if not path.exists():
            raise InvalidInputError(f"{path}: no such file, expected records or a folder of bench")
        own = read_records(path)
        if not own:
            raise DataError(f"{path}: holds no record, expected at least one")
        try:
            grouped(own)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        lines += own
    for title, runs in grouped(lines).items():
        found.setdefault(title, []).extend(curves_of(runs))
    return {title: curves for title, curves in found.items() if curves}


def _write(figure: Figure, path: Path) -> None:
    """The same records give the same file."""
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with matplotlib.rc_context({"svg.hashsalt": "flowverify"}):
        try:
            figure.savefig(path, format=kind, dpi=150, metadata=dates[kind])
        except (OSError, FlowverifyError) as error:
            raise InvalidInputError(f"out {path}: {one_line(error)}, expected a file that can be written") from error
