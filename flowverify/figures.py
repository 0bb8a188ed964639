"""Pictures of certificates: an image, the worst that its ball holds to first order, and the flow between the two.

The worst case to first order is nu*, the image of the ball that minimises f_y - f_t as linearised at the image, t the
runner-up: what a gradient step on the network would pick, found exactly by the support function (theory,
section 5). The network's own minimum over the ball may lie elsewhere, and every picture says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowverify.ball import Threat, distance_name
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.results import Certificate, Verdict
from flowverify.transport.distance import EXACT_MASS_TOLERANCE
from flowverify.transport.references import minimal_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_ARROW = 0.4  # length of the arrow of the smallest flow, relative to that of the largest
ARROWS_ACROSS = 13  # the longest arrow is this part of the picture, and a pixel at least
DRAWN_SHARE = 1e-3  # flows below this share of the largest are left out


@dataclass(frozen=True)
class WorstCase:
    """nu* of one image, float64.

    Attributes:
        image: (C, H, W).
        worst: nu*, of the same mass, within the radius for the ground cost.
        flow: a shortest flow from image to worst, (edges,): image + A flow = worst.
        ground: the ground cost of the ball.
        distance: of the normalised images for this ground cost, by an exact solver, in pixels.
        flow_length: ||flow||_1 of the normalised images: W1 with l1 ground cost, in pixels.
        exact: whether nu* is the minimiser to first order; with a cap it is nearly that.
        label, rival: y and t.
        margins: f_y - f_t at the image and at the worst case.
        predicted: the network's class of the worst case.
    """

    image: Tensor
    worst: Tensor
    flow: Tensor
    ground: str
    distance: float
    flow_length: float
    exact: bool
    label: int
    rival: int
    margins: tuple[float, float]
    predicted: int


def worst_cases(
    network: Network,
    images: Tensor,
    labels: Sequence[int],
    radii: Sequence[float],
    ground: str = "l1",
    cap: float | None = None,
) -> list[WorstCase]:
    """The worst case to first order of each image (B, C, H, W) in the ball of its radius, in pixels.

    With a cap it is nearly the worst to first order.

    Raises:
        InvalidInputError: an image is not valid, numbers differ, or a radius is negative or not finite.
    """
    threat = Threat(ground, cap)
    images = threat.check(images, network.grid).detach().double().cpu()
    if not len(images) == len(labels) == len(radii):
        raise InvalidInputError(f"given {len(images)} images, {len(labels)} labels and {len(radii)} radii")
    double = _double(network)
    target = torch.as_tensor(list(labels))
    variable = images.clone().requires_grad_(True)
    logits = double(variable)
    rivals = logits.detach().scatter(1, target[:, None], -torch.inf).argmax(1)
    (gradient,) = torch.autograd.grad(_margins(logits, target, rivals).sum(), variable)
    ball = threat.ball(images, threat.budget(torch.tensor(list(radii), dtype=torch.float64), images))
    worst = ball.best_moves(-gradient).image
    after = double(worst)
    flows = minimal_flow(images, worst, mass_tolerance=EXACT_MASS_TOLERANCE)
    distances = threat.distance(images, worst)
    before, behind = _margins(logits.detach(), target, rivals), _margins(after, target, rivals)
    return [
        WorstCase(
            image=images[k],
            worst=worst[k],
            flow=flows[k],
            ground=threat.ground,
            distance=float(distances[k]),
            flow_length=_flow_length(images[k], flows[k]),
            exact=cap is None,
            label=int(target[k]),
            rival=int(rivals[k]),
            margins=(float(before[k]), float(behind[k])),
            predicted=int(after[k].argmax()),
        )
        for k in range(len(images))
    ]


def draw_worst_cases(
    network: Network, images: Tensor, certificates: Sequence[Certificate], path: str | Path
) -> list[WorstCase]:
    """Draws a row for each image as PNG: the image, nu*, and their difference under the flow's arrows.

    Args:
        network: the network of the certificates.
        images: (B, C, H, W), one for each certificate.
        certificates: nu* is sought in their balls, which share the ground cost and cap of the first.
        path: of the PNG file; it is replaced.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: no image; or see :func:`worst_cases`.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    if not certificates:
        raise InvalidInputError("picture: given no image, expected at least one")
    labels, radii = [one.label for one in certificates], [one.radius for one in certificates]
    cases = worst_cases(network, images, labels, radii, certificates[0].ground, certificates[0].cap)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure, and asks for a display where there is one.
    figure = Figure(figsize=(11, 3.6 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
    for row, case, certificate in zip(rows, cases, certificates, strict=True):
        _draw_case(row, case, certificate)
    figure.savefig(path, format="png", dpi=80)
    return cases


def require_matplotlib() -> None:
    """Raises DependencyError, with what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("pictures need matplotlib: pip install 'flowverify[plot]'") from error


def _double(network: Network) -> Network:
    import copy

    return copy.deepcopy(network).double().cpu()


def _margins(logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    return (logits.gather(1, labels[:, None]) - logits.gather(1, rivals[:, None])).squeeze(1)


def _draw_case(row: Any, case: WorstCase, certificate: Certificate) -> None:
    certified = certificate.verdict is Verdict.CERTIFIED
    kind = "certified radius" if certified else f"{certificate.verdict}, not certified, at radius"
    row.suptitle(
        f"label {case.label}, predicted {certificate.prediction}: {kind} {certificate.radius:.4f} pixels "
        f"({distance_name(certificate.ground, certificate.cap)}; {certificate.method})",
        fontweight="bold",
    )
    before, behind, flow = row.subplots(1, 3)
    brightest = max(float(case.image.max()), float(case.worst.max()))
    shown = _show(before, case.image, brightest)
    before.set_title(f"image\nf{case.label} - f{case.rival} = {case.margins[0]:.2f}", fontsize=10)
    _show(behind, case.worst, brightest)
    behind.set_title(
        f"{'' if case.exact else 'nearly '}worst case to first order, nu*\n"
        f"predicted {case.predicted}, f{case.label} - f{case.rival} = {case.margins[1]:.2f}",
        fontsize=10,
    )
    if shown is not None:
        row.colorbar(shown, ax=[before, behind], shrink=0.8, label="pixel")
    _draw_flow(row, flow, case.image, case.worst, case.flow)
    flow.set_title(_distance_title(case), fontsize=10)


def _distance_title(case: WorstCase) -> str:
    """The distance for the ball's own ground cost, and the length of the arrows' flow where that is another."""
    moved = f"{distance_name(case.ground)} = {case.distance:.4f} pixels"
    if case.ground == "l1":
        return f"from image to nu*: {moved}\n({case.distance:.1%} of the mass by one pixel)"
    return f"from image to nu*: {moved}\narrows: flow of length {case.flow_length:.4f} ({distance_name('l1')})"


def _flow_length(image: Tensor, flow: Tensor) -> float:
    return float(flow.abs().sum() / image.sum())


def _show(axes: Axes, image: Tensor, brightest: float) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    if image.shape[0] == 3:
        axes.imshow((image / max(brightest, 1.0)).permute(1, 2, 0).numpy())
        return None
    return axes.imshow(image.sum(0).numpy(), cmap="gray", vmin=0, vmax=brightest)


def _draw_flow(row: Any, axes: Axes, image: Tensor, changed: Tensor, flow: Tensor) -> None:
    """The change in colours, and an arrow over every edge that mass flows along."""
    change = (changed - image).sum(0)
    largest = max(float(change.abs().max()), 1e-12)
    shown = axes.imshow(change.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=0.75)
    row.colorbar(shown, ax=axes, shrink=0.8, label="change of the pixel")
    ink = image.sum(0)
    if min(ink.shape) >= 16:  # on a coarser grid the outline says less than the pixels do
        axes.contour(ink.numpy(), levels=[0.3 * float(ink.max())], colors="0.55", linewidths=1)
    axes.set_xticks([])
    axes.set_yticks([])
    longest = max(1.0, max(ink.shape) / ARROWS_ACROSS)
    right, down = (part.sum(0) for part in Grid.of(image).split(flow))
    starts: list[tuple[float, float]] = []
    arrows: list[tuple[float, float]] = []
    most = max(float(right.abs().max()) if right.numel() else 0.0, float(down.abs().max()) if down.numel() else 0.0)
    for part, (across, along) in ((right, (1, 0)), (down, (0, 1))):
        for i, j in (part.abs() > max(DRAWN_SHARE * most, 0.0)).nonzero().tolist():
            amount = float(part[i, j])
            # The square root keeps small flows visible beside large ones.
            length = longest * (LEAST_ARROW + (1 - LEAST_ARROW) * math.sqrt(abs(amount) / most))
            length = math.copysign(length, amount)
            middle = (j + across / 2, i + along / 2)
            starts.append((middle[0] - across * length / 2, middle[1] - along * length / 2))
            arrows.append((across * length, along * length))
    if starts:
        x, y = zip(*starts, strict=True)
        u, v = zip(*arrows, strict=True)
        axes.quiver(
            x, y, u, v, angles="xy", scale_units="xy", scale=1, units="xy", width=0.1 * longest, headwidth=4,
            headlength=4, headaxislength=3.5, minshaft=1, color="black",
        )  # fmt: skip


def draw_adversarial(images: Tensor, adversarial: Tensor, titles: Sequence[str], paths: Sequence[str | Path]) -> None:
    """Draws each pair as a PNG of its own: the original, the adversarial image, and the difference under flow arrows.

    Args:
        images, adversarial: (B, C, H, W), of equal masses per channel to a relative 1e-9; a shortest flow (l1 ground
            cost) from one to the other gives the arrows.
        titles: of each picture, with the distance between the images and its ground cost.
        paths: of each picture.

    Raises:
        DependencyError: matplotlib is not installed.
        InvalidInputError: an image is not valid, or masses or numbers differ.
        OSError: a file cannot be written.
    """
    require_matplotlib()
    if not len(images) == len(adversarial) == len(titles) == len(paths):
        raise InvalidInputError(f"given {len(images)} images, {len(adversarial)} adversarial, {len(paths)} paths")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clean, found = (part.detach().double().cpu() for part in (images, adversarial))
    for k, flow in enumerate(minimal_flow(clean, found, mass_tolerance=EXACT_MASS_TOLERANCE)):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        row = figure.subfigures(1, 1, squeeze=False)[0, 0]
        row.suptitle(titles[k], fontweight="bold")
        before, behind, arrows = row.subplots(1, 3)
        brightest = max(float(clean[k].max()), float(found[k].max()))
        shown = _show(before, clean[k], brightest)
        before.set_title("original", fontsize=10)
        _show(behind, found[k], brightest)
        behind.set_title("adversarial", fontsize=10)
        if shown is not None:
            row.colorbar(shown, ax=[before, behind], shrink=0.8, label="pixel")
        _draw_flow(row, arrows, clean[k], found[k], flow)
        length = _flow_length(clean[k], flow)
        arrows.set_title(f"difference\narrows: flow of length {length:.4f} pixels ({distance_name('l1')})", fontsize=10)
        figure.savefig(paths[k], format="png", dpi=80)
