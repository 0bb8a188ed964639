"""Compiled CPU kernels of the support function and the least budget for every ground cost but l1.

Each problem is a continuous knapsack over the envelopes of the sources that hold mass
(:mod:`flowverify.transport.moves_kernel`): exact, with the maximiser and the multiplier, without a search. For l1 the
scans of :mod:`flowverify.transport.scan_kernel` are faster, as they serve sixteen problems at once.
"""

from __future__ import annotations

import numba
import numpy as np

from flowverify.transport.moves_kernel import move_best
from flowverify.transport.scan_kernel import Array

REACHED = 1 - 1e-9  # of a target: what rounding may have taken from a gain that reaches it exactly


@numba.njit(nogil=True, cache=True)
def solve_problems(
    coefficients: Array, mass: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, budgets: Array,
    first: int, last: int, excess: Array, multipliers: Array, maximisers: Array,
) -> None:  # fmt: skip
    """Problems ``first`` to ``last`` of one image; ``maximisers`` of no rows if they are not wanted."""
    moved = np.empty(mass.size)
    for problem in range(first, last):
        row = coefficients[problem].astype(np.float64)
        gain, _, slope = move_best(row, mass, shape, offsets, costs, budgets[problem], np.inf, moved)
        excess[problem], multipliers[problem] = gain, slope
        if maximisers.shape[0] > 0:
            maximisers[problem] = moved


@numba.njit(nogil=True, cache=True)
def solve_least_budgets(
    coefficients: Array, mass: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, targets: Array,
    first: int, last: int, budgets: Array, multipliers: Array,
) -> None:  # fmt: skip
    """The least cost that gains each target; infinite where nothing does."""
    moved = np.empty(mass.size)
    for problem in range(first, last):
        target = targets[problem]
        budgets[problem], multipliers[problem] = 0.0, 0.0
        if target > 0:
            row = coefficients[problem].astype(np.float64)
            gain, cost, slope = move_best(row, mass, shape, offsets, costs, np.inf, target, moved)
            budgets[problem] = cost if gain >= target * REACHED else np.inf
            multipliers[problem] = slope


@numba.njit(nogil=True, cache=True)
def lipschitz_constants(
    coefficients: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, first: int, last: int, result: Array
) -> None:
    """max |c_i - c_(i+o)| / cost(o) over the offsets, cheapest first, until no difference is large enough."""
    channels, height, width = shape
    for problem in range(first, last):
        largest, rise = 0.0, 0.0
        if not np.isfinite(coefficients[problem].sum()):
            result[problem] = np.nan
            continue
        for channel in range(channels):
            plane = coefficients[problem, channel * height * width : (channel + 1) * height * width]
            rise = max(rise, np.float64(plane.max()) - np.float64(plane.min()))
        for k in range(costs.size):
            if not rise > largest * costs[k]:
                break
            row, column = offsets[k, 0], offsets[k, 1]
            left, right = max(0, -column), min(width, width - column)
            steepest = 0.0
            for channel in range(channels):
                for i in range(height - row):
                    here = (channel * height + i) * width
                    there = here + row * width + column
                    for j in range(left, right):
                        difference = np.float64(coefficients[problem, here + j])
                        difference = abs(difference - np.float64(coefficients[problem, there + j]))
                        steepest = max(steepest, difference)
            largest = max(largest, steepest / costs[k])
        result[problem] = largest


@numba.njit(nogil=True, cache=True)
def solve_capped(
    coefficients: Array, mass: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, budget: float,
    cap: float, rule: tuple[int, float, float, float, float], first: int, last: int, excess: Array, multipliers: Array,
    reduced: Array, maximisers: Array,
) -> None:  # fmt: skip
    """The descent of :mod:`flowverify.transport.capped`; ``reduced`` and ``maximisers`` of no rows if not wanted."""
    steps, first_share, shrink, enough, dearest = rule
    moved, slope_of = np.empty(mass.size), np.empty(mass.size)
    for problem in range(first, last):
        own = coefficients[problem].astype(np.float64)
        row = own.copy()
        limit = dearest * np.abs(own).max()
        best, share = np.inf, first_share
        for step in range(steps + 1):
            value, _, slope = move_best(row, mass, shape, offsets, costs, budget, np.inf, moved)
            for pixel in range(mass.size):
                if row[pixel] < own[pixel]:
                    value += (own[pixel] - row[pixel]) * (cap - mass[pixel])
            if value < best:
                best = value
                multipliers[problem] = slope
                if maximisers.shape[0] > 0:
                    maximisers[problem] = moved
                    reduced[problem] = row
            else:
                share *= shrink
            size = 0.0
            for pixel in range(mass.size):
                slope_of[pixel] = cap - moved[pixel]
                if slope_of[pixel] > 0 and row[pixel] >= own[pixel]:
                    slope_of[pixel] = 0.0
                size += slope_of[pixel] * slope_of[pixel]
            if step == steps or not size > 0 or share <= enough or not best > 0:
                break
            length = (value - (1 - share) * best) / size
            for pixel in range(mass.size):
                price = max(0.0, own[pixel] - row[pixel] - length * slope_of[pixel])
                row[pixel] = min(own[pixel], own[pixel] - min(price, limit))
        excess[problem] = best
