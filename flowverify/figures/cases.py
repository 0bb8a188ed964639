"""What pictures show, without drawing it: worst cases, the flow that leads to them, and the images on the way there.

The worst case to first order is nu*, the image of the ball that minimises f_y - f_t as linearised at the image, t the
runner-up: what a gradient step on the network would pick, found exactly by the support function (theory,
section 5). The network's own minimum over the ball may lie elsewhere, and every picture says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowverify.ball import Threat, between, distance_name
from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.notebook import by
from flowverify.results import Certificate, Verdict
from flowverify.transport.distance import EXACT_MASS_TOLERANCE
from flowverify.transport.references import minimal_flow

DRAWN_SHARE = 1e-3  # flows below this share of the largest are left out
MOST_ARROWS = 400  # of one picture: the largest
RESIDUE = 1e-12  # of the mass: what rounding leaves of a flow along paths


@dataclass(frozen=True)
class Arrow:
    """Mass that flows along one edge, from pixel to neighbouring pixel, as (column, row)."""

    start: tuple[int, int]
    end: tuple[int, int]
    channel: int
    amount: float


@dataclass(frozen=True)
class Path:
    """An amount of mass, and the pixels (row, column) of one channel that it passes."""

    amount: float
    channel: int
    pixels: tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class Change:
    """An image, another of the same mass in every channel, and a shortest flow between the two; float64.

    Attributes:
        image, other: (C, H, W).
        flow: (edges,), image + A flow = other, of least l1 norm.
    """

    image: Tensor
    other: Tensor
    flow: Tensor

    def __repr__(self) -> str:
        return f"Change(image of {by(self.image.shape)}, flow of length {self.flow_length:.4g} pixels)"

    @property
    def flow_length(self) -> float:
        """||flow||_1 of the normalised images: W1 with l1 ground cost, in pixels."""
        return float(self.flow.abs().sum() / self.image.sum())

    def arrows(self, *, by_channel: bool = False, most: int = MOST_ARROWS) -> list[Arrow]:
        """The largest flows along edges, the largest first; of all channels together, or of each."""
        right, down = Grid.of(self.image).split(self.flow)
        if not by_channel:
            right, down = right.sum(0, keepdim=True), down.sum(0, keepdim=True)
        found = []
        for part, (across, along) in ((right, (1, 0)), (down, (0, 1))):
            for channel, i, j in part.nonzero().tolist():
                amount = float(part[channel, i, j])
                ends = (j, i), (j + across, i + along)
                start, end = ends if amount > 0 else ends[::-1]
                found.append(Arrow(start, end, channel, abs(amount)))
        found.sort(key=lambda arrow: -arrow.amount)
        least = DRAWN_SHARE * found[0].amount if found else 0.0
        return [arrow for arrow in found[:most] if arrow.amount > least]

    def paths(self) -> list[Path]:
        """The flow as mass that goes from a pixel which has too much of it to one that lacks it.

        The paths leave out no more than rounding does. A flow of least norm has no cycles, so that each walk ends.
        """
        grid = Grid.of(self.image)
        right, down = (part.numpy() for part in grid.split(self.flow))
        excess = (self.image - self.other).numpy()
        least = RESIDUE * max(float(self.image.sum()), 1e-300)
        found = []
        for channel in range(grid.channels):
            leaving: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
            for part, (along, across) in ((right, (0, 1)), (down, (1, 0))):
                for i, j in zip(*part[channel].nonzero(), strict=True):
                    amount = float(part[channel, i, j])
                    tail, head = (int(i), int(j)), (int(i) + along, int(j) + across)
                    if amount < 0:
                        tail, head = head, tail
                    leaving.setdefault(tail, {})[head] = abs(amount)
            for i, j in zip(*(excess[channel] > least).nonzero(), strict=True):
                source, left = (int(i), int(j)), float(excess[channel, i, j])
                while left > least:
                    walk = [source]
                    while onward := leaving.get(walk[-1]):
                        walk.append(max(onward, key=onward.__getitem__))
                        if -excess[channel][walk[-1]] > least:
                            break
                    if len(walk) == 1:
                        break
                    steps = list(pairwise(walk))
                    amount = min([left, *(leaving[tail][head] for tail, head in steps)])
                    if -excess[channel][walk[-1]] > least:
                        amount = min(amount, float(-excess[channel][walk[-1]]))
                    for tail, head in steps:
                        leaving[tail][head] -= amount
                        if leaving[tail][head] <= least:
                            del leaving[tail][head]
                    excess[channel][walk[-1]] += amount
                    left -= amount
                    found.append(Path(amount, channel, tuple(walk)))
        return found

    def on_the_way(self, shares: Iterable[float]) -> list[Tensor]:
        """The images that have moved a share of the way, all mass at once along its path; float64 (C, H, W).

        Each has the mass of the image and no negative pixel, and lies at the share of the distance from it (W1 with l1
        ground cost).
        """
        paths = self.paths()
        return [_moved(self.image, paths, share) for share in shares]


def _moved(image: Tensor, paths: Sequence[Path], share: float) -> Tensor:
    result = image.numpy().copy()
    for path in paths:
        whole, part = divmod(share * (len(path.pixels) - 1), 1)
        here = path.pixels[int(whole)]
        ahead = path.pixels[min(int(whole) + 1, len(path.pixels) - 1)]
        result[path.channel][path.pixels[0]] -= path.amount
        result[path.channel][here] += path.amount * (1 - part)
        result[path.channel][ahead] += path.amount * part
    return torch.from_numpy(result).clamp(min=0)


@dataclass(frozen=True, repr=False)
class WorstCase:
    """nu* of one image, or the counterexample of its certificate; float64.

    Attributes:
        image: (C, H, W).
        worst: nu*, of the same mass, within the radius for the ground cost; or the counterexample.
        flow: a shortest flow from image to worst, (edges,): image + A flow = worst.
        ground, cap: of the ball.
        distance: of the normalised images for this ground cost, by an exact solver, in pixels.
        flow_length: ||flow||_1 of the normalised images: W1 with l1 ground cost, in pixels.
        exact: whether nu* is the minimiser to first order; with a cap it is nearly that.
        label, rival: y and t.
        margins: f_y - f_t at the image and at the worst case.
        predicted: the network's class of the worst case.
        counterexample: whether ``worst`` is one.
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
    cap: float | None = None
    counterexample: bool = False

    def __repr__(self) -> str:
        kind = "counterexample" if self.counterexample else "worst case to first order"
        before, behind = self.margins
        return (
            f"WorstCase({kind} of an image of {by(self.image.shape)}: label {self.label}, predicted {self.predicted}, "
            f"distance {self.distance:.4g} pixels ({distance_name(self.ground, self.cap)}), "
            f"f{self.label} - f{self.rival} from {before:.4g} to {behind:.4g})"
        )

    @property
    def change(self) -> Change:
        return Change(self.image, self.worst, self.flow)

    def on_the_way(self, shares: Sequence[float]) -> list[Tensor]:
        """Images between the two, all of them in the ball if the worst case is; float64 (C, H, W).

        Mass moves along the flow (:meth:`Change.on_the_way`). For ground costs other than l1, and with a cap, such
        images may leave the ball: then they lie on the segment between the two, as balls are convex.
        """
        if self.ground == "l1" and self.cap is None:
            return self.change.on_the_way(shares)
        clean, far = (part.expand(len(shares), *part.shape) for part in (self.image, self.worst))
        return list(between(clean, far, torch.tensor(list(shares), dtype=torch.float64)))


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
    double = in_double(network)
    target = torch.as_tensor(list(labels))
    variable = images.clone().requires_grad_(True)
    logits = double(variable)
    rivals = logits.detach().scatter(1, target[:, None], -torch.inf).argmax(1)
    (gradient,) = torch.autograd.grad(margins_over(logits, target, rivals).sum(), variable)
    ball = threat.ball(images, threat.budget(torch.tensor(list(radii), dtype=torch.float64), images))
    worst = ball.best_moves(-gradient).image
    return _cases(double, images, worst, target, rivals, threat, counterexample=False)


def cases_of(network: Network, images: Tensor, certificates: Sequence[Certificate]) -> list[WorstCase]:
    """What a picture of each certificate shows: the counterexample of one that is falsified, where there is one, or
    else the worst case to first order at its radius.

    Args:
        certificates: one for each image (B, C, H, W); they share ground cost and cap.

    Raises:
        InvalidInputError: as :func:`worst_cases`, or certificates for several threats.
    """
    if not certificates:
        return []
    threats = {(one.ground, one.cap) for one in certificates}
    if len(threats) > 1:
        raise InvalidInputError(f"certificates for {len(threats)} ground costs and caps: expected the same for all")
    ((ground, cap),) = threats
    labels, radii = [one.label for one in certificates], [one.radius for one in certificates]
    found = worst_cases(network, images, labels, radii, ground, cap)
    refuted = [k for k, one in enumerate(certificates) if one.verdict is Verdict.FALSIFIED and one.witness is not None]
    if refuted:
        double, threat = in_double(network), Threat(ground, cap)
        clean = torch.stack([found[k].image for k in refuted])
        witnesses = [certificates[k].witness for k in refuted]
        others = torch.stack([one.detach().double().cpu() for one in witnesses if one is not None])
        target = torch.tensor([labels[k] for k in refuted])
        rivals = double(others).detach().scatter(1, target[:, None], -torch.inf).argmax(1)
        shown = _cases(double, clean, others, target, rivals, threat, counterexample=True)
        for k, case in zip(refuted, shown, strict=True):
            found[k] = case
    return found


def _cases(
    double: Network,
    images: Tensor,
    others: Tensor,
    labels: Tensor,
    rivals: Tensor,
    threat: Threat,
    *,
    counterexample: bool,
) -> list[WorstCase]:
    with torch.no_grad():
        before, after = double(images), double(others)
    flows = minimal_flow(images, others, mass_tolerance=EXACT_MASS_TOLERANCE)
    distances = threat.distance(images, others)
    margins = [margins_over(logits, labels, rivals).tolist() for logits in (before, after)]
    return [
        WorstCase(
            image=images[k],
            worst=others[k],
            flow=flows[k],
            ground=threat.ground,
            distance=float(distances[k]),
            flow_length=Change(images[k], others[k], flows[k]).flow_length,
            exact=threat.cap is None,
            label=int(labels[k]),
            rival=int(rivals[k]),
            margins=(margins[0][k], margins[1][k]),
            predicted=int(after[k].argmax()),
            cap=threat.cap,
            counterexample=counterexample,
        )
        for k in range(len(images))
    ]


def in_double(network: Network) -> Network:
    """A copy in float64, on the CPU."""
    return copy.deepcopy(network).double().cpu()


def margins_over(logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """f_y - f_t of each image, (B,)."""
    return (logits.gather(1, labels[:, None]) - logits.gather(1, rivals[:, None])).squeeze(1)
