"""What the records of a task say together. Radii are in pixels on normalised images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from flowverify.ball import distance_name
from flowverify.bench.tasks import Record, Task
from flowverify.certifiers.ends import CLOSED, Ends, bracketed, count_closed, ends_of, median_text, upper_text

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
