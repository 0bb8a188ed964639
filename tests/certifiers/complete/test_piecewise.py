"""Networks of piecewise linear operations as networks of ReLUs, and exact answers for them."""

from __future__ import annotations

import pytest
import torch
from contracts import quick, random_network
from torch import Tensor, nn

from flowverify import Network, WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.milp import MilpCertifier
from flowverify.certifiers.complete.problem import relus_only
from flowverify.certifiers.options import CompleteOptions
from flowverify.errors import UnsupportedOperationError

ACTIVATIONS = {
    "leaky": lambda: nn.LeakyReLU(0.1),
    "steep": lambda: nn.LeakyReLU(1.5),
    "falling": lambda: nn.LeakyReLU(-0.5),
    "flat": lambda: nn.LeakyReLU(1.0),
}
POOLS = {
    "pairs": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, stride=2),
    "padded": nn.MaxPool2d(3, stride=2, padding=1),
    "dilated": nn.MaxPool2d((2, 1), stride=1, dilation=(2, 1)),
    "single": nn.MaxPool2d(1, stride=2),
}


def activated(kind: str, seed: int) -> Network:
    """On images of three pixels in a row."""
    layers = [nn.Flatten(), nn.Linear(3, 4), ACTIVATIONS[kind](), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)]
    return random_network((1, 1, 3), layers, seed).double()


def pooled(seed: int) -> Network:
    layers = [nn.Conv2d(1, 2, 1), nn.MaxPool2d((1, 2), stride=1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU()]
    return random_network((1, 1, 3), [*layers, nn.Linear(3, 3)], seed).double()


@pytest.mark.parametrize("kind", POOLS)
def test_pools_are_the_same_function(kind: str) -> None:
    pool, size = POOLS[kind], 6
    width = int(pool(torch.zeros(1, 2, size, size)).numel())
    layers = [nn.Conv2d(1, 2, 3, padding=1), pool, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(width, 2)]
    network = random_network((1, size, size), layers, 0).double()
    found, images = relus_only(network), torch.randn(50, 1, size, size, dtype=torch.float64)
    assert all(isinstance(node.operation, nn.ReLU) for node in found.activations)
    torch.testing.assert_close(found(images), network(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_the_same_function(kind: str) -> None:
    network, images = activated(kind, 1), torch.randn(50, 1, 1, 3, dtype=torch.float64)
    found = relus_only(network)
    assert all(isinstance(node.operation, nn.ReLU) for node in found.activations)
    torch.testing.assert_close(found(images), network(images), rtol=1e-12, atol=1e-12)


def test_a_network_of_relus_stays_and_curves_are_refused() -> None:
    layers = [nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)]
    network = random_network((1, 1, 3), layers, 0)
    assert relus_only(network) is network
    layers[2] = nn.Sigmoid()
    with pytest.raises(UnsupportedOperationError, match="is Sigmoid; expected affine layers and ReLU, LeakyReLU or"):
        relus_only(random_network((1, 1, 3), layers, 0))


def grid_of_ball(image: Tensor, budget: float, steps: int = 401) -> Tensor:
    """Images (N, 1, 1, 3) of the ball: the two flows between three pixels, on a grid that has its corners."""
    amounts = torch.linspace(-budget, budget, steps, dtype=torch.float64)
    first, second = (flow.flatten() for flow in torch.meshgrid(amounts, amounts, indexing="ij"))
    inside = first.abs() + second.abs() <= budget * (1 + 1e-12)
    moved = torch.stack([-first, first - second, second], 1)[inside]
    points = image.flatten() + moved
    return points[(points >= 0).all(1)].reshape(-1, 1, 1, 3)


def steepest(network: Network) -> float:
    """A Lipschitz constant of the logits in the largest change of a pixel."""
    slope = 1.0
    for node in network.nodes:
        if isinstance(node.operation, nn.Linear | nn.Conv2d):
            slope *= float(node.operation.weight.abs().flatten(1).sum(1).max())
        slope *= max(1.0, abs(float(getattr(node.operation, "negative_slope", 1.0))))
    return slope


NETWORKS = [row for kind in (*ACTIVATIONS, "pooled") for row in quick([(kind, 0), (kind, 1)], 1)]


@pytest.mark.parametrize(("kind", "seed"), NETWORKS)
def test_exact_answers_are_those_of_a_fine_grid(kind: str, seed: int) -> None:
    network = pooled(seed) if kind == "pooled" else activated(kind, seed)
    image = torch.tensor([[[0.5, 0.8, 0.3]]], dtype=torch.float64)
    label, radius = int(network(image[None]).argmax()), 0.2
    budget = radius * float(image.sum())
    logits = network(grid_of_ball(image, budget))
    others = logits.clone()
    others[:, label] = -torch.inf
    least = float((logits[:, label] - others.amax(1)).min())
    options = CompleteOptions(timeout=None, nodes=5000)
    certifier = CompleteCertifier(network, options=options)
    found = certifier.least_margin(image, label, WassersteinBall(radius))
    spacing = 2 * budget / 400
    assert found.lower - 1e-9 <= least <= found.upper + 2 * 2 * spacing * steepest(network)
    assert found.upper - found.lower <= 1e-5
    batch, labels = image[None], torch.tensor([label])
    for exact in (certifier, MilpCertifier(network, options=options)):
        closed = exact.search(batch, labels)[0]
        assert closed.verdict == "certified"
        inside, outside = (
            network(grid_of_ball(image, one * float(image.sum()))) for one in (closed.radius, 1.0)
        )  # fmt: skip
        assert bool((inside.argmax(1) == label).all())
        if closed.upper_radius is not None:
            assert closed.radius < closed.upper_radius <= closed.radius * 1.0101
        else:
            assert bool((outside.argmax(1) == label).all())
