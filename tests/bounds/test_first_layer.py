"""The first layer's bounds are exact on either side: each is a linear program of its own."""

from __future__ import annotations

import pytest
import torch
from contracts import largest_gain, random_network, sparse_images
from plans import COSTS, plan_gain
from torch import nn

from flowverify.ball import Threat
from flowverify.bounds.intervals import AffineValue
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
    threat = Threat(positive=feasible)
    value = AffineValue(network, network.output, torch.float64, threat)
    lower, upper = value.bounds(threat.ball(images, budget))
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


@pytest.mark.parametrize("ground", COSTS)
def test_exact_for_every_ground_cost(ground: str) -> None:
    network = random_network((2, 5, 5), [nn.Flatten(), nn.Linear(50, 3)], 4)
    images = sparse_images((2, 5, 5), 1, 6, 0.4)
    rows = network.nodes[-1].operation.get_parameter("weight").detach().reshape(-1, 2, 5, 5)
    centre = network(images).detach()[0]
    threat, loose = Threat(ground), Threat(ground, positive=False)
    value = AffineValue(network, network.output, torch.float64, threat)
    vanilla = AffineValue(network, network.output, torch.float64, loose)
    for radius in (0.05, 0.6, 4.0):
        budget = radius * images.flatten(1).sum(1)
        lower, upper = value.bounds(threat.ball(images, budget))
        free = vanilla.bounds(loose.ball(images, budget))
        for index, row in enumerate(rows):
            above, below = (plan_gain(sign * row, images[0], float(budget), ground) for sign in (1, -1))
            assert float(upper[0, index]) == pytest.approx(float(centre[index]) + above, rel=1e-7, abs=1e-9)
            assert float(lower[0, index]) == pytest.approx(float(centre[index]) - below, rel=1e-7, abs=1e-9)
        assert (free[0] <= lower + 1e-9).all() and (free[1] >= upper - 1e-9).all()
        label = torch.eye(3, dtype=torch.float64)[None, :2] - torch.eye(3, dtype=torch.float64)[None, 2:]
        margins = value.margins(label, threat.ball(images, budget))
        for index in range(2):
            gain = plan_gain(rows[2] - rows[index], images[0], float(budget), ground)
            exact = float(centre[index] - centre[2]) - gain
            assert float(margins[0, index]) == pytest.approx(exact, rel=1e-7, abs=1e-9)


def test_a_cap_tightens_the_first_layer() -> None:
    network = random_network((1, 6, 6), [nn.Flatten(), nn.Linear(36, 4)], 5)
    images = (1.5 * sparse_images((1, 6, 6), 1, 7)).clamp(max=1)
    rows = network.nodes[-1].operation.get_parameter("weight").detach().reshape(-1, 1, 6, 6)
    budget, centre = 0.3 * images.flatten(1).sum(1), network(images).detach()[0]
    free, capped = (
        AffineValue(network, network.output, torch.float64, threat).bounds(threat.ball(images, budget))
        for threat in (Threat("l2"), Threat("l2", 1.0))
    )
    for index, row in enumerate(rows):
        above, below = (plan_gain(sign * row, images[0], float(budget), "l2", 1.0) for sign in (1, -1))
        assert float(centre[index]) + above - 1e-9 <= float(capped[1][0, index]) < float(free[1][0, index])
        assert float(centre[index]) - below + 1e-9 >= float(capped[0][0, index]) > float(free[0][0, index])
