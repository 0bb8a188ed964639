"""What the pictures of a report show: curves, boxes and times of tasks, on axes that may be shared.

Radii for different ground costs, caps or data sets are different numbers: each such threat has axes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowverify.bench import sources
from flowverify.bench.names import title_of
from flowverify.bench.statistics import FAILURES, TaskRecords, quantiles, radius_of
from flowverify.curves import Curve, Run, curves_of

SHOWN_POINTS = 2000  # of a scatter plot, so that the page stays small


@dataclass(frozen=True)
class Cloud:
    """The points of one entry of a legend: radius and seconds of images."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Box:
    """Of some radii the quantiles at 5%, 25%, 50%, 75% and 95%; ``missing`` images have none."""

    label: str
    quantiles: tuple[float, float, float, float, float]
    missing: int = 0


def accuracy_curves(tasks: Sequence[TaskRecords]) -> dict[str, list[Curve]]:
    """The curves of tasks (:func:`flowverify.curves.curves_of`) by the titles of their axes."""
    return {title: curves_of(map(_run, group)) for title, group in by_threat(tasks).items()}


def _run(one: TaskRecords) -> Run:
    name = title_of(one.task, radius=False)
    return Run(name, one.records, one.task.settings["radius"], one.task.kind == "attack", one.task.positions)


def radius_boxes(tasks: Sequence[TaskRecords]) -> dict[str, list[Box]]:
    """Where the radii of each searching task lie, and its upper ends, by the titles of their axes."""

    def boxes_of(group: Sequence[TaskRecords]) -> list[Box]:
        boxes = []
        for one in group:
            name = title_of(one.task, radius=False)
            if one.searched and one.task.kind == "certify":
                boxes += _box(name, [ends.certified for ends in one.ends()])
            if one.searched and (one.task.kind == "attack" or one.bracketed):
                boxes += _box(f"{name}: at most", [ends.upper for ends in one.ends()])
        return boxes

    return {title: boxes_of(group) for title, group in by_threat(tasks).items()}


def _box(label: str, radii: Sequence[float]) -> list[Box]:
    known = [radius for radius in radii if math.isfinite(radius)]
    if not known:
        return []
    low, first, middle, third, high = quantiles(known, (0.05, 0.25, 0.5, 0.75, 0.95))
    return [Box(label, (low, first, middle, third, high), len(radii) - len(known))]


def measured_alone(one: TaskRecords) -> bool:
    """Whether the images of a task were timed one by one: images that are computed together share their time."""
    places = {record["index"]: record["seconds"] for record in one.correct if record["seconds"] > 0}
    for job in one.task.jobs():
        times = [places[position] for position in job.positions if position in places]
        if len(times) > 1 and len(set(times)) < len(times):
            return False
    return True


def times_against_radii(tasks: Sequence[TaskRecords]) -> dict[str, list[Cloud]]:
    """Seconds of each image against its radius, of tasks whose images were timed one by one."""

    def clouds_of(group: Sequence[TaskRecords]) -> list[Cloud]:
        clouds = []
        for one in group:
            if not one.searched or not measured_alone(one):
                continue
            pairs = [(radius_of(one.task, r), r["seconds"]) for r in one.correct if r["verdict"] not in FAILURES]
            pairs = [(radius, seconds) for radius, seconds in pairs if math.isfinite(radius) and seconds > 0]
            pairs = pairs[:: max(1, math.ceil(len(pairs) * len(tasks) / SHOWN_POINTS))]
            if pairs:
                kind = ": at most" if one.task.kind == "attack" else ""
                clouds.append(Cloud(f"{title_of(one.task, radius=False)}{kind}", pairs))
        return clouds

    return {title: clouds_of(group) for title, group in by_threat(tasks).items()}


def by_threat(tasks: Sequence[TaskRecords]) -> dict[str, list[TaskRecords]]:
    """Tasks that may share axes, by what their radii are: the distance, the cap, and the data set."""
    found: dict[tuple[str, str], list[TaskRecords]] = {}
    for one in tasks:
        if one.task.kind in ("certify", "attack"):
            found.setdefault((one.distance, sources.short_data(one.task.settings["data"])), []).append(one)
    return {f"{distance}; {data}": group for (distance, data), group in found.items()}
