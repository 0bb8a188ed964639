"""Colour images of CIFAR-10's size: mass moves within a channel, and the channels share one budget."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from contracts import quick
from plans import frank_wolfe
from torch import Tensor, nn

import flowverify as fv
from flowverify.attack import make_attack
from flowverify.ball import Threat
from flowverify.certifiers.incomplete import Certifier
from flowverify.transport.distance import wasserstein_distance

HERE = os.environ.get("FLOWVERIFY_DATA")
pytestmark = pytest.mark.skipif(
    HERE is None or not (Path(HERE) / "cifar10_sample").is_dir(), reason="needs cifar10_sample in $FLOWVERIFY_DATA"
)
THREATS = [("l1", None), ("l2", 1.0), ("local:5", None)]


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network with random weights, and two images labelled as it sees them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)
    )
    images = fv.load_dataset("cifar10-sample").images[:2]
    return network, images, network(images).argmax(1)


@pytest.mark.parametrize(("ground", "cap"), quick(THREATS, 2))
def test_certified_below_attacked(problem: tuple[nn.Module, Tensor, Tensor], ground: str, cap: float | None) -> None:
    network, images, labels = problem
    certifier = Certifier(network, bound="crown-ibp" if cap else "best", input_shape=(3, 32, 32))
    found = certifier.search(images, labels, Threat(ground, cap))
    radii = torch.tensor([one.radius for one in found])
    assert (radii > 0).all() and {(one.ground, one.cap) for one in found} == {(ground, cap)}
    attacked = make_attack("minimal", network, effort="fast").minimise(images, labels, ground, cap)
    hit = attacked.radius[attacked.found]
    assert len(hit) and (radii[attacked.found] <= hit).all()
    witness = attacked.images[attacked.found]
    torch.testing.assert_close(witness.sum((-1, -2)), images.double()[attacked.found].sum((-1, -2)), rtol=1e-9, atol=0)
    assert cap is None or bool((witness <= cap).all())
    # Vertices of the certified balls, which spend the budget where it pays most, keep the class.
    budget = radii * images.double().flatten(1).sum(1)
    points = frank_wolfe(certifier.precise, images.double(), labels, budget, ground, cap)
    classes = certifier.precise(points.flatten(0, 1)).argmax(1).reshape(2, -1)
    assert (classes == labels[:, None]).all()


def test_one_budget_for_all_channels() -> None:
    """Each channel moves as far as the radius allows one of them: together they are outside of the ball."""
    images = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball, moved = fv.WassersteinBall(0.05), images.clone()
    for channel in range(3):
        alone = images.clone()
        amount = 0.05 * images.sum()
        for target in (alone, moved):
            target[0, channel, 2, 2] += amount
            target[0, channel] *= images[0, channel].sum() / target[0, channel].sum()
        assert ball.with_radius(0.3).contains(images, alone).all()
    parts = [wasserstein_distance(images[:, k : k + 1], moved[:, k : k + 1], normalised=False) for k in range(3)]
    whole = wasserstein_distance(images, moved, normalised=False)
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-9)
