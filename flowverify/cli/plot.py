"""``flowverify plot``: certified accuracy against radius, from whatever records there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowverify.cli.common import check_writable, one_line, user_errors
from flowverify.errors import DataError, FlowverifyError, InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowverify.curves import Curve

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
    from flowverify.bench.plots import accuracy_curves
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
