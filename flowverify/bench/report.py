"""A folder of results as one HTML page that needs nothing else, as CSV, and as LaTeX tables."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flowverify.bench import plots, sources
from flowverify.bench.statistics import (
    CERTIFIED_ON_WORD,
    Comparison,
    TaskRecords,
    by_task,
    evidence,
    measured,
    quantiles,
)
from flowverify.bench.store import read_folder
from flowverify.bench.tasks import Record
from flowverify.certifiers.base import CLOSED, count_closed, median_upper
from flowverify.errors import DataError, FlowverifyError, InvalidInputError
from flowverify.figures import require_matplotlib

VERDICTS = ("certified", CERTIFIED_ON_WORD, "falsified", "unknown", "misclassified", "timeout", "error")


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is aligned left, and those in ``left``."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: tuple[str, ...] = ()

    @property
    def alignment(self) -> list[str]:
        """``left`` or ``right`` for each column."""
        return ["left" if k == 0 or name in self.left else "right" for k, name in enumerate(self.columns)]

    def to_csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return buffer.getvalue()


def summary(tasks: Sequence[TaskRecords]) -> Table:
    """One row a task."""
    foreign = any(CERTIFIED_ON_WORD in one.counts() for one in tasks)
    verdicts = tuple(verdict for verdict in VERDICTS if foreign or verdict != CERTIFIED_ON_WORD)
    above = any(one.bracketed or (one.searched and one.task.kind == "attack") for one in tasks)
    upper = ("median at most", CLOSED) if above else ()
    columns = (
        "task", "images", *verdicts, "distance", "median certified radius", *upper, "quartiles", "ms an image",
        "peak MiB",
    )  # fmt: skip
    return Table("Tasks", columns, [_summary_row(one, verdicts, above) for one in tasks], left=("distance",))


def _summary_row(one: TaskRecords, verdicts: Sequence[str], above: bool) -> tuple[str, ...]:
    """A median of what was found by an attack is an upper end, and stands in another column than certified ones."""
    counts = one.counts()
    low, middle, high = quantiles(one.radii(), (0.25, 0.5, 0.75)) if one.searched else (math.nan,) * 3
    memory = one.peak_memory()
    attack = one.task.kind == "attack"
    upper = middle if attack else median_upper(one.ends()) if one.bracketed else math.nan
    return (
        one.task.name,
        f"{len(one.records)} of {len(one.task.positions)}",
        *(str(counts[verdict]) for verdict in verdicts),
        one.distance,
        "" if attack else number(middle),
        *((number(upper), count_closed(one.ends()) if one.bracketed else "") if above else ()),
        f"{number(low)} to {number(high)}" if one.searched and one.records else "",
        number(1000 * one.mean_seconds()),
        "" if memory is None else f"{memory:.0f}",
    )


def claims(comparisons: Sequence[Comparison], tasks: Sequence[TaskRecords]) -> Table:
    """Ours beside the papers' numbers."""
    named = {one.task.name: one for one in tasks}
    rows = []
    for one in comparisons:
        over = "" if one.over is None else f" over {one.over}"
        means = f"{one.measure}: {one.of}{over}"
        rows.append((one.claim, one.source, one.paper, number(measured(one, named)), means, evidence(one, named)))
    columns = ("claim", "source", "paper", "ours", "measured as", "of which radii")
    return Table("Ours beside the paper's", columns, rows, left=("source", "measured as", "of which radii"))


def failures(tasks: Sequence[TaskRecords]) -> Table:
    """Errors and timeouts, by reason."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for one in tasks:
        for record in one.records:
            if record["verdict"] in ("error", "timeout"):
                key = (one.task.name, record["verdict"], record.get("note", ""))
                found.setdefault(key, []).append(record["index"])
    rows = [(*key, str(len(where)), ", ".join(map(str, where[:10]))) for key, where in found.items()]
    columns = ("task", "verdict", "reason", "images", "the first of them")
    return Table("Errors and timeouts", columns, rows, left=("verdict", "reason", "the first of them"))


def environments(records: Sequence[Record]) -> Table:
    """The machines and versions that the records come from."""
    found: dict[tuple[str, ...], int] = {}
    for record in records:
        own = record["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        processor = f"{own['processor']}, {own['processors']} processors, {own.get('threads', '?')} threads a worker"
        key = (processor, own["system"], own.get("device", ""), versions)
        found[key] = found.get(key, 0) + 1
    rows = [(*key, str(count)) for key, count in found.items()]
    return Table(
        "Machines and versions",
        ("processor", "system", "device", "versions", "records"),
        rows,
        left=("system", "device", "versions"),
    )


def records_csv(records: Sequence[Record]) -> str:
    """Every record as a row; the environment is left to the JSON lines."""
    columns: list[str] = []
    for record in records:
        columns += [key for key in record if key not in columns and key not in ("environment", "output")]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def number(value: Any) -> str:
    """Four significant digits, or nothing where there is no number."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.4g}"


_LOADER = PackageLoader("flowverify.bench")
_HTML = Environment(loader=_LOADER, autoescape=True, trim_blocks=True)
_LATEX_LETTERS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_LATEX = Environment(
    loader=_LOADER,
    undefined=StrictUndefined,
    variable_start_string="<<",
    variable_end_string=">>",
    block_start_string="<%",
    block_end_string="%>",
    trim_blocks=True,
    keep_trailing_newline=True,
    finalize=lambda text: "".join(_LATEX_LETTERS.get(letter, letter) for letter in text),
)


def write_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Writes report.html, records.csv, summary.csv and tables.tex into ``out``, by default the folder itself.

    Raises:
        InvalidInputError: the folder does not hold results, or no record yet.
        DataError: a file in it is damaged, or ``out`` cannot be made.
        DependencyError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    suite, records, log = read_folder(folder)
    if not records:
        raise InvalidInputError(f"{folder}: holds no record yet, expected at least one")
    require_matplotlib()
    tasks = by_task(suite.tasks, records)
    listed = [summary(tasks)]
    if suite.comparisons:
        listed.append(claims(suite.comparisons, tasks))
    failed = failures(tasks)
    if failed.rows:
        listed.append(failed)
    drawn = (
        ("Certified accuracy", plots.certified_accuracy(tasks)),
        ("Radii", plots.radius_boxes(tasks)),
        ("Time against radius", plots.time_against_radius(tasks)),
    )
    page = _HTML.get_template("report.html.jinja").render(
        suite=suite,
        records=records,
        log=log,
        tables=listed,
        pictures=[(title, _inline(content, "svg+xml")) for title, content in drawn if content is not None],
        galleries=_galleries(tasks),
        tasks=tasks,
        machines=environments(records),
    )
    target = Path(folder if out is None else out)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}), expected a folder or a new name") from error
    written = {
        "report.html": page,
        "records.csv": records_csv(records),
        "summary.csv": listed[0].to_csv(),
        "tables.tex": to_latex(listed),
    }
    for name, content in written.items():
        (target / name).write_text(content, encoding="utf-8")
    return [target / name for name in written]


def to_latex(listed: Sequence[Table]) -> str:
    """Tables in the manner of booktabs, with every letter that LaTeX reads as its own escaped."""
    return _LATEX.get_template("tables.tex.jinja").render(tables=listed)


def _galleries(tasks: Sequence[TaskRecords]) -> Iterator[tuple[str, str, str, str]]:
    """Worst cases to first order for each model: of the last of its tasks that has any, searching ones first.

    Yields a title, what it shows, and the picture or the reason why there is none.
    """
    chosen: dict[str, TaskRecords] = {}
    for one in sorted(tasks, key=lambda one: one.searched):
        if plots.pictured(one):
            chosen[one.task.settings["model"]] = one
    for model, one in chosen.items():
        source = failure = ""
        try:
            source = _inline(plots.gallery(one), "png")
        except FlowverifyError as error:  # the records may have come from elsewhere, without model and data
            failure = str(error)
        title = f"Worst cases to first order of {sources.short(model)}"
        yield title, f"{one.task.name} ({one.distance})", source, failure


def _inline(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
