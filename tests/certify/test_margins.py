"""What the margin engine refuses, falls back on, and does not let a batch change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowverify.certify.margins import MarginBounds
from flowverify.certify.verify import Certifier
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network


def pooled(kernel: int, stride: int) -> Network:
    torch.manual_seed(0)
    modules = [nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(kernel, stride), nn.ReLU(), nn.Flatten()]
    width = Network.sequential((1, 6, 6), modules).num_classes
    return Network.sequential((1, 6, 6), [*modules, nn.Linear(width, 3)])


def test_overlapping_pools_are_refused_where_auto_lirpa_would_break_down() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"layer '1_MaxPool2d': .*stride 2 and kernel size 3"):
        MarginBounds(pooled(3, 2), bound="crown")
    images = torch.rand(2, 1, 6, 6)
    bounds = MarginBounds(pooled(3, 2), bound="ibp").lower_bounds(images, torch.tensor([0, 1]), torch.zeros(2))
    assert bounds.shape == (2, 2)


def test_alpha_crown_through_a_pool_is_crown_and_says_so() -> None:
    images, labels, budget = torch.rand(2, 1, 6, 6), torch.tensor([0, 1]), torch.tensor([0.1, 0.2])
    optimised, plain = (MarginBounds(pooled(2, 2), bound=bound) for bound in ("alpha-crown", "crown"))
    assert torch.equal(optimised.lower_bounds(images, labels, budget), plain.lower_bounds(images, labels, budget))
    assert "cannot optimise slopes through MaxPool2d" in optimised.notes[0]
    certifier = Certifier(pooled(2, 2), "fine-tuned", "alpha-crown")
    predicted = pooled(2, 2)(images[:1]).argmax(1)
    assert "MaxPool2d" in certifier.search(images[:1], predicted)[0].note


@pytest.mark.parametrize("bound", ["crown", "best"])
def test_bounds_of_an_image_do_not_depend_on_its_batch(bound: str) -> None:
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)]
    network = Network.sequential((1, 6, 6), layers).double()
    images = torch.rand(8, 1, 6, 6, dtype=torch.float64)
    labels = network(images).argmax(1)
    budget = torch.linspace(0, 2, 8, dtype=torch.float64)
    engine = MarginBounds(network, bound=bound, dtype=torch.float64)
    together = engine.lower_bounds(images, labels, budget)
    for index in range(8):
        one = slice(index, index + 1)
        torch.testing.assert_close(
            engine.lower_bounds(images[one], labels[one], budget[one]), together[one], rtol=1e-9, atol=1e-9
        )
