"""Raises lower bounds by Adam on their multipliers, problem by problem, until each is positive or time is up.

The steps are taken on a sketch of the problem; the bounds that come out are in float64 and on all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.gradients import Adam, Problems
from flowverify.certifiers.complete.joint import JointLimits
from flowverify.certifiers.complete.relaxation import Multipliers, lower_bound

SLOPE_STEP = 0.03
SPLIT_STEP = 0.2
LIMIT_STEP = 0.05
DECAY = 0.98
LOOSE, TIGHT = 1e-3, 1e-6  # the ball's tolerance on the way, and of the last bound; all of them are sound
SURE = 100  # units in the last place of a bound's terms: what the steps' precision may be off
FEWER = 0.7  # when so many are left to do, the others are put aside


@dataclass
class Ascended:
    """The best bound of each problem, its multipliers, and the minimiser over the ball that belongs to it."""

    value: Tensor
    multipliers: Multipliers
    point: Tensor


def ascend(
    maps: AffineMaps,
    ball: Polytope,
    stage: int,
    specification: Tensor,
    lower: Sequence[Tensor],  # (N, n_k) each
    upper: Sequence[Tensor],
    signs: Sequence[Tensor],  # +1 where split active, -1 inactive, 0 elsewhere
    start: Multipliers,
    iterations: int,
    joint: Sequence[JointLimits] = (),
    *,
    enough: float = torch.inf,
    pace: float = 1.0,
    precise: bool = False,
) -> Ascended:
    """Maximises the bounds of :func:`lower_bound` over slopes, and multipliers of splits and joint limits.

    Args:
        iterations: evaluations of the bound, at least 1.
        enough: a problem whose bound exceeds this is left alone.
        pace: factor of all steps; small ones finish what large ones have begun.
        precise: steps in float64, for bounds that are to become positive by little.
    """
    multipliers = start
    if stage and iterations > 1 and len(specification):
        kind = torch.float64 if precise else torch.float32
        problems = Problems.sketched(maps, ball, stage, specification, lower, upper, signs, joint, kind)
        multipliers = _climb(problems, start.to(kind), iterations, enough, pace)
    bound = lower_bound(
        maps, ball, stage, specification, lower, upper, multipliers, joint, tolerance=TIGHT, point=True
    )  # fmt: skip
    assert bound.point is not None
    multipliers = Multipliers.of(multipliers.variables, bound.multiplier.to(multipliers.guess))
    return Ascended(bound.value, multipliers, bound.point)


def _climb(problems: Problems, start: Multipliers, iterations: int, enough: float, pace: float) -> Multipliers:
    """The best multipliers that were met, in float64."""
    count, device = len(problems.specification), problems.specification.device
    best = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
    kept, guesses = [v.clone() for v in start.variables], start.guess.clone()
    rows = torch.arange(count, device=device)
    adam = Adam(start, (SLOPE_STEP * pace, SPLIT_STEP * pace, LIMIT_STEP * pace), DECAY)
    guess, unsure = start.guess, SURE * torch.finfo(problems.specification.dtype).eps
    for step in range(iterations):
        found = problems.slope(Multipliers.of(adam.values, guess), LOOSE)
        better = found.value > best[rows]
        if bool(better.all()) and len(rows) == count:
            best, kept = found.value.double(), [v.clone() for v in adam.values]
        else:
            chosen = rows[better]
            best[chosen] = found.value[better].double()
            for target, source in zip(kept, adam.values, strict=True):
                target[chosen] = source[better]
        guess = found.multiplier
        guesses[rows] = guess.to(guesses)
        if step == iterations - 1:
            break
        adam.step(found.gradients, problems.signs, problems.compiled)
        going = ~(found.value > enough + unsure * found.size)
        left = int(going.sum())
        if left == 0:
            break
        if left <= FEWER * len(rows):
            rows, guess = rows[going], guess[going]
            adam.keep(going)
            problems = problems[going]
    return Multipliers.of([v.double() for v in kept], guesses)
