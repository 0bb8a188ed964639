"""Compiled CPU kernel of :mod:`flowverify.transport.moves`: exact greedy moves of mass, for any ground cost.

A source's best value at each distance has an upper concave envelope, and a plan that is optimal for a linear
function moves mass along the steps of these envelopes, steepest first. So the maximum over a ball is a continuous
knapsack: no search over a multiplier, and the least budget for a gain comes out of the same pass.
"""

from __future__ import annotations

import numba
import numpy as np

from flowverify.transport.scan_kernel import Array

FIRST_FLOOR = 0.5  # of the steepest step to a neighbour: where the first attempt stops looking for steps
LOWER = 0.5  # from attempt to attempt


@numba.njit(nogil=True, cache=True)
def _steps_of_source(
    values: Array, row: int, column: int, shape: tuple[int, int], offsets: Array, costs: Array, reach: float,
    floor: float, where: Array, at: Array, height_of: Array,
) -> int:  # fmt: skip
    """The envelope of one source up to cost ``reach``: vertices (pixel, cost, value); returns their number."""
    height, width = shape
    where[0], at[0], height_of[0] = row * width + column, 0.0, values[row * width + column]
    count, best = 1, height_of[0]
    for k in range(1, costs.size):
        cost = costs[k]
        if cost > reach:
            break
        i, j = row + offsets[k, 0], column + offsets[k, 1]
        if i < 0 or j < 0 or i >= height or j >= width:
            continue
        value = values[i * width + j]
        if not value > best + 0.0:
            continue
        best = value
        while count > 0 and at[count - 1] == cost:
            count -= 1
        while count > 1:
            rise = (height_of[count - 1] - height_of[count - 2]) * (cost - at[count - 2])
            if rise > (value - height_of[count - 2]) * (at[count - 1] - at[count - 2]):
                break
            count -= 1
        where[count], at[count], height_of[count] = i * width + j, cost, value
        count += 1
    while count > 1 and (height_of[count - 1] - height_of[count - 2] < floor * (at[count - 1] - at[count - 2])):
        count -= 1
    return count


@numba.njit(nogil=True, cache=True)
def move_best(
    coefficients: Array, mass: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, budget: float,
    target: float, moved: Array,
) -> tuple[float, float, float]:  # fmt: skip
    """Moves mass by the steepest steps until the budget is spent, the target is gained, or no step is left.

    Writes the image to ``moved``; returns gain, cost and the slope of the last step (0 where none was left).
    """
    channels, height, width = shape
    plane = height * width
    moved[:] = mass
    highest = np.empty(channels)
    steepest = 0.0
    for channel in range(channels):
        top = -np.inf
        for row in range(height):
            for column in range(width):
                here = coefficients[channel * plane + row * width + column]
                top = max(top, here)
                if column > 0:
                    steepest = max(steepest, abs(here - coefficients[channel * plane + row * width + column - 1]))
                if row > 0:
                    steepest = max(steepest, abs(here - coefficients[channel * plane + (row - 1) * width + column]))
        highest[channel] = top
    if steepest <= 0.0 or budget <= 0.0 or target <= 0.0 or not np.isfinite(steepest):
        return 0.0, 0.0, 0.0
    sources = np.flatnonzero(mass > 0)
    where, at, height_of = np.empty(costs.size + 1, np.int64), np.empty(costs.size + 1), np.empty(costs.size + 1)
    size = 8 * sources.size + 64
    step_slope, step_cost = np.empty(size), np.empty(size)
    step_source, step_goal = np.empty(size, np.int64), np.empty(size, np.int64)
    floor = FIRST_FLOOR * steepest
    while True:
        steps = 0
        for s in range(sources.size):
            pixel = sources[s]
            channel = pixel // plane
            rest = pixel - channel * plane
            rise = highest[channel] - coefficients[pixel]
            if rise <= 0:
                continue
            reach = rise / floor if floor > 0 else np.inf
            if reach < 1.0:
                continue
            values = coefficients[channel * plane : (channel + 1) * plane]
            count = _steps_of_source(
                values, rest // width, rest % width, (height, width), offsets, costs, reach, floor, where, at, height_of
            )
            if steps + count > size:
                size = 2 * (steps + count)
                step_slope, step_cost = _longer(step_slope, size), _longer(step_cost, size)
                step_source, step_goal = _longer(step_source, size), _longer(step_goal, size)
            for k in range(1, count):
                step_cost[steps] = at[k] - at[k - 1]
                step_slope[steps] = (height_of[k] - height_of[k - 1]) / step_cost[steps]
                step_source[steps] = s
                step_goal[steps] = channel * plane + where[k]
                steps += 1
        # Steps of a source are stored in order; a stable sort keeps them in order where slopes tie.
        order = np.argsort(-step_slope[:steps], kind="mergesort")
        gain, gain_lost, cost, cost_lost = 0.0, 0.0, 0.0, 0.0
        finished = False
        last = -1
        share, slope = 1.0, 0.0
        for position in range(steps):
            k = order[position]
            step = mass[sources[step_source[k]]] * step_cost[k]
            slope = step_slope[k]
            last = position
            share = min(1.0, (budget - cost) / step, (target - gain) / (step * slope))
            cost, cost_lost = _add(cost, cost_lost, share * step)
            gain, gain_lost = _add(gain, gain_lost, share * step * slope)
            if share < 1.0 or cost >= budget or gain >= target:
                finished = True
                break
        if finished or floor <= 0.0:
            break
        floor = floor * LOWER if floor > 1e-4 * steepest else 0.0
    moved_to = sources.copy()
    for position in range(last):
        k = order[position]
        moved_to[step_source[k]] = step_goal[k]
    moved[:] = 0
    partial = -1 if last < 0 else step_source[order[last]]
    for s in range(sources.size):
        amount = mass[sources[s]]
        if s == partial:
            moved[step_goal[order[last]]] += share * amount
            amount -= share * amount
        moved[moved_to[s]] += amount
    return gain, cost, slope if finished else 0.0


@numba.njit(nogil=True, cache=True)
def _add(total: float, lost: float, term: float) -> tuple[float, float]:
    """Kahan's compensated sum: its rounding does not grow with the number of terms."""
    term -= lost
    larger = total + term
    return larger, (larger - total) - term


@numba.njit(nogil=True, cache=True)
def _longer(values: Array, size: int) -> Array:
    result = np.empty(size, values.dtype)
    result[: values.size] = values
    return result
