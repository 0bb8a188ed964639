"""Compiled CPU kernel of the support function of rows of moves; see :mod:`flowverify.bounds.lifted.support`.

Prices y are found by label correction: moves whose gain is above the multiplier start a queue, and a pixel whose
price has risen hands it on to its neighbours. Only pixels that a gainful path reaches are ever touched, and only the
window of a row is read. What is returned does not rest on convergence: at the end every inequality is looked at once
more, and the multiplier is raised by the largest violation.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from flowverify.bounds.lifted.support import DOWNWARD, RIGHTWARD
from flowverify.bounds.lifted.sweeps import UNIT

Array = NDArray[Any]

MAX_STEPS = 40


@numba.njit(nogil=True, cache=True)
def _gain(row: Array, place: tuple[int, int, int, int], channels: int, way: int, at: tuple[int, int, int]) -> float:
    """The gain of the move from a pixel in one direction: 0 outside of the window."""
    top, left, height, width = place
    i, j = at[1] - top, at[2] - left
    if i < 0 or j < 0 or i >= height or j >= width:
        return 0.0
    return float(row[((way * channels + at[0]) * height + i) * width + j])


@numba.njit(nogil=True, cache=True)
def _returns(pixel: int, source: int, following: Array, steps: Array, height: int, width: int) -> bool:
    """Whether the path from a pixel leads over the source within a few moves: a cycle of positive gain."""
    for _ in range(min(steps[pixel], 8)):
        way = following[pixel]
        pixel = pixel + DOWNWARD[way] * width + RIGHTWARD[way]
        if pixel == source:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _prices(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], starts: Array, count: int,
    multiplier: float, mass: Array, limit: float, y: Array, steps: Array, following: Array, queue: Array, queued: Array,
    touched: Array,
) -> tuple[bool, int, float, float]:  # fmt: skip
    """Least y >= 0 with y_i >= y_j + gain of i -> j - multiplier, from y = 0.

    Stops where mass . y passes the limit, or a path becomes longer than any that is looked for.

    Returns:
        whether it came to an end, how many pixels have been touched, mass . y, and the cost of the moves.
    """
    channels, height, width = shape
    pixels = channels * height * width
    longest = 2 * (height + width)
    total, reached, first, waiting = 0.0, 0, 0, 0
    for k in range(count):
        entry = starts[k]
        rise = row[entry] - multiplier
        if rise <= 0:
            continue
        j = place[1] + entry % place[3]
        rest = entry // place[3]
        i = place[0] + rest % place[2]
        rest //= place[2]
        channel, way = rest % channels, rest // channels
        goal_i, goal_j = i + DOWNWARD[way], j + RIGHTWARD[way]
        if min(i, j, goal_i, goal_j) < 0 or max(i, goal_i) >= height or max(j, goal_j) >= width:
            continue
        pixel = (channel * height + i) * width + j
        if rise > y[pixel]:
            if y[pixel] == 0.0:
                touched[reached] = pixel
                reached += 1
            total += mass[pixel] * (rise - y[pixel])
            y[pixel], steps[pixel], following[pixel] = rise, 1, way
            if not queued[pixel]:
                queued[pixel] = True
                queue[(first + waiting) % pixels] = pixel
                waiting += 1
    complete = total <= limit
    while waiting > 0 and complete:
        pixel = queue[first]
        first = (first + 1) % pixels
        waiting -= 1
        queued[pixel] = False
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        for way in range(4):
            from_i, from_j = i - DOWNWARD[way], j - RIGHTWARD[way]
            if from_i < 0 or from_j < 0 or from_i >= height or from_j >= width:
                continue
            source = (channel * height + from_i) * width + from_j
            price = y[pixel] + _gain(row, place, channels, way, (channel, from_i, from_j)) - multiplier
            if price > y[source] + 1e-12 * y[source]:
                if steps[pixel] > 3 and _returns(pixel, source, following, steps, height, width):
                    complete = False
                    break
                if y[source] == 0.0:
                    touched[reached] = source
                    reached += 1
                total += mass[source] * (price - y[source])
                y[source], steps[source], following[source] = price, steps[pixel] + 1, way
                if steps[source] > longest:
                    complete = False
                if not queued[source]:
                    queued[source] = True
                    queue[(first + waiting) % pixels] = source
                    waiting += 1
        if total > limit:
            complete = False
    while waiting > 0:
        queued[queue[first]] = False
        first = (first + 1) % pixels
        waiting -= 1
    cost = 0.0
    for k in range(reached):
        cost += mass[touched[k]] * steps[touched[k]]
    return complete, reached, total, cost


@numba.njit(nogil=True, cache=True)
def _violation(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], multiplier: float, y: Array,
    touched: Array, reached: int,
) -> float:  # fmt: skip
    """The largest y_j + gain of i -> j - multiplier - y_i, or 0, with what rounding may hide in it.

    Moves outside of the window gain nothing: they matter where they lead to a pixel with a price.
    """
    channels, height, width = shape
    top, left, rows, columns = place
    worst, size = 0.0, multiplier
    for way in range(4):
        for channel in range(channels):
            for a in range(rows):
                i, goal_i = top + a, top + a + DOWNWARD[way]
                if min(i, goal_i) < 0 or max(i, goal_i) >= height:
                    continue
                for b in range(columns):
                    j, goal_j = left + b, left + b + RIGHTWARD[way]
                    if min(j, goal_j) < 0 or max(j, goal_j) >= width:
                        continue
                    gain = float(row[((way * channels + channel) * rows + a) * columns + b])
                    here = y[(channel * height + i) * width + j]
                    there = y[(channel * height + goal_i) * width + goal_j]
                    worst = max(worst, there + gain - multiplier - here)
                    size = max(size, abs(gain), there)
    for k in range(reached):
        pixel = touched[k]
        size = max(size, y[pixel])
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        for way in range(4):
            from_i, from_j = i - DOWNWARD[way], j - RIGHTWARD[way]
            if 0 <= from_i < height and 0 <= from_j < width:
                source = (channel * height + from_i) * width + from_j
                gain = _gain(row, place, channels, way, (channel, from_i, from_j))
                worst = max(worst, y[pixel] + gain - multiplier - y[source])
    return worst + 16 * UNIT * size


@numba.njit(nogil=True, cache=True)
def _follow(
    place: tuple[int, int, int, int], shape: tuple[int, int, int], share: float, mass: Array, y: Array,
    following: Array, touched: Array, reached: int, flow: Array,
) -> None:  # fmt: skip
    """Adds what flows where all mass takes its path, times ``share``, to the moves within the window."""
    channels, height, width = shape
    top, left, rows, columns = place
    for k in range(reached):
        pixel = touched[k]
        amount = share * mass[pixel]
        if amount == 0.0:
            continue
        for _ in range(4 * (height + width)):
            if y[pixel] <= 0.0:
                break
            way = following[pixel]
            channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
            a, b = i - top, j - left
            if 0 <= a < rows and 0 <= b < columns:
                flow[((way * channels + channel) * rows + a) * columns + b] += amount
            pixel = (channel * height + i + DOWNWARD[way]) * width + j + RIGHTWARD[way]


@numba.njit(nogil=True, cache=True)
def _clear(y: Array, touched: Array, reached: int) -> None:
    for k in range(reached):
        y[touched[k]] = 0.0


@numba.njit(nogil=True, cache=True)
def _best_pair(row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int]) -> tuple[float, int, int]:
    """The largest mean gain of a move and its reverse, and both: below it no prices exist."""
    channels = shape[0]
    top, left, rows, columns = place
    best, one, other = 0.0, -1, -1
    for way in (0, 2):
        for channel in range(channels):
            forth = (way * channels + channel) * rows * columns
            back = ((way + 1) * channels + channel) * rows * columns
            ahead = 1 if way == 0 else columns
            for a in range(max(0, -top), min(rows, shape[1] - top) - (way == 2)):
                for b in range(max(0, -left), min(columns, shape[2] - left) - (way == 0)):
                    at = a * columns + b
                    gain = row[forth + at] + row[back + at + ahead]
                    if gain > best:
                        best, one, other = gain, forth + at, back + at + ahead
    return best / 2, one, other


@numba.njit(nogil=True, cache=True)
def solve_rows(
    rows: Array, shared: bool, origins: Array, per_origin: int, window: tuple[int, int], shape: tuple[int, int, int],
    mass: Array, budget: float, enough: Array, guesses: Array, tolerance: float, first: int, last: int,
    values: Array, multipliers: Array, flows: Array,
) -> None:  # fmt: skip
    """Solves rows ``first`` to ``last`` of one image, rows (N, 4 * C * window).

    Args:
        shared: the same rows, (per_origin, ...), stand at every origin.
        enough: at which value a row needs no further search.
        flows: empty, or one flow a row.
    """
    pixels = shape[0] * shape[1] * shape[2]
    entries = rows.shape[1]
    y, steps, following = np.zeros(pixels), np.zeros(pixels, np.int64), np.zeros(pixels, np.int64)
    queue, queued, touched = np.zeros(pixels, np.int64), np.zeros(pixels, np.bool_), np.zeros(pixels, np.int64)
    starts = np.empty(entries, np.int64)
    inflated = 1 + (pixels + 8) * 2 * UNIT
    for index in range(first, last):
        row = rows[index % per_origin] if shared else rows[index]
        at = index // per_origin
        place = (origins[at, 0], origins[at, 1], window[0], window[1])
        high, best_entry = 0.0, -1
        for entry in range(entries):
            if row[entry] > high:
                high, best_entry = float(row[entry]), entry
        if not high <= np.inf or not np.isfinite(row.sum()):
            values[index], multipliers[index] = np.nan, np.nan
            continue
        steepest, simple = high, high * budget * inflated  # without any price: every gain is below
        high_value, high_cost = high * budget, 0.0
        best, best_at = high_value, high
        low, low_value, low_slope, feasible = 0.0, 0.0, 0.0, False
        count = 0
        if high_value * inflated > enough[index] and high > 0.0 and budget > 0.0:
            low = min(high, _best_pair(row, place, shape)[0])
            for entry in range(entries):
                if row[entry] > low:
                    starts[count] = entry
                    count += 1
        for step in range(MAX_STEPS):
            if best * inflated <= enough[index] or high == 0.0 or budget == 0.0:
                break
            high_slope = budget - high_cost
            if feasible:
                trial = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
                floor = low_value + (trial - low) * low_slope
                if best - floor <= tolerance * best or not low < trial < high:
                    break
            else:
                if best - (high_value - high_slope * (high - low)) <= tolerance * best:
                    break
                trial = 0.5 * (low + high)
                if step == 0 and 0.0 < guesses[index] < high:
                    trial = guesses[index]
                elif step == 1 and guesses[index] > 0.0 and low > 0.0:
                    trial = min(1.1 * low, trial)
                elif step == 1 and guesses[index] > 0.0:
                    trial = max(0.9 * high, trial)
            complete, reached, total, cost = _prices(
                row, place, shape, starts, count, trial, mass, high_value - trial * budget, y, steps, following, queue,
                queued, touched,
            )  # fmt: skip
            _clear(y, touched, reached)
            value = trial * budget + total
            if complete and value < best:
                best, best_at = value, trial
            if complete and cost <= budget:
                high, high_value, high_cost = trial, value, cost
                if cost == budget:
                    break
            else:
                low, low_value, low_slope, feasible = trial, value, budget - cost, complete
                kept = 0
                for k in range(count):
                    if row[starts[k]] > low:
                        starts[kept] = starts[k]
                        kept += 1
                count = kept
        if best_at == steepest and flows.shape[0] == 0:
            values[index], multipliers[index] = simple, best_at
            continue
        # The bound, from the inequalities themselves.
        count = 0
        for entry in range(entries):
            if row[entry] > best_at:
                starts[count] = entry
                count += 1
        _, reached, total, cost = _prices(
            row, place, shape, starts, count, best_at, mass, np.inf, y, steps, following, queue, queued, touched
        )
        total = 0.0
        for k in range(reached):
            total += mass[touched[k]] * y[touched[k]]
        price = best_at + _violation(row, place, shape, best_at, y, touched, reached)
        values[index], multipliers[index] = min(simple, (price * budget + total) * inflated), best_at
        _clear(y, touched, reached)
        if flows.shape[0] > 0:
            flow = flows[index]
            flow[:] = 0
            if high == 0.0 or budget == 0.0:
                continue
            count = 0
            for entry in range(entries):
                if row[entry] > low:
                    starts[count] = entry
                    count += 1
            share, circulates = 0.0, low > 0.0
            if low > 0.0:
                complete, reached, total, cost = _prices(
                    row, place, shape, starts, count, low, mass, np.inf, y, steps, following, queue, queued, touched
                )
                if complete and cost > budget:
                    share, circulates = (budget - high_cost) / (cost - high_cost), False
                    _follow(place, shape, share, mass, y, following, touched, reached, flow)
                _clear(y, touched, reached)
            _, reached, total, cost = _prices(
                row, place, shape, starts, count, high, mass, np.inf, y, steps, following, queue, queued, touched
            )
            _follow(place, shape, 1 - share, mass, y, following, touched, reached, flow)
            _clear(y, touched, reached)
            if circulates:
                _, one, other = _best_pair(row, place, shape)
                flow[best_entry if one < 0 else one] += (budget - high_cost) / 2
                flow[best_entry if other < 0 else other] += (budget - high_cost) / 2
