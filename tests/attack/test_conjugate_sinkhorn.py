"""The conjugate Sinkhorn bound: never below the exact support function, and as close as its entropy allows."""

import math

import pytest
import torch

from flowverify.attack import conjugate_sinkhorn
from flowverify.errors import InvalidInputError
from flowverify.transport.support import best_moves


def problem(seed=0, count=5, shape=(2, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images[:, :, :2] = 0
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64), images


@pytest.mark.parametrize("ground", ["l1", "l2"])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.5, 20.0])
def test_is_an_upper_bound_within_the_entropy(ground, radius):
    coefficients, images = problem()
    mass = images.flatten(1).sum(1)
    exact = (coefficients * images).flatten(1).sum(1)
    exact = exact + best_moves(coefficients, images, budget=radius * mass, ground=ground).gain
    scale = coefficients.flatten(1).amax(1) - coefficients.flatten(1).amin(1)
    for regularisation in (3.0, 1e2, 1e3, 1e5):
        bound = conjugate_sinkhorn(coefficients, images, radius * mass, ground, regularisation=regularisation)
        assert bool((bound >= exact - 1e-9 * exact.abs()).all())
        room = mass * scale * math.log(30) / regularisation
        assert bool((bound <= exact + room + 1e-4 * scale * mass * (radius == 0)).all())


def test_stopping_early_leaves_a_bound():
    coefficients, images = problem(1)
    budget = 0.2 * images.flatten(1).sum(1)
    exact = (coefficients * images).flatten(1).sum(1) + best_moves(coefficients, images, budget=budget).gain
    for iterations in (0, 1, 3):
        assert bool((conjugate_sinkhorn(coefficients, images, budget, iterations=iterations) >= exact - 1e-9).all())


def test_constant_coefficients():
    _, images = problem()
    budget = 0.2 * images.flatten(1).sum(1)
    bound = conjugate_sinkhorn(torch.full_like(images, 2.0), images, budget)
    torch.testing.assert_close(bound, 2 * images.flatten(1).sum(1), rtol=1e-9, atol=0)


def test_bad_input():
    coefficients, images = problem()
    with pytest.raises(InvalidInputError, match="expected"):
        conjugate_sinkhorn(coefficients[:2], images, torch.ones(5))
    with pytest.raises(InvalidInputError, match="expected > 0"):
        conjugate_sinkhorn(coefficients, images, -torch.ones(5))
    with pytest.raises(InvalidInputError, match="expected > 0"):
        conjugate_sinkhorn(coefficients, images, torch.ones(5), regularisation=0.0)
