"""Pictures as files, still or moving, and on the axes of a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.ball import check_images, distance_name
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.figures import panels
from flowverify.figures.cases import Change, WorstCase, cases_of, in_double
from flowverify.network import Network, load_network
from flowverify.results import Certificate
from flowverify.transport.distance import EXACT_MASS_TOLERANCE
from flowverify.transport.references import minimal_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        row.suptitle(panels.head_lines(certificate, name), fontweight="bold", fontsize=11)
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
        figure.suptitle(panels.head_lines(certificate, name), fontweight="bold", fontsize=11)
        _draw_certificate(figure, drawn, case, certificate)
        return drawn
    several = list(ax) if hasattr(ax, "__iter__") else [ax]
    if len(several) == 1:
        panels.show_flow(several[0], case.change)
        lines = [panels.head_lines(certificate, name), panels.bound_text(certificate)]
        several[0].set_title("\n".join(filter(None, lines)), fontsize=panels.FONT)
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
    titles = panels.image_title(case), panels.worst_title(case, certificate), panels.distance_title(case)
    _draw_change(row, axes, case.change, titles)


def _draw_change(row: Any, axes: Sequence[Axes], change: Change, titles: Sequence[str]) -> None:
    """The two images and the flow on three axes; with colour bars, if ``row`` is what they are to be made in."""
    before, behind, flow = axes
    white = panels.white_of(change.image)
    shown = panels.show_image(before, change.image, white)
    panels.mark_window(before, change)
    panels.show_image(behind, change.other, white)
    note = panels.brighter(change.other, white)
    if shown is not None and row is not None:
        row.colorbar(shown, ax=[before, behind], shrink=0.8, label="pixel", extend="max" if note else "neither")
    behind.set_xlabel(note, fontsize=8.5)
    _draw_flow(row, flow, change)
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize=panels.FONT)


def _draw_flow(row: Any, axes: Axes, change: Change) -> None:
    shown, left_out = panels.show_flow(axes, change)
    if shown is not None and row is not None:
        row.colorbar(shown, ax=axes, shrink=0.8, label="change of the pixel")
    axes.set_xlabel(left_out, fontsize=8.5, labelpad=20 if shown is None else 4)  # below the legend of channels


class _MovingChange:
    """One image that becomes another, beside the flow."""

    def __init__(self, row: Any, change: Change) -> None:
        self.white = panels.white_of(change.image)
        self.moving, arrows = row.subplots(1, 2, width_ratios=(1.0, 1.2))
        self.images = change.on_the_way(_shares())
        self.length = change.flow_length
        panels.show_image(self.moving, change.image, self.white)
        panels.mark_window(self.moving, change)
        _draw_flow(row, arrows, change)
        self.show(0)

    def show(self, number: int) -> None:
        share, image = _shares()[number], self.images[number]
        _replace(self.moving, image, self.white)
        moved, whole = share * self.length, self.length
        self.moving.set_title(f"{moved:.4f} of {whole:.4f} pixels ({distance_name('l1')})", fontsize=panels.FONT)


class _MovingCase:
    """The image of a certificate that becomes its worst case, beside the flow and the margin on the way."""

    def __init__(self, row: Any, network: Network, case: WorstCase, certificate: Certificate, name: str) -> None:
        self.case, self.white = case, panels.white_of(case.image)
        row.suptitle(panels.head_lines(certificate, name), fontweight="bold", fontsize=11)
        self.moving, arrows, margins = row.subplots(1, 3, width_ratios=(1.0, 1.2, 1.0))
        self.images = case.on_the_way(_shares())
        self.margins, self.classes = panels.margins_on_the_way(in_double(network), self.images, case.label, case.rival)
        panels.show_image(self.moving, case.image, self.white)
        panels.mark_window(self.moving, case.change)
        _draw_flow(row, arrows, case.change)
        kind = "counterexample" if case.counterexample else "worst case to first order, nu*"
        arrows.set_title(f"to the {kind}", fontsize=panels.FONT)
        self.mark = panels.show_margins(margins, case, certificate, _shares(), self.margins)
        margins.set_title(panels.bound_text(certificate) or "margin", fontsize=panels.FONT)
        self.show(0)

    def show(self, number: int) -> None:
        case, distance = self.case, _shares()[number] * self.case.distance
        _replace(self.moving, self.images[number], self.white)
        self.moving.set_title(
            f"{distance:.4f} of {case.distance:.4f} pixels ({distance_name(case.ground, case.cap)})\n"
            f"predicted {self.classes[number]}, f{case.label} - f{case.rival} = {self.margins[number]:.2f}",
            fontsize=panels.FONT,
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
