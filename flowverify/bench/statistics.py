"""What the records of a task say together. Radii are in pixels on normalised images.

A paper's numbers stand beside ours by which records a claim is about, and what is computed from them.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from flowverify.ball import distance_name
from flowverify.bench.tasks import Record, Task
from flowverify.certifiers.base import CLOSED, Ends, bracketed, count_closed, ends_of, median_text, upper_text
from flowverify.settings import OneOf, Settings, Text, expected, settings, wrong

FAILURES = ("error", "timeout")
ON_WORD = "on the verifier's word"  # the evidence of a record that an outside verifier answers for
CERTIFIED_ON_WORD = f"certified {ON_WORD}"


@dataclass(frozen=True)
class TaskRecords:
    """A task with what is there of its records."""

    task: Task
    records: list[Record]

    @property
    def searched(self) -> bool:
        """Whether each record has a radius of its own."""
        return self.task.kind in ("certify", "attack") and self.task.settings["radius"] is None

    @property
    def correct(self) -> list[Record]:
        """Those of images that are classified right, failures included."""
        return [record for record in self.records if record["verdict"] != "misclassified"]

    def radii(self) -> list[float]:
        """Radii of images classified right.

        For a certificate the largest certified radius, 0 for none, an error or a timeout. For an attack the least
        radius found, infinite for none.
        """
        return [radius_of(self.task, record) for record in self.correct]

    def ends(self) -> list[Ends]:
        """What is known from both sides of the radii of images classified right; attacks give the upper end only."""
        return [ends_of(record) for record in self.correct]

    @property
    def bracketed(self) -> bool:
        """Whether it certifies radii and gives upper ends too."""
        return self.task.kind == "certify" and self.searched and bracketed(self.ends())

    @property
    def distance(self) -> str:
        """Of which distance its radii are, and with which cap: "W1, l2"; "" where it has none."""
        return distance_of(self.task.settings)

    def median_text(self) -> str:
        """The median radius in words: both ends where both are known, with how many brackets are closed."""
        about = f"{self.distance}; over images classified right"
        if self.task.kind == "attack":
            return f"median radius {upper_text(self.ends())} ({about})"
        closed = f", {CLOSED}: {count_closed(self.ends())}" if self.bracketed else ""
        return median_text(self.ends(), about) + closed

    def seconds(self) -> list[float]:
        """Of the images that have a result."""
        return [record["seconds"] for record in self.records if record["verdict"] not in FAILURES]

    def counts(self) -> Counter[str]:
        """How many records have each verdict; what is certified on an outside verifier's word counts apart."""
        return Counter(
            CERTIFIED_ON_WORD if record.get("evidence") == ON_WORD else str(record["verdict"])
            for record in self.records
        )

    def share_certified(self) -> float:
        """Of all images, misclassified ones included: the certified accuracy, by what is proven here."""
        return self.counts()["certified"] / len(self.records) if self.records else math.nan

    def median_radius(self) -> float:
        return median(self.radii() or [math.nan])

    def mean_seconds(self) -> float:
        return mean(self.seconds() or [math.nan])

    def peak_memory(self) -> float | None:
        """MiB, of the largest job."""
        return max((one["peak_memory_mib"] for one in self.records if one.get("peak_memory_mib")), default=None)


def radius_of(task: Task, record: Record) -> float:
    """See :meth:`TaskRecords.radii`."""
    ends = ends_of(record)
    return ends.upper if task.kind == "attack" else ends.certified


def distance_of(settings: Mapping[str, Any]) -> str:
    """See :attr:`TaskRecords.distance`."""
    ground = settings.get("ground")
    return "" if ground is None else distance_name(ground, settings.get("cap"))


def by_task(tasks: Iterable[Task], records: Iterable[Record]) -> list[TaskRecords]:
    """The records of each task."""
    found: dict[str, tuple[Task, list[Record]]] = {task.name: (task, []) for task in tasks}
    for record in records:
        found[record["task"]][1].append(record)
    return [TaskRecords(task, own) for task, own in found.values()]


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation; infinite values count as the largest."""
    ordered = sorted(values)
    if not ordered:
        return [math.nan] * len(shares)
    result = []
    for share in shares:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high, weight = min(low + 1, len(ordered) - 1), place - low
        result.append(ordered[low] if weight == 0 else ordered[low] + weight * (ordered[high] - ordered[low]))
    return result


def _ratio(first: float, second: float) -> float:
    return first / second if second and math.isfinite(second) else math.nan


def _paired(of: TaskRecords, over: TaskRecords) -> list[tuple[float, float]]:
    """Radii of the images that both classify right, and on which no attack failed."""
    known = {record["index"]: record for record in over.correct}
    pairs = [
        (radius_of(of.task, record), radius_of(over.task, known[record["index"]]))
        for record in of.correct
        if record["index"] in known
    ]
    return [(first, second) for first, second in pairs if math.isfinite(first) and math.isfinite(second)]


def _paired_ratios(of: TaskRecords, over: TaskRecords) -> list[float]:
    return [_ratio(first, second) for first, second in _paired(of, over) if second > 0]


ONE: dict[str, Callable[[TaskRecords], float]] = {
    "median radius": TaskRecords.median_radius,
    "mean radius": lambda of: mean([one for one in of.radii() if math.isfinite(one)] or [math.nan]),
    "certified accuracy": TaskRecords.share_certified,
    "seconds an image": TaskRecords.mean_seconds,
}
TWO: dict[str, Callable[[TaskRecords, TaskRecords], float]] = {
    "ratio of median radii": lambda of, over: _ratio(of.median_radius(), over.median_radius()),
    "ratio of mean radii": lambda of, over: _ratio(
        sum(first for first, _ in _paired(of, over)), sum(second for _, second in _paired(of, over))
    ),
    "median ratio of radii": lambda of, over: median(_paired_ratios(of, over) or [math.nan]),
    "largest ratio of radii": lambda of, over: max(_paired_ratios(of, over), default=math.nan),
    "ratio of seconds": lambda of, over: _ratio(of.mean_seconds(), over.mean_seconds()),
    "share of radii not below": lambda of, over: mean(
        [float(first >= second) for first, second in _paired(of, over)] or [math.nan]
    ),
}
PAIRED = ("ratio of mean radii", "median ratio of radii", "largest ratio of radii", "share of radii not below")
NUMBER = "median radius over number"
MEASURES = (*ONE, *TWO, NUMBER)


@settings
class Comparison(Settings):
    """A paper's number beside ours."""

    claim: Text = Field(description="What is claimed.")
    source: Text = Field(description="Where.")
    paper: Annotated[
        str,
        expected("text or a number"),
        BeforeValidator(
            lambda value: str(value) if type(value) in (int, float) else value, json_schema_input_type=str | int | float
        ),
    ] = Field(description="The number.")
    measure: Annotated[str, OneOf(MEASURES)] = Field(description=f"{', '.join(MEASURES)}.")
    of: Text = Field(description="The name of the task that is measured, with * for any text.")
    over: str | float | None = Field(
        None, description=f"What it is compared with: a task, a number for {NUMBER!r}, nothing for a single task."
    )


def resolved(comparison: Comparison, tasks: Sequence[Task]) -> Comparison:
    """The comparison with the names of its tasks in place of their patterns.

    Raises:
        SettingError: a pattern that does not fit one task, or ``over`` is not what the measure needs.
    """
    over = comparison.over
    if comparison.measure in TWO:
        if not isinstance(over, str):
            raise wrong("over", over, "the name of a task")
        over = _task("over", over, tasks)
    elif comparison.measure == NUMBER:
        if not isinstance(over, float) or not 0 < over < math.inf:
            raise wrong("over", over, "a number > 0")
    elif over is not None:
        raise wrong("over", over, f"nothing for the measure {comparison.measure!r}")
    return replace(comparison, of=_task("of", comparison.of, tasks), over=over)


def measured(comparison: Comparison, tasks: Mapping[str, TaskRecords]) -> float:
    """Our number beside the paper's; NaN as long as records are missing for it."""
    of = tasks[comparison.of]
    if not of.records:
        return math.nan
    if comparison.measure == NUMBER:
        return _ratio(of.median_radius(), float(comparison.over or math.nan))
    if comparison.measure in ONE:
        return ONE[comparison.measure](of)
    over = tasks[str(comparison.over)]
    return TWO[comparison.measure](of, over) if over.records else math.nan


def evidence(comparison: Comparison, tasks: Mapping[str, TaskRecords]) -> str:
    """What our number is about: certified radii or those of attacks, both ends where there are two, which distances."""
    if "radi" not in comparison.measure:
        return ""
    named = [comparison.of] if not isinstance(comparison.over, str) else [comparison.of, comparison.over]
    involved = [tasks[name] for name in named if tasks[name].records]
    parts = []
    for one in involved:
        kind = "of attacks" if one.task.kind == "attack" else "certified"
        parts.append(one.median_text() if one.bracketed else f"{kind} ({one.distance})")
    text = " over ".join(parts if len(set(parts)) > 1 else parts[:1])
    if comparison.measure in PAIRED and len(involved) == 2:
        text += f"; {len(_paired(*involved))} images"
    return text


def _task(key: str, pattern: str, tasks: Sequence[Task]) -> str:
    found = [task.name for task in tasks if fnmatch.fnmatchcase(task.name, pattern)]
    if len(found) != 1:
        names = ", ".join(found or [task.name for task in tasks])
        raise wrong(key, pattern, f"the name of one task, it fits {len(found)}: {names}")
    return found[0]
