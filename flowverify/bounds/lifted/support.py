"""The support function of rows of moves: the exact maximum of G . m over the ball, and bounds of it from any prices.

A *move* carries mass from a pixel to one of its four neighbours. m >= 0 is how much each move carries: the polytope is

    {m >= 0 : sum(m) <= eps,  mu_i + (what enters i) - (what leaves i) >= 0 for every pixel i},

and without positivity the second condition is missing. By linear programming duality (theory, section 21)

    max G . m = min over lambda >= 0 of  lambda eps + mu . y,

y the least prices >= 0 with y_i >= y_j + G_(i -> j) - lambda for every move i -> j: a problem of longest paths. Every
(lambda, y) that fulfils the inequalities gives an upper bound, whatever found it; lambda >= max G takes y = 0, the
value without positivity, so that the result is never worse. For G_(i -> j) = c_j - c_i it is the support function of
:mod:`flowverify.transport.support`.

Gains are stored as planes by the pixel that the mass leaves: G[way, channel, row, column], the ways being to the right,
to the left, down and up. A row may be a *window*: planes over a part of the grid, outside of which it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.backend import Backend, use_compiled

WAYS = 4
DOWNWARD = (0, 0, 1, -1)
RIGHTWARD = (1, -1, 0, 0)
SEARCH_STEPS = 16
ROUNDS = 200
UNIT = 2.0**-53


@dataclass(frozen=True, eq=False)
class MoveRows:
    """Gains of moves, a batch of rows for each of B images.

    Attributes:
        gains: (B, Q, R, 4, C, h, w): R rows at each of Q places. B or Q may be 1 for rows that all share.
        origins: (Q, 2), where the window of each place stands in the image; it may reach beyond the image.
    """

    gains: Tensor
    origins: Tensor

    @property
    def count(self) -> int:
        """Rows an image."""
        return len(self.origins) * self.gains.shape[2]


@dataclass(frozen=True)
class MoveSupport:
    """Upper bounds of max G . m, (B, Q * R) in float64, and the lambda of each; maybe a maximiser, as the gains."""

    value: Tensor
    multiplier: Tensor
    flow: Tensor | None


def gains_of_pixels(coefficients: Tensor) -> Tensor:
    """G_(i -> j) = c_j - c_i of coefficients (..., C, H, W), planes (..., 4, C, H, W); 0 where a move would leave."""
    *leading, height, width = coefficients.shape
    gains = coefficients.new_zeros(*leading[:-1], WAYS, leading[-1], height, width)
    right = coefficients[..., :, 1:] - coefficients[..., :, :-1]
    down = coefficients[..., 1:, :] - coefficients[..., :-1, :]
    gains[..., 0, :, :, :-1], gains[..., 1, :, :, 1:] = right, -right
    gains[..., 2, :, :-1, :], gains[..., 3, :, 1:, :] = down, -down
    return gains


def moves_within(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Which moves of a grid stay in it, (4, 1, H, W)."""
    mask = torch.ones(WAYS, 1, height, width, dtype=torch.bool, device=device)
    mask[0, :, :, -1] = mask[1, :, :, 0] = mask[2, :, -1] = mask[3, :, 0] = False
    return mask


def maximum(
    rows: MoveRows,
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    *,
    feasible: bool = True,
    enough: Tensor | None = None,
    guess: Tensor | None = None,
    tolerance: float | None = None,
    flow: bool = False,
    backend: Backend = "auto",
) -> MoveSupport:
    """Upper bounds of max G . m over the ball around each image, within ``tolerance`` of the maximum.

    Args:
        rows: gains of moves; entries of moves that leave the grid are not read.
        feasible: whether images must stay nonnegative (fine-tuned), or not (vanilla).
        enough: (B, Q * R), values at which a row needs no further search; infinite where none is needed.
        guess: multipliers (B, Q * R) to start from, 0 where there is none.
        tolerance: relative to the value, 1e-4 by default. The result is an upper bound whatever it is.
        flow: also return a maximiser within the windows.

    Raises:
        InvalidInputError: shapes that do not fit.

    Rows that are not finite have the value NaN.
    """
    images = images.detach().double()
    budget = budget.detach().double().to(images.device)
    batch, shape = images.shape[0], (images.shape[0], rows.count)
    gains = rows.gains.detach()
    fits = gains.ndim == 7 and gains.shape[3] == WAYS and gains.shape[4] == images.shape[1]
    if not fits or gains.shape[0] not in (1, batch) or gains.shape[1] not in (1, len(rows.origins)):
        raise InvalidInputError(
            f"gains of shape {tuple(gains.shape)}: expected ({batch}, {len(rows.origins)}, R, 4, {images.shape[1]}, "
            "h, w)"
        )
    tolerance = 1e-4 if tolerance is None else tolerance
    limits = torch.full(shape, -torch.inf, dtype=torch.float64) if enough is None else enough.double()
    guesses = torch.zeros(shape, dtype=torch.float64) if guess is None else guess.double()
    if use_compiled(backend, gains):
        return _compiled(rows, gains, images, budget, feasible, limits, guesses, tolerance, flow)
    whole = whole_grid(MoveRows(gains, rows.origins), images.shape[-2:]).double()
    value, multiplier, moved = _vanilla(whole, budget) if not feasible else _swept(whole, images, budget)
    part = None if not flow else windows_of(moved, rows).to(gains)
    return MoveSupport(value, multiplier, part)


class _Maximum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gains: Tensor, origins: Tensor, images: Tensor, budget: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        found = maximum(MoveRows(gains, origins), images, budget, flow=True, **options)
        ctx.save_for_backward(found.flow)
        ctx.shape = gains.shape
        ctx.mark_non_differentiable(found.multiplier)
        return found.value.to(gains.dtype), found.multiplier

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (flow,) = ctx.saved_tensors
        weighted = gradient.reshape(*flow.shape[:3], 1, 1, 1, 1) * flow
        for dim in (0, 1):
            if ctx.shape[dim] == 1 and weighted.shape[dim] > 1:
                weighted = weighted.sum(dim, keepdim=True)
        return weighted, None, None, None, None


def maximum_value(rows: MoveRows, images: Tensor, budget: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """:func:`maximum`'s value, and its multiplier.

    The value is differentiable in the gains: the gradient is the maximiser (Danskin's theorem).
    """
    found: tuple[Tensor, Tensor] = _Maximum.apply(  # type: ignore[no-untyped-call]
        rows.gains, rows.origins, images, budget, options
    )
    return found


def _compiled(
    rows: MoveRows,
    gains: Tensor,
    images: Tensor,
    budget: Tensor,
    feasible: bool,
    enough: Tensor,
    guess: Tensor,
    tolerance: float,
    flow: bool,
) -> MoveSupport:
    from flowverify.bounds.lifted import kernel

    batch, places, per_place = images.shape[0], len(rows.origins), gains.shape[2]
    shared = gains.shape[1] == 1 and places > 1
    entries = gains.shape[3:].numel()
    flat = gains.reshape(gains.shape[0], -1, entries).contiguous().numpy()
    origins = rows.origins.cpu().numpy().astype(np.int64)
    mass, budgets = images.flatten(1).contiguous().numpy(), budget.numpy()
    count = rows.count
    values, multipliers = np.empty((batch, count)), np.empty((batch, count))
    flows = np.zeros((batch, count if flow else 0, entries), flat.dtype)
    limits, guesses = enough.contiguous().numpy(), guess.contiguous().numpy()
    window, shape = tuple(gains.shape[-2:]), tuple(images.shape[1:])
    workers = max(1, torch.get_num_threads())
    size = max(16, -(-count // workers))

    def work(job: tuple[int, int]) -> None:
        index, first = job
        kernel.solve_rows(
            flat[index if len(flat) > 1 else 0], shared, origins, per_place, window, shape, mass[index],
            float(budgets[index]), feasible, limits[index], guesses[index], tolerance, first, min(count, first + size),
            values[index], multipliers[index], flows[index],
        )  # fmt: skip

    jobs = [(index, first) for index in range(batch) for first in range(0, count, size)]
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            work(job)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, jobs))
    moved = torch.from_numpy(flows).reshape(batch, places, per_place, *gains.shape[3:]) if flow else None
    return MoveSupport(torch.from_numpy(values), torch.from_numpy(multipliers), moved)


def whole_grid(rows: MoveRows, size: Sequence[int]) -> Tensor:
    """The rows on the whole grid, (B, Q * R, 4, C, H, W); moves that leave it gain 0."""
    gains, (height, width) = rows.gains, size
    gains = gains.expand(gains.shape[0], len(rows.origins), *gains.shape[2:])
    h, w = gains.shape[-2:]
    if (h, w) == (height, width) and not bool(rows.origins.any()):
        whole = gains
    else:
        index, inside = _pixels(rows.origins, (h, w), (height, width))
        flat = (gains * inside[:, None, None, None]).flatten(-2)
        whole = gains.new_zeros(*gains.shape[:-2], height * width)
        at = index.flatten(1)[None, :, None, None, None]
        whole = whole.scatter_add(-1, at.expand(flat.shape), flat).reshape(*gains.shape[:-2], height, width)
    return whole.flatten(1, 2) * moves_within(height, width, gains.device)


def _pixels(origins: Tensor, window: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the pixels of windows stand in the flattened grid, (Q, h, w), and which of them do."""
    i = origins[:, 0, None] + torch.arange(window[0], device=origins.device)
    j = origins[:, 1, None] + torch.arange(window[1], device=origins.device)
    inside = ((i >= 0) & (i < size[0]))[:, :, None] & ((j >= 0) & (j < size[1]))[:, None]
    return i.clamp(0, size[0] - 1)[:, :, None] * size[1] + j.clamp(0, size[1] - 1)[:, None], inside


def windows_of(planes: Tensor, rows: MoveRows) -> Tensor:
    """The windows of planes (B, Q * R, 4, C, H, W), with the shape of the rows: the adjoint of :func:`whole_grid`."""
    size, window = planes.shape[-2:], rows.gains.shape[-2:]
    inner = planes * moves_within(size[0], size[1], planes.device)
    planes = inner.reshape(len(planes), len(rows.origins), -1, *planes.shape[2:])
    index, inside = _pixels(rows.origins, window, size)
    at = index.flatten(1)[None, :, None, None, None]
    found = planes.flatten(-2).gather(-1, at.expand(*planes.shape[:-2], at.shape[-1]))
    result: Tensor = found.reshape(*found.shape[:-1], *window) * inside[:, None, None, None]
    return result


def _vanilla(gains: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steepest, at = gains.flatten(2).max(2)
    steepest = torch.where(torch.isnan(steepest), steepest, steepest.clamp(min=0))
    moved = torch.zeros_like(gains.flatten(2)).scatter(2, at[..., None], 1.0) * budget.reshape(-1, 1, 1)
    moved = moved * (steepest > 0)[..., None]
    value = steepest * budget[:, None] * (1 + 8 * UNIT)
    return value, steepest.expand_as(value), moved.reshape(*value.shape, *gains.shape[2:])


def _swept(gains: Tensor, images: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same search in torch, all rows at once: prices by sweeps that repeat until nothing changes."""
    mass = images[:, None]
    batch = max(gains.shape[0], images.shape[0])
    gains = gains.expand(batch, *gains.shape[1:])
    budget = budget[:, None]
    high = gains.flatten(2).amax(2).clamp(min=0)
    high_value, high_cost = high * budget, torch.zeros_like(high)
    best, best_at = high_value.clone(), high.clone()
    pairs = gains[:, :, 0, ..., :-1] + gains[:, :, 1, ..., 1:], gains[:, :, 2, ..., :-1, :] + gains[:, :, 3, ..., 1:, :]
    low = (
        torch.stack([pair.flatten(2).amax(2) if pair.numel() else 0 * high for pair in pairs]).amax(0).clamp(min=0) / 2
    )
    low_value, low_slope = torch.zeros_like(high), torch.zeros_like(high)
    known = torch.zeros_like(high, dtype=torch.bool)
    for _ in range(SEARCH_STEPS):
        high_slope = budget - high_cost
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        trial = torch.where(known & (crossing > low) & (crossing < high), crossing, (low + high) / 2)
        prices, cost_of, settled = _relax(gains, trial)
        value = trial * budget + (mass * prices).flatten(2).sum(2)
        cost = (mass * cost_of).flatten(2).sum(2)
        better = settled & (value < best)
        best, best_at = torch.where(better, value, best), torch.where(better, trial, best_at)
        right = settled & (cost <= budget)
        high, high_value, high_cost = (
            torch.where(right, new, old) for new, old in ((trial, high), (value, high_value), (cost, high_cost))
        )
        left = ~right
        low, low_value, low_slope = (
            torch.where(left, new, old) for new, old in ((trial, low), (value, low_value), (budget - cost, low_slope))
        )
        known = torch.where(left, settled & (cost > budget), known)
    prices, _, _ = _relax(gains, best_at)
    violation = (_handed_on(gains, prices, best_at)[0] - prices).flatten(2).amax(2).clamp(min=0)
    size = torch.maximum(gains.abs().flatten(2).amax(2), prices.flatten(2).amax(2)) + best_at
    price = best_at + violation + 16 * UNIT * size
    value = (price * budget + (mass * prices).flatten(2).sum(2)) * (1 + (images[0].numel() + 8) * 2 * UNIT)
    simple = gains.flatten(2).amax(2).clamp(min=0) * budget * (1 + 8 * UNIT)
    return torch.minimum(value, simple), best_at, _flow(gains, best_at, mass)


def _neighbour(values: Tensor, way: int) -> Tensor:
    """At each pixel, the value at the pixel that the move leads to; -inf where it leaves the grid."""
    pad, kept = torch.nn.functional.pad, -torch.inf
    if way == 0:
        return pad(values[..., :, 1:], (0, 1), value=kept)
    if way == 1:
        return pad(values[..., :, :-1], (1, 0), value=kept)
    if way == 2:
        return pad(values[..., 1:, :], (0, 0, 0, 1), value=kept)
    return pad(values[..., :-1, :], (0, 0, 1, 0), value=kept)


def _handed_on(gains: Tensor, prices: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """The largest y_j + G_(i -> j) - lambda at each pixel i, and the way."""
    offers = torch.stack([_neighbour(prices, way) + gains[:, :, way] for way in range(WAYS)])
    best, way = offers.max(0)
    return best - multiplier[..., None, None, None], way


def _relax(gains: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prices, the number of moves of each pixel's path, and whether they have settled."""
    prices = torch.zeros_like(gains[:, :, 0])
    steps = torch.zeros_like(prices)
    rows_changed = torch.ones_like(multiplier, dtype=torch.bool)
    for _ in range(min(ROUNDS, 2 * sum(prices.shape[-2:]))):
        offer, way = _handed_on(gains, prices, multiplier)
        better = offer > prices * (1 + 1e-12)
        rows_changed = better.flatten(2).any(2)
        if not bool(rows_changed.any()):
            break
        ahead = torch.stack([_neighbour(steps, k) for k in range(WAYS)]).gather(0, way[None])[0]
        prices, steps = torch.where(better, offer, prices), torch.where(better, ahead + 1, steps)
    return prices, steps, ~rows_changed


def _flow(gains: Tensor, multiplier: Tensor, mass: Tensor) -> Tensor:
    """What flows where all mass takes its path at this multiplier: mass is handed on, step by step."""
    prices, _, _ = _relax(gains, multiplier)
    _, way = _handed_on(gains, prices, multiplier)
    moving = prices > 0
    here = mass.expand_as(prices) * moving
    flow = torch.zeros_like(gains)
    one_hot = torch.nn.functional.one_hot(way, WAYS).movedim(-1, 2) * moving[:, :, None]
    for _ in range(min(ROUNDS, 2 * sum(prices.shape[-2:]))):
        sent = one_hot * here[:, :, None]
        flow = flow + sent
        pad = torch.nn.functional.pad
        here = (
            pad(sent[:, :, 0, ..., :, :-1], (1, 0)) + pad(sent[:, :, 1, ..., :, 1:], (0, 1))
            + pad(sent[:, :, 2, ..., :-1, :], (0, 0, 1, 0)) + pad(sent[:, :, 3, ..., 1:, :], (0, 0, 0, 1))
        ) * moving  # fmt: skip
        if not bool((here > 0).any()):
            break
    return flow
