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

Compiled kernels do this on the CPU; in torch it is done for all rows at once. With prices d(o) of moves the dual is

    max G . m = min over lambda >= 0 of  lambda eps + mu . y,      y_i >= y_j + G_(i -> j) - lambda d(i, j),

without y_j where moves are single (theory, section 22): then y is a maximum, else sweeps repeat until nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves, shifted
from flowverify.errors import InvalidInputError
from flowverify.transport.compiled import Backend, use_compiled

WAYS = len(NEIGHBOURS)
ROWS_AT_ONCE = 64  # of one image: as many as a cache holds in float64
DOWNWARD, RIGHTWARD = zip(*NEIGHBOURS.offsets, strict=True)


@dataclass(frozen=True, eq=False)
class MoveRows:
    """Gains of moves, a batch of rows for each of B images.

    Attributes:
        gains: (B, Q, R, 4, C, h, w): R rows at each of Q places. B or Q may be 1 for rows that all share.
        origins: (Q, 2), where the window of each place stands in the image; it may reach beyond the image.
        multipliers: (B, Q * R), at which each row's maximum has been found, where it has been looked for.
    """

    gains: Tensor
    origins: Tensor
    multipliers: Tensor | None = None

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


def maximum(
    rows: MoveRows,
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    *,
    feasible: bool = True,
    moves: Moves = NEIGHBOURS,
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
        moves: in which the rows are written.
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
    fits = gains.ndim == 7 and gains.shape[3] == len(moves) and gains.shape[4] == images.shape[1]
    if not fits or gains.shape[0] not in (1, batch) or gains.shape[1] not in (1, len(rows.origins)):
        raise InvalidInputError(
            f"gains of shape {tuple(gains.shape)}: expected ({batch}, {len(rows.origins)}, R, {len(moves)}, "
            f"{images.shape[1]}, h, w)"
        )
    tolerance = 1e-4 if tolerance is None else tolerance
    limits = torch.full(shape, -torch.inf, dtype=torch.float64) if enough is None else enough.double()
    guesses = torch.zeros(shape, dtype=torch.float64) if guess is None else guess.double()
    if (feasible or moves is NEIGHBOURS) and use_compiled(backend, gains):
        return _compiled(rows, gains, moves, images, budget, feasible, limits, guesses, tolerance, flow)
    whole = whole_grid(MoveRows(gains, rows.origins), images.shape[-2:]).double()
    whole = whole * moves.within(images.shape[-2], images.shape[-1], whole.device)
    value, multiplier, moved = (
        swept(whole, images, budget, moves) if feasible else without_positivity(whole, budget, moves)
    )
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
    moves: Moves,
    images: Tensor,
    budget: Tensor,
    feasible: bool,
    enough: Tensor,
    guess: Tensor,
    tolerance: float,
    flow: bool,
) -> MoveSupport:
    from flowverify.bounds.lifted import kernel, priced_kernel

    batch, places, per_place = images.shape[0], len(rows.origins), gains.shape[2]
    shared = gains.shape[1] == 1 and places > 1
    entries = gains.shape[3:].numel()
    flat = gains.reshape(gains.shape[0], -1, entries)
    origins = rows.origins.cpu().numpy().astype(np.int64)
    mass, budgets = images.flatten(1).contiguous().numpy(), budget.numpy()
    count = rows.count
    values, multipliers = np.empty((batch, count)), np.empty((batch, count))
    flows = np.zeros((batch, count if flow else 0, entries))
    limits, guesses = enough.contiguous().numpy(), guess.contiguous().numpy()
    window, shape = tuple(gains.shape[-2:]), tuple(images.shape[1:])
    workers = max(1, torch.get_num_threads())
    size = max(16, min(ROWS_AT_ONCE, -(-count // workers)))

    solve, before, after = kernel.solve_rows, tuple[Any, ...](), tuple[Any, ...]((feasible,))
    if moves is not NEIGHBOURS:
        solve, after = priced_kernel.solve_rows, ()
        before = (np.array(moves.offsets), np.array(moves.prices), moves.chained)

    def work(job: tuple[int, int]) -> None:
        index, first = job
        last = min(count, first + size)
        own = flat[index if len(flat) > 1 else 0]
        # One precision, as kernels take long to compile; they work in float64 anyway.
        part = (own if shared else own[first:last]).double().contiguous().numpy()
        solve(
            part, shared, origins, per_place, window, shape, *before, mass[index], float(budgets[index]), *after,
            limits[index], guesses[index], tolerance, first, last, values[index], multipliers[index], flows[index],
        )  # fmt: skip

    jobs = [(index, first) for index in range(batch) for first in range(0, count, size)]
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            work(job)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, jobs))
    moved = (
        torch.from_numpy(flows).to(gains.dtype).reshape(batch, places, per_place, *gains.shape[3:]) if flow else None
    )
    return MoveSupport(torch.from_numpy(values), torch.from_numpy(multipliers), moved)


def whole_grid(rows: MoveRows, size: Sequence[int]) -> Tensor:
    """The rows on the whole grid, (B, Q * R, ways, C, H, W)."""
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
    return whole.flatten(1, 2)


def _pixels(origins: Tensor, window: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the pixels of windows stand in the flattened grid, (Q, h, w), and which of them do."""
    i = origins[:, 0, None] + torch.arange(window[0], device=origins.device)
    j = origins[:, 1, None] + torch.arange(window[1], device=origins.device)
    inside = ((i >= 0) & (i < size[0]))[:, :, None] & ((j >= 0) & (j < size[1]))[:, None]
    return i.clamp(0, size[0] - 1)[:, :, None] * size[1] + j.clamp(0, size[1] - 1)[:, None], inside


def windows_of(planes: Tensor, rows: MoveRows) -> Tensor:
    """The windows of planes (B, Q * R, ways, C, H, W), in the shape of the rows: the adjoint of :func:`whole_grid`."""
    size, window = planes.shape[-2:], rows.gains.shape[-2:]
    planes = planes.reshape(len(planes), len(rows.origins), -1, *planes.shape[2:])
    index, inside = _pixels(rows.origins, window, size)
    at = index.flatten(1)[None, :, None, None, None]
    found = planes.flatten(-2).gather(-1, at.expand(*planes.shape[:-2], at.shape[-1]))
    result: Tensor = found.reshape(*found.shape[:-1], *window) * inside[:, None, None, None]
    return result


SEARCH_STEPS = 16
ROUNDS = 200
UNIT = 2.0**-53
APART = 1e-9  # relative


def largest_slope(gains: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """max of 0 and G / d over all moves of each row (B, N, ways, C, H, W), and the move: (B, N)."""
    steepest, at = (gains / moves.priced(gains)).flatten(2).max(2)
    return torch.where(torch.isnan(steepest), steepest, steepest.clamp(min=0)), at


def without_positivity(gains: Tensor, budget: Tensor, moves: Moves) -> tuple[Tensor, Tensor, Tensor]:
    """Values, multipliers (B, N) and flows of the maximum over m >= 0 that cost no more than the budget (B,)."""
    steepest, at = largest_slope(gains, moves)
    amount = budget[:, None, None] / moves.priced(gains).expand(gains.shape[2:]).flatten()[at][..., None]
    moved = (
        torch.zeros_like(gains.flatten(2))
        .expand(len(budget), -1, -1)
        .scatter(2, at[..., None].expand(amount.shape), amount)
    )
    moved = moved * (steepest > 0)[..., None]
    value = steepest * budget[:, None] * (1 + 8 * UNIT)
    return value, steepest.expand_as(value), moved.reshape(*value.shape, *gains.shape[2:])


def swept(gains: Tensor, images: Tensor, budget: Tensor, moves: Moves) -> tuple[Tensor, Tensor, Tensor]:
    """Values, multipliers (B, N) and flows of the maximum over the ball, for rows (B or 1, N, ways, C, H, W)."""
    mass = images[:, None]
    batch = max(gains.shape[0], images.shape[0])
    gains = gains.expand(batch, *gains.shape[1:])
    budget = budget[:, None]
    high = largest_slope(gains, moves)[0]
    high_value, high_cost = high * budget, torch.zeros_like(high)
    best, best_at = high_value.clone(), high.clone()
    low = _largest_returning(gains, moves) if moves.chained else torch.zeros_like(high)
    low = torch.minimum(low, high)
    low_value, low_slope = torch.zeros_like(high), torch.zeros_like(high)
    known = torch.zeros_like(high, dtype=torch.bool)
    for _ in range(SEARCH_STEPS):
        high_slope = budget - high_cost
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        trial = torch.where(known & (crossing > low) & (crossing < high), crossing, (low + high) / 2)
        prices, paid, settled = _prices(gains, trial, moves)
        value = trial * budget + (mass * prices).flatten(2).sum(2)
        cost = (mass * paid).flatten(2).sum(2)
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
    multiplier, prices = prices_at(gains, best_at, moves)
    value = (multiplier * budget + (mass * prices).flatten(2).sum(2)) * (1 + (images[0].numel() + 8) * 2 * UNIT)
    simple = largest_slope(gains, moves)[0] * budget * (1 + 8 * UNIT)
    # Beside the multipliers, where no two ways tie: a flow of one, priced as another, would break the budget.
    right, left = (_flow(gains, at, mass, moves) for at in (high * (1 + APART), low * (1 - APART)))
    right_cost, left_cost = ((flow * moves.priced(flow)).flatten(2).sum(2) for flow in (right, left))
    share = ((budget - right_cost) / (left_cost - right_cost)).clamp(0, 1)
    share = torch.where(known & (left_cost > budget), share, 0.0)[..., None, None, None, None]
    return torch.minimum(value, simple), best_at, (1 - share) * right + share * left


def prices_at(gains: Tensor, multiplier: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """Prices y of rows at multipliers (B, N), and the multipliers, raised until all inequalities are fulfilled."""
    prices, _, _ = _prices(gains, multiplier, moves)
    violation = (_handed_on(gains, prices, multiplier, moves)[0] - prices).flatten(2).amax(2).clamp(min=0)
    size = torch.maximum(gains.abs().flatten(2).amax(2), prices.flatten(2).amax(2)) + multiplier * max(moves.prices)
    return multiplier + (violation + 16 * UNIT * size) / min(moves.prices), prices


def _largest_returning(gains: Tensor, moves: Moves) -> Tensor:
    """The largest gain of a move and its opposite, for each unit of their cost: below it no prices exist."""
    best = torch.zeros_like(gains[:, :, 0, 0, 0, 0])
    for way in range(0, len(moves), 2):
        back = shifted(gains[:, :, way + 1], moves.offsets[way], -torch.inf)
        best = torch.maximum(best, (gains[:, :, way] + back).flatten(2).amax(2) / (2 * moves.prices[way]))
    return best


def _handed_on(gains: Tensor, prices: Tensor, multiplier: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """The largest y_j + G_(i -> j) - lambda d(i, j) at each pixel i, without y_j for single moves; and the way."""
    best, best_way = torch.full_like(prices, -torch.inf), torch.zeros_like(prices, dtype=torch.long)
    for way, (offset, price) in enumerate(zip(moves.offsets, moves.prices, strict=True)):
        offer = gains[:, :, way] - (multiplier * price)[..., None, None, None]
        offer = offer + shifted(prices, offset, -torch.inf) if moves.chained else offer
        better = offer > best
        best, best_way = torch.where(better, offer, best), torch.where(better, way, best_way)
    return best, best_way


def _prices(gains: Tensor, multiplier: Tensor, moves: Moves) -> tuple[Tensor, Tensor, Tensor]:
    """The least y, what a unit of each pixel's mass pays on its way, and whether the prices have settled."""
    prices = torch.zeros_like(gains[:, :, 0])
    paid, own = torch.zeros_like(prices), moves.priced(gains).flatten()
    unsettled = torch.zeros_like(multiplier, dtype=torch.bool)
    for _ in range(min(ROUNDS, 2 * sum(prices.shape[-2:])) if moves.chained else 1):
        offer, way = _handed_on(gains, prices, multiplier, moves)
        better = offer > prices * (1 + 1e-12)
        unsettled = better.flatten(2).any(2)
        if not bool(unsettled.any()):
            break
        ahead = _ahead(paid, way, moves) if moves.chained else 0.0
        prices, paid = torch.where(better, offer, prices), torch.where(better, ahead + own[way], paid)
    return prices, paid, ~unsettled if moves.chained else torch.ones_like(unsettled)


def _ahead(values: Tensor, way: Tensor, moves: Moves) -> Tensor:
    """At each pixel, the value where its way leads to."""
    result = torch.zeros_like(values)
    for k, offset in enumerate(moves.offsets):
        result = torch.where(way == k, shifted(values, offset, 0.0), result)
    return result


def _flow(gains: Tensor, multiplier: Tensor, mass: Tensor, moves: Moves) -> Tensor:
    """What flows where all mass takes its way at this multiplier; chains hand it on, step by step."""
    prices, _, _ = _prices(gains, multiplier, moves)
    _, way = _handed_on(gains, prices, multiplier, moves)
    moving = prices > 0
    here = mass.expand_as(prices) * moving
    chosen = torch.nn.functional.one_hot(way, len(moves)).movedim(-1, 2) * moving[:, :, None]
    flow = chosen * here[:, :, None]
    for _ in range(min(ROUNDS, 2 * sum(prices.shape[-2:])) if moves.chained else 0):
        sent = chosen * here[:, :, None]
        here = (
            sum(shifted(sent[:, :, k], (-row, -column), 0.0) for k, (row, column) in enumerate(moves.offsets)) * moving
        )
        if not bool((here > 0).any()):
            break
        flow = flow + chosen * here[:, :, None]
    return flow
