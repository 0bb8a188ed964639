"""Compiled CPU kernel of the support function for moves at any prices; see :mod:`flowverify.bounds.lifted.support`.

As :mod:`flowverify.bounds.lifted.kernel` for the neighbours of l1. Single moves need no queue: each pixel takes its
best one. What is returned does not rest on convergence: every inequality is looked at once more at the end, and the
multiplier is raised by the largest violation over the lowest price.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from flowverify.bounds.lifted.support import APART, UNIT

Array = NDArray[Any]

MAX_STEPS = 40


@numba.njit(nogil=True, cache=True)
def _staying(first: int, count: int, step: int, size: int) -> tuple[int, int]:
    """Which of ``count`` lines of a window that begins at ``first`` lie in the grid and stay there, as (first, end)."""
    return max(0, -first, -first - step), min(count, size - first, size - first - step)


@numba.njit(nogil=True, cache=True)
def _entries(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], offsets: Array, prices: Array,
    floor: float, ways: Array, pixels: Array, gains: Array,
) -> int:  # fmt: skip
    """Lists the moves within the grid whose gain is above ``floor`` for each unit of cost; returns their number."""
    channels, height, width = shape
    top, left, rows, columns = place
    count = 0
    for way in range(len(prices)):
        least = floor * prices[way]
        first_a, end_a = _staying(top, rows, offsets[way, 0], height)
        first_b, end_b = _staying(left, columns, offsets[way, 1], width)
        for channel in range(channels):
            for a in range(first_a, end_a):
                pixel = (channel * height + top + a) * width + left
                line = ((way * channels + channel) * rows + a) * columns
                for b in range(first_b, end_b):
                    gain = float(row[line + b])
                    # Overwritten if not counted: branches would cost more.
                    ways[count], pixels[count], gains[count] = way, pixel + b, gain
                    count += gain > least
    return count


@numba.njit(nogil=True, cache=True)
def _gain(row: Array, place: tuple[int, int, int, int], channels: int, way: int, at: tuple[int, int, int]) -> float:
    """The gain of the move from a pixel in one way: 0 outside of the window."""
    top, left, height, width = place
    i, j = at[1] - top, at[2] - left
    if i < 0 or j < 0 or i >= height or j >= width:
        return 0.0
    return float(row[((way * channels + at[0]) * height + i) * width + j])


@numba.njit(nogil=True, cache=True)
def _returns(pixel: int, source: int, following: Array, strides: Array, links: int) -> bool:
    """Whether the chain from a pixel leads over the source within a few moves: a cycle of positive gain."""
    for _ in range(min(links, 8)):
        pixel = pixel + strides[following[pixel]]
        if pixel < 0 or pixel >= following.shape[0]:
            return False  # the chain has become shorter meanwhile, and this is beyond its end
        if pixel == source:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _solve(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], offsets: Array, prices: Array,
    strides: Array, chained: bool, entries: tuple[Array, Array, Array], count: int, multiplier: float, mass: Array,
    limit: float, y: Array, paid: Array, following: Array, links: Array, queue: Array, queued: Array, touched: Array,
) -> tuple[bool, int, float, float]:  # fmt: skip
    """The least y >= 0 of the inequalities, from y = 0; stops where mass . y passes the limit, or a chain is too long.

    Returns:
        whether it came to an end, how many pixels have been touched, mass . y, and the cost of the moves.
    """
    channels, height, width = shape
    size = channels * height * width
    longest = 2 * (height + width)
    total, reached, first, waiting = 0.0, 0, 0, 0
    ways, pixels, gains = entries
    for k in range(count):
        rise, pixel = gains[k] - multiplier * prices[ways[k]], pixels[k]
        if rise > y[pixel]:
            if y[pixel] == 0.0:
                touched[reached] = pixel
                reached += 1
            total += mass[pixel] * (rise - y[pixel])
            y[pixel], paid[pixel], following[pixel], links[pixel] = rise, prices[ways[k]], ways[k], 1
            if chained and not queued[pixel]:
                queued[pixel] = True
                queue[(first + waiting) % size] = pixel
                waiting += 1
    complete = total <= limit or not chained
    while waiting > 0 and complete:
        pixel = queue[first]
        first = (first + 1) % size
        waiting -= 1
        queued[pixel] = False
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        for way in range(len(prices)):
            from_i, from_j = i - offsets[way, 0], j - offsets[way, 1]
            if from_i < 0 or from_j < 0 or from_i >= height or from_j >= width:
                continue
            source = (channel * height + from_i) * width + from_j
            gain = _gain(row, place, channels, way, (channel, from_i, from_j))
            price = y[pixel] + gain - multiplier * prices[way]
            if price > y[source] + 1e-12 * y[source]:
                if links[pixel] > 3 and _returns(pixel, source, following, strides, links[pixel]):
                    complete = False
                    break
                if y[source] == 0.0:
                    touched[reached] = source
                    reached += 1
                total += mass[source] * (price - y[source])
                y[source], paid[source], following[source] = price, paid[pixel] + prices[way], way
                links[source] = links[pixel] + 1
                if links[source] > longest:
                    complete = False
                if not queued[source]:
                    queued[source] = True
                    queue[(first + waiting) % size] = source
                    waiting += 1
        if total > limit:
            complete = False
    while waiting > 0:
        queued[queue[first]] = False
        first = (first + 1) % size
        waiting -= 1
    cost = 0.0
    for k in range(reached):
        cost += mass[touched[k]] * paid[touched[k]]
    return complete, reached, total, cost


@numba.njit(nogil=True, cache=True)
def _violation(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], offsets: Array, prices: Array,
    chained: bool, multiplier: float, y: Array, touched: Array, reached: int,
) -> float:  # fmt: skip
    """By how much inequalities are violated at most, or 0, with what rounding may hide in it.

    Moves outside of the window gain nothing: they matter where they lead to a pixel with a price.
    """
    channels, height, width = shape
    top, left, rows, columns = place
    worst, size = 0.0, multiplier * prices.max()
    for way in range(len(prices)):
        fee = multiplier * prices[way]
        first_a, end_a = _staying(top, rows, offsets[way, 0], height)
        first_b, end_b = _staying(left, columns, offsets[way, 1], width)
        for channel in range(channels):
            for a in range(first_a, end_a):
                here = (channel * height + top + a) * width + left
                there = here + offsets[way, 0] * width + offsets[way, 1]
                line = ((way * channels + channel) * rows + a) * columns
                for b in range(first_b, end_b):
                    gain = float(row[line + b])
                    ahead = y[there + b] if chained else 0.0
                    worst = max(worst, ahead + gain - fee - y[here + b])
                    size = max(size, abs(gain))
    for k in range(reached):
        pixel = touched[k]
        size = max(size, y[pixel])
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        for way in range(len(prices) if chained else 0):
            from_i, from_j = i - offsets[way, 0], j - offsets[way, 1]
            if 0 <= from_i < height and 0 <= from_j < width:
                source = (channel * height + from_i) * width + from_j
                gain = _gain(row, place, channels, way, (channel, from_i, from_j))
                worst = max(worst, y[pixel] + gain - multiplier * prices[way] - y[source])
    return float(worst + 16 * UNIT * size)


@numba.njit(nogil=True, cache=True)
def _follow(
    place: tuple[int, int, int, int], shape: tuple[int, int, int], strides: Array, chained: bool, share: float,
    mass: Array, y: Array, following: Array, touched: Array, reached: int, flow: Array,
) -> None:  # fmt: skip
    """Adds what flows where all mass takes its way, times ``share``, to the moves within the window."""
    channels, height, width = shape
    top, left, rows, columns = place
    for k in range(reached):
        pixel = touched[k]
        amount = share * mass[pixel]
        if amount == 0.0:
            continue
        for _ in range(4 * (height + width) if chained else 1):
            if y[pixel] <= 0.0:
                break
            way = following[pixel]
            channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
            a, b = i - top, j - left
            if 0 <= a < rows and 0 <= b < columns:
                flow[((way * channels + channel) * rows + a) * columns + b] += amount
            pixel += strides[way]


@numba.njit(nogil=True, cache=True)
def _clear(y: Array, touched: Array, reached: int) -> None:
    for k in range(reached):
        y[touched[k]] = 0.0


@numba.njit(nogil=True, cache=True)
def _best_pair(
    row: Array, place: tuple[int, int, int, int], shape: tuple[int, int, int], offsets: Array, prices: Array,
    entries: tuple[Array, Array, Array], count: int,
) -> float:  # fmt: skip
    """The largest gain of a move and its opposite for each unit of their cost: below it no prices exist for chains."""
    channels, height, width = shape
    ways, pixels, gains = entries
    best = 0.0
    for k in range(count):
        way, pixel = ways[k], pixels[k]
        channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
        back = _gain(row, place, channels, way ^ 1, (channel, i + offsets[way, 0], j + offsets[way, 1]))
        best = max(best, (gains[k] + back) / (2 * prices[way]))
    return best


@numba.njit(nogil=True, cache=True)
def _strides(offsets: Array, width: int) -> Array:
    """By how many pixels moves lead on in a channel."""
    strides = np.empty(len(offsets), np.int64)
    for way in range(len(offsets)):
        strides[way] = offsets[way, 0] * width + offsets[way, 1]
    return strides


@numba.njit(nogil=True, cache=True)
def solve_rows(
    rows: Array, shared: bool, origins: Array, per_origin: int, window: tuple[int, int], shape: tuple[int, int, int],
    offsets: Array, prices: Array, chained: bool, mass: Array, budget: float, enough: Array, guesses: Array,
    tolerance: float, first: int, last: int, values: Array, multipliers: Array, flows: Array,
) -> None:  # fmt: skip
    """Solves rows ``first`` to ``last`` of one image, in float64.

    Args:
        rows: these, (last - first, ways * C * window); or, where they are ``shared``, the (per_origin, ...) of every
            origin.
        offsets, prices: of the moves, (ways, 2) and (ways,); each offset is followed by its opposite.
        enough: at which value a row needs no further search; infinite for rows whose value is of no use.
        flows: empty, or one flow a row.
    """
    size, length = shape[0] * shape[1] * shape[2], rows.shape[1]
    y, paid, following = np.zeros(size), np.zeros(size), np.zeros(size, np.int64)
    links, queue, queued = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.bool_)
    touched = np.zeros(size, np.int64)
    entries = (np.empty(length + 1, np.int64), np.empty(length + 1, np.int64), np.empty(length + 1))
    strides = _strides(offsets, shape[2])
    cheapest = prices.min()
    inflated = 1 + (size + 8) * 2 * UNIT
    for index in range(first, last):
        if enough[index] == np.inf:
            values[index], multipliers[index] = np.inf, 0.0
            continue
        row = rows[index % per_origin] if shared else rows[index - first]
        at = index // per_origin
        place = (origins[at, 0], origins[at, 1], window[0], window[1])
        if not np.isfinite(row.sum()):
            values[index], multipliers[index] = np.nan, np.nan
            continue
        count, high = _entries(row, place, shape, offsets, prices, 0.0, entries[0], entries[1], entries[2]), 0.0
        best_entry = -1
        for k in range(count):
            slope = entries[2][k] / prices[entries[0][k]]
            if slope > high:
                high, best_entry = slope, k
        steepest, simple = high, high * budget * inflated
        high_value, high_cost = high * budget, 0.0
        best, best_at = high_value, high
        low, low_value, low_slope, known = 0.0, 0.0, 0.0, False
        idle = high == 0.0 or budget == 0.0
        if chained and not idle and high_value * inflated > enough[index]:
            low = min(high, _best_pair(row, place, shape, offsets, prices, entries, count))
        for step in range(MAX_STEPS):
            if idle or best * inflated <= enough[index]:
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
                if step == 0 and 0.0 < guesses[index] < high:
                    trial = guesses[index]
            complete, reached, total, cost = _solve(
                row, place, shape, offsets, prices, strides, chained, entries, count, trial, mass,
                high_value - trial * budget, y, paid, following, links, queue, queued, touched,
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
        if best_at == steepest and flows.shape[0] == 0:
            values[index], multipliers[index] = simple, best_at
            continue
        # The bound, from the inequalities themselves.
        _, reached, _, _ = _solve(
            row, place, shape, offsets, prices, strides, chained, entries, count, best_at, mass, np.inf, y, paid,
            following, links, queue, queued, touched,
        )  # fmt: skip
        total = 0.0
        for k in range(reached):
            total += mass[touched[k]] * y[touched[k]]
        raised = _violation(row, place, shape, offsets, prices, chained, best_at, y, touched, reached) / cheapest
        values[index], multipliers[index] = min(simple, ((best_at + raised) * budget + total) * inflated), best_at
        _clear(y, touched, reached)
        if flows.shape[0] == 0:
            continue
        flow = flows[index]
        flow[:] = 0
        if idle:
            continue
        # Beside the multipliers, where no two ways tie: a flow of one, priced as another, would break the budget.
        _, reached, _, high_cost = _solve(
            row, place, shape, offsets, prices, strides, chained, entries, count, high * (1 + APART), mass, np.inf, y,
            paid, following, links, queue, queued, touched,
        )  # fmt: skip
        _follow(place, shape, strides, chained, 1.0, mass, y, following, touched, reached, flow)
        _clear(y, touched, reached)
        complete, reached, _, cost = _solve(
            row, place, shape, offsets, prices, strides, chained, entries, count, low * (1 - APART), mass, np.inf, y,
            paid, following, links, queue, queued, touched,
        )  # fmt: skip
        if complete and cost > budget:
            share = max(0.0, (budget - high_cost) / (cost - high_cost))
            flow *= 1 - share
            _follow(place, shape, strides, chained, share, mass, y, following, touched, reached, flow)
        elif not complete:
            # Around a cycle, which no mass limits: what is left of the budget goes to the steepest move.
            way, pixel = entries[0][best_entry], entries[1][best_entry]
            channel, i, j = pixel // (shape[1] * shape[2]), pixel // shape[2] % shape[1], pixel % shape[2]
            spot = ((way * shape[0] + channel) * window[0] + i - place[0]) * window[1] + j - place[1]
            flow[spot] += (budget - high_cost) / prices[way]
        _clear(y, touched, reached)


@numba.njit(nogil=True, cache=True)
def bent_rows(
    rows: Array, shared: bool, origins: Array, per_origin: int, window: tuple[int, int], shape: tuple[int, int, int],
    offsets: Array, prices: Array, chained: bool, feasible: bool, mass: Array, budget: float, multipliers: Array,
    per_place: int, wanted: Array, centres: Array, known: Array, right: Array, left: Array, flattest: float,
    trust: float, found: Array,
) -> None:  # fmt: skip
    """Rows above bends of one image, in float64; see :func:`flowverify.bounds.lifted.relaxations.bent_rows`.

    Args:
        multipliers: (N,), 0 for rows without charges.
        per_place: how many of the rows are of one place: half above z - z0, then half above z0 - z.
        wanted, centres, known, right, left: (N / 2,).
        found: (N / 2, length of a row); not written to where nothing is wanted, or a move leaves the grid.
    """
    channels, height, width = shape
    size, length, half = channels * height * width, rows.shape[1], per_place // 2
    y, paid, following = np.zeros(size), np.zeros(size), np.zeros(size, np.int64)
    links, queue, queued = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.bool_)
    touched = np.zeros(size, np.int64)
    entries = (np.empty(length + 1, np.int64), np.empty(length + 1, np.int64), np.empty(length + 1))
    strides = _strides(offsets, width)
    cheapest, dearest = prices.min(), prices.max()
    for entry in range(len(wanted)):
        if not wanted[entry]:
            continue
        falling = centres[entry] < 0
        first = entry // half * per_place + entry % half
        index = first if falling else first + half
        upward = rows[first % per_origin] if shared else rows[first]
        row = rows[index % per_origin] if shared else rows[index]
        at, result = first // per_origin, found[entry]
        place = (origins[at, 0], origins[at, 1], window[0], window[1])
        if not np.isfinite(upward.sum()):
            result[:] = np.nan
            continue
        multiplier = multipliers[index]
        value, scale, reached = 0.0, 0.0, 0
        if multiplier > 0.0:
            highest, total = 0.0, 0.0
            if feasible:
                count = _entries(row, place, shape, offsets, prices, multiplier, entries[0], entries[1], entries[2])
                _, reached, _, _ = _solve(
                    row, place, shape, offsets, prices, strides, chained, entries, count, multiplier, mass, np.inf, y,
                    paid, following, links, queue, queued, touched,
                )  # fmt: skip
                violation = _violation(row, place, shape, offsets, prices, chained, multiplier, y, touched, reached)
                multiplier = multiplier + violation / cheapest
                for k in range(reached):
                    total += mass[touched[k]] * y[touched[k]]
                    highest = max(highest, y[touched[k]])
            value = (multiplier * budget * (1 + 8 * UNIT) + total) * (1 + 2 * (size + 8) * UNIT)
            # What rounding of charges may add up to: a move costs at least the cheapest.
            value += 8 * UNIT * (multiplier * dearest + 2 * highest) * budget / cheapest
        height_below = (1 - flattest) * abs(centres[entry])
        # Charges for more than all that the row can do are no smaller than it.
        if value > 0.0 and value >= height_below and known[entry] >= trust * value:
            scale = height_below / value * (1 - 8 * UNIT)
        for way in range(len(prices)):
            fee = multiplier * prices[way]
            first_a, end_a = _staying(place[0], place[2], offsets[way, 0], height)
            first_b, end_b = _staying(place[1], place[3], offsets[way, 1], width)
            for channel in range(channels):
                for a in range(first_a, end_a):
                    here = (channel * height + place[0] + a) * width + place[1]
                    there = here + strides[way]
                    line = ((way * channels + channel) * place[2] + a) * place[3]
                    if scale == 0.0:
                        for b in range(first_b, end_b):
                            gain = upward[line + b]
                            result[line + b] = max(right[entry] * gain, left[entry] * gain)
                        continue
                    for b in range(first_b, end_b):
                        gain, charge = upward[line + b], fee + y[here + b]
                        if chained:
                            charge -= y[there + b]
                        if falling:
                            result[line + b] = max(flattest * gain, gain - scale * charge)
                        else:
                            result[line + b] = max(gain, flattest * gain - scale * charge)
        _clear(y, touched, reached)
