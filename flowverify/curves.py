"""Certified accuracy against radius, and what bounds it from above: curves of any records, on matplotlib axes.

A search gives a radius for each image: the share of images that are certified falls by steps, one at each of them.
Where radii are given, each is a point. Attacks, and the counterexamples of complete methods, give shares that cannot be
passed ("at most"): those of images that were not refuted. Each share is one of the images that were looked at; its band
is where the share of all images like them lies with a confidence of 95% (Clopper and Pearson 1934, at each radius by
itself), if they were drawn at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowverify.attack.base import AttackResult
from flowverify.ball import Threat
from flowverify.certifiers.base import Ends, bracketed, ends_of
from flowverify.errors import DataError, FlowverifyError, InvalidInputError
from flowverify.figures import require_matplotlib
from flowverify.results import Certificate, Verdict
from flowverify.smoothing.noise import upper_bound_of_failure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
COLOURS = 10
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
MARKERS = ("o", "s", "^", "D", "v", "*")
NEEDED = ("verdict", "ground", "radius")  # of a record that a curve can be made of
FIRST = ("model", "method", "bound", "alpha", "attack")  # what a curve is called by
SETTINGS = (  # what tells curves of one name apart
    "engine", "references", "binarise", "sigma", "step", "block", "n", "n0", "seed", "options", "sha256",
    "asked",
)  # fmt: skip
AXES = ("dataset", "split", "target", "ground", "cap")  # what shares no axes


def style(number: int) -> tuple[str, Any, str]:
    """Colour, dash and marker of a curve; no two of the first 60 have the same, whether dashed or marked."""
    turn = (number // COLOURS) % len(DASHES)
    return f"C{number % COLOURS}", DASHES[turn], MARKERS[turn]


@dataclass(frozen=True)
class Curve:
    """How many of some images are certified at each radius; for ``at_most``, how many are not refuted.

    Attributes:
        label: for the legend.
        radii: in pixels, ascending.
        counts: from each radius on until the next with ``steps``, else at each radius alone.
        images: of how many.
        number: of its style; None for its place on its axes.
    """

    label: str
    radii: tuple[float, ...]
    counts: tuple[int, ...]
    images: int
    steps: bool = True
    at_most: bool = False
    number: int | None = None

    @property
    def shares(self) -> Floats:
        return np.asarray(self.counts, dtype=np.float64) / self.images

    def band(self, confidence: float = CONFIDENCE) -> tuple[Floats, Floats]:
        """Clopper-Pearson bounds of the share of all images, from below and above, at each radius by itself."""
        counts, tail = np.asarray(self.counts, dtype=np.float64), (1 - confidence) / 2
        return (
            1.0 - upper_bound_of_failure(counts, self.images, tail),
            np.asarray(upper_bound_of_failure(self.images - counts, self.images, tail)),
        )


def steps_of(label: str, radii: Iterable[float], images: int, *, at_most: bool = False) -> Curve:
    """The curve of a search.

    Args:
        radii: of the images that are classified right; infinite ones stay to the end.
        images: those that are misclassified too.
    """
    known = sorted(radii)
    finite = [one for one in known if math.isfinite(one)]
    counts = range(len(known), len(known) - len(finite) - 1, -1)
    return Curve(label, (0.0, *finite), tuple(counts), images, at_most=at_most)


@dataclass(frozen=True)
class Run:
    """The records of one way of treating one model, over some images.

    Attributes:
        name: of its curve; with a radius, of the curve that it is a point of.
        radius: that was asked about; None for a search.
        attacks: whether it looked for counterexamples alone.
        images: what tells runs over other images apart.
    """

    name: str
    records: Sequence[Record]
    radius: float | None
    attacks: bool
    images: tuple[int, ...] = ()

    def ends(self) -> list[Ends]:
        """Of the images that are classified right."""
        return [ends_of(one) for one in self.records if one["verdict"] != Verdict.MISCLASSIFIED]

    def count(self, *verdicts: Verdict) -> int:
        return sum(one["verdict"] in verdicts for one in self.records)


def curves_of(runs: Iterable[Run]) -> list[Curve]:
    """The curves of runs that share a threat: of what is certified, and of what is known from above."""
    curves: list[Curve] = []
    decided: dict[tuple[str, tuple[int, ...], bool], list[Run]] = {}
    for one in runs:
        if not one.records:
            continue
        label = _images(len(one.records))
        if one.radius is not None:
            decided.setdefault((one.name, one.images, one.attacks), []).append(one)
            continue
        if not one.attacks:
            curves.append(steps_of(f"{one.name} {label}", [end.certified for end in one.ends()], len(one.records)))
        if one.attacks or bracketed(one.ends()):
            upper = [end.upper for end in one.ends()]
            curves.append(steps_of(f"{one.name}: at most {label}", upper, len(one.records), at_most=True))
    for (name, _, attacks), group in decided.items():
        points = sorted(group, key=lambda one: one.radius or 0.0)
        images = len(points[0].records)
        radii = tuple(float(one.radius or 0.0) for one in points)
        label, name = _images(images), f"{name}, decided"
        if not attacks:
            certified = tuple(one.count(Verdict.CERTIFIED) for one in points)
            curves.append(Curve(f"{name} {label}", radii, certified, images, steps=False))
        if attacks or any(one.count(Verdict.FALSIFIED) for one in points):
            left = tuple(images - one.count(Verdict.FALSIFIED, Verdict.MISCLASSIFIED) for one in points)
            curves.append(Curve(f"{name}: at most {label}", radii, left, images, steps=False, at_most=True))
    return curves


def alike(panels: Mapping[str, Sequence[Curve]]) -> dict[str, list[Curve]]:
    """The curves of several axes, with one style for those that are called the same on each."""
    styles: dict[tuple[str, int], int] = {}
    found: dict[str, list[Curve]] = {}
    for title, curves in panels.items():
        seen: Counter[str] = Counter()
        for curve in curves:
            number = styles.setdefault((curve.label, seen[curve.label]), len(styles))
            found.setdefault(title, []).append(replace(curve, number=number))
            seen[curve.label] += 1
    return found


def _images(count: int) -> str:
    return f"({count} image{'s' * (count != 1)})"


def draw_curves(axes: Axes, curves: Sequence[Curve], confidence: float | None = CONFIDENCE) -> None:
    """Draws curves with their bands, in colours and dashes of their own; legends are left to the caller.

    Args:
        confidence: of the bands; without it there are none.
    """
    from matplotlib.ticker import PercentFormatter

    end = max((curve.radii[-1] for curve in curves), default=0.0)
    for place, curve in enumerate(curves):
        radii, counts = curve.radii, curve.counts
        if curve.steps and curve.at_most and counts[-1]:  # nothing is known against these, however far
            radii, counts = (*radii, max(end, radii[-1])), (*counts, counts[-1])
        whole = Curve(curve.label, radii, counts, curve.images)
        colour, dash, _ = style(place if curve.number is None else curve.number)
        if curve.steps:
            axes.step(radii, whole.shares, where="post", color=colour, linestyle=dash, label=curve.label)
        else:
            axes.plot(radii, whole.shares, marker="o", color=colour, linestyle=dash, label=curve.label)
        if confidence is not None:
            low, high = whole.band(confidence)
            step = "post" if curve.steps else None
            axes.fill_between(radii, low, high, step=step, color=colour, alpha=0.1, linewidth=0)  # type: ignore[arg-type]
    bands = "" if confidence is None else f"\nbands: {100 * confidence:.4g}%, Clopper-Pearson"
    axes.set(ylabel=f'images certified ("at most": not refuted){bands}', ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)


def figure_of(
    drawn: Mapping[str, Sequence[Any]],
    draw: Callable[[Axes, Any], None],
    *,
    below: str = "",
    height: float = 4.2,
    each: float = 0.16,
    legend: bool = True,
) -> Figure | None:
    """Axes one above the other, for each title with anything to draw; None for none.

    Args:
        drawn: what is drawn on the axes of each title, which begins with the distance that its radii are.
        below: what the label of the radii says besides their distance.
        height, each: of axes, and of each thing on them, in inches.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {title: things for title, things in drawn.items() if things}
    if not shown:
        return None
    heights = [height + each * len(things) for things in shown.values()]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, things) in zip(parts, shown.items(), strict=True):
        axes = part.subplots()
        draw(axes, things)
        _label(axes, title, below)
        if legend:
            part.legend(loc="outside lower center", fontsize=8, frameon=False)
    return figure


def _label(axes: Axes, title: str, below: str = "") -> None:
    axes.set(title=title, xlabel=f"radius (pixels; {title.partition(';')[0]}){below}")
    axes.set_xlim(left=0)


def grouped(records: Iterable[Record]) -> dict[str, list[Run]]:
    """Records by the title of the axes that they share: one ground cost, cap, data set and target.

    They are those that ``--save`` and ``--json`` write. A record that was made again replaces the one before.

    Raises:
        DataError: something else, such as a prediction, which has no radius.
    """
    found: dict[str, dict[str, dict[Any, Record]]] = {}
    settings: dict[str, Record] = {}
    titles: dict[str, str] = {}
    for number, one in enumerate(records):
        record = _checked(one)
        own = {key: record.get(key) for key in (*AXES, *FIRST, *SETTINGS)}
        key = repr(sorted(own.items()))
        if key not in settings:
            settings[key], titles[key] = own, _title(record)
        found.setdefault(titles[key], {}).setdefault(key, {})[record.get("index", f"row {number}")] = record
    result: dict[str, list[Run]] = {}
    for title, groups in found.items():
        names = _names([settings[key] for key in groups])
        result[title] = [
            Run(
                name,
                list(by_index.values()),
                _number(settings[key]["asked"]),
                settings[key]["attack"] is not None,
                tuple(sorted(index for index in by_index if isinstance(index, int))),
            )
            for name, (key, by_index) in zip(names, groups.items(), strict=True)
        ]
    return result


def _checked(one: object) -> Record:
    """A record with the upper end that it gives in ``upper_radius``, as certificates have it."""
    if not isinstance(one, Mapping) or any(key not in one for key in NEEDED):
        given = ", ".join(map(str, one)) if isinstance(one, Mapping) else type(one).__name__
        raise DataError(f"record of {given or 'nothing'}: expected one of a certificate or an attack, with a radius")
    record = dict(one)
    if record["verdict"] not in list(Verdict):
        raise DataError(f"record with the verdict {record['verdict']!r}: expected one of {', '.join(Verdict)}")
    try:
        if record.get("attack") is not None:
            record |= {"upper_radius": record["radius"], "radius": None}
        for key in ("radius", "upper_radius"):
            if record.get(key) is not None and not float(record[key]) >= 0:
                raise ValueError(f"{key} {record[key]!r}")
        Threat(record["ground"], record.get("cap"))
    except (TypeError, ValueError, FlowverifyError) as error:
        raise DataError(
            f"record of image {record.get('index', '?')}: {error}, expected one as --save writes"
        ) from error
    return record


def _title(record: Record) -> str:
    data = " ".join(str(record[key]) for key in ("dataset", "split") if record.get(key) is not None)
    target = "" if record.get("target") is None else f"target {record['target']}"
    return "; ".join(filter(None, [Threat(record["ground"], record.get("cap")).name, data, target]))


def _number(asked: object) -> float | None:
    return float(asked) if isinstance(asked, int | float) else None


def _names(settings: Sequence[Record]) -> list[str]:
    """What each curve is called: model and method, and of what else there is whatever tells it from the others."""
    own = [
        {key: one.get(key) for key in SETTINGS if key != "asked" or _number(one["asked"]) is None} for one in settings
    ]
    first = [", ".join(_word(key, one[key]) for key in FIRST if one.get(key)) or "records" for one in settings]
    names = []
    for name, one in zip(first, own, strict=True):
        others = [other for other_name, other in zip(first, own, strict=True) if other_name == name]
        more = [
            _word(key, value)
            for key, value in one.items()
            if value not in (None, {}) and any(other.get(key) != value for other in others)
        ]
        names.append(", ".join([name, *more]))
    return names


def _word(key: str, value: Any) -> str:
    if key == "model":
        return Path(str(value)).name
    if key in ("method", "bound"):
        return str(value)
    if key == "sha256":
        return f"file {str(value)[:8]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


Records = Sequence[Record | Certificate] | AttackResult


def plot_curve(
    records: Records | Mapping[str, Records],
    ax: Axes | None = None,
    *,
    label: str = "",
    confidence: float | None = CONFIDENCE,
) -> Axes:
    """Draws certified accuracy against radius on matplotlib axes, with a legend.

    Args:
        records: certificates of one search over some images, the result of an attack, or records as ``--save`` writes
            them; or several of these by the names of their curves.
        ax: without it, the axes of a new figure of pyplot.
        label: the name of the curve, for the legend.
        confidence: of the bands; None for no bands.

    Returns:
        The axes that were drawn on.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: no record; radii of several ground costs, caps or data sets, which share no axes; or a
            confidence outside of (0, 1).
        DataError: something else than records.
    """
    require_matplotlib()
    if confidence is not None and not 0 < confidence < 1:
        raise InvalidInputError(f"confidence {confidence!r}: expected a number between 0 and 1, or None")
    named = dict(records) if isinstance(records, Mapping) else {label: records}
    titles: dict[str, list[Run]] = {}
    for name, one in named.items():
        for title, runs in grouped(_plain(one)).items():
            titles.setdefault(title, []).extend(
                Run(", ".join(filter(None, [name, run.name if len(runs) > 1 or not name else ""])), run.records,
                    run.radius, run.attacks, run.images)
                for run in runs
            )  # fmt: skip
    if not titles:
        raise InvalidInputError("records: given none, expected at least one")
    if len(titles) > 1:
        raise InvalidInputError(f"records of {' and of '.join(titles)}: expected one of these for the same axes")
    ((title, runs),) = titles.items()
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(layout="constrained")[1]
    draw_curves(ax, curves_of(runs), confidence)
    _label(ax, title)
    ax.legend(fontsize=8)
    return ax


def _plain(records: Records) -> list[Record]:
    if isinstance(records, AttackResult):
        return [records.to_json(row) for row in range(len(records))]
    return [one.to_json() if isinstance(one, Certificate) else one for one in records]
