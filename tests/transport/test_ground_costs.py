"""Support function, least budget, dilation and Lipschitz constant for every ground cost, against dense plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contracts import sparse_images
from plans import COSTS, cost_matrix, plan_cost, plan_gain, plan_samples
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.transport.dilation import dilate, lipschitz_constant
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.support import inner, least_budget, support, support_value

DOUBLE = torch.float64
BACKENDS = ("compiled", "torch")
SHAPES = ((1, 5, 5), (3, 5, 3), (1, 5, 6))
RADII = (0.0, 1e-3, 0.3, 50.0)


def functions_of(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Three functions: a rough one, one of few values, so that there are ties, and one that rises askew."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(1, *shape, generator=generator, dtype=DOUBLE)
    ties = torch.randint(-2, 3, (1, *shape), generator=generator).to(DOUBLE)
    height, width = shape[-2:]
    askew = torch.arange(height)[:, None] - 0.7 * torch.arange(width) + 0.05 * rough
    return torch.cat([rough, ties, askew])


@pytest.mark.parametrize("ground", COSTS)
def test_support_is_the_linear_program(ground: str) -> None:
    for seed, shape in enumerate(SHAPES):
        rows, images = functions_of(seed, shape), sparse_images(shape, 1, seed, (1.0, 0.0, 0.5)[seed])
        for radius in RADII:
            budget = radius * images.flatten(1).sum(1)
            exact = torch.tensor([[plan_gain(row, images[0], float(budget), ground) for row in rows]], dtype=DOUBLE)
            for backend in BACKENDS[: 1 + (seed < 2)]:
                found = support(rows, images, budget, maximiser=True, backend=backend, ground=ground)  # type: ignore[arg-type]
                torch.testing.assert_close(found.excess, exact, rtol=1e-7, atol=1e-9)
                check_maximiser(rows, images, budget, found.maximiser, exact, ground)
                # The multiplier attains the value in the dual problem.
                wide = rows.expand(len(images), *rows.shape)
                risen = inner_of(dilate(wide, found.multiplier, ground).value - wide, images)
                torch.testing.assert_close(budget[:, None] * found.multiplier + risen, exact, rtol=1e-7, atol=1e-9)
            single = support(rows.float(), images.float(), budget, ground=ground).excess.double()
            torch.testing.assert_close(single, exact, rtol=1e-4, atol=1e-5)
            assert (exact <= budget[:, None] * lipschitz_constant(rows, ground) * (1 + 1e-9) + 1e-9).all()


def inner_of(values: Tensor, images: Tensor) -> Tensor:
    return torch.einsum("bsp,bp->bs", values.flatten(2), images.flatten(1))


def check_maximiser(
    rows: Tensor, images: Tensor, budget: Tensor, moved: Tensor | None, exact: Tensor, ground: str
) -> None:
    """nu* >= 0, of the mass of mu in each channel, within the budget by an exact solver, and it attains the value."""
    assert moved is not None and (moved >= 0).all()
    masses = images[:, None].sum((-1, -2)).expand(-1, len(rows), -1)
    torch.testing.assert_close(moved.sum((-1, -2)), masses, rtol=1e-12, atol=0)
    gained = torch.einsum("bsp,sp->bs", (moved - images[:, None]).flatten(2), rows.flatten(1))
    torch.testing.assert_close(gained, exact, rtol=1e-7, atol=1e-9)
    for index in range(len(rows)):
        spent = wasserstein_distance(images, moved[:, index], ground, normalised=False)
        assert (spent <= budget * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("ground", COSTS)
def test_no_sample_gains_more(ground: str) -> None:
    images = sparse_images((2, 6, 6), 3, 5, 0.5)
    rows = functions_of(1, (2, 6, 6))
    for radius in (0.01, 0.3, 3.0):
        budget = radius * images.flatten(1).sum(1)
        points = plan_samples(images, budget, 60, ground)
        gains = torch.einsum("bnp,sp->bsn", (points - images[:, None]).flatten(2), rows.flatten(1)).amax(-1)
        assert (gains <= support(rows, images, budget, ground=ground).excess + 1e-11).all()


@pytest.mark.parametrize("ground", COSTS)
def test_least_budget_is_the_linear_program(ground: str) -> None:
    for seed, shape in enumerate(SHAPES[:2]):
        rows, images = functions_of(seed, shape), sparse_images(shape, 1, seed, 0.6)
        for share in (-1.0, 0.0, 1e-3, 0.6, 1e3):
            target = torch.full((1, 3), share * float(images.sum()), dtype=DOUBLE)
            for backend in BACKENDS:
                found = least_budget(rows, images, target, maximiser=True, backend=backend, ground=ground)  # type: ignore[arg-type]
                for index, row in enumerate(rows):
                    exact = plan_cost(row, images[0], max(0.0, float(target[0, index])), ground)
                    value = float(found.budget[0, index])
                    assert value == pytest.approx(exact, rel=1e-7, abs=1e-9)
                    assert found.maximiser is not None
                    nearest = found.maximiser[:, index]
                    if np.isfinite(exact) and share > 0:
                        assert float((row * (nearest - images[0])).sum()) == pytest.approx(float(target[0, index]))
                        spent = wasserstein_distance(images, nearest, ground, normalised=False)
                        assert float(spent) == pytest.approx(exact, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("ground", COSTS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_dilation_and_lipschitz_constant_by_brute_force(ground: str, dtype: torch.dtype) -> None:
    values = functions_of(4, (2, 6, 5)).to(dtype)
    cost = torch.from_numpy(cost_matrix(6, 5, ground))
    flat = values.flatten(-2).double()
    for slope in (0.0, 0.2, 1.0, 30.0):
        multiplier = torch.tensor([slope, slope / 2, slope], dtype=dtype)
        candidates = flat[..., None, :] - multiplier.double()[:, None, None, None] * cost.nan_to_num(posinf=1e30)
        candidates = torch.where(torch.isinf(cost), -torch.inf, candidates)
        found = dilate(values, multiplier, ground)
        best = candidates.amax(-1)
        torch.testing.assert_close(found.value.flatten(-2).double(), best, rtol=0, atol=1e-5)
        origin = found.origin.flatten(-2)
        torch.testing.assert_close(candidates.gather(-1, origin[..., None]).squeeze(-1), best, rtol=0, atol=1e-5)
        fee = cost.expand(*origin.shape, -1).gather(-1, origin[..., None]).squeeze(-1)
        torch.testing.assert_close(found.distance.flatten(-2).double(), fee, rtol=1e-6, atol=0)
    steepest = ((flat[..., None] - flat[..., None, :]).abs() / torch.where(cost > 0, cost, torch.inf)).amax(
        (-1, -2, -3)
    )
    compiled, plain = (lipschitz_constant(one, ground) for one in (values, values.clone().requires_grad_(True)))
    tolerance = 1e-12 if dtype == DOUBLE else 1e-6
    for constant in (compiled, plain.detach()):
        torch.testing.assert_close(constant.double(), steepest, rtol=tolerance, atol=0)
    assert torch.equal(dilate(values, compiled * (1 + 1e-6), ground).value, values)


@pytest.mark.parametrize("ground", ["l2", "l2^2", "local:3"])
def test_gradients_are_the_differences(ground: str) -> None:
    rows = functions_of(6, (1, 4, 5))[:1].expand(2, 1, 1, 4, 5).clone().requires_grad_(True)
    images = (sparse_images((1, 4, 5), 2, 6, 1.0) + 0.1).requires_grad_(True)
    budget = torch.tensor([0.3, 2.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, mu, eps: support_value(c, mu, eps, ground=ground), (rows, images, budget))


@pytest.mark.parametrize("ground", ["l2", "l2^2", "local:3"])
def test_gradient_in_the_image_at_budget_zero(ground: str) -> None:
    images = sparse_images((1, 4, 4), 1, 0, 1.0).requires_grad_(True)
    rows = functions_of(2, (1, 4, 4))
    support_value(rows, images, torch.zeros(1), ground=ground).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad[0], rows.sum(0))


def test_vanilla_of_powers_is_that_of_chained_steps() -> None:
    """d^p of two steps costs more than the steps one by one: Lip for l2^2 and for powers of l1 is that for l1."""
    rows = functions_of(3, (1, 7, 6))
    for ground in ("l2^2", "l1^2", "l1^3", "l2^2.5"):
        torch.testing.assert_close(lipschitz_constant(rows, ground), lipschitz_constant(rows), rtol=1e-15, atol=0)
    assert (lipschitz_constant(rows, "l2") >= lipschitz_constant(rows)).all()


def test_a_window_of_one_pixel_moves_nothing() -> None:
    images, rows = sparse_images((1, 4, 4), 1, 0), functions_of(0, (1, 4, 4))
    for backend in BACKENDS:
        found = support(rows, images, torch.ones(1), ground="local:1", backend=backend)  # type: ignore[arg-type]
        assert (found.excess == 0).all()
    assert (lipschitz_constant(rows, "local:1") == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("ground", ["l2", "local:3"])
def test_what_is_not_finite_proves_nothing(ground: str, value: float) -> None:
    rows = torch.where(torch.eye(4) > 0, value, functions_of(0, (1, 4, 4)))
    assert lipschitz_constant(rows, ground).isnan().all()
    for backend in BACKENDS:
        found: Any = support(rows, sparse_images((1, 4, 4), 1, 0), torch.ones(1), ground=ground, backend=backend)  # type: ignore[arg-type]
        assert found.excess.isnan().all()


def test_bad_ground_costs() -> None:
    rows, images = functions_of(0, (1, 4, 4)), sparse_images((1, 4, 4), 1, 0)
    for solve in (
        lambda name: support(rows, images, torch.ones(1), ground=name),
        lambda name: support_value(rows, images, torch.ones(1), ground=name),
        lambda name: least_budget(rows, images, torch.ones(1, 3), ground=name),
    ):
        with pytest.raises(UnknownNameError, match="unknown ground cost 'l3'"):
            solve("l3")
        with pytest.raises(InvalidInputError, match="given the power 0.5, expected a finite number p >= 1"):
            solve("l2^0.5")
        with pytest.raises(InvalidInputError, match="a window of 5 pixels on images of 4 x 4: expected at most 4"):
            solve("local:5")
    assert inner(rows, images).shape == (1, 3)
