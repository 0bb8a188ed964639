"""Which moves of mass rows are written in, and what each costs: neighbours for l1, other offsets for other costs.

Two kinds of sets of moves stand for the ball (theory, section 22). *Single* moves lead from mass that is there to where
it stays, over every offset of finite cost: that is the ball's definition, for every ground cost. *Chained* moves hand
mass on, over few offsets, at prices so low that to every pixel some chain is no dearer than the ground cost: a set that
holds the ball, which is the ball itself for the neighbours of l1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import BoundError
from flowverify.transport.ground import FloatArray, IndexArray, offsets_by_cost, parse_ground, steepest_offsets

LEAST_RATIO = 0.5  # of the price of a chained move to its cost: what theory, section 22, says of rounding rests on it
SLACK = 1e-12  # relative: prices are this much below what costs, as computed, allow


@dataclass(frozen=True)
class Moves:
    """Moves over some offsets.

    Attributes:
        offsets: (rows, columns), each followed by its opposite.
        prices: of a unit of mass, one an offset, positive; the same for opposites.
        chained: whether mass may be moved again.
    """

    offsets: tuple[tuple[int, int], ...]
    prices: tuple[float, ...]
    chained: bool = True

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def reach(self) -> tuple[int, int]:
        """The largest step along each axis."""
        return max(abs(row) for row, _ in self.offsets), max(abs(column) for _, column in self.offsets)

    def priced(self, like: Tensor) -> Tensor:
        """Prices that broadcast against planes (..., ways, C, H, W)."""
        return torch.tensor(self.prices, dtype=torch.float64, device=like.device)[:, None, None, None]

    def within(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """Which moves of a grid stay in it, (ways, 1, H, W)."""
        inside = torch.ones(1, height, width, dtype=torch.bool, device=device)
        return torch.stack([shifted(inside, offset, False) for offset in self.offsets])

    def gains(self, coefficients: Tensor) -> Tensor:
        """G_(i -> j) = c_j - c_i of coefficients (..., C, H, W): (..., ways, C, H, W), 0 for moves that leave."""
        gains: Tensor = _Gains.apply(coefficients, self.offsets)  # type: ignore[no-untyped-call]
        return gains

    def entering(self, flow: Tensor) -> Tensor:
        """What enters each pixel less what leaves it, (..., C, H, W), of flows (..., ways, C, H, W) that stay."""
        return _entering(flow, self.offsets)


class _Gains(torch.autograd.Function):
    """c_j - c_i of every move that stays; backward, what enters a pixel less what leaves it."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, offsets: tuple[tuple[int, int], ...]) -> Tensor:
        ctx.offsets = offsets
        *leading, height, width = coefficients.shape
        gains = coefficients.new_empty(*leading[:-1], len(offsets), leading[-1], height, width)
        for way, offset in enumerate(offsets):
            plane, (here, there) = gains[..., way, :, :, :], _ends(offset, height, width)
            for axis, (first, last) in ((-2, here[0]), (-1, here[1])):
                plane.narrow(axis, 0, first).zero_()
                plane.narrow(axis, last, plane.shape[axis] - last).zero_()
            torch.sub(_part(coefficients, there), _part(coefficients, here), out=_part(plane, here))
        return gains

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _entering(gradient, ctx.offsets), None


def _entering(flow: Tensor, offsets: tuple[tuple[int, int], ...]) -> Tensor:
    result = flow.new_zeros(*flow.shape[:-4], *flow.shape[-3:])
    for way, offset in enumerate(offsets):
        here, there = _ends(offset, *flow.shape[-2:])
        moved = _part(flow[..., way, :, :, :], here)
        _part(result, there).add_(moved)
        _part(result, here).sub_(moved)
    return result


Part = tuple[tuple[int, int], tuple[int, int]]  # of a grid: the first and last rows and columns


def _ends(offset: tuple[int, int], height: int, width: int) -> tuple[Part, Part]:
    """Where the moves of an offset that stay in the grid start, and where they end."""
    (row, column) = offset
    rows, columns = (max(-row, 0), max(height - max(row, 0), 0)), (max(-column, 0), max(width - max(column, 0), 0))
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        return ((0, 0), (0, 0)), ((0, 0), (0, 0))
    return (rows, columns), ((rows[0] + row, rows[1] + row), (columns[0] + column, columns[1] + column))


def _part(values: Tensor, part: Part) -> Tensor:
    (top, bottom), (left, right) = part
    return values[..., top:bottom, left:right]


NEIGHBOURS = Moves(((0, 1), (0, -1), (1, 0), (-1, 0)), (1.0, 1.0, 1.0, 1.0))


def shifted(values: Tensor, offset: tuple[int, int], outside: float) -> Tensor:
    """At each pixel, the value at the pixel that the move leads to; ``outside`` where it leaves the grid."""
    (row, column), (height, width) = offset, values.shape[-2:]
    if abs(row) >= height or abs(column) >= width:
        return torch.full_like(values, outside)
    kept = values[..., max(row, 0) : height + min(row, 0), max(column, 0) : width + min(column, 0)]
    pads = (max(-column, 0), max(column, 0), max(-row, 0), max(row, 0))
    return torch.nn.functional.pad(kept, pads, value=outside)


@lru_cache(maxsize=64)
def moves_of(ground: str, height: int, width: int, single: int = 50_000, chained: int = 16) -> Moves:
    """The moves in which rows over the balls of a ground cost are written.

    Args:
        single: up to how many of them (offsets of finite cost, times pixels) moves are single; above, they are chained.
        chained: over how many offsets chains are.

    Raises:
        BoundError: chains cost too much, or do not lead to where mass may move.
        UnknownNameError, InvalidInputError: as :func:`~flowverify.transport.ground.check_ground`.
    """
    if parse_ground(ground).name == "l1" or height * width == 1:
        return NEIGHBOURS  # of one pixel all of them leave the grid
    offsets, costs = offsets_by_cost(height, width, ground)
    forward = [k for k, (row, column) in enumerate(offsets.tolist()) if (row, column) > (0, 0)]
    if 2 * len(forward) * height * width <= single:
        return _both_ways(offsets[forward].tolist(), costs[forward] * (1 - SLACK), False)
    directions, prices = _quadrant(*steepest_offsets(height, width, ground), chained)
    shortest = _shortest_chains(height, width, directions, prices)
    rows, columns = np.abs(offsets[1:]).T
    ratio = float((costs[1:] / shortest[rows, columns]).min(initial=1.0))
    if not ratio >= LEAST_RATIO:
        raise BoundError(
            f"lifted bounds of ground cost {ground}: its chains of {2 * len(directions)} moves or more cost up to "
            f"{1 / max(ratio, 1e-300):.3g} times as much as single moves, expected {1 / LEAST_RATIO:g}"
        )
    mirrored = [
        (row, sign * column, price)
        for (row, column), price in zip(directions, prices, strict=True)
        for sign in ((1, -1) if row and column else (1,))
    ]
    scaled = np.array([price for _, _, price in mirrored]) * (ratio * (1 - SLACK))
    return _both_ways([[row, column] for row, column, _ in mirrored], scaled, True)


def _quadrant(offsets: IndexArray, costs: FloatArray, count: int) -> tuple[list[tuple[int, int]], list[float]]:
    """The cheapest offsets without their signs, as many as make about ``count`` with them."""
    chosen: dict[tuple[int, int], float] = {}
    made = 0
    for (row, column), cost in zip(np.abs(offsets).tolist(), costs.tolist(), strict=True):
        if made < count and (row, column) not in chosen:
            chosen[row, column] = cost
            made += 4 if row and column else 2
    return list(chosen), list(chosen.values())


def _both_ways(offsets: list[list[int]], prices: FloatArray, chained: bool) -> Moves:
    pairs = [sign for row, column in offsets for sign in ((row, column), (-row, -column))]
    return Moves(tuple(pairs), tuple(float(price) for price in np.repeat(prices, 2)), chained)


def _shortest_chains(height: int, width: int, directions: list[tuple[int, int]], prices: list[float]) -> FloatArray:
    """The price of the cheapest chain to each offset that stays in its rectangle, and so in the image: (H, W)."""
    least = np.full((height, width), np.inf)
    least[0, 0] = 0.0
    for i in range(height):
        for j in range(width):
            for (row, column), price in zip(directions, prices, strict=True):
                if row <= i and column <= j:
                    least[i, j] = min(least[i, j], least[i - row, j - column] + price)
    return least
