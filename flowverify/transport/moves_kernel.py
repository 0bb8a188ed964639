"""Compiled CPU kernels for any ground cost: exact greedy moves of mass, for one function or for many.

A source's best value at each distance has an upper concave envelope, and a plan that is optimal for a linear
function moves mass along the steps of these envelopes, steepest first. So the maximum over a ball is a continuous
knapsack: no search over a multiplier, and the least budget for a gain comes out of the same pass.

The support function and the least budget of every ground cost but l1 are one such knapsack a function: exact, with
the maximiser and the multiplier, without a search. For l1 the scans of :mod:`flowverify.transport.scan_kernel` are
faster, as they serve sixteen problems at once.

With a cap on the pixels moves are greedy, and feasible by construction. A move takes mass from a pixel to one of a
window around it, as much as there is and as there is room for. Moves are made in order of their gain for each unit of
cost; whenever a level of that order is passed, the steeper moves are tried again, since moving mass away makes room.
Each move respects the cap, the mass and the budget exactly. With a metric, chains of moves reach farther than the
window, and the cost, the sum of the moves', is an upper bound of W1. For a cost that is no metric a chain may be dearer
than its moves, or forbidden: there mass moves once only.
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
    """The descent of :mod:`flowverify.transport.support`; ``reduced`` and ``maximisers`` of no rows if not wanted."""
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


LEVELS = 24
LEVEL_RATIO = 0.8  # between consecutive levels of slope
PASSES = 30  # at one level
WINDOW = 3.0  # length of the longest single move where moves may be chained, in pixels
SINGLE_WINDOW = 5.0  # and where they may not


@numba.njit(nogil=True, cache=True)
def move_best_capped(
    coefficients: Array, mass: Array, shape: tuple[int, int, int], offsets: Array, costs: Array, budget: float,
    target: float, cap: float, chains: bool, longest: float, moved: Array,
) -> tuple[float, float, float]:  # fmt: skip
    """Writes the image to ``moved``; returns gain, cost and the slope of the last move (0 where none was left).

    ``longest`` is the cost of the longest move; ``chains``: whether mass may move more than once.
    """
    channels, height, width = shape
    plane = height * width
    moved[:] = mass
    # What may leave a pixel: all that is there, or only what was there from the start.
    left = moved if chains else mass.copy()
    near = 1
    while near < costs.size and costs[near] <= longest:
        near += 1
    size = 4096
    slopes, lengths = np.empty(size), np.empty(size)
    origins, goals = np.empty(size, np.int64), np.empty(size, np.int64)
    count = 0
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                pixel = channel * plane + row * width + column
                for k in range(1, near):
                    i, j = row + offsets[k, 0], column + offsets[k, 1]
                    if i < 0 or j < 0 or i >= height or j >= width:
                        continue
                    goal = channel * plane + i * width + j
                    rise = coefficients[goal] - coefficients[pixel]
                    if rise <= 0:
                        continue
                    if count == size:
                        size *= 2
                        slopes, lengths = _longer(slopes, size), _longer(lengths, size)
                        origins, goals = _longer(origins, size), _longer(goals, size)
                    slopes[count], lengths[count] = rise / costs[k], costs[k]
                    origins[count], goals[count] = pixel, goal
                    count += 1
    gain, cost, slope = 0.0, 0.0, 0.0
    if count == 0 or budget <= 0.0 or target <= 0.0:
        return gain, cost, slope
    order = np.argsort(-slopes[:count], kind="mergesort")
    level, end = slopes[order[0]], 0
    for step in range(LEVELS + 1):
        level = level * LEVEL_RATIO if step < LEVELS else 0.0
        while end < count and slopes[order[end]] >= level:
            end += 1
        for _ in range(PASSES):
            progress = False
            for position in range(end):
                k = order[position]
                amount = min(left[origins[k]], cap - moved[goals[k]])
                if amount <= 0.0:
                    continue
                slope = slopes[k]
                full = amount
                amount = min(amount, (budget - cost) / lengths[k], (target - gain) / (lengths[k] * slope))
                moved[origins[k]] = max(0.0, moved[origins[k]] - amount)
                if not chains:
                    left[origins[k]] = max(0.0, left[origins[k]] - amount)
                moved[goals[k]] = min(cap, moved[goals[k]] + amount)
                cost += amount * lengths[k]
                gain += amount * lengths[k] * slope
                progress = progress or amount > 1e-9 * cap
                if amount < full:
                    return gain, cost, slope
            if not progress:
                break
    return gain, cost, 0.0
