"""The support function of rows of any moves in torch, all rows at once; see :mod:`flowverify.bounds.lifted.support`.

With prices d(o) of moves the dual is

    max G . m = min over lambda >= 0 of  lambda eps + mu . y,      y_i >= y_j + G_(i -> j) - lambda d(i, j),

without y_j where moves are single (theory, section 22): then y is a maximum, else sweeps repeat until nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.bounds.lifted.moves import Moves, shifted

SEARCH_STEPS = 16
ROUNDS = 200
UNIT = 2.0**-53


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
    return torch.minimum(value, simple), best_at, _flow(gains, best_at, mass, moves)


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
