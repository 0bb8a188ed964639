"""Compiled CPU kernel of the maximiser nu*: where the plan on either side of the best multiplier leads."""

from __future__ import annotations

import numba
import numpy as np

from flowverify.transport.scan_kernel import LANES, Array, allocate, evaluate, load


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
            reach[side] = buffers[0].reshape(holder_mass.size, LANES)
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
            moved[:] = mass
            if kept:
                _lead(coefficients[problem], holder_mass, pixels, reach[1, :, lane], 1 - share, shape, moved)
            if share > 0:
                _lead(coefficients[problem], holder_mass, pixels, reach[0, :, lane], share, shape, moved)
