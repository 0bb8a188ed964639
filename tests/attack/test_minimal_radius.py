"""The minimal-radius attack reaches what is known exactly, and is the strongest here."""

import pytest
import torch
from problems import assert_claims_hold, digits
from torch import nn

from flowverify.attack import Binarised, FlowDescent, FrankWolfe, MinimalRadius, binarise
from flowverify.ball import WassersteinBall
from flowverify.certifiers.linear import LinearCertifier
from flowverify.errors import InvalidInputError
from flowverify.network import load_network


def linear_problem(count=30, channels=1):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 49, 5)).double()
    images = torch.rand(count, channels, 7, 7, dtype=torch.float64)
    images[:, :, 2:4] = 0
    return network, images, network(images).argmax(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_reaches_the_exact_radius_of_a_linear_network(channels):
    network, images, labels = linear_problem(channels=channels)
    exact = LinearCertifier(load_network(network, images.shape[1:])).radii(images, labels).radius
    found = MinimalRadius(network).minimise(images, labels)
    assert bool((found.radius >= exact * (1 - 1e-9)).all())
    assert float((found.radius / exact).max()) <= 1.001


def test_at_most_the_others():
    network, images, labels = digits(5)
    best = MinimalRadius(network).minimise(images, labels).radius.median()
    for other in (FrankWolfe(network), FlowDescent(network)):
        assert best <= 1.001 * other.minimise(images, labels).radius.median()


def test_more_effort_is_no_worse():
    network, images, labels = digits(20)
    fast, normal = (
        MinimalRadius(network, effort=effort).minimise(images, labels).radius for effort in ("fast", "normal")
    )
    assert normal.median() <= fast.median()


def test_a_radius_that_is_enough_ends_the_search():
    network, images, labels = digits(10)
    nearest = MinimalRadius(network).minimise(images, labels)
    ball = WassersteinBall(float(nearest.radius.max()) * 1.01)
    found = MinimalRadius(network).run(images, labels, ball)
    assert bool(found.found.all())
    assert_claims_hold(found, network, images, labels, ball.radius)


class TestBinarised:
    def test_is_the_network_of_binary_images(self):
        network, images, labels = digits(8)
        defended = Binarised(network, 0.4)
        assert torch.equal(defended(images), network((images >= 0.4).float()))
        assert set(binarise(images, 0.4).unique().tolist()) == {0, 1}
        result = MinimalRadius(defended).minimise(images, labels)
        assert_claims_hold(result, defended, images, labels)
        assert result.outcome.count("found") >= 4

    def test_derivatives(self):
        images = torch.tensor([[[[0.2, 0.5, 3.0]]]], requires_grad=True)
        Binarised(nn.Identity())(images).sum().backward()
        assert images.grad.flatten().tolist() == [1, 1, 1]
        images.grad = None
        Binarised(nn.Identity(), steepness=4.0)(images).sum().backward()
        assert images.grad.flatten()[1] == 1 and 0 < images.grad.flatten()[2] < 1e-3

    def test_bad_input(self):
        with pytest.raises(InvalidInputError, match="expected a torch.nn.Module"):
            Binarised(lambda x: x)
        with pytest.raises(InvalidInputError, match="expected finite numbers"):
            Binarised(nn.Identity(), float("nan"))
