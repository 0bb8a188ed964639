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

from flowverify.bounds.lifted.support import APART, DOWNWARD, RIGHTWARD, UNIT

Array = NDArray[Any]

MAX_STEPS = 40


@numba.njit(nogil=True, cache=True)
def _returns(pixel: int, source: int, following: Array, steps: Array, offsets: Array) -> bool:
    """Whether the path from a pixel leads over the source within a few moves: a cycle of positive gain."""
    for _ in range(min(steps[pixel], 8)):
        pixel += offsets[following[pixel]]
        if pixel < 0 or pixel >= following.shape[0]:
            return False  # the path has become shorter meanwhile, and this is beyond its end
        if pixel == source:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _prices(
    gains: Array, offsets: Array, starts: Array, count: int, multiplier: float, mass: Array, limit: float, longest: int,
    y: Array, steps: Array, following: Array, queue: Array, queued: Array, touched: Array, chosen: Array,
) -> tuple[bool, int, float, float]:  # fmt: skip
    """Least y >= 0 with y_i >= y_j + gain of i -> j - multiplier, from y = 0.

    Stops where mass . y passes the limit, or a path becomes longer than any that is looked for.

    Returns:
        whether it came to an end, how many pixels have been touched, mass . y, and the cost of the moves.
    """
    pixels = y.shape[0]
    total, reached, first, waiting = 0.0, 0, 0, 0
    steep = 0
    for k in range(count):
        entry = starts[k]
        chosen[steep] = entry
        steep += gains[entry] > multiplier
    way, base = 0, 0  # starts are listed way by way
    for k in range(steep):
        entry = chosen[k]
        rise = gains[entry] - multiplier
        while entry >= base + pixels:
            way, base = way + 1, base + pixels
        pixel = entry - base
        if rise > y[pixel]:
            if y[pixel] == 0.0:
                touched[reached] = pixel
                reached += 1
            total += mass[pixel] * (rise - y[pixel])
            y[pixel], steps[pixel], following[pixel] = rise, 1, way
            if not queued[pixel]:
                queued[pixel] = True
                queue[waiting] = pixel
                waiting += 1
    complete = total <= limit
    while waiting > 0 and complete:
        pixel = queue[first]
        first = first + 1 if first + 1 < pixels else 0
        waiting -= 1
        queued[pixel] = False
        here = y[pixel] - multiplier
        for way in range(4):
            source = pixel - offsets[way]
            price = here + gains[way * pixels + source]
            if price > 0.0 and price > y[source] + 1e-12 * y[source]:
                if steps[pixel] > 3 and _returns(pixel, source, following, steps, offsets):
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
                    last = first + waiting
                    queue[last if last < pixels else last - pixels] = source
                    waiting += 1
        if total > limit:
            complete = False
    while waiting > 0:
        queued[queue[first]] = False
        first = first + 1 if first + 1 < pixels else 0
        waiting -= 1
    cost = 0.0
    for k in range(reached):
        cost += mass[touched[k]] * steps[touched[k]]
    return complete, reached, total, cost


@numba.njit(nogil=True, cache=True)
def _violation(
    gains: Array, offsets: Array, starts: Array, count: int, multiplier: float, y: Array, touched: Array, reached: int
) -> float:
    """The largest y_j + gain of i -> j - multiplier - y_i, or 0, with what rounding may hide in it.

    A move that gains no more than the multiplier and leads to a pixel without a price fulfils its inequality: the
    others are among the starts, or lead to a pixel that has been touched.
    """
    pixels = y.shape[0]
    worst, size = 0.0, multiplier
    way, base = 0, 0
    for k in range(count):
        entry = starts[k]
        while entry >= base + pixels:
            way, base = way + 1, base + pixels
        pixel = entry - base
        gain, there = gains[entry], y[pixel + offsets[way]]
        worst = max(worst, there + gain - multiplier - y[pixel])
        size = max(size, abs(gain), there, y[pixel])
    for k in range(reached):
        pixel = touched[k]
        size = max(size, y[pixel])
        for way in range(4):
            source = pixel - offsets[way]
            gain = gains[way * pixels + source]
            if gain > -np.inf:
                worst = max(worst, y[pixel] + gain - multiplier - y[source])
                size = max(size, abs(gain))
    return worst + 16 * UNIT * size


@numba.njit(nogil=True, cache=True)
def _follow(
    place: tuple[int, int, int, int], shape: tuple[int, int, int], share: float, mass: Array, y: Array,
    following: Array, offsets: Array, touched: Array, reached: int, flow: Array,
) -> None:  # fmt: skip
    """Adds what flows where all mass takes its path, times ``share``, to the moves within the window."""
    channels, height, width = shape
    top, left, rows, columns = place
    plane, line = (height + 2) * (width + 2), width + 2
    for k in range(reached):
        pixel = touched[k]
        amount = share * mass[pixel]
        if amount == 0.0:
            continue
        for _ in range(4 * (height + width)):
            if y[pixel] <= 0.0:
                break
            way = following[pixel]
            channel = pixel // plane
            i, j = pixel % plane // line - 1, pixel % line - 1
            a, b = i - top, j - left
            if 0 <= a < rows and 0 <= b < columns:
                flow[((way * channels + channel) * rows + a) * columns + b] += amount
            pixel += offsets[way]


@numba.njit(nogil=True, cache=True)
def _clear(y: Array, touched: Array, reached: int) -> None:
    for k in range(reached):
        y[touched[k]] = 0.0


@numba.njit(nogil=True, cache=True)
def _framed(shape: tuple[int, int, int], offsets: Array) -> Array:
    """No gain for any move of the grid with a frame of one pixel, and -inf for moves that leave it."""
    channels, height, width = shape
    gains = np.full((4, channels, height + 2, width + 2), -np.inf)
    for way in range(4):
        for i in range(height):
            for j in range(width):
                if 0 <= i + DOWNWARD[way] < height and 0 <= j + RIGHTWARD[way] < width:
                    for channel in range(channels):
                        gains[way, channel, i + 1, j + 1] = 0.0
    return gains.reshape(-1)


@numba.njit(nogil=True, cache=True)
def _place(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], gains: Array
) -> tuple[float, int, float]:
    """Writes a window to where it stands in the frame: the largest gain, where it stands in the row, and the sum."""
    channels, height, width = shape
    top, left, rows, columns = place
    plane, line = (height + 2) * (width + 2), width + 2
    high, best, total = 0.0, -1, 0.0
    for way in range(4):
        # Moves that stay in the grid.
        low_a = max(0, -top, -top - DOWNWARD[way])
        end_a = min(rows, height - top, height - top - DOWNWARD[way])
        low_b = max(0, -left, -left - RIGHTWARD[way])
        end_b = min(columns, width - left, width - left - RIGHTWARD[way])
        for channel in range(channels):
            for a in range(low_a, end_a):
                source = ((way * channels + channel) * rows + a) * columns
                target = (way * channels + channel) * plane + (top + a + 1) * line + left + 1
                for b in range(low_b, end_b):
                    gain = float(row[source + b])
                    gains[target + b] = gain
                    total += gain
                    if gain > high:
                        high, best = gain, source + b
    return high, best, total


@numba.njit(nogil=True, cache=True)
def _displace(place: tuple[int, int, int, int], shape: tuple[int, int, int], gains: Array) -> None:
    """Takes a window away again."""
    channels, height, width = shape
    top, left, rows, columns = place
    plane, line = (height + 2) * (width + 2), width + 2
    for way in range(4):
        low_a = max(0, -top, -top - DOWNWARD[way])
        end_a = min(rows, height - top, height - top - DOWNWARD[way])
        low_b = max(0, -left, -left - RIGHTWARD[way])
        end_b = min(columns, width - left, width - left - RIGHTWARD[way])
        for channel in range(channels):
            for a in range(low_a, end_a):
                target = (way * channels + channel) * plane + (top + a + 1) * line + left + 1
                for b in range(low_b, end_b):
                    gains[target + b] = 0.0


@numba.njit(nogil=True, cache=True)
def _best_pair(gains: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int]) -> tuple[float, int, int]:
    """The largest mean gain of a move and its reverse, below which no prices exist, and both as entries of the row."""
    channels, height, width = shape
    top, left, rows, columns = place
    plane, line = (height + 2) * (width + 2), width + 2
    pixels = channels * plane
    best, one, other = 0.0, -1, -1
    for way in (0, 2):
        ahead, ahead_in_row = (1, 1) if way == 0 else (line, columns)
        for channel in range(channels):
            for a in range(max(0, -top), min(rows, height - top) - (way == 2)):
                at = channel * plane + (top + a + 1) * line + left + 1
                source = ((way * channels + channel) * rows + a) * columns
                for b in range(max(0, -left), min(columns, width - left) - (way == 0)):
                    gain = gains[way * pixels + at + b] + gains[(way + 1) * pixels + at + b + ahead]
                    if gain > best:
                        best, one = gain, source + b
                        other = source + channels * rows * columns + b + ahead_in_row
    return best / 2, one, other


@numba.njit(nogil=True, cache=True)
def _listed(
    gains: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], least: float, starts: Array
) -> int:
    """Lists the moves of a window that gain more than something, and counts them."""
    channels, height, width = shape
    top, left, rows, columns = place
    plane, line = (height + 2) * (width + 2), width + 2
    count = 0
    for way in range(4):
        for channel in range(channels):
            for a in range(max(0, -top), min(rows, height - top)):
                at = (way * channels + channel) * plane + (top + a + 1) * line + left + 1
                for b in range(max(0, -left), min(columns, width - left)):
                    starts[count] = at + b  # and is overwritten if not counted: branches would cost more
                    count += gains[at + b] > least
    return count


@numba.njit(nogil=True, cache=True)
def solve_rows(
    rows: Array, shared: bool, origins: Array, per_origin: int, window: tuple[int, int], shape: tuple[int, int, int],
    mass_of: Array, budget: float, feasible: bool, enough: Array, guesses: Array, tolerance: float, first: int,
    last: int, values: Array, multipliers: Array, flows: Array,
) -> None:  # fmt: skip
    """Solves rows ``first`` to ``last`` of one image, in float64.

    Args:
        rows: these, (last - first, 4 * C * window); or, where they are ``shared``, the (per_origin, ...) of every
            origin.
        feasible: whether images must stay nonnegative.
        enough: at which value a row needs no further search; infinite for rows whose value is of no use.
        flows: empty, or one flow a row.
    """
    channels, height, width = shape
    pixels = channels * (height + 2) * (width + 2)
    offsets = np.array([1, -1, width + 2, -width - 2])
    gains, mass = _framed(shape, offsets), np.zeros(pixels)
    for pixel in range(channels * height * width):
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        mass[(channel * (height + 2) + i + 1) * (width + 2) + j + 1] = mass_of[pixel]
    y, steps, following = np.zeros(pixels), np.zeros(pixels, np.int64), np.zeros(pixels, np.int64)
    queue, queued, touched = np.zeros(pixels, np.int64), np.zeros(pixels, np.bool_), np.zeros(pixels, np.int64)
    starts, chosen = np.empty(rows.shape[1] + 1, np.int64), np.empty(rows.shape[1] + 1, np.int64)
    longest = 2 * (height + width)
    inflated = 1 + (channels * height * width + 8) * 2 * UNIT
    nowhere = np.int64(0)
    place, placed = (nowhere, nowhere, window[0], window[1]), False
    for index in range(first, last):
        if enough[index] == np.inf:
            values[index], multipliers[index] = np.inf, 0.0
            continue
        row = rows[index % per_origin] if shared else rows[index - first]
        at = index // per_origin
        if placed and (place[0] != origins[at, 0] or place[1] != origins[at, 1]):
            _displace(place, shape, gains)
        place, placed = (origins[at, 0], origins[at, 1], window[0], window[1]), True
        high, best_entry, sum_ = _place(row, place, shape, gains)
        if not np.isfinite(sum_):
            values[index], multipliers[index] = np.nan, np.nan
            continue
        simple = high * budget * inflated  # without any price: every gain is below
        wanted = simple > enough[index] and high > 0.0 and budget > 0.0
        if not feasible or not wanted:
            values[index], multipliers[index] = simple, high
            if flows.shape[0] > 0 and best_entry >= 0:
                flows[index, best_entry] = budget
            continue
        high_value, high_cost = high * budget, 0.0
        best, best_at, steepest = high_value, high, high
        low, one, other = _best_pair(gains, place, shape)
        low = min(high, low)
        count = _listed(gains, place, shape, low, starts)
        low_value, low_slope, known = 0.0, 0.0, False
        for step in range(MAX_STEPS):
            if best * inflated <= enough[index]:
                break
            high_slope = budget - high_cost
            if known:
                trial = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
                floor = low_value + (trial - low) * low_slope
                if best - floor <= tolerance * best or not low < trial < high:
                    break
            else:
                if best - (high_value - high_slope * (high - low)) <= tolerance * best:
                    break
                trial = 0.5 * (low + high)
                if step == 0 and low < guesses[index] < high:
                    trial = guesses[index]
                elif step == 1 and guesses[index] > 0.0 and low == guesses[index]:
                    trial = min(1.1 * low, trial)
                elif step == 1 and guesses[index] > 0.0 and high == guesses[index]:
                    trial = max(0.9 * high, trial)
            complete, reached, total, cost = _prices(
                gains, offsets, starts, count, trial, mass, high_value - trial * budget, longest, y, steps, following,
                queue, queued, touched, chosen,
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
                low, low_value, low_slope, known = trial, value, budget - cost, complete
                kept = 0
                for k in range(count):
                    start = starts[k]
                    starts[kept] = start
                    kept += gains[start] > low
                count = kept
        if best_at == steepest and flows.shape[0] == 0:
            values[index], multipliers[index] = simple, best_at
            continue
        # The bound, from the inequalities themselves: of all moves that gain more than best_at.
        if best_at < low:
            count = _listed(gains, place, shape, best_at, starts)
        _, reached, total, cost = _prices(
            gains, offsets, starts, count, best_at, mass, np.inf, longest, y, steps, following, queue, queued, touched,
            chosen,
        )  # fmt: skip
        total = 0.0
        for k in range(reached):
            total += mass[touched[k]] * y[touched[k]]
        price = best_at + _violation(gains, offsets, starts, count, best_at, y, touched, reached)
        values[index], multipliers[index] = min(simple, (price * budget + total) * inflated), best_at
        _clear(y, touched, reached)
        if flows.shape[0] > 0:
            # Beside the multipliers, where no two paths tie: a flow of one, priced as another, would break the budget.
            flow = flows[index]
            _, reached, total, cost = _prices(
                gains, offsets, starts, count, high * (1 + APART), mass, np.inf, longest, y, steps, following, queue,
                queued, touched, chosen,
            )  # fmt: skip
            _follow(place, shape, 1.0, mass, y, following, offsets, touched, reached, flow)
            _clear(y, touched, reached)
            circulates, high_cost = low > 0.0, cost
            if low > 0.0:
                complete, reached, total, cost = _prices(
                    gains, offsets, starts, count, low * (1 - APART), mass, np.inf, longest, y, steps, following, queue,
                    queued, touched, chosen,
                )  # fmt: skip
                if complete and cost > budget:
                    share, circulates = max(0.0, (budget - high_cost) / (cost - high_cost)), False
                    flow *= 1 - share
                    _follow(place, shape, share, mass, y, following, offsets, touched, reached, flow)
                _clear(y, touched, reached)
            if circulates:
                flow[best_entry if one < 0 else one] += (budget - high_cost) / 2
                flow[best_entry if other < 0 else other] += (budget - high_cost) / 2
