"""What a report draws: charts of tasks as SVG, and their images, with what was found for them.

Charts are curves, boxes and times of tasks, on axes that may be shared. Radii for different ground costs, caps or data
sets are different numbers: each such threat has axes of its own. Charts have the colours of the page's style sheet; its
script makes them answer.

Images are shown as they are, and for as many results as a page can hold, with the adversarial image of an attack, or
the counterexample of a complete method, if the run has kept it; or else with the worst case of the ball to first order.
All of it is what the page's own script draws: images as they lie in their files, pixel by pixel, and arrows as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from flowverify.bench import sources
from flowverify.bench.sources import title_of
from flowverify.bench.statistics import FAILURES, TaskRecords, quantiles, radius_of
from flowverify.bench.tasks import Key, Record, Task, unpacked
from flowverify.curves import Curve, Run, curves_of
from flowverify.errors import DataError, FlowverifyError
from flowverify.figures import WorstCase, cases_of
from flowverify.figures.files import brighter, white_of, window
from flowverify.notebook import data_address
from flowverify.results import Certificate, Verdict

if TYPE_CHECKING:
    from flowverify.data import Dataset

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


COLOURS = 8  # of the style sheet
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 3 2 3 2 3", "1 5")
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 10, 52  # around what is drawn
TICKS = 6


class Plane:
    """Where numbers lie in a chart.

    Args:
        across, along: the largest number to the right; the least and the largest upwards.
        logarithmic: whether powers of ten are equally far apart upwards.
    """

    def __init__(self, across: float, along: tuple[float, float], *, logarithmic: bool = False) -> None:
        self.across = across or 1.0
        self.scale: Callable[[float], float] = math.log10 if logarithmic else float
        self.low, self.high = (self.scale(value) for value in along)

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / self.across, 2)

    def y(self, value: float) -> float:
        share = (self.scale(value) - self.low) / ((self.high - self.low) or 1.0)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 2)

    def frame(self, below: str, beside: str, rows: Sequence[tuple[float, str]]) -> list[str]:
        """Grid, numbers and what they are."""
        parts = ['<g class="grid" aria-hidden="true">']
        for value, text in rows:
            height = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
            parts.append(f'<text class="end" x="{LEFT - 6}" y="{height + 4}">{escape(text)}</text>')
        for value in steps(self.across):
            place = self.x(value)
            parts.append(f'<line x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="middle" x="{place}" y="{HEIGHT - BOTTOM + 18}">{value:.4g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="middle name" x="{middle}" y="{HEIGHT - 10}">{escape(below)}</text>')
        up = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text class="middle name" transform="translate(14 {up}) rotate(-90)">{escape(beside)}</text></g>'
        )
        return parts


def steps(largest: float, count: int = TICKS) -> list[float]:
    """Round numbers from 0 to the largest, about so many."""
    if largest <= 0:
        return [0.0]
    rough = largest / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [round(step * k, 12) for k in range(int(largest / step * (1 + 1e-9)) + 1)]


def svg(title: str, parts: Sequence[str], attributes: str = "") -> str:
    """A chart; what it shows is read out by its title."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" {attributes}>'
        f"{''.join(parts)}</svg>"
    )


def look(number: int) -> str:
    """The class and the dashes of a line; no two of the first 48 look the same."""
    dashes = DASHES[(number // COLOURS) % len(DASHES)]
    return f'class="line c{number % COLOURS}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def accuracy_chart(title: str, curves: Sequence[Curve], number: int) -> tuple[str, list[dict[str, Any]]]:
    """Curves with their bands, and what the script reads of them.

    Args:
        number: of the chart on its page.
    """
    plane = Plane(max((curve.radii[-1] for curve in curves), default=1.0) * 1.02, (0.0, 1.0))
    distance = title.partition(";")[0]
    parts = plane.frame(f"radius (pixels; {distance})", "share of images", [(k / 5, f"{20 * k}%") for k in range(6)])
    read = []
    for k, curve in enumerate(curves):
        low, high = curve.band()
        points = list(zip(curve.radii, curve.shares.tolist(), low.tolist(), high.tolist(), strict=True))
        if curve.steps and curve.at_most and curve.counts[-1]:  # nothing is known against these, however far
            points.append((plane.across, *points[-1][1:]))
        upper = _line(plane, [(radius, above) for radius, _, _, above in points], steps=curve.steps)
        lower = _line(plane, [(radius, below) for radius, _, below, _ in points], steps=curve.steps)
        band = "L".join(upper[1:].split("L") + lower[1:].split("L")[::-1])
        marks = "" if curve.steps else "".join(
            f'<circle class="mark c{k % COLOURS}" cx="{plane.x(radius)}" cy="{plane.y(share)}" r="3.5"/>'
            for radius, share, _, _ in points
        )  # fmt: skip
        line = _line(plane, [(radius, share) for radius, share, _, _ in points], steps=curve.steps)
        shown = f'<path class="band c{k % COLOURS}" d="M{band}Z"/><path {look(k)} d="{line}"/>{marks}'
        parts.append(f'<g data-curve="{k}">{shown}</g>')
        read.append(
            {"label": curve.label, "radii": [round(radius, 6) for radius in curve.radii], "counts": curve.counts,
             "images": curve.images, "steps": curve.steps, "open": bool(curve.at_most and curve.counts[-1])}
        )  # fmt: skip
    parts.append(
        f'<line class="cursor" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
    )
    about = f"Certified accuracy against radius, {title}; {len(curves)} curves. Left and right arrow keys read it out."
    given = f'tabindex="0" data-chart="{number}" data-across="{plane.across:.6g}"'
    return svg(about, parts, given), read


def _line(plane: Plane, points: Sequence[tuple[float, float]], *, steps: bool) -> str:
    found: list[tuple[float, float]] = []
    for radius, share in points:
        if steps and found:
            found.append((plane.x(radius), found[-1][1]))
        found.append((plane.x(radius), plane.y(share)))
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in found)


def time_chart(title: str, clouds: Sequence[Cloud]) -> str:
    """Seconds against radii; each point says both when it is pointed at."""
    seconds = [second for cloud in clouds for _, second in cloud.points]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    high += high == low
    across = max(radius for cloud in clouds for radius, _ in cloud.points) * 1.03
    plane = Plane(across, (10.0**low, 10.0**high), logarithmic=True)
    rows = [(10.0**power, f"{10.0**power:g} s") for power in range(low, high + 1)]
    parts = plane.frame(f"radius (pixels; {title.partition(';')[0]})", "seconds an image", rows)
    for k, cloud in enumerate(clouds):
        parts += [
            f'<circle class="mark c{k % COLOURS}" cx="{plane.x(radius)}" cy="{plane.y(second)}" r="3" '
            f'fill-opacity="0.65"><title>{escape(cloud.label)}: radius {radius:.4g}, {second:.3g} s</title></circle>'
            for radius, second in cloud.points
        ]
    return svg(f"Seconds an image against its radius, {title}", parts)


def box_chart(box: Box, across: float) -> str:
    """One line of a table of quantiles: whiskers from 5% to 95%, a box between the quartiles, the median in it."""
    low, first, middle, third, high = (round(100 * value / (across or 1.0), 2) for value in box.quantiles)
    return (
        '<svg class="box" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<line x1="{low}" x2="{high}" y1="6" y2="6"/>'
        f'<rect x="{first}" width="{max(0.4, third - first):g}" y="1.5" height="9"/>'
        f'<line class="median" x1="{middle}" x2="{middle}" y1="0" y2="12"/></svg>'
    )


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
