"""The tables of a report: as rows, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowverify.bench.comparisons import Comparison, evidence, measured
from flowverify.bench.statistics import CERTIFIED_ON_WORD, TaskRecords, quantiles
from flowverify.bench.tasks import Record
from flowverify.certifiers.ends import CLOSED, count_closed, median_upper

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
