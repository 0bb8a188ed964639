"""The images of a report: each as it is, and for as many results as a page can hold, what was found for it.

That is the adversarial image of an attack, or the counterexample of a complete method, if the run has kept it; or else
the worst case of its ball to first order.

All of it is what the page's own script draws: images as they lie in their files, pixel by pixel, and arrows as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flowverify.bench import sources
from flowverify.bench.statistics import TaskRecords
from flowverify.bench.tasks import Key, Record, Task, unpacked
from flowverify.errors import DataError, FlowverifyError
from flowverify.figures import WorstCase, cases_of
from flowverify.figures.files import brighter, white_of, window
from flowverify.notebook import data_address
from flowverify.results import Certificate, Verdict

if TYPE_CHECKING:
    from flowverify.data import Dataset

MOST_CASES = 1000  # worst cases of a page
MOST_BYTES = 2_500_000  # of its images, and as many of its worst cases
ARROWS = 150  # of one worst case, the largest
TIE = 1e-6  # relative: counterexamples lie next to ties, and other batches round otherwise
DIRECTIONS = {(1, 0): 0, (0, 1): 1, (-1, 0): 2, (0, -1): 3}


@dataclass
class Pictures:
    """What a page shows of its images.

    Attributes:
        images: by data set and position, as addresses.
        cases: by the number of a task and the position of an image.
        wanted: how many results have a case.
        failures: why there are none, by data set or model.
    """

    images: dict[str, dict[int, str]] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    wanted: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def radius_shown(one: TaskRecords, record: Record) -> float | None:
    """The radius of the ball whose worst case is shown where nothing was found; None where there is nothing to see."""
    if one.task.kind not in ("certify", "attack") or record["verdict"] in ("misclassified", "error"):
        return None
    radius = record.get("radius") or one.task.settings.get("radius") or record.get("upper_radius")
    return float(radius) if radius and math.isfinite(radius) else None


def pictures(
    tasks: Sequence[TaskRecords],
    witnesses: Mapping[Key, str],
    most: int = MOST_CASES,
    most_bytes: int = MOST_BYTES,
) -> Pictures:
    """The images of all tasks, and the cases of the first images of every task: as many as there is room for.

    A model or a data set that is not there any more leaves its pictures out.

    Args:
        witnesses: the images that were found, by task and position, packed.
    """
    found, room = Pictures(), most_bytes
    data: dict[str, Dataset] = {}
    for one in tasks:
        if one.task.kind not in ("certify", "attack"):
            continue
        key = sources.short_data(one.task.settings["data"])
        try:
            if key not in data and key not in found.failures:
                data[key] = sources.dataset(one.task.settings["data"])
        except FlowverifyError as error:
            found.failures[key] = str(error)
        shown = found.images.setdefault(key, {})
        for record in one.records if key in data else []:
            place = record["index"]
            if place not in shown and room > 0:
                image = data[key].images[place].double()
                shown[place] = data_address(image.numpy(), white_of(image))
                room -= len(shown[place])
    _draw_cases(found, tasks, witnesses, data, most, most_bytes)
    return found


def _draw_cases(
    found: Pictures,
    tasks: Sequence[TaskRecords],
    witnesses: Mapping[Key, str],
    data: dict[str, Dataset],
    most: int,
    room: int,
) -> None:
    chosen: dict[int, list[tuple[Record, float]]] = {}
    for number, record, radius in _in_turn(tasks):
        found.wanted += 1
        if found.wanted <= most:
            chosen.setdefault(number, []).append((record, radius))
    for number, pairs in chosen.items():
        task = tasks[number].task
        key, model = sources.short_data(task.settings["data"]), sources.short(task.settings["model"])
        if key not in data or model in found.failures:
            continue
        try:
            sources.check_digest(task.settings)
            network = sources.network(task.settings["model"], data[key].input_shape)
            certificates = [_certificate(task, *pair, witnesses) for pair in pairs]
            images = data[key].images[[record["index"] for record, _ in pairs]]
            cases = cases_of(network, images, certificates)
            _check(cases, pairs)
        except FlowverifyError as error:  # the records may have come from elsewhere, without model and data
            found.failures[model] = str(error)
            continue
        for (record, _), case in zip(pairs, cases, strict=True):
            entry = case_entry(case, str(task.settings.get("attack") or task.settings.get("method")))
            room -= len(entry["other"]) + 12 * len(entry["arrows"])
            if room > 0:
                found.cases[f"{number}/{record['index']}"] = entry


def _in_turn(tasks: Sequence[TaskRecords]) -> Iterator[tuple[int, Record, float]]:
    """The first result of every task, the second of every task, and so on, of those that have a worst case."""
    lists = [sorted(one.records, key=lambda record: record["index"]) for one in tasks]
    for rank in range(max(map(len, lists), default=0)):
        for number, (one, records) in enumerate(zip(tasks, lists, strict=True)):
            if rank < len(records) and (radius := radius_shown(one, records[rank])) is not None:
                yield number, records[rank], radius


def _certificate(task: Task, record: Record, radius: float, witnesses: Mapping[Key, str]) -> Certificate:
    """What a picture is drawn of: the image that was found, or without one the ball of a radius."""
    text = witnesses.get((task.name, record["index"]))
    return Certificate(
        Verdict.UNKNOWN if text is None else Verdict.FALSIFIED, record["label"], None, "", "",
        task.settings["ground"], radius, None, 0.0, cap=task.settings.get("cap"),
        witness=None if text is None else torch.from_numpy(unpacked(text)),
    )  # fmt: skip


def _check(cases: Sequence[WorstCase], pairs: Sequence[tuple[Record, float]]) -> None:
    """Raises DataError: an image that was kept as a counterexample is none."""
    for case, (record, _) in zip(cases, pairs, strict=True):
        if case.counterexample and case.margins[1] > TIE * (1 + abs(case.margins[0])):
            raise DataError(
                f"image kept for {record['task']}, image {record['index']}: is classified as {case.label}, expected "
                "a counterexample"
            )


def case_entry(case: WorstCase, by: str) -> dict[str, Any]:
    """A case as plain JSON values: its image, the arrows of the flow, and what its captions say.

    Args:
        by: what found it, if it is a counterexample.
    """
    change, white = case.change, white_of(case.image)
    colours = case.image.shape[0] == 3
    arrows = change.arrows(by_channel=colours, most=ARROWS)
    left, top, right, bottom = window(change)
    strongest = arrows[0].amount if arrows else 1.0
    return {
        "other": data_address(case.worst.numpy(), white),
        "size": [case.image.shape[-1], case.image.shape[-2]],
        "view": [left, top, right - left + 1, bottom - top + 1],
        "arrows": [
            [
                *arrow.start,
                DIRECTIONS[arrow.end[0] - arrow.start[0], arrow.end[1] - arrow.start[1]],
                round(math.sqrt(arrow.amount / strongest), 2),
                arrow.channel if colours else -1,
            ]
            for arrow in arrows
        ],
        "all": len(change.arrows(by_channel=colours, most=10**9)),
        "by": by if case.counterexample else "",
        "rival": case.rival,
        "predicted": case.predicted,
        "margins": [float(f"{margin:.5g}") for margin in case.margins],
        "distance": round(case.distance, 5),
        "exact": case.exact,
        "above": brighter(case.worst, white).replace("orange", "shown as white").replace("clipped", "shown as white"),
    }
