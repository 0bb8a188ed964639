"""A folder of results as one HTML page that needs nothing else, as CSV, and as LaTeX tables. Without matplotlib."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flowverify.bench import charts, sources
from flowverify.bench.charts import Pictures, pictures, radius_shown
from flowverify.bench.sources import titles
from flowverify.bench.statistics import (
    CERTIFIED_ON_WORD,
    ON_WORD,
    Comparison,
    TaskRecords,
    by_task,
    evidence,
    measured,
    quantiles,
)
from flowverify.bench.store import read_folder, read_witnesses
from flowverify.bench.tasks import Record
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.base import CLOSED, count_closed, ends_of, median_upper
from flowverify.errors import DataError, InvalidInputError

MOST_ROWS = 20_000  # of the page's table of images; records.csv has all
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
        OSError: a file cannot be written.
    """
    suite, records, log = read_folder(folder)
    if not records:
        raise InvalidInputError(f"{folder}: holds no record yet, expected at least one")
    tasks = by_task(suite.tasks, records)
    listed = [summary(tasks)]
    if suite.comparisons:
        listed.append(claims(suite.comparisons, tasks))
    failed = failures(tasks)
    if failed.rows:
        listed.append(failed)
    target = Path(folder if out is None else out)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}), expected a folder or a new name") from error
    named = titles(one.task for one in tasks)
    shown = pictures(tasks, read_witnesses(folder))
    curves = _curves(tasks)
    page = _HTML.get_template("report.html.jinja").render(
        suite=suite,
        records=records,
        log=log,
        tables=[_named(table, named) for table in listed],
        slugs={title: name for name, title in named.items()},
        files=_files(Path(folder), target),
        charts=[(title, chart, read) for title, chart, read in curves],
        boxes=_boxes(tasks),
        times=[(title, Markup(charts.time_chart(title, clouds)), clouds)
               for title, clouds in charts.times_against_radii(tasks).items() if clouds],
        shared=[named[one.task.name] for one in tasks if one.searched and not charts.measured_alone(one)],
        pictures=shown,
        rows=sum(len(one.records) for one in tasks if _has_images(one)),
        most_rows=MOST_ROWS,
        content=_script_data(tasks, named, shown, curves),
        tasks=tasks,
        named=named,
        look=lambda place: Markup(charts.look(place)),
        machines=environments(records),
    )  # fmt: skip
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


def _named(table: Table, named: Mapping[str, str]) -> Table:
    """The table with the titles of tasks in place of their names."""

    def words(cell: str) -> str:
        for name in sorted(named, key=len, reverse=True):
            cell = cell.replace(name, named[name]) if "/" in name else cell
        return cell

    return replace(table, rows=[(named.get(row[0], row[0]), *map(words, row[1:])) for row in table.rows])


def _files(folder: Path, target: Path) -> list[tuple[str, str, str]]:
    """Links to the other files: what they hold, and where they lie as the page sees it."""
    found = [
        ("records.csv", "records.csv", "every record, as a table"),
        ("summary.csv", "summary.csv", "the tasks, as a table"),
        ("tables.tex", "tables.tex", "the tables for LaTeX"),
    ]
    for name, what in (("records.jsonl", "every record, as lines of JSON"), ("suite.json", "the suite, as JSON")):
        found.append((name, quote(Path(os.path.relpath(folder / name, target)).as_posix()), what))
    return found


def _has_images(one: TaskRecords) -> bool:
    return one.task.kind in ("certify", "attack")


def _curves(tasks: Sequence[TaskRecords]) -> list[tuple[str, Markup, list[dict[str, Any]]]]:
    found: list[tuple[str, Markup, list[dict[str, Any]]]] = []
    for title, curves in charts.accuracy_curves(tasks).items():
        if curves:
            chart, read = charts.accuracy_chart(title, curves, len(found))
            found.append((title, Markup(chart), read))
    return found


def _boxes(tasks: Sequence[TaskRecords]) -> list[tuple[str, list[tuple[charts.Box, Markup, list[str]]]]]:
    """Of each threat its boxes, drawn and in numbers."""
    found: list[tuple[str, list[tuple[charts.Box, Markup, list[str]]]]] = []
    for title, boxes in charts.radius_boxes(tasks).items():
        across = max((box.quantiles[-1] for box in boxes), default=1.0)
        lines = [
            (box, Markup(charts.box_chart(box, across)), [number(value) for value in box.quantiles]) for box in boxes
        ]
        if lines:
            found.append((title, lines))
    return found


def _script_data(
    tasks: Sequence[TaskRecords],
    named: Mapping[str, str],
    shown: Pictures,
    curves: Sequence[tuple[str, Markup, list[dict[str, Any]]]],
) -> Markup:
    """What the page's script reads, as JSON that ends no element of the page."""
    rows = []
    for number, one in enumerate(tasks):
        if _has_images(one):
            rows += [(record["index"], number, record) for record in one.records]
    rows.sort(key=lambda row: row[:2])
    content = {
        "tasks": [_task_data(one, named[one.task.name]) for one in tasks],
        "rows": [_row_data(tasks[number], number, record) for _, number, record in rows[:MOST_ROWS]],
        "images": shown.images,
        "cases": shown.cases,
        "curves": [read for _, _, read in curves],
    }
    return Markup(json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c"))


def _task_data(one: TaskRecords, title: str) -> dict[str, Any]:
    if not _has_images(one):
        return {"title": title}
    settings = one.task.settings
    data = settings["data"]
    command = ["flowverify", "verify", settings["model"], "--dataset", data["name"], "--split", data["split"]]
    if one.task.kind == "certify":
        command += ["--method", settings["method"]]
        command += ["--bound", settings["bound"]] if settings["bound"] in BOUNDS else []
    command += ["--ground", settings["ground"]]
    command += [] if settings.get("cap") is None else ["--cap", f"{settings['cap']:g}"]
    return {
        "title": title,
        "data": sources.short_data(data),
        "called": Path(data["name"]).name if data["name"].endswith(".npz") else sources.short_data(data),
        "distance": one.distance,
        "attack": one.task.kind == "attack",
        "command": " ".join(command),
    }


def _row_data(one: TaskRecords, number: int, record: Record) -> list[Any]:
    """Task, image, label, prediction, status, radius, upper end, margin, seconds, note, radius of its picture."""
    ends = ends_of(record)
    attack = one.task.kind == "attack"
    asked = one.task.settings.get("radius")
    radius = None if attack and asked is None else record.get("radius", asked)
    upper = ends.upper if math.isfinite(ends.upper) and record["verdict"] != "misclassified" else None
    status = CERTIFIED_ON_WORD if record.get("evidence") == ON_WORD else record["verdict"]
    values = [
        number, record["index"], record.get("label"), record.get("prediction"), status, radius, upper,
        record.get("margin"), record.get("seconds"), record.get("note", ""), radius_shown(one, record),
    ]  # fmt: skip
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A number with what a reader can use of it; None for one that JSON has not."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
