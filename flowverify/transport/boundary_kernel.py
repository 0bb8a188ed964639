"""Compiled CPU kernel of :mod:`flowverify.transport.least_budget`, on the scans of the support function."""

from __future__ import annotations

import numba
import numpy as np

from flowverify.transport.scan_kernel import LANES, MAX_STEPS, Array, allocate, evaluate, lipschitz_constants, load


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
            near[lane] = np.float64(lipschitz[lane]), 0.0, 0.0
            far[lane] = -1.0, np.inf, 0.0
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
                    near[lane] = here, spent, gain
                    trial[lane] = 0.5 * here if here > 1e-3 * lipschitz[lane] else 0.0
                    continue
                if far[lane, 0] < 0:
                    far[lane] = here, spent, gain
                elif spent <= near[lane, 1] or spent >= far[lane, 1]:
                    done[lane] = True  # nothing above the chord: near and far are neighbours
                    continue
                elif gain < target:
                    near[lane] = here, spent, gain
                else:
                    far[lane] = here, spent, gain
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
