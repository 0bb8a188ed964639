"""The support function of rows of moves against linear programmes, and what makes it sound whatever the search does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from contracts import sparse_images
from scipy.optimize import linprog
from torch import Tensor

from flowverify.bounds.lifted import kernel
from flowverify.bounds.lifted.moves import NEIGHBOURS
from flowverify.bounds.lifted.support import MoveRows, maximum, maximum_value, whole_grid
from flowverify.errors import InvalidInputError
from flowverify.transport.support import support

STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))
ORIGIN = torch.zeros(1, 2, dtype=torch.long)
KINDS = ("of pixels", "bent", "any")


def largest(gains: Tensor, image: Tensor, budget: float) -> float:
    """max G . m by HiGHS, moves written down one by one."""
    channels, height, width = image.shape
    index = np.arange(image.numel()).reshape(image.shape)
    moves = [
        (index[c, i, j], index[c, i + di, j + dj], float(gains[way, c, i, j]))
        for way, (di, dj) in enumerate(STEPS)
        for c in range(channels)
        for i in range(height)
        for j in range(width)
        if 0 <= i + di < height and 0 <= j + dj < width
    ]
    count = np.arange(len(moves))
    tails, heads, gain = (np.array(column) for column in zip(*moves, strict=True))
    leaving = scipy.sparse.coo_array(
        (np.r_[np.ones(len(moves)), -np.ones(len(moves))], (np.r_[tails, heads], np.r_[count, count])),
        shape=(image.numel(), len(moves)),
    )
    total = scipy.sparse.coo_array(np.ones((1, len(moves))))
    solution = linprog(
        -gain, A_ub=scipy.sparse.vstack([leaving, total]), b_ub=np.r_[image.flatten().numpy(), budget], method="highs"
    )
    assert solution.status == 0
    return -float(solution.fun)


def rows_of(kind: str, shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 1, count, *shape, generator=generator, dtype=torch.float64)
    gains = NEIGHBOURS.gains(pixels)
    if kind == "bent":
        return torch.maximum(gains, 0.3 * gains)
    if kind == "any":
        return torch.randn(gains.shape, generator=generator, dtype=torch.float64) * NEIGHBOURS.within(*shape[1:])
    return gains


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 3, 3), (1, 1, 6)])
@pytest.mark.parametrize("share", [0.02, 0.2, 3.0])
def test_equals_the_linear_programme(shape: tuple[int, int, int], kind: str, share: float, backend: str) -> None:
    image = sparse_images(shape, 1, 3)
    budget = share * image.sum().reshape(1)
    gains = rows_of(kind, shape, 4, 1)
    found = maximum(MoveRows(gains, ORIGIN), image, budget, tolerance=1e-9, flow=True, backend=backend)  # type: ignore[arg-type]
    for row in range(4):
        expected = largest(gains[0, 0, row], image[0], float(budget))
        value = float(found.value[0, row])
        assert value >= expected * (1 - 1e-9)
        assert value <= expected * (1 + (1e-7 if backend == "auto" else 2e-3)) + 1e-9


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 4, 4)])
def test_equals_the_support_function_of_pixels(shape: tuple[int, int, int], feasible: bool) -> None:
    images = sparse_images(shape, 2, 4)
    budget = 0.1 * images.flatten(1).sum(1)
    pixels = torch.randn(1, 1, 30, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = MoveRows(NEIGHBOURS.gains(pixels), ORIGIN)
    found = maximum(rows, images, budget, feasible=feasible, tolerance=1e-9).value
    if feasible:
        expected = support(pixels[0, 0], images, budget).excess
    else:
        expected = budget[:, None] * rows.gains[0, 0].flatten(1).amax(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flow_is_feasible_and_the_gradient(kind: str, backend: str) -> None:
    shape = (1, 4, 4)
    images = sparse_images(shape, 2, 7, share=1.0)
    budget = 0.05 * images.flatten(1).sum(1)
    rows = MoveRows(rows_of(kind, shape, 6, 2), ORIGIN)
    found = maximum(rows, images, budget, tolerance=1e-9, flow=True, backend=backend)  # type: ignore[arg-type]
    flow = found.flow
    assert flow is not None
    assert (flow >= 0).all()
    if backend == "auto":
        assert (flow.flatten(3).sum(3) <= budget[:, None, None] * (1 + 1e-9)).all()
        gained = (flow * rows.gains).flatten(3).sum(3)[:, 0]
        if kind != "any":  # the cycle of the largest mean may be longer than two moves
            torch.testing.assert_close(gained, found.value, rtol=1e-6, atol=0)
        gains = rows.gains.expand(2, -1, -1, -1, -1, -1, -1).clone().requires_grad_(True)
        maximum_value(MoveRows(gains, ORIGIN), images, budget, {"tolerance": 1e-9})[0].sum().backward()
        torch.testing.assert_close(gains.grad, flow)


def test_windows_are_rows_that_are_zero_outside() -> None:
    shape = (2, 6, 7)
    images = sparse_images(shape, 2, 1)
    budget = torch.tensor([0.5, 30.0], dtype=torch.float64)
    origins = torch.tensor([[0, 0], [-1, 3], [4, 5], [2, -2]])
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(2, 4, 3, 4, 2, 3, 4, generator=generator, dtype=torch.float64)
    windows = MoveRows(gains, origins)
    whole = MoveRows(whole_grid(windows, shape[1:])[:, None], ORIGIN)
    found = maximum(windows, images, budget, tolerance=1e-9).value
    expected = maximum(whole, images, budget, tolerance=1e-9).value
    assert (found >= expected * (1 - 1e-9)).all()
    # Moves of a window that leave the grid are not part of the programme, but may raise the first multiplier.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    for image in range(2):
        for row in (0, 5, 11):
            value = largest(whole.gains[image, 0, row], images[image], float(budget[image]))
            assert float(found[image, row]) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_prices_that_did_not_settle_give_a_sound_bound(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sweep short: the check raises the multiplier by what is violated."""
    shape = (1, 4, 5)
    image = sparse_images(shape, 1, 3)
    gains = rows_of(kind, shape, 8, 5)
    budget = 0.1 * image.sum().reshape(1)
    whole = [largest(gains[0, 0, row], image[0], float(budget)) for row in range(8)]

    prices = kernel._prices.py_func

    def no_hand_on(gains_: Any, offsets: Any, starts: Any, count: int, *rest: Any) -> Any:
        return prices(gains_, offsets, starts, count // 2, *rest)

    monkeypatch.setattr(kernel, "_prices", no_hand_on)
    place = (0, 0, 4, 5)
    values, multipliers = np.empty(8), np.empty(8)
    kernel.solve_rows.py_func(
        gains[0, 0].flatten(1).numpy(), False, np.zeros((1, 2), np.int64), 8, place[2:], shape, image.flatten().numpy(),
        float(budget), True, np.full(8, -np.inf), np.zeros(8), 1e-6, 0, 8, values, multipliers, np.empty((0, 80)),
    )  # fmt: skip
    assert (values >= np.array(whole) * (1 - 1e-12)).all()


def test_more_budget_never_gains_less_and_a_value_that_is_enough_ends_the_search() -> None:
    image = sparse_images((1, 5, 5), 1, 2)
    rows = MoveRows(rows_of("bent", (1, 5, 5), 20, 3), ORIGIN)
    values = [maximum(rows, image, torch.tensor([b], dtype=torch.float64)).value for b in (0.0, 0.1, 0.2, 1.0, 50.0)]
    assert (values[0] == 0).all()
    for less, more in itertools.pairwise(values):
        assert (less <= more * (1 + 2e-4)).all()
    simple = 0.2 * rows.gains[0, 0].flatten(1).amax(1)
    enough = torch.full((1, 20), 1e9, dtype=torch.float64)
    found = maximum(rows, image, torch.tensor([0.2], dtype=torch.float64), enough=enough).value
    torch.testing.assert_close(found[0], simple, rtol=1e-12, atol=0)
    assert (values[2] <= found).all()
    useless = maximum(rows, image, torch.tensor([0.2], dtype=torch.float64), enough=enough * torch.inf).value
    assert (useless >= found).all()


def test_what_is_not_finite_bounds_nothing_and_shapes_are_checked() -> None:
    image = sparse_images((1, 3, 3), 1, 2)
    budget = torch.tensor([0.1], dtype=torch.float64)
    gains = rows_of("bent", (1, 3, 3), 3, 3)
    gains[0, 0, 1, 0, 0, 1, 1] = torch.nan
    for backend in ("auto", "torch"):
        found = maximum(MoveRows(gains, ORIGIN), image, budget, backend=backend).value  # type: ignore[arg-type]
        assert torch.isnan(found[0, 1])
    with pytest.raises(InvalidInputError, match=r"gains of shape .*: expected \(1, 1, R, 4, 1, h, w\)"):
        maximum(MoveRows(gains[:, :, :, :3], ORIGIN), image, budget)
