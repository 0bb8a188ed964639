"""Compiled CPU kernels of a ReLU layer's relaxation: its value, its gradient, and a step of Adam, row by row.

The formulas are those of :mod:`flowverify.certifiers.complete.relaxation`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HUGE = 1e30  # in place of the gradient of a limit that no pattern keeps to


@numba.njit(nogil=True, cache=True)
def _steepen(members: Array, up: Array, down: Array, theta: Array, steeper: Array, flatter: Array) -> None:
    """U and D of one node, from its joint limits."""
    steeper[:] = 0
    flatter[:] = 0
    for group in range(theta.size):
        for member in range(members.shape[1]):
            neuron = members[group, member]
            steeper[neuron] += theta[group] * up[group, member]
            flatter[neuron] += theta[group] * down[group, member]


@numba.njit(nogil=True, cache=True)
def relax_rows(
    coefficients: Array, lower: Array, upper: Array, alpha: Array, gamma: Array,
    members: Array, up: Array, down: Array, limit: Array, theta: Array,
    rho: Array, steeper: Array, flatter: Array, constant: Array,
) -> None:  # fmt: skip
    """Writes rho, U and D (N, n), and adds to the constants (N,); joint limits are (N, G, m) and (N, G)."""
    zero = coefficients.dtype.type(0)
    for row in range(coefficients.shape[0]):
        _steepen(members[row], up[row], down[row], theta[row], steeper[row], flatter[row])
        total = 0.0
        for group in range(theta.shape[1]):
            if theta[row, group] > 0:
                total -= theta[row, group] * limit[row, group]
        for neuron in range(coefficients.shape[1]):
            low, high = lower[row, neuron], upper[row, neuron]
            least = -flatter[row, neuron]
            most = coefficients[row, neuron] + steeper[row, neuron]
            active, inactive = low >= 0, high <= 0
            if active:
                free = most
            elif inactive:
                free = least
            elif most < least:
                free = (high * most - low * least) / (high - low)
            else:
                free = least + alpha[row, neuron] * (most - least)
            slope = free + gamma[row, neuron]
            rho[row, neuron] = slope
            below = ((most if active else least) - slope) * low
            above = ((least if inactive and not active else most) - slope) * high
            value = min(below, above)
            if not active and not inactive:
                value = min(value, zero)
            if np.isnan(low + high):  # min would pass over it, and what is not a number proves nothing
                total = np.nan
            total += value
        constant[row] += total


@numba.njit(nogil=True, cache=True)
def relax_gradients(
    coefficients: Array, lower: Array, upper: Array, alpha: Array,
    members: Array, up: Array, down: Array, limit: Array, theta: Array,
    rho: Array, steeper: Array, flatter: Array, read: Array,
    output: Array, for_alpha: Array, for_gamma: Array, for_theta: Array,
) -> None:  # fmt: skip
    """The way back: from ``read``, the gradient in rho but for the constants, to those in A and the multipliers.

    ``read`` is what the layer reads at the minimiser, in the relaxation; the gradient in A is what it puts out.
    """
    zero = coefficients.dtype.type(0)
    one = coefficients.dtype.type(1)
    for row in range(coefficients.shape[0]):
        for group in range(theta.shape[1]):
            for_theta[row, group] = max(-limit[row, group], -HUGE) if limit[row, group] > -HUGE else HUGE
        for neuron in range(coefficients.shape[1]):
            low, high, slope = lower[row, neuron], upper[row, neuron], rho[row, neuron]
            least = -flatter[row, neuron]
            most = coefficients[row, neuron] + steeper[row, neuron]
            active, inactive = low >= 0, high <= 0
            below = ((most if active else least) - slope) * low
            above = ((least if inactive and not active else most) - slope) * high
            by_slope, by_least, by_most = read[row, neuron], zero, zero
            if active or inactive or min(below, above) < 0:
                # At gamma = 0 both ends agree; the side to which gamma can go from there is the one that counts.
                if below < above or (below == above and active):
                    by_slope -= low
                    if active:
                        by_most += low
                    else:
                        by_least += low
                else:
                    by_slope -= high
                    if inactive and not active:
                        by_least += high
                    else:
                        by_most += high
            for_gamma[row, neuron] = by_slope
            for_alpha[row, neuron] = zero
            if active:
                by_most += by_slope
            elif inactive:
                by_least += by_slope
            elif most < least:
                share = high / (high - low)
                by_most += share * by_slope
                by_least += (one - share) * by_slope
            else:
                for_alpha[row, neuron] = by_slope * (most - least)
                by_most += alpha[row, neuron] * by_slope
                by_least += (one - alpha[row, neuron]) * by_slope
            output[row, neuron] = by_most
            steeper[row, neuron] = by_most
            flatter[row, neuron] = -by_least
        for group in range(theta.shape[1]):
            for member in range(members.shape[2]):
                neuron = members[row, group, member]
                for_theta[row, group] += up[row, group, member] * steeper[row, neuron]
                for_theta[row, group] += down[row, group, member] * flatter[row, neuron]


@numba.njit(nogil=True, cache=True)
def adam_step(
    value: Array, gradient: Array, mean: Array, square: Array, first: float, second: float, rate: float,
    first_bias: float, second_bias: float, lowest: float, highest: float,
) -> None:  # fmt: skip
    """One step uphill, in place, within [lowest, highest]."""
    kind = value.dtype.type
    keep, add, keep_square, add_square = kind(first), kind(1 - first), kind(second), kind(1 - second)
    pace, unbias, small = kind(rate / first_bias), kind(1 / second_bias), kind(1e-8)
    low, high = kind(lowest), kind(highest)
    for row in range(value.shape[0]):
        for place in range(value.shape[1]):
            slope = gradient[row, place]
            average = keep * mean[row, place] + add * slope
            spread = keep_square * square[row, place] + add_square * slope * slope
            mean[row, place], square[row, place] = average, spread
            moved = value[row, place] + pace * average / ((spread * unbias) ** kind(0.5) + small)
            value[row, place] = min(max(moved, low), high)


@numba.njit(nogil=True, cache=True)
def adam_step_on_sides(
    value: Array, gradient: Array, mean: Array, square: Array, sign: Array, first: float, second: float, rate: float,
    first_bias: float, second_bias: float,
) -> None:  # fmt: skip
    """As :func:`adam_step` for gamma: -beta where z >= 0 and beta where z <= 0, beta >= 0; 0 where nothing is split."""
    kind = value.dtype.type
    keep, add, keep_square, add_square = kind(first), kind(1 - first), kind(second), kind(1 - second)
    pace, unbias, small, zero = kind(rate / first_bias), kind(1 / second_bias), kind(1e-8), kind(0)
    for row in range(value.shape[0]):
        for place in range(value.shape[1]):
            side = sign[row, place]
            if side == 0:
                value[row, place] = zero
                continue
            slope = gradient[row, place]
            average = keep * mean[row, place] + add * slope
            spread = keep_square * square[row, place] + add_square * slope * slope
            mean[row, place], square[row, place] = average, spread
            moved = value[row, place] + pace * average / ((spread * unbias) ** kind(0.5) + small)
            value[row, place] = min(moved, zero) if side > 0 else max(moved, zero)
