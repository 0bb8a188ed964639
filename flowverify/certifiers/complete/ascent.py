"""Raises lower bounds by Adam on their multipliers, problem by problem, until each is positive or time is up.

The steps are taken on the reduced problem; the bounds that come out are in float64 and on all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.gradients import slope
from flowverify.certifiers.complete.relaxation import Multipliers, Relaxation, lower_bound
from flowverify.certifiers.complete.settings import AscentSettings


@dataclass
class Ascended:
    """The best bound of each problem, its multipliers, and the minimiser over the ball that belongs to it."""

    value: Tensor
    multipliers: Multipliers
    point: Tensor


def ascend(
    relaxation: Relaxation,
    start: Multipliers,
    iterations: int,
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
    if relaxation.problem.stage and iterations > 1 and len(relaxation):
        kind = torch.float64 if precise else torch.float32
        multipliers = _climb(relaxation.reduced(kind), start.to(kind), iterations, enough, pace)
    bound = lower_bound(relaxation, multipliers, tolerance=relaxation.problem.settings.ascent.tolerance, point=True)
    assert bound.point is not None
    multipliers = Multipliers.of(multipliers.variables, bound.multiplier.to(multipliers.guess))
    return Ascended(bound.value, multipliers, bound.point)


def _climb(relaxation: Relaxation, start: Multipliers, iterations: int, enough: float, pace: float) -> Multipliers:
    """The best multipliers that were met, in float64."""
    settings, specification = relaxation.problem.settings.ascent, relaxation.problem.specification
    count, device = len(specification), specification.device
    best = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
    kept, guesses = [v.clone() for v in start.variables], start.guess.clone()
    rows = torch.arange(count, device=device)
    adam = Adam(start, settings, pace)
    guess, unsure = start.guess, settings.unsure * torch.finfo(specification.dtype).eps
    for step in range(iterations):
        found = slope(relaxation, Multipliers.of(adam.values, guess), settings.rough_tolerance)
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
        adam.step(found.gradients, relaxation.signs, relaxation.compiled)
        going = ~(found.value > enough + unsure * found.size)
        left = int(going.sum())
        if left == 0:
            break
        if left <= settings.going_share * len(rows):
            rows, guess = rows[going], guess[going]
            adam.keep(going)
            relaxation = relaxation[going]
    return Multipliers.of([v.double() for v in kept], guesses)


class Adam:
    """Steps uphill on multipliers: slopes stay in [0, 1], gamma on the side of its split, theta nonnegative."""

    def __init__(self, multipliers: Multipliers, settings: AscentSettings, pace: float = 1.0) -> None:
        self.values = [v.clone() for v in multipliers.variables]
        self._means, self._squares = ([torch.zeros_like(v) for v in self.values] for _ in range(2))
        self._settings, self._pace, self._taken = settings, pace, 0

    def keep(self, chosen: Tensor) -> None:
        """Leaves only these problems."""
        self.values, self._means, self._squares = (
            [v[chosen] for v in group] for group in (self.values, self._means, self._squares)
        )

    def step(self, gradients: Sequence[Tensor], signs: Sequence[Tensor], compiled: bool) -> None:
        layers, own = len(signs), self._settings
        keep, keep_square = own.averages
        steps = own.slope_step * self._pace, own.split_step * self._pace, own.limit_step * self._pace
        first, second = 1 - keep ** (self._taken + 1), 1 - keep_square ** (self._taken + 1)
        for index, gradient in enumerate(gradients):
            kind, layer = divmod(index, layers)
            rate = steps[kind] * own.decay**self._taken
            value, mean, square = self.values[index], self._means[index], self._squares[index]
            low, high = ((0.0, 1.0), (-torch.inf, torch.inf), (0.0, torch.inf))[kind]
            if compiled:
                from flowverify.certifiers.complete import relaxation_kernel as kernel

                arrays = (value.numpy(), gradient.numpy(), mean.numpy(), square.numpy())
                if kind == 1:
                    kernel.adam_step_on_sides(*arrays, signs[layer].numpy(), keep, keep_square, rate, first, second)
                else:
                    kernel.adam_step(*arrays, keep, keep_square, rate, first, second, low, high)
                continue
            mean.mul_(keep).add_(gradient, alpha=1 - keep)
            square.mul_(keep_square).addcmul_(gradient, gradient, value=1 - keep_square)
            moved = value + rate * (mean / first) / ((square / second).sqrt() + 1e-8)
            if kind == 1:
                sign = signs[layer]
                moved = torch.where(sign > 0, moved.clamp(max=0), torch.where(sign < 0, moved.clamp(min=0), 0.0))
            self.values[index] = moved.clamp(low, high)
        self._taken += 1
