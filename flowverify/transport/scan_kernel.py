"""Compiled CPU kernels for the l1 ground cost: sixteen problems at once, one vector lane each.

The problems of one image are solved side by side in the lanes of vector registers. A running maximum is
sequential along its scan line, so the lanes, and the scan lines themselves, are the contiguous axis:
buffers are laid out (channel, column, row, lane) for the horizontal scans and (channel, row, column, lane)
for the vertical ones. Between the two only the columns that hold mass are carried over: the dilation is
read nowhere else. The mathematics, and the torch implementation that is the reference for this one, are
in :mod:`flowverify.transport.support`.

The maximiser nu* is where the plans on either side of the best multiplier lead; the least budget that gains a target
(:mod:`flowverify.transport.support`) is found on the same scans.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LANES = 16
MAX_STEPS = 64


@numba.njit(nogil=True, cache=True)
def _relax(value: Array, steps: Array, price: Array, target: int, source: int, count: int) -> None:
    """Lets ``count`` entries at ``target`` take the value at ``source`` for one more step."""
    one = price.dtype.type(1)
    for k in range(count):
        here = value[target + k]
        there = value[source + k] - price[k]
        steps_here = steps[target + k]
        steps_there = steps[source + k] + one
        better = there > here
        value[target + k] = there if better else here
        steps[target + k] = steps_there if better else steps_here


@numba.njit(nogil=True, cache=True)
def _transpose(source: Array, target: Array, columns: Array, height: int, items: int) -> None:
    """(column, row, items) -> (row, chosen column, items); complex items move 16 bytes at a time."""
    chosen = columns.size
    for position in range(chosen):
        column = columns[position]
        for row in range(height):
            start = np.uint64((column * height + row) * items)
            goal = np.uint64((row * chosen + position) * items)
            for item in range(items):
                target[goal + np.uint64(item)] = source[start + np.uint64(item)]


@numba.njit(nogil=True, cache=True)
def _scan(value: Array, steps: Array, price: Array, lines: int, count: int) -> None:
    """Running maxima across ``lines`` lines of ``count`` entries, forth and back."""
    size = np.uint64(count)
    for line in range(1, lines):
        _relax(value, steps, price, np.uint64(line * count), np.uint64((line - 1) * count), size)
    for line in range(lines - 2, -1, -1):
        _relax(value, steps, price, np.uint64(line * count), np.uint64((line + 1) * count), size)


@numba.njit(nogil=True, cache=True)
def allocate(
    coefficients: Array, columns: int, holders: int, shape: tuple[int, int, int]
) -> tuple[Array, tuple[Array, ...]]:
    """Room for the coefficients of :func:`load`, and the buffers of :func:`evaluate` for so many columns with mass."""
    channels, height, width = shape
    kind = coefficients.dtype
    pixels = channels * height * width
    base = np.empty(pixels * LANES, kind)
    value = np.empty(pixels * LANES, kind)
    steps = np.empty(pixels * LANES, kind)
    value_rows = np.empty(height * columns * LANES, kind)
    steps_rows = np.empty(height * columns * LANES, kind)
    price = np.empty(max(height, width) * LANES, kind)
    reach = np.empty(holders * LANES, kind)
    buffers = (
        reach, value, steps, value_rows, steps_rows, price, value.view(np.complex128), steps.view(np.complex128),
        value_rows.view(np.complex128), steps_rows.view(np.complex128),
    )  # fmt: skip
    return base, buffers


@numba.njit(nogil=True, cache=True)
def load(coefficients: Array, first: int, used: int, base: Array, shape: tuple[int, int, int]) -> None:
    """(problem, channel, row, column) -> (channel, column, row, lane); idle lanes repeat the first one."""
    channels, height, width = shape
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                pixel = (channel * height + row) * width + column
                goal = ((channel * width + column) * height + row) * LANES
                for lane in range(LANES):
                    problem = first + lane if lane < used else first
                    base[goal + lane] = coefficients[problem, pixel]


@numba.njit(nogil=True, cache=True)
def _steepest(base: Array, first: int, second: int, count: int, result: Array) -> None:
    """Raises each lane's result to the largest difference between ``count`` neighbours."""
    for position in range(count):
        here, there = np.uint64(first + position * LANES), np.uint64(second + position * LANES)
        for lane in range(LANES):
            step = np.uint64(lane)
            difference = abs(base[here + step] - base[there + step])
            result[step] = difference if difference > result[step] else result[step]


@numba.njit(nogil=True, cache=True)
def lipschitz_constants(base: Array, shape: tuple[int, int, int], result: Array) -> None:
    channels, height, width = shape
    result[:] = 0
    line = height * LANES
    for channel in range(channels):
        for column in range(width):
            start = (channel * width + column) * line
            _steepest(base, start + LANES, start, height - 1, result)
            if column > 0:
                _steepest(base, start, start - line, height, result)


@numba.njit(nogil=True, cache=True)
def evaluate(
    base: Array, multiplier: Array, shape: tuple[int, int, int], columns: Array,
    holders: Array, mass: Array, buffers: tuple[Array, ...], gain: Array, cost: Array,
) -> None:  # fmt: skip
    """gain = sum_i mu_i (dilation(c) - c)_i and cost = the transport cost of moving to the argmaxima.

    The first buffer has the distance of each holder of mass to its argmax, (holder, lane).
    """
    channels, height, width = shape
    reach, value, steps, value_rows, steps_rows, price, value_wide, steps_wide, value_rows_wide, steps_rows_wide = (
        buffers
    )
    for k in range(price.size):
        price[k] = multiplier[k % LANES]
    for k in range(value.size):
        value[k] = base[k]
    steps[:] = 0
    items = LANES * value.itemsize // 16
    plane, plane_wide = height * width * LANES, height * width * items
    chosen = columns.size
    gain[:] = 0
    cost[:] = 0
    holder = 0
    for channel in range(channels):
        part = slice(channel * plane, (channel + 1) * plane)
        part_wide = slice(channel * plane_wide, (channel + 1) * plane_wide)
        _scan(value[part], steps[part], price, width, height * LANES)
        _transpose(value_wide[part_wide], value_rows_wide, columns, height, items)
        _transpose(steps_wide[part_wide], steps_rows_wide, columns, height, items)
        _scan(value_rows, steps_rows, price, height, chosen * LANES)
        while holder < mass.size and holders[holder, 0] == channel:
            start = holders[holder, 1] * LANES
            goal = holders[holder, 2] * LANES
            weight = mass[holder]
            for lane in range(LANES):
                gain[lane] += weight * (value_rows[goal + lane] - base[start + lane])
                cost[lane] += weight * steps_rows[goal + lane]
                reach[holder * LANES + lane] = steps_rows[goal + lane]
            holder += 1


@numba.njit(nogil=True, cache=True)
def _next_multiplier(
    low: float, low_value: float, low_slope: float, high: float, high_value: float, high_slope: float,
    lipschitz: float, guess: float, step: int,
) -> float:  # fmt: skip
    """The crossing of the two tangents of the bracket, or a geometric step while one side is missing."""
    if low < 0:
        if step == 0 and 0 < guess < high:
            return guess
        smaller = high * (0.85 if guess > 0 and step < 4 else 0.35)
        return smaller if smaller > 1e-3 * lipschitz else 0.0
    crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
    if guess > 0 and high >= lipschitz and step < 5:
        crossing = min(crossing, low * 1.15)
    return crossing


@numba.njit(nogil=True, cache=True)
def _put(row: Array, numbers: tuple[float, ...]) -> None:
    """Number by number: whole rows take seconds to compile, as what could not be assigned is put into words."""
    for k in range(len(numbers)):
        row[k] = numbers[k]


@numba.njit(nogil=True, cache=True)
def solve_problems(
    coefficients: Array, mass: Array, columns: Array, holders: Array, holder_mass: Array, budget: float,
    guesses: Array, tolerance: float, shape: tuple[int, int, int], first: int, last: int,
    excess: Array, multipliers: Array, brackets: Array,
) -> None:  # fmt: skip
    """Solves problems ``first`` to ``last`` of one image; see :func:`flowverify.transport.support.support`."""
    kind = coefficients.dtype
    base, buffers = allocate(coefficients, columns.size, holder_mass.size, shape)
    lipschitz = np.empty(LANES, kind)
    trial = np.empty(LANES, kind)
    gain = np.empty(LANES, kind)
    cost = np.empty(LANES, kind)
    best = np.empty(LANES)
    best_at = np.empty(LANES)
    side = np.empty((LANES, 6))  # low, its value, its slope; high, its value, its slope
    done = np.empty(LANES, np.bool_)
    for start in range(first, last, LANES):
        used = min(LANES, last - start)
        load(coefficients, start, used, base, shape)
        lipschitz_constants(base, shape, lipschitz)
        for lane in range(LANES):
            limit = np.float64(lipschitz[lane])
            best[lane], best_at[lane] = limit * budget, limit
            _put(side[lane], (-1.0, 0.0, 0.0, limit, limit * budget, budget))
            done[lane] = limit == 0.0 or budget == 0.0 or lane >= used
        for step in range(MAX_STEPS):
            pending = False
            for lane in range(LANES):
                if not done[lane]:
                    s = side[lane]
                    guess = guesses[start + lane] if lane < used else 0.0
                    trial[lane] = _next_multiplier(
                        s[0], s[1], s[2], s[3], s[4], s[5], np.float64(lipschitz[lane]), guess, step
                    )
                    if s[0] >= 0 and not s[0] < trial[lane] < s[3]:
                        done[lane] = True
                    else:
                        pending = True
            if not pending:
                break
            evaluate(base, trial, shape, columns, holders, holder_mass, buffers, gain, cost)
            for lane in range(LANES):
                if done[lane]:
                    continue
                here = np.float64(trial[lane])
                slope = budget - np.float64(cost[lane])
                total = here * budget + np.float64(gain[lane])
                if total < best[lane]:
                    best[lane], best_at[lane] = total, here
                if slope < 0:
                    side[lane, 0], side[lane, 1], side[lane, 2] = here, total, slope
                else:
                    side[lane, 3], side[lane, 4], side[lane, 5] = here, total, slope
                    if here == 0.0 or slope == 0.0:
                        done[lane] = True
                s = side[lane]
                if s[0] >= 0 and not done[lane]:
                    crossing = (s[1] - s[0] * s[2] - s[4] + s[3] * s[5]) / (s[5] - s[2])
                    floor = s[1] + (crossing - s[0]) * s[2]
                    done[lane] = best[lane] - floor <= tolerance * best[lane]
        for lane in range(used):
            excess[start + lane] = best[lane]
            multipliers[start + lane] = best_at[lane]
            brackets[start + lane, 0] = side[lane, 0]
            brackets[start + lane, 1] = side[lane, 3]


@numba.njit(nogil=True, cache=True)
def _argmax_at(values: Array, offset: int, row: int, column: int, distance: int, height: int, width: int) -> int:
    """The pixel of largest value at just this distance; the scans have told that the argmax is there."""
    best = offset + row * width + column
    if distance == 0:
        return best
    largest = -np.inf
    for down in range(-distance, distance + 1):
        other = row + down
        if other < 0 or other >= height:
            continue
        across = distance - abs(down)
        for side in range(2):
            place = column + across if side else column - across
            if 0 <= place < width:
                pixel = offset + other * width + place
                if values[pixel] > largest:
                    largest, best = values[pixel], pixel
    return best


@numba.njit(nogil=True, cache=True)
def _lead(values: Array, mass: Array, pixels: Array, reach: Array, share: float, shape: tuple[int, int, int],
          moved: Array) -> None:  # fmt: skip
    """Carries this share of every holder's mass to its argmax."""
    _, height, width = shape
    plane = height * width
    for holder in range(mass.size):
        if reach[holder] > 0:
            pixel = pixels[holder]
            channel, place = pixel // plane, pixel % plane
            goal = _argmax_at(values, channel * plane, place // width, place % width, int(reach[holder]), height, width)
            moved[pixel] = max(0.0, moved[pixel] - share * mass[holder])  # rounding takes nothing below 0
            moved[goal] += share * mass[holder]


@numba.njit(nogil=True, cache=True)
def maximise_problems(
    coefficients: Array, mass: Array, columns: Array, holders: Array, holder_mass: Array, budgets: Array,
    brackets: Array, shape: tuple[int, int, int], first: int, last: int, maximisers: Array,
) -> None:  # fmt: skip
    """Writes nu*: the mix of the two sides of the bracket that spends exactly the budget."""
    kind = coefficients.dtype
    base, buffers = allocate(coefficients, columns.size, holder_mass.size, shape)
    trial = np.empty(LANES, kind)
    gain = np.empty(LANES, kind)
    cost = np.empty((2, LANES), kind)
    reach = np.empty((2, holder_mass.size, LANES), kind)
    pixels = np.flatnonzero(mass)
    for start in range(first, last, LANES):
        used = min(LANES, last - start)
        load(coefficients, start, used, base, shape)
        for side in range(2):
            for lane in range(LANES):
                trial[lane] = max(0.0, brackets[start + lane, side]) if lane < used else 0.0
            evaluate(base, trial, shape, columns, holders, holder_mass, buffers, gain, cost[side])
            for k in range(buffers[0].size):
                reach[side, k // LANES, k % LANES] = buffers[0][k]
        for lane in range(used):
            problem = start + lane
            budget = budgets[problem]
            far, near = float(cost[0, lane]), float(cost[1, lane])
            kept = near <= budget  # else all of the near side's mass stays where it is
            if not kept:
                near = 0.0
            share = 0.0
            if brackets[problem, 0] >= 0 and far > near:
                share = min(1.0, (budget - near) / (far - near))
            moved = maximisers[problem]
            for k in range(moved.size):
                moved[k] = mass[k]
            if kept:
                _lead(coefficients[problem], holder_mass, pixels, reach[1, :, lane], 1 - share, shape, moved)
            if share > 0:
                _lead(coefficients[problem], holder_mass, pixels, reach[0, :, lane], share, shape, moved)


@numba.njit(nogil=True, cache=True)
def solve_least_budgets(
    coefficients: Array, mass: Array, columns: Array, holders: Array, holder_mass: Array, targets: Array,
    shape: tuple[int, int, int], first: int, last: int, budgets: Array, multipliers: Array, brackets: Array,
) -> None:  # fmt: skip
    """Solves problems ``first`` to ``last`` of one image."""
    kind = coefficients.dtype
    base, buffers = allocate(coefficients, columns.size, holder_mass.size, shape)
    lipschitz = np.empty(LANES, kind)
    trial = np.empty(LANES, kind)
    excess = np.empty(LANES, kind)
    cost = np.empty(LANES, kind)
    near = np.empty((LANES, 3))  # multiplier, cost and gain of a plan that falls short of the target
    far = np.empty((LANES, 3))  # and of one that reaches it
    done = np.empty(LANES, np.bool_)
    for start in range(first, last, LANES):
        used = min(LANES, last - start)
        load(coefficients, start, used, base, shape)
        lipschitz_constants(base, shape, lipschitz)
        for lane in range(LANES):
            _put(near[lane], (np.float64(lipschitz[lane]), 0.0, 0.0))
            _put(far[lane], (-1.0, np.inf, 0.0))
            done[lane] = lane >= used or targets[start + lane] <= 0
            trial[lane] = 0.5 * lipschitz[lane]
        for _ in range(MAX_STEPS):
            if done.all():
                break
            evaluate(base, trial, shape, columns, holders, holder_mass, buffers, excess, cost)
            for lane in range(LANES):
                if done[lane]:
                    continue
                target = targets[start + lane]
                here, spent = np.float64(trial[lane]), np.float64(cost[lane])
                gain = np.float64(excess[lane]) + here * spent
                if far[lane, 0] < 0 and gain < target:
                    if here == 0:  # every source is at its argmax, and that is not enough
                        done[lane] = True
                        continue
                    _put(near[lane], (here, spent, gain))
                    trial[lane] = 0.5 * here if here > 1e-3 * lipschitz[lane] else 0.0
                    continue
                if far[lane, 0] < 0:
                    _put(far[lane], (here, spent, gain))
                elif spent <= near[lane, 1] or spent >= far[lane, 1]:
                    done[lane] = True  # nothing above the chord: near and far are neighbours
                    continue
                elif gain < target:
                    _put(near[lane], (here, spent, gain))
                else:
                    _put(far[lane], (here, spent, gain))
                chord = (far[lane, 2] - near[lane, 2]) / (far[lane, 1] - near[lane, 1])
                done[lane] = not far[lane, 0] < chord < near[lane, 0]
                trial[lane] = chord
        for lane in range(used):
            problem = start + lane
            target = targets[problem]
            multipliers[problem] = 0.0
            brackets[problem, 0], brackets[problem, 1] = far[lane, 0], near[lane, 0]
            if target <= 0:
                budgets[problem] = 0.0
            elif far[lane, 0] < 0:
                budgets[problem] = np.inf
                brackets[problem, 1] = 0.0
            else:
                slope = (far[lane, 2] - near[lane, 2]) / (far[lane, 1] - near[lane, 1])
                budgets[problem] = near[lane, 1] + (target - near[lane, 2]) / slope
                multipliers[problem] = slope
