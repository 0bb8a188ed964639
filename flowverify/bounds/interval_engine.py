"""The engine of intervals: exact where the affine part of a network ends, interval arithmetic above.

A value that is affine in the image has exact bounds over the Wasserstein ball around each image: entry k is
c_k . x + b_k, so they are support functions (theory, sections 4 and 5; section 13 for what stands above). The
coefficients do not depend on the image: they are computed once a network and shared by the batch.

Networks with operations that have no largest slope have intervals that carry their own rounding. Section 15 of the
theory bounds rounding before anything is computed, by the largest slopes of activations. A product of two values has
none; how much an error grows in it depends on the values. Here the interval of every value is widened, as soon as it
is computed, by what rounding may have changed in it, so that it holds in exact arithmetic. Nothing is left to be
allowed for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat
from flowverify.bounds.engine import Batch, EngineOptions, WarmStart
from flowverify.bounds.intervals import Interval, propagate
from flowverify.network import Network, affine_rows
from flowverify.network import operations as ops
from flowverify.network.rounding import (
    FEW,
    INFLATED,
    TINY,
    UNIT,
    gamma,
    is_steep,
    magnitudes,
    reach,
    rounding_of_operation,
)
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.support import inner


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


CHUNK_ENTRIES = 1 << 26  # of rows that are bounded at once, so that a large layer is never copied whole


class AffineValue:
    """One affine value of a network, ready to be bounded over balls of a threat.

    Args:
        network: the network in canonical form.
        name: a value in ``network.affine_of_input()``.
        dtype: the precision of the bounds.
    """

    def __init__(self, network: Network, name: str, dtype: torch.dtype, threat: Threat) -> None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        rows, bias = affine_rows(network, name, dtype)
        self.name, self.threat = name, threat
        self.shape = network.shape(name)
        self.bias = bias.to(device)
        self.rows = rows.to(device).reshape(-1, *network.input_shape)
        self.lipschitz = lipschitz_constant(self.rows, threat.ground)

    def bounds(self, ball: Ball, tolerance: float | None = None, warm_start: WarmStart | None = None) -> Interval:
        """Lower and upper bounds over each ball, of shape (B, *shape)."""
        centre = inner(self.rows, ball.images) + self.bias
        if self.threat.positive:
            above, below = (self._excess(sign, ball, tolerance, warm_start) for sign in (+1, -1))
        else:
            above = below = ball.budget[:, None].to(centre) * self.lipschitz
        lower, upper = centre - below, centre + above
        return lower.reshape(-1, *self.shape), upper.reshape(-1, *self.shape)

    def margins(self, specification: Tensor, ball: Ball, tolerance: float | None = None) -> Tensor:
        """Exact lower bounds of linear functions (B, S, entries) of the value, (B, S): for networks that are affine."""
        rows = torch.einsum("bse,ep->bsp", specification, self.rows.flatten(1))
        rows = rows.reshape(*specification.shape[:2], *self.rows.shape[1:])
        centre = inner(rows, ball.images) + specification @ self.bias
        return centre - ball.support(-rows, tolerance=tolerance).excess

    def _excess(self, sign: int, ball: Ball, tolerance: float | None, warm_start: WarmStart | None) -> Tensor:
        size = max(1, CHUNK_ENTRIES // self.rows[0].numel())
        parts = []
        for start in range(0, len(self.rows), size):
            rows, guess = self.rows[start : start + size], None
            if warm_start is not None:
                guess = warm_start.at(("first layer", self.name, start)).guess(sign, len(rows))
            found = ball.support(sign * rows, guess=guess, tolerance=tolerance)
            if warm_start is not None:
                warm_start.keep(sign, found.multiplier)
            parts.append(found.excess)
        return torch.cat(parts, dim=1)


_RISING = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Flatten, ops.Reshape, ops.Permute, ops.Index, ops.Pad, ops.Concatenate)


class IntervalEngine:
    """Bounds by intervals (theory, section 13); takes every network, and every other engine builds on it."""

    monotone = True

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None:
        self.network, self.options = network, options
        self.notes: list[str] = []
        affine = network.affine_of_input()
        self.above = [node for node in network.nodes if node.name not in affine]
        ends = {name for node in self.above for name in node.inputs if name in affine}
        if network.is_affine:
            ends.add(network.output)
        self.exact = _exact_above(network, affine)  # where no other engine is of use
        self.affine = {name: AffineValue(network, name, dtype, threat) for name in sorted(ends)}
        self.outward = Outward(network, self.affine) if is_steep(network) else None

    def start(self, batch: Batch) -> IntervalRun:
        return IntervalRun(self, batch)


def _exact_above(network: Network, affine: Collection[str]) -> set[str]:
    """The values whose entries are non-decreasing functions of one entry each of what is bounded exactly."""
    exact = set(affine)
    for node in network.nodes:
        rising = isinstance(node.operation, _RISING) or (
            isinstance(node.operation, nn.LeakyReLU) and node.operation.negative_slope >= 0
        )
        if rising and exact.issuperset(node.inputs):
            exact.add(node.name)
    return exact - set(affine)


class IntervalRun:
    """Knows the values where the affine part ends from the start."""

    def __init__(self, engine: IntervalEngine, batch: Batch) -> None:
        self.engine, self.batch = engine, batch
        for name, value in engine.affine.items():
            if name != engine.network.output and name not in batch.intervals:
                found = value.bounds(batch.ball, engine.options.tolerance, batch.warm_start)
                batch.intervals[name] = engine.outward.start(name, found, batch.ball) if engine.outward else found

    def tighten(self, name: str, wanted: Tensor | None = None) -> Interval:
        """Bounds of any value above the affine part, for all of its entries."""
        node = self.engine.network.node(name)
        inputs = [self.batch.intervals[read] for read in node.inputs]
        found = propagate(node.operation, inputs)
        return self.engine.outward.step(node.operation, inputs, found) if self.engine.outward else found

    def margins(self, specification: Tensor) -> Tensor:
        network, intervals = self.engine.network, self.batch.intervals
        if network.output in self.engine.affine:
            value = self.engine.affine[network.output]
            return value.margins(specification, self.batch.ball, self.engine.options.tolerance)
        last = network.nodes[-1]
        if isinstance(last.operation, nn.Linear):
            # The specification merges with the last layer, so that shared terms cancel.
            (lower, upper), layer = intervals[last.inputs[0]], last.operation
            weights = specification @ layer.weight
            constant = 0 * weights[..., 0] if layer.bias is None else specification @ layer.bias
            terms = specification.abs() @ layer.weight.abs()
            rest = 0 * constant if layer.bias is None else specification.abs() @ layer.bias.abs()
        else:
            lower, upper = self.tighten(last.name)
            weights, constant = specification, torch.zeros_like(specification[..., 0])
            terms, rest = weights.abs(), constant
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        found = (weights @ centre[..., None] - weights.abs() @ radius[..., None]).squeeze(-1) + constant
        if self.engine.outward is None:
            return found
        return found - self.engine.outward.functions(terms, rest, (lower, upper), specification.shape[-1])
