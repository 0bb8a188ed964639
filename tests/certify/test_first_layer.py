"""The first layer's bounds are exact on either side: each is a linear program of its own."""

from __future__ import annotations

import pytest
import torch
from contracts import largest_gain, random_network, sparse_images
from torch import nn

from flowverify.certify.first_layer import AffineValue
from flowverify.network import ScaleShift


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(), nn.Linear(50, 6)],
        [ScaleShift(torch.tensor(-2.0), torch.tensor(0.3)), nn.Conv2d(2, 3, 3, 2, 1), nn.Flatten()],
    ],
    ids=["linear", "normalised convolution"],
)
def test_both_ends_are_attained(layers: list[nn.Module], feasible: bool) -> None:
    network = random_network((2, 5, 5), layers, 1)
    images = sparse_images((2, 5, 5), 2, 3, 0.15)  # few pixels hold mass, so that up and down differ
    budget = torch.tensor([0.1, 0.6], dtype=torch.float64) * images.flatten(1).sum(1)
    lower, upper = AffineValue(network, network.output, torch.float64).bounds(images, budget, feasible, None, None)
    values = network(images)
    assert lower.shape == upper.shape == values.shape
    basis = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    rows = (network(basis) - network(torch.zeros(1, 2, 5, 5, dtype=torch.float64))).T.reshape(-1, 2, 5, 5)
    uneven = 0
    for image in range(2):
        for unit in range(0, rows.shape[0], 3):
            if feasible:
                above, below = (
                    largest_gain(sign * rows[unit], images[image], float(budget[image])) for sign in (1, -1)
                )
            else:  # budget times the steepest step between neighbours, either way
                steps = torch.cat([rows[unit].diff(dim=-1).flatten(), rows[unit].diff(dim=-2).flatten()])
                above = below = float(budget[image] * steps.abs().max())
            uneven += abs(above - below) > 0.05 * above
            assert float(upper[image, unit] - values[image, unit]) == pytest.approx(above, rel=1e-6, abs=1e-9)
            assert float(values[image, unit] - lower[image, unit]) == pytest.approx(below, rel=1e-6, abs=1e-9)
    assert uneven > 0 or not feasible
