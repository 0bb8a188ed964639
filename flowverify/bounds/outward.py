"""Intervals that carry their own rounding: for networks with operations that have no largest slope.

Section 15 of the theory bounds rounding before anything is computed, by the largest slopes of activations. A product of
two values has none; how much an error grows in it depends on the values. Here the interval of every value is widened,
as soon as it is computed, by what rounding may have changed in it, so that it holds in exact arithmetic. Nothing is
left to be allowed for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flowverify.ball import Ball
from flowverify.bounds.intervals import Interval
from flowverify.network import Network
from flowverify.network.rounding import FEW, INFLATED, TINY, UNIT, gamma, magnitudes, reach, rounding_of_operation


class Outward:
    """Widens the intervals of one network.

    Args:
        network: in the precision of the bounds.
        affine: the values at which intervals start, whose bounds over the ball are computed by duality.
    """

    def __init__(self, network: Network, affine: Iterable[str]) -> None:
        self._start: dict[str, tuple[float, Tensor]] = {}
        for name in affine:
            part = network.before(name).double()
            self._start[name] = gamma(part), magnitudes(part, relaxed=False)[part.output]

    def start(self, name: str, interval: Interval, ball: Ball) -> Interval:
        """The interval of a value that is affine in the image."""
        share, (fixed, moving) = self._start[name]
        mass = reach(ball.mass.double(), ball.budget.double())
        off = share * (fixed + mass.reshape(-1, *[1] * fixed.ndim) * moving)
        return widened(interval, off)

    def step(self, operation: nn.Module, inputs: Sequence[Interval], interval: Interval) -> Interval:
        """The interval that an operation makes of those of its inputs."""
        return widened(interval, rounding_of_operation(operation, [size(one) for one in inputs], size(interval)))

    def functions(self, weights: Tensor, constants: Tensor, interval: Interval, terms: int) -> Tensor:
        """By how much lower bounds (B, S) of linear functions of a value may be off.

        Args:
            weights: sums of the sizes of all products that the coefficients (B, S, entries) are made of.
            constants: the same of the constants, (B, S).
            terms: how many products a coefficient is the sum of.
        """
        count = weights.shape[-1] + terms + FEW
        total: Tensor = (weights @ size(interval)[..., None]).squeeze(-1) + constants
        return count * UNIT * INFLATED * total + TINY


def size(interval: Interval) -> Tensor:
    """The larger of the sizes of both ends."""
    return torch.maximum(interval[0].abs(), interval[1].abs())


def widened(interval: Interval, off: Tensor) -> Interval:
    """The interval and what is no farther from it than ``off``."""
    lower, upper = interval
    return lower - off.to(lower), upper + off.to(upper)
