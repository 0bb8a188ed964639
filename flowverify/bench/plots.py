"""The pictures of a report, as SVG: certified accuracy, radii, time against radius; and worst cases, as PNG.

Radii for different ground costs, caps or data sets are different numbers: each such threat has axes of its own.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowverify.bench import sources
from flowverify.bench.statistics import FAILURES, TaskRecords, radius_of
from flowverify.curves import Curve, Run, curves_of, draw_curves, figure_of, style
from flowverify.figures import draw_worst_cases
from flowverify.results import Certificate, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURED = 3  # worst cases of each model
SHOWN_POINTS = 2000  # of a scatter plot, so that the page stays small


@dataclass(frozen=True)
class Cloud:
    """The points of one entry of a legend."""

    label: str
    points: Sequence[tuple[float, float]]


def certified_accuracy(tasks: Sequence[TaskRecords]) -> bytes | None:
    """The share of all images with a certificate at each radius; upper ends give shares that cannot be passed."""
    return _panels(accuracy_curves(tasks), draw_curves)


def accuracy_curves(tasks: Sequence[TaskRecords]) -> dict[str, list[Curve]]:
    """The curves of tasks (:func:`flowverify.curves.curves_of`) by the titles of their axes."""
    return {title: curves_of(map(_run, group)) for title, group in by_threat(tasks).items()}


def _run(one: TaskRecords) -> Run:
    name = one.task.name if one.searched else one.task.name.rpartition("/")[0]
    return Run(name, one.records, one.task.settings["radius"], one.task.kind == "attack", one.task.positions)


def radius_boxes(tasks: Sequence[TaskRecords]) -> bytes | None:
    """Median, quartiles, and 5% to 95% of the radii of each searching task, and of its upper ends."""

    def draw(axes: Axes, boxes: Sequence[tuple[str, list[float]]]) -> None:
        names, radii = zip(*reversed(boxes), strict=True)
        axes.boxplot(radii, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6)
        axes.set_yticks(range(1, len(names) + 1), names)
        axes.grid(axis="x", alpha=0.3)

    def boxes_of(group: Sequence[TaskRecords]) -> list[tuple[str, list[float]]]:
        boxes = []
        for one in group:
            if one.searched and one.task.kind == "certify":
                boxes.append((one.task.name, [ends.certified for ends in one.ends()]))
            if one.searched and (one.task.kind == "attack" or one.bracketed):
                upper = [ends.upper for ends in one.ends() if math.isfinite(ends.upper)]
                unknown = len(one.ends()) - len(upper)
                boxes.append((f"{one.task.name}: at most" + (f"\n(none for {unknown})" if unknown else ""), upper))
        return [(name, radii) for name, radii in boxes if radii]

    boxes = {title: boxes_of(group) for title, group in by_threat(tasks).items()}
    return _panels(boxes, draw, below="; box: quartiles, whiskers: 5% to 95%", height=0.9, each=0.42, legend=False)


def time_against_radius(tasks: Sequence[TaskRecords]) -> bytes | None:
    """Seconds of each image against its radius; images of one chunk share its time equally."""

    def draw(axes: Axes, clouds: Sequence[Cloud]) -> None:
        for number, cloud in enumerate(clouds):
            colour, _, marker = style(number)
            axes.plot(
                *zip(*cloud.points, strict=True), linestyle="", marker=marker, color=colour, markersize=3.5, alpha=0.6,
                label=cloud.label, rasterized=True,
            )  # fmt: skip
        axes.set(ylabel="seconds an image", yscale="log")
        axes.grid(alpha=0.3)

    def clouds_of(group: Sequence[TaskRecords]) -> list[Cloud]:
        clouds = []
        for one in group:
            if not one.searched:
                continue
            pairs = [(radius_of(one.task, r), r["seconds"]) for r in one.correct if r["verdict"] not in FAILURES]
            pairs = [(radius, seconds) for radius, seconds in pairs if math.isfinite(radius) and seconds > 0]
            pairs = pairs[:: max(1, math.ceil(len(pairs) * len(tasks) / SHOWN_POINTS))]
            if pairs:
                kind = ": at most" if one.task.kind == "attack" else ""
                clouds.append(Cloud(f"{one.task.name}{kind}", pairs))
        return clouds

    return _panels({title: clouds_of(group) for title, group in by_threat(tasks).items()}, draw)


def by_threat(tasks: Sequence[TaskRecords]) -> dict[str, list[TaskRecords]]:
    """Tasks that may share axes, by what their radii are: the distance, the cap, and the data set."""
    found: dict[tuple[str, str], list[TaskRecords]] = {}
    for one in tasks:
        if one.task.kind in ("certify", "attack"):
            found.setdefault((one.distance, sources.short_data(one.task.settings["data"])), []).append(one)
    return {f"{distance}; {data}": group for (distance, data), group in found.items()}


def gallery(one: TaskRecords) -> bytes:
    """Worst cases with flow arrows for the images of the smallest, median and largest radius; PNG.

    Raises:
        FlowverifyError: the model or the data set of the records is not there any more.
    """
    ordered = sorted(pictured(one), key=lambda record: (record["radius"], record["index"]))
    chosen = [ordered[round(k * (len(ordered) - 1) / (PICTURED - 1))] for k in range(PICTURED)]
    chosen = list({record["index"]: record for record in chosen}.values())
    sources.check_digest(one.task.settings)
    data = sources.dataset(one.task.settings["data"])
    certificates = [
        Certificate(
            verdict=Verdict(record["verdict"]),
            label=record["label"],
            prediction=record["prediction"],
            method=record["method"],
            bound=record["bound"],
            ground=record["ground"],
            radius=record["radius"],
            margin=record["margin"],
            seconds=record["seconds"],
            cap=record.get("cap"),
        )
        for record in chosen
    ]
    images = data.images[[record["index"] for record in chosen]]
    network = sources.network(one.task.settings["model"], data.input_shape)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "gallery.png"
        draw_worst_cases(network, images, certificates, path)
        return path.read_bytes()


def pictured(one: TaskRecords) -> list[dict[str, Any]]:
    """The records of a task that a gallery can show."""
    if one.task.kind != "certify":
        return []
    return [record for record in one.records if record["verdict"] == "certified" and record["radius"] > 0]


def _panels(drawn: Mapping[str, Sequence[Any]], draw: Callable[[Axes, Any], None], **layout: Any) -> bytes | None:
    """A figure of :func:`flowverify.curves.figure_of` as SVG."""
    figure = figure_of(drawn, draw, **layout)
    return None if figure is None else _svg(figure)


def _svg(figure: Figure) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "flowverify"}):  # the same records give the same page
        figure.savefig(buffer, format="svg", dpi=100, metadata={"Date": None})
    return buffer.getvalue()
