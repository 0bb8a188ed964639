"""The support function with a cap: never below the linear program, never above the value without, and close."""

from __future__ import annotations

import pytest
import torch
from contracts import sparse_images
from plans import plan_gain
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport import support as support_module
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.support import best_moves, support, support_value

DOUBLE = torch.float64
GROUNDS = ("l1", "l2", "l2^2", "local:3", "local:5^2")
SHAPES = ((1, 5, 5), (2, 5, 6), (1, 6, 6))


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A rough function, one with ties, and an image of which many pixels are at the cap of 1, and many empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[seed % 3]
    rough = torch.randn(1, *shape, generator=generator, dtype=DOUBLE)
    rows = torch.cat([rough, torch.randint(-2, 3, rough.shape, generator=generator).to(DOUBLE)])
    return rows, (1.5 * sparse_images(shape, 1, seed, 0.6)).clamp(max=1)


@pytest.mark.parametrize("ground", GROUNDS)
def test_between_the_linear_program_and_the_value_without(ground: str) -> None:
    close = []
    for seed in range(3):
        rows, images = problem(seed)
        for radius in (0.0, 0.02, 0.3, 50.0):
            budget = radius * images.flatten(1).sum(1)
            exact = torch.tensor(
                [[plan_gain(row, images[0], float(budget), ground, 1.0) for row in rows]], dtype=DOUBLE
            )
            free = support(rows, images, budget, ground=ground).excess
            for backend in ("compiled", "torch"):
                found = support(rows, images, budget, ground=ground, cap=1.0, backend=backend).excess  # type: ignore[arg-type]
                assert (found >= exact - 1e-9).all()
                assert (found <= free * (1 + 1e-12)).all()
            single = support(rows.float(), images.float(), budget, ground=ground, cap=1.0).excess
            assert (single >= exact - 1e-5).all()
            matters = (free > 1.01 * exact) & (radius < 1)
            close += [((free - found) / (free - exact))[matters]]
            high = support(rows, images, budget, ground=ground, cap=float(images.sum())).excess
            torch.testing.assert_close(high, free, rtol=1e-12, atol=0)
    # Most of what the cap is worth is found.
    assert float(torch.cat(close).median()) > 0.6


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 3.0])
def test_every_price_gives_a_bound(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak duality, whatever the steps do."""
    monkeypatch.setattr(support_module, "FIRST_SHARE", share)
    rows, images = problem(1)
    budget = 0.2 * images.flatten(1).sum(1)
    exact = torch.tensor([[plan_gain(row, images[0], float(budget), "l2", 1.0) for row in rows]], dtype=DOUBLE)
    for steps in (0, 1, 4, 40):
        for backend in ("compiled", "torch"):
            found = support_module.support_capped(rows, images, budget, 1.0, ground="l2", steps=steps, backend=backend)  # type: ignore[arg-type]
            assert (found.excess >= exact - 1e-9).all()


def test_the_gradient_is_that_of_the_bound() -> None:
    rows, images = problem(2)
    budget = 0.2 * images.flatten(1).sum(1)
    found = support_module.support_capped(rows, images, budget, 1.0, maximiser=True)
    assert found.reduced is not None and found.maximiser is not None
    prices = rows - found.reduced
    assert (prices >= 0).all() and (prices > 0).any()
    # The bound, from its parts.
    gained = ((found.maximiser - images[:, None]) * found.reduced).flatten(2).sum(-1)
    total = gained + (prices * (1 - images[:, None])).flatten(2).sum(-1)
    torch.testing.assert_close(total, found.excess, rtol=1e-9, atol=1e-12)
    variable = rows.clone().requires_grad_(True)
    support_value(variable, images, budget, cap=1.0).sum().backward()
    assert variable.grad is not None
    torch.testing.assert_close(variable.grad, found.maximiser[0])


@pytest.mark.parametrize("ground", ["l2^2", "local:3", "local:3:l1", "l1^2"])
def test_capped_moves_cost_what_they_say(ground: str) -> None:
    """Where the cost is no metric, moves may not be chained."""
    rows, images = problem(0)
    for radius in (0.05, 0.5, 5.0):
        budget = radius * images.flatten(1).sum(1)
        for row in rows:
            found = best_moves(row[None], images, budget=budget, ground=ground, cap=1.0)
            assert (found.image >= 0).all() and (found.image <= 1).all()
            torch.testing.assert_close(found.image.sum((-1, -2)), images.sum((-1, -2)), rtol=1e-12, atol=0)
            spent = wasserstein_distance(images, found.image, ground, normalised=False, mass_tolerance=1e-9)
            assert float(spent) <= float(found.cost) * (1 + 1e-9) + 1e-12 and float(found.cost) <= float(budget) * (
                1 + 1e-9
            )
            best = plan_gain(row, images[0], float(budget), ground, 1.0)
            assert 0.5 * best <= float(found.gain) <= best * (1 + 1e-9) + 1e-12


def test_a_pixel_above_the_cap() -> None:
    rows, images = problem(0)
    with pytest.raises(InvalidInputError, match=r"image 0 has a pixel of 1: expected at most the cap, 0\.9"):
        support(rows, images, torch.ones(1), cap=0.9)
