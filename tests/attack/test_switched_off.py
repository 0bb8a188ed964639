"""Attacks where the ReLUs that change the class are off at the image, so that the gradient is 0 or leads elsewhere."""

import math

import pytest
import torch
from torch import nn

from flowverify.attack import make_attack
from flowverify.attack.base import AttackedModel, LeakyGradients
from flowverify.ball import Threat
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.network import load_network
from flowverify.network.subject import Subject

SIZE = 6
IMAGE = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
IMAGE[0, 0, 2, 2] = IMAGE[0, 0, 2, 3] = 0.5  # mass 1, in row 2
LABEL = torch.tensor([0])


def switched_off(distraction: float = 0.0) -> nn.Module:
    """f_1 - f_0 = relu(mean row - 2.1) - 0.1 + distraction relu(mean column): the class changes at mean row 2.2.

    So the radius is 0.2; the mean column, at most 5, leads to no other class.
    """
    rows = torch.arange(SIZE, dtype=torch.float64)[:, None].expand(SIZE, SIZE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([rows.flatten(), rows.T.flatten()]))
        network[1].bias.copy_(torch.tensor([-2.1, 0.0]))
        network[3].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, distraction]]))
        network[3].bias.copy_(torch.tensor([0.1, 0.0]))
    return network


@pytest.mark.parametrize(("name", "at_most"), [("minimal", 0.2001), ("frank-wolfe", 0.201), ("flow-pgd", 0.25)])
def test_a_relu_is_switched_on(name: str, at_most: float) -> None:
    found = make_attack(name, switched_off()).minimise(IMAGE, LABEL)
    assert found.outcome == ("found",)
    assert 0.2 <= float(found.radius) <= at_most


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_a_gradient_that_leads_nowhere_is_left(effort: str) -> None:
    network = switched_off(distraction=1e-3)
    found = make_attack("minimal", network, effort=effort).minimise(IMAGE, LABEL)
    assert found.outcome == ("found",)
    assert 0.19 <= float(found.radius) <= 0.2


def test_certifieres_descend_from_there() -> None:
    nearest = NearestCounterexample(Subject(load_network(switched_off(), (1, SIZE, SIZE))), IMAGE[0], 0, Threat())
    nearest.descend()
    assert nearest.budget == pytest.approx(0.2, rel=1e-3)


def test_leaky_gradients_keep_values_and_are_a_relu_s_where_it_is_on() -> None:
    network, point = switched_off(), IMAGE.clone()
    point[0, 0, 2], point[0, 0, 3, 1] = 0.0, 1.0
    model = AttackedModel(network)
    for image in (IMAGE, point):
        plain, gradient = model._differentiated(image, lambda logits: logits[:, 1])
        with LeakyGradients(0.25):
            leaky, other = model._differentiated(image, lambda logits: logits[:, 1])
        torch.testing.assert_close(plain, leaky, rtol=0, atol=1e-15)
        share = 1.0 if bool(gradient.any()) else 0.25
        expected = share * network[1].weight[0].reshape(IMAGE.shape)
        torch.testing.assert_close(other, expected)
    assert not math.isclose(float(plain), 0.0)
