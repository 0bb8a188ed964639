"""Pictures as files, still or moving, and on the axes of a notebook.

Each part is drawn on matplotlib axes of its own: an image, the flow between two, margins along the way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.ball import check_images, distance_name
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.figures.cases import Change, WorstCase, cases_of, in_double
from flowverify.network import Network, load_network
from flowverify.results import Certificate, Verdict
from flowverify.transport.distance import EXACT_MASS_TOLERANCE
from flowverify.transport.references import minimal_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ABOVE = "#f4a261"  # pixels of a grey image above white
CHANNELS = (("red", "#b5121b"), ("green", "#1a7f37"), ("blue", "#1f4fd8"))
INK = "#111111"  # arrows of grey images
LEAST_WINDOW = 10  # pixels that a view of the flow shows at least
AROUND = 2  # pixels beside those whose mass moves
LENGTH = 0.84  # of an arrow, of the way between two pixels
FINEST = 34  # where a view has more pixels across than this, arrows grow beyond a pixel, to stay visible
SHAFT = (0.07, 0.15)  # half of its width, for the least and the largest flow
ASIDE = 0.32  # of a pixel: how far apart the arrows of several channels are on one edge
OUTLINED = 16  # pixels: on a coarser grid the outline of an image says less than its pixels do
FONT = 9.5


def show_image(axes: Axes, image: Tensor, white: float) -> Any:
    """An image (C, H, W); what is brighter than ``white`` is marked on grey images and clipped on colour images.

    Returns what a colour bar is made of; None for colour images.
    """
    _bare(axes)
    if image.shape[0] == 3:
        axes.imshow((image / white).clamp(0, 1).permute(1, 2, 0).numpy())
        return None
    import matplotlib

    grey = matplotlib.colormaps["gray"].with_extremes(over=ABOVE)
    return axes.imshow(image.sum(0).numpy(), cmap=grey, vmin=0, vmax=white * (1 + 1e-9))


def white_of(image: Tensor) -> float:
    """What is white in a picture: the brightest pixel of the original, whatever the other image has."""
    shown = image if image.shape[0] == 3 else image.sum(0)
    return max(float(shown.max()), 1e-12)


def brighter(image: Tensor, white: float) -> str:
    """How many pixels are brighter than white, and up to what."""
    shown = image if image.shape[0] == 3 else image.sum(0)
    above = shown > white * (1 + 1e-9)
    count = int(above.any(0).sum() if image.shape[0] == 3 else above.sum())
    if not count:
        return ""
    how = "clipped" if image.shape[0] == 3 else "orange"
    return f"{count} pixel{'s' if count > 1 else ''} above white, up to {float(shown.max()) / white:.1f} x ({how})"


def show_flow(axes: Axes, change: Change) -> tuple[Any, str]:
    """The change in colours under an arrow for each edge that mass flows along, where any mass moves.

    For colour images, the arrows have the colours of their channels, over the image in pale grey.

    Returns:
        What a colour bar of the change is made of, or None; and what the arrows leave out, or "".
    """
    _bare(axes)
    image, colours = change.image, change.image.shape[0] == 3
    ink = image.sum(0)
    if colours:
        pale = (ink / max(float(ink.max()), 1e-12)).numpy()
        shown = None
        axes.imshow(pale, cmap="gray", vmin=-4, vmax=1.2)
    else:
        changed = (change.other - image).sum(0)
        largest = max(float(changed.abs().max()), 1e-12)
        shown = axes.imshow(changed.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=0.6)
        if min(ink.shape) >= OUTLINED:
            axes.contour(ink.numpy(), levels=[0.3 * float(ink.max())], colors="0.5", linewidths=1)
    left, top, right, bottom = window(change)
    axes.set_xlim(left - 0.5, right + 0.5)
    axes.set_ylim(bottom + 0.5, top - 0.5)
    arrows = change.arrows(by_channel=colours)
    if not arrows:
        return shown, ""
    scale = max(LENGTH, max(right - left, bottom - top) / FINEST)
    most = arrows[0].amount
    edges = Counter(frozenset((arrow.start, arrow.end)) for arrow in arrows)
    groups: dict[str, list[list[tuple[float, float]]]] = {}
    for arrow in reversed(arrows):  # the largest on top
        colour = CHANNELS[arrow.channel][1] if colours else INK
        side_by_side = edges[frozenset((arrow.start, arrow.end))] > 1
        aside = ASIDE * (arrow.channel - 1) if side_by_side else 0.0
        strength = math.sqrt(arrow.amount / most)  # the square root keeps small flows visible beside large ones
        outline = _outline(arrow.start, arrow.end, scale, strength, aside, 0.38 if side_by_side else 1.0)
        groups.setdefault(colour, []).append(outline)
    from matplotlib.collections import PolyCollection

    for colour, outlines in groups.items():
        arrows_of = PolyCollection(outlines, facecolors=colour, edgecolors="white", linewidths=0.4, zorder=3)
        axes.add_collection(arrows_of, autolim=False)
    if colours:
        _legend(axes)
    return shown, _left_out(change, arrows, by_channel=colours)


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, lw=3, label=f"{name} moves") for name, colour in CHANNELS]
    axes.legend(handles=lines, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.09), frameon=False)


def _left_out(change: Change, arrows: Sequence[Any], *, by_channel: bool) -> str:
    everything = change.arrows(by_channel=by_channel, most=10**9)
    if len(arrows) == len(everything):
        return ""
    share = sum(arrow.amount for arrow in arrows) / sum(arrow.amount for arrow in everything)
    return f"the largest {len(arrows)} of {len(everything)} arrows, {share:.0%} of the flow"


def window(change: Change) -> tuple[int, int, int, int]:
    """The square part of the grid that holds all flow that is drawn, as first and last column and row: (left, top,
    right, bottom).
    """
    height, width = change.image.shape[-2:]
    pixels = [pixel for arrow in change.arrows(by_channel=True) for pixel in (arrow.start, arrow.end)]
    if not pixels:
        return 0, 0, width - 1, height - 1
    spans = []
    for axis, size in ((0, width), (1, height)):
        first, last = min(pixel[axis] for pixel in pixels), max(pixel[axis] for pixel in pixels)
        spans.append([first - AROUND, last + AROUND, size])
    side = max(LEAST_WINDOW, *(last - first + 1 for first, last, _ in spans))
    found = []
    for first, last, size in spans:
        start = max(0, min((first + last + 1 - side) // 2, size - side))
        found.append((start, min(size, start + side) - 1))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def mark_window(axes: Axes, change: Change) -> None:
    """A frame on an image around what :func:`show_flow` shows, unless it shows all."""
    left, top, right, bottom = window(change)
    if (right - left + 1, bottom - top + 1) == (change.image.shape[-1], change.image.shape[-2]):
        return
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left + 1, bottom - top + 1, fill=False, edgecolor="#e9c46a", lw=1)
    )


def _outline(
    start: tuple[int, int], end: tuple[int, int], length: float, strength: float, aside: float, share: float
) -> list[tuple[float, float]]:
    """The seven corners of an arrow between the centres of two pixels.

    Args:
        aside: how far it is shifted, in pixels.
        share: of the usual width.
    """
    along, across = end[0] - start[0], end[1] - start[1]
    half = (SHAFT[0] + (SHAFT[1] - SHAFT[0]) * strength) * max(1.0, length) * share
    head, wide = min(0.42 * length, 0.12 + 2.2 * half), 0.04 + 2.1 * half
    middle = (start[0] + end[0]) / 2 - aside * across, (start[1] + end[1]) / 2 + aside * along

    def at(forward: float, sideways: float) -> tuple[float, float]:
        return (
            middle[0] + forward * along - sideways * across,
            middle[1] + forward * across + sideways * along,
        )

    back, tip = -length / 2, length / 2
    neck = tip - head
    left = [at(back, half), at(neck, half), at(neck, wide)]
    return [*left, at(tip, 0), at(neck, -wide), at(neck, -half), at(back, -half)]


def show_margins(
    axes: Axes, case: WorstCase, certificate: Certificate, shares: Sequence[float], margins: Sequence[float]
) -> Any:
    """f_y - f_t on the way to the worst case, beside what is proven of the whole ball; returns the moving mark."""
    distances = [share * case.distance for share in shares]
    axes.plot(distances, margins, color="#1f4fd8", lw=1.6, label=f"f{case.label} - f{case.rival} on the way")
    (mark,) = axes.plot(distances[:1], margins[:1], "o", color="#b5121b", ms=7)
    if certificate.margin is not None and certificate.verdict is Verdict.CERTIFIED:
        axes.axhline(certificate.margin, color="#1a7f37", ls="--", lw=1.4, label="proven of all images in the ball")
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xlabel(f"distance from the image (pixels; {distance_name(case.ground, case.cap)})", fontsize=FONT)
    axes.set_title("margin", fontsize=FONT)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return mark


def head_lines(certificate: Certificate, name: str = "") -> str:
    """The title of the picture of a certificate: of which image, and what is claimed."""
    certified = certificate.verdict is Verdict.CERTIFIED
    kind = "certified radius" if certified else f"{certificate.verdict}, not certified, at radius"
    predicted = "" if certificate.prediction is None else f", predicted {certificate.prediction}"
    first = f"{name + ': ' if name else ''}label {certificate.label}{predicted}"
    distance = distance_name(certificate.ground, certificate.cap)
    return f"{first}\n{kind} {certificate.radius:.4f} pixels ({distance}; {certificate.method})"


def image_title(case: WorstCase) -> str:
    return f"image\nf{case.label} - f{case.rival} = {case.margins[0]:.2f}"


def worst_title(case: WorstCase, certificate: Certificate) -> str:
    """What the other image is, its margin, and what is proven of all images of the ball beside it."""
    kind = "counterexample" if case.counterexample else "worst case to first order, nu*"
    if not case.counterexample and not case.exact:
        kind = f"nearly {kind}"
    lines = [kind, f"predicted {case.predicted}, f{case.label} - f{case.rival} = {case.margins[1]:.2f}"]
    if not case.counterexample and (proven := bound_text(certificate)):
        lines.append(proven)
    return "\n".join(lines)


def bound_text(certificate: Certificate) -> str:
    """What is known of the least margin over the ball; "" for nothing."""
    if certificate.margin is None or not math.isfinite(certificate.margin):
        return ""
    if certificate.verdict is Verdict.CERTIFIED:
        return f"proven of the whole ball: at least {certificate.margin:.3g}"
    return f"bound over the whole ball: {certificate.margin:.3g}, which proves nothing"


def distance_title(case: WorstCase) -> str:
    """The distance for the ball's own ground cost, and the length of the arrows' flow where that is another."""
    goal = "the counterexample" if case.counterexample else "nu*"
    moved = f"{distance_name(case.ground)} = {case.distance:.4f} pixels"
    if case.ground == "l1":
        return f"from image to {goal}: {moved}\n({case.distance:.1%} of the mass by one pixel)"
    length = f"arrows: flow of length {case.flow_length:.4f} ({distance_name('l1')})"
    return f"from image to {goal}: {moved}\n{length}"


def margins_on_the_way(network: Any, images: Sequence[Tensor], label: int, rival: int) -> tuple[list[float], list[int]]:
    """f_y - f_t and the class of each image."""
    with torch.no_grad():
        logits = network(torch.stack(list(images)))
    return (logits[:, label] - logits[:, rival]).tolist(), logits.argmax(1).tolist()


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


PICTURES = (".png", ".gif")  # what a picture's file may end in
FRAMES = 20  # of a moving picture
FRAME, LAST = 120, 1000  # milliseconds that an image is shown for
DPI = 80
ROW = (13.0, 5.2)  # inches of the picture of one image
RATIOS = (1.0, 1.0, 1.6)


def draw_worst_cases(
    network: Network,
    images: Tensor,
    certificates: Sequence[Certificate],
    path: str | Path,
    names: Sequence[str] = (),
) -> list[WorstCase]:
    """Draws a row for each image: the image, nu*, and their difference under the flow's arrows.

    A falsified image is shown with its counterexample, where the certificate has one. A ``.gif`` moves the mass along
    the flow, beside the arrows and the margin on the way.

    Args:
        network: the network of the certificates.
        images: (B, C, H, W), one for each certificate.
        certificates: nu* is sought in their balls, which share ground cost and cap.
        path: of the file, which ends in .png (as does one that ends otherwise) or .gif; it is replaced.
        names: of each image, such as those of :func:`image_name`.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: no image, or another number of names; or see :func:`worst_cases`.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    if not certificates:
        raise InvalidInputError("picture: given no image, expected at least one")
    if names and len(names) != len(certificates):
        raise InvalidInputError(f"picture: given {len(names)} names for {len(certificates)} images")
    cases = cases_of(network, images, certificates)
    named = list(zip(cases, certificates, names or [""] * len(cases), strict=True))
    figure, rows = _rows(len(cases))
    if _moves(path):
        _animate(figure, [_MovingCase(row, network, *one) for row, one in zip(rows, named, strict=True)], path)
        return cases
    for row, (case, certificate, name) in zip(rows, named, strict=True):
        row.suptitle(head_lines(certificate, name), fontweight="bold", fontsize=11)
        _draw_certificate(row, row.subplots(1, 3, width_ratios=RATIOS), case, certificate)
    figure.savefig(path, format="png", dpi=DPI)
    return cases


def draw_adversarial(images: Tensor, adversarial: Tensor, titles: Sequence[str], paths: Sequence[str | Path]) -> None:
    """Draws each pair as a file of its own: the original, the adversarial image, and the difference under flow arrows.

    Args:
        images, adversarial: (B, C, H, W), of equal masses per channel to a relative 1e-9; a shortest flow (l1 ground
            cost) from one to the other gives the arrows.
        titles: of each picture, with the distance between the images and its ground cost.
        paths: of each picture; a .gif moves the mass along the flow.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: an image is not valid, or masses or numbers differ.
        OSError: a file cannot be written.
    """
    require_matplotlib()
    if not len(images) == len(adversarial) == len(titles) == len(paths):
        raise InvalidInputError(f"given {len(images)} images, {len(adversarial)} adversarial, {len(paths)} paths")
    clean, found = (part.detach().double().cpu() for part in (images, adversarial))
    flows = minimal_flow(clean, found, mass_tolerance=EXACT_MASS_TOLERANCE)
    for change, title, path in zip(map(Change, clean, found, flows), titles, paths, strict=True):
        figure, (row,) = _rows(1)
        row.suptitle(title, fontweight="bold", fontsize=11)
        if _moves(path):
            _animate(figure, [_MovingChange(row, change)], path)
            continue
        axes = row.subplots(1, 3, width_ratios=RATIOS)
        length = f"arrows: flow of length {change.flow_length:.4f} pixels ({distance_name('l1')})"
        _draw_change(row, axes, change, ("original", "adversarial", f"difference\n{length}"))
        figure.savefig(path, format="png", dpi=DPI)


def plot_certificate(
    network: str | Path | nn.Module,
    image: Tensor,
    certificate: Certificate,
    *,
    ax: Axes | Sequence[Axes] | None = None,
    name: str = "",
) -> Any:
    """Draws a certificate on matplotlib axes: the flow to the worst case to first order, with what is proven.

    Args:
        network: as :func:`flowverify.certify` takes it.
        image: the image of the certificate, (C, H, W).
        ax: axes for the flow alone, or three for the image, its worst case and the flow; without them, a new figure
            of pyplot with three.
        name: of the image, for the title.

    Returns:
        The axes that were drawn on, as given.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: an image or a network that do not fit, or another number of axes.
    """
    require_matplotlib()
    batch = check_images(image)
    if len(batch) != 1:
        raise InvalidInputError(f"image of shape {tuple(image.shape)}: expected one image, (C, H, W)")
    canonical = load_network(network, tuple(int(size) for size in batch.shape[1:]))
    (case,) = cases_of(canonical, batch, [certificate])
    if ax is None:
        from matplotlib import pyplot

        figure, drawn = pyplot.subplots(1, 3, figsize=ROW, width_ratios=RATIOS, layout="constrained")
        figure.suptitle(head_lines(certificate, name), fontweight="bold", fontsize=11)
        _draw_certificate(figure, drawn, case, certificate)
        return drawn
    several = list(ax) if hasattr(ax, "__iter__") else [ax]
    if len(several) == 1:
        show_flow(several[0], case.change)
        lines = [head_lines(certificate, name), bound_text(certificate)]
        several[0].set_title("\n".join(filter(None, lines)), fontsize=FONT)
    elif len(several) == 3:
        _draw_certificate(None, several, case, certificate)
    else:
        raise InvalidInputError(f"ax: given {len(several)} axes, expected one or three")
    return ax


def image_name(model: str, data: str, split: str, index: int) -> str:
    """What an image is called in titles: its network, data set and position."""
    return f"{Path(model).name}, {' '.join(filter(None, [Path(data).name, split]))}, image {index}"


def require_matplotlib() -> None:
    """Raises DependencyError, with what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("pictures need matplotlib: pip install 'flowverify[plot]'") from error


def _moves(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".gif"


def _rows(count: int) -> tuple[Figure, list[Any]]:
    """A figure with a part for each image. Not by pyplot: it keeps every figure, and asks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(ROW[0], ROW[1] * count), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subfigures(count, 1, squeeze=False)[:, 0])


def _draw_certificate(row: Any, axes: Sequence[Axes], case: WorstCase, certificate: Certificate) -> None:
    titles = image_title(case), worst_title(case, certificate), distance_title(case)
    _draw_change(row, axes, case.change, titles)


def _draw_change(row: Any, axes: Sequence[Axes], change: Change, titles: Sequence[str]) -> None:
    """The two images and the flow on three axes; with colour bars, if ``row`` is what they are to be made in."""
    before, behind, flow = axes
    white = white_of(change.image)
    shown = show_image(before, change.image, white)
    mark_window(before, change)
    show_image(behind, change.other, white)
    note = brighter(change.other, white)
    if shown is not None and row is not None:
        row.colorbar(shown, ax=[before, behind], shrink=0.8, label="pixel", extend="max" if note else "neither")
    behind.set_xlabel(note, fontsize=8.5)
    _draw_flow(row, flow, change)
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize=FONT)


def _draw_flow(row: Any, axes: Axes, change: Change) -> None:
    shown, left_out = show_flow(axes, change)
    if shown is not None and row is not None:
        row.colorbar(shown, ax=axes, shrink=0.8, label="change of the pixel")
    axes.set_xlabel(left_out, fontsize=8.5, labelpad=20 if shown is None else 4)  # below the legend of channels


class _MovingChange:
    """One image that becomes another, beside the flow."""

    def __init__(self, row: Any, change: Change) -> None:
        self.white = white_of(change.image)
        self.moving, arrows = row.subplots(1, 2, width_ratios=(1.0, 1.2))
        self.images = change.on_the_way(_shares())
        self.length = change.flow_length
        show_image(self.moving, change.image, self.white)
        mark_window(self.moving, change)
        _draw_flow(row, arrows, change)
        self.show(0)

    def show(self, number: int) -> None:
        share, image = _shares()[number], self.images[number]
        _replace(self.moving, image, self.white)
        moved, whole = share * self.length, self.length
        self.moving.set_title(f"{moved:.4f} of {whole:.4f} pixels ({distance_name('l1')})", fontsize=FONT)


class _MovingCase:
    """The image of a certificate that becomes its worst case, beside the flow and the margin on the way."""

    def __init__(self, row: Any, network: Network, case: WorstCase, certificate: Certificate, name: str) -> None:
        self.case, self.white = case, white_of(case.image)
        row.suptitle(head_lines(certificate, name), fontweight="bold", fontsize=11)
        self.moving, arrows, margins = row.subplots(1, 3, width_ratios=(1.0, 1.2, 1.0))
        self.images = case.on_the_way(_shares())
        self.margins, self.classes = margins_on_the_way(in_double(network), self.images, case.label, case.rival)
        show_image(self.moving, case.image, self.white)
        mark_window(self.moving, case.change)
        _draw_flow(row, arrows, case.change)
        kind = "counterexample" if case.counterexample else "worst case to first order, nu*"
        arrows.set_title(f"to the {kind}", fontsize=FONT)
        self.mark = show_margins(margins, case, certificate, _shares(), self.margins)
        margins.set_title(bound_text(certificate) or "margin", fontsize=FONT)
        self.show(0)

    def show(self, number: int) -> None:
        case, distance = self.case, _shares()[number] * self.case.distance
        _replace(self.moving, self.images[number], self.white)
        self.moving.set_title(
            f"{distance:.4f} of {case.distance:.4f} pixels ({distance_name(case.ground, case.cap)})\n"
            f"predicted {self.classes[number]}, f{case.label} - f{case.rival} = {self.margins[number]:.2f}",
            fontsize=FONT,
        )
        self.mark.set_data([distance], [self.margins[number]])


def _shares() -> list[float]:
    return [number / (FRAMES - 1) for number in range(FRAMES)]


def _replace(axes: Axes, image: Tensor, white: float) -> None:
    shown = (image / white).clamp(0, 1).permute(1, 2, 0) if image.shape[0] == 3 else image.sum(0)
    axes.images[0].set_data(torch.as_tensor(shown).numpy())


def _animate(figure: Figure, moving: Sequence[_MovingChange | _MovingCase], path: str | Path) -> None:
    """Writes a GIF that shows all of them at once, and again and again."""
    from PIL import Image  # comes with matplotlib, whose own writer gives all frames the same time

    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is laid out once stays where it is
    frames = []
    for number in range(FRAMES):
        for one in moving:
            one.show(number)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))  # type: ignore[attr-defined]
    times = [FRAME] * (FRAMES - 1) + [LAST]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
