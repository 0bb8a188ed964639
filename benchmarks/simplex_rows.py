"""Vanilla radii by lifted bounds, and by interpolation of the first ReLUs at the vertices of the simplex of moves.

python -m benchmarks.simplex_rows [--models digits-fc3,mnist-fc3] [--images 20] [--first 0]

The second is the relaxation of Behl et al. 2021 (*Overcoming the Convex Barrier for Simplex Inputs*), written down here
for networks of three dense layers: a vanilla ball is a simplex whose vertices are the image and, for each move, the
image that the whole budget leads to by it. A linear function of the first ReLUs, those with a negative coefficient
replaced by lines, is largest at a vertex; ReLUs of the second layer are relaxed by lines over the intervals that this
gives. The lines are CROWN's, or tangents at the image, whichever bounds more.

One row a network: median radii of both, of secants alone (rows without charges; theory, section 22) and of CROWN, in
float64 without the allowance for rounding, and on how many images each is larger. Images from 1000 on (of digits, from
100) are those that settings were chosen on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.ball import Threat
from flowverify.bounds.lifted.engine import LiftedBounds
from flowverify.bounds.lifted.moves import NEIGHBOURS
from flowverify.bounds.margins import MarginBounds, margin_specification
from flowverify.network import Network

TOLERANCE = 0.003  # relative, of radii


def simplex_margin(network: Network, image: Tensor, label: Tensor, budget: float) -> float:
    """The least lower bound of a margin over the simplex around one image (1, C, H, W), float64."""
    first, second, third = (node.operation for node in network.nodes if isinstance(node.operation, nn.Linear))
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert isinstance(third, nn.Linear)
    gains = NEIGHBOURS.gains(first.weight.reshape(-1, *image.shape[1:])).flatten(1)  # neurons x moves
    z = first(image.flatten(1))[0]
    vertices = z[:, None] + torch.cat([torch.zeros_like(gains[:, :1]), budget * gains], 1)  # neurons x vertices
    low, high = vertices.amin(1), vertices.amax(1)

    def slopes(low: Tensor, high: Tensor, centre: Tensor, tangent: bool) -> Tensor:
        usual = (centre >= 0 if tangent else high > -low).to(low)
        return torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, usual))

    def largest(rows: Tensor, tangent: bool) -> Tensor:
        """Of linear functions (N, neurons) of the first ReLUs."""
        lines = vertices * slopes(low, high, z, tangent)[:, None]
        return (rows.clamp(min=0) @ vertices.clamp(min=0) + rows.clamp(max=0) @ lines).amax(1)

    upper = torch.minimum(*(largest(second.weight, tangent) for tangent in (True, False))) + second.bias
    lower = second.bias - torch.minimum(*(largest(-second.weight, tangent) for tangent in (True, False)))
    centre = second(z.clamp(min=0))
    rises = -(margin_specification(label, network.num_classes, torch.float64)[0] @ third.weight)
    clean = network(image)[0]
    clean = clean[label] - torch.cat([clean[: int(label)], clean[int(label) + 1 :]])
    bent = (lower < 0) & (upper > 0)
    chord = torch.where(bent, upper / (upper - lower).clamp(min=1e-300), (lower >= 0).to(upper))
    found = []
    for tangent in (True, False):
        above, below = rises.clamp(min=0) * chord, rises.clamp(max=0) * slopes(lower, upper, centre, tangent)
        # From the value at the image: constants of chords, and what lines there depart by.
        constant = (above * torch.where(bent, -lower, 0.0)).sum(1) - rises @ centre.clamp(min=0)
        for own in (True, False):
            rise = largest((above + below) @ second.weight, own) + (above + below) @ second.bias
            found.append((clean - rise - constant).min())
    return float(torch.stack(found).max())


def radius(margin: Callable[[float], float], mass: float) -> float:
    """The largest radius with a positive margin, by bisection."""
    low, high = 0.0, 0.01
    while margin(high * mass) > 0:
        low, high = high, 2 * high
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if margin(middle * mass) > 0 else (low, middle)
    return low


def radii(name: str, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each kind of bound, (B,), for images (B, C, H, W) that are classified right."""
    network, images, threat = fv.load_model(name).double(), images.double(), Threat(positive=False)
    crown = MarginBounds(network, threat, "crown", dtype=torch.float64)
    lifted = LiftedBounds(network, feasible=False, steps=10)
    secants = LiftedBounds(network, feasible=False, steps=10, trust=torch.inf)

    def by(bounds: LiftedBounds) -> Callable[[Tensor, Tensor, float], float]:
        def margin(image: Tensor, label: Tensor, budget: float) -> float:
            return float(bounds.lower_bounds(image, label, torch.tensor([budget], dtype=torch.float64)).min())

        return margin

    kinds: dict[str, Callable[[Tensor, Tensor, float], float]] = {
        "theirs": partial(simplex_margin, network),
        "lifted": by(lifted),
        "secants": by(secants),
        "crown": lambda image, label, budget: float(crown.margins(threat.ball(image, budget), label).min()),
    }
    pairs = list(zip(images[:, None], labels[:, None], strict=True))
    return {
        kind: torch.tensor(
            [radius(partial(margin, image, label), float(image.sum())) for image, label in pairs], dtype=torch.float64
        )
        for kind, margin in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="digits-fc3,mnist-fc3")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    header(f"Simplex rows: {options.images} test images from {options.first}, vanilla, l1")
    print("| network | interpolation, then lines | lifted | secants alone | CROWN | lifted larger, smaller on |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.models.split(","):
        data = fv.load_dataset("digits" if name.startswith("digits") else "mnist")
        data = data[options.first : options.first + options.images]
        right = fv.load_model(name)(data.images).argmax(1) == data.labels
        found = radii(name, data.images[right], data.labels[right])
        larger = found["lifted"] > found["theirs"] * (1 + TOLERANCE)
        smaller = found["lifted"] < found["theirs"] * (1 - TOLERANCE)
        cells = " | ".join(quartiles(found[kind]) for kind in ("theirs", "lifted", "secants", "crown"))
        print(f"| {name} | {cells} | {int(larger.sum())}, {int(smaller.sum())} of {int(right.sum())} |", flush=True)


if __name__ == "__main__":
    main()
