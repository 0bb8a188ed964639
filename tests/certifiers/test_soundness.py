"""The sweep: no feasible point violates a lower bound, over many networks, all methods and bounds, 10^5 points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from contracts import descend, margins_at, random_network, samples, sparse_images
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Threat
from flowverify.bounds.margins import MarginBounds
from flowverify.network import Network

NETWORKS = 50
POINTS = 400  # for each of two images and three radii of a random network: 120,000, and the shipped ones on top
RADII = (0.03, 0.3, 2.0)


def random_case(seed: int) -> Network:
    """An MLP or a CNN of random sizes, on 6x6 to 10x10 pixels with one or two channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    channels, height, width = draw(1, 2), draw(6, 10), draw(6, 10)
    classes, hidden = draw(2, 5), draw(4, 16)
    if seed % 2:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU()]
        for _ in range(draw(0, 2)):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        layers.append(nn.Linear(hidden, classes))
    else:
        stride, padding = draw(1, 3), draw(0, 2)
        layers = [nn.Conv2d(channels, 3, 3, stride, padding), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten()]
        if height + 2 * padding < 3 + stride or width + 2 * padding < 3 + stride:
            layers = [layers[0], nn.ReLU(), nn.Flatten()]
        with torch.no_grad():
            size = nn.Sequential(*layers)(torch.zeros(1, channels, height, width)).shape[1]
        layers.append(nn.Linear(size, classes))
    return random_network((channels, height, width), layers, seed)


def violations(
    network: Network, images: Tensor, labels: Tensor, radius: float, count: int, bounds: tuple[str, ...]
) -> tuple[list[str], int]:
    """Which bounds some feasible point violates, and how many points were tried."""
    budget = radius * images.flatten(1).double().sum(1)
    double = network.double()
    points = torch.cat([samples(images, budget, count, int(radius * 100)), descend(double, images, labels, budget)], 1)
    with torch.no_grad():
        least = margins_at(double, points, labels).amin(1)
    found = []
    for method in ("vanilla", "fine-tuned"):
        for bound in bounds:
            threat = Threat(positive=method == "fine-tuned")
            engine = MarginBounds(network, threat, bound, dtype=torch.float64)
            excess = float((engine.margins(threat.ball(images, budget), labels) - least).max())
            if not excess <= 1e-9:
                found.append(f"{method} {bound} at radius {radius}: {excess}")
    return found, points.shape[0] * points.shape[1]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 5))])
def test_random_networks(part: int) -> None:
    tried = 0
    for seed in range(part, NETWORKS, 5):
        network = random_case(seed)
        images = sparse_images(network.input_shape, 2, seed, (0.2, 0.6, 1.0)[seed % 3])
        labels = network(images).argmax(1)
        for index, radius in enumerate(RADII):
            chosen = (("best",), ("crown", "ibp"), ("crown-ibp",))[(index + seed) % 3]
            found, count = violations(network, images, labels, radius, POINTS, chosen)
            assert not found, (seed, found)
            tried += count
    assert tried * 5 >= 100_000


def with_mnist() -> bool:
    return (Path(os.environ.get("FLOWVERIFY_DATA", "/nowhere")) / "mnist").is_dir()


NEEDS_MNIST = pytest.mark.skipif(not with_mnist(), reason="needs MNIST")


@pytest.mark.parametrize(
    ("model", "dataset"),
    [
        ("digits-fc3", "digits"),
        *(pytest.param(model, "mnist", marks=NEEDS_MNIST) for model in ("mnist-fc3", "mnist-linear")),
        pytest.param("mnist-cnn", "mnist", marks=[NEEDS_MNIST, pytest.mark.slow]),  # small ones of its kind are above
    ],
)
def test_shipped_networks(model: str, dataset: str) -> None:
    network = fv.load_model(model)
    data = fv.load_dataset(dataset)
    count = {"digits-fc3": 10, "mnist-cnn": 2}.get(model, 3)
    images, labels = data.images[:count].double(), data.labels[:count]
    for radius in (0.02, 0.2):
        found, _ = violations(network, images, labels, radius, 200, ("best", "crown"))
        assert not found, found
    certificates = fv.search_radius(fv.Certifier(network), data.images[:count], labels)
    radii = torch.tensor([certificate.radius for certificate in certificates], dtype=torch.float64)
    chosen = (radii > 0).nonzero().flatten()
    assert chosen.numel() >= count * 0.7
    budget = radii[chosen] * images[chosen].flatten(1).sum(1)
    points = torch.cat(
        [samples(images[chosen], budget, 200), descend(network.double(), images[chosen], labels[chosen], budget)], 1
    )
    assert (margins_at(network.double(), points, labels[chosen]) > 0).all()
