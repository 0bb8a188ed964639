"""Intervals: their propagation through one canonical operation, and the engine that starts them from a ball.

Gowal et al. 2018 (arXiv:1810.12715): an affine operation maps centre and half-width by W and |W|; a non-decreasing
operation maps the two ends.

The engine is exact where the affine part of a network ends. A value that is affine in the image has exact bounds over
the Wasserstein ball around each image: entry k is c_k . x + b_k, so they are support functions (theory, sections 4 and
5; section 13 for what stands above). The coefficients do not depend on the image: they are computed once a network and
shared by the batch.

Networks with operations that have no largest slope have intervals that carry their own rounding. Section 15 of the
theory bounds rounding before anything is computed, by the largest slopes of activations. A product of two values has
none; how much an error grows in it depends on the values. Here the interval of every value is widened, as soon as it
is computed, by what rounding may have changed in it, so that it holds in exact arithmetic. Nothing is left to be
allowed for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.ball import Ball, Threat
from flowverify.bounds.engine import Batch, EngineOptions, WarmStart
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, affine_rows
from flowverify.network import operations as ops
from flowverify.network.curves import CURVES, Exp, Log, Power, range_between
from flowverify.network.operations import Softmax, Standardise
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

Interval = tuple[Tensor, Tensor]

LARGEST_PRODUCT = 1 << 22  # entries of all products that a matrix product of intervals adds up
LARGEST_MATRIX = 1024  # rows of the matrix that adds up all entries but one

_NON_DECREASING: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Flatten,
    ops.Reshape,
    ops.Permute,
    ops.Index,
    ops.Pad,
    ops.Add,
    ops.Concatenate,
)


def propagate(operation: nn.Module, inputs: Sequence[Interval]) -> Interval:
    """Bounds of ``operation`` over the product of the input intervals, each (B, *shape).

    Raises:
        UnsupportedOperationError: an operation that is not canonical.
    """
    if isinstance(operation, _NON_DECREASING):
        lower, upper = operation(*(low for low, _ in inputs)), operation(*(high for _, high in inputs))
        return lower, upper
    if isinstance(operation, ops.Subtract):
        (low, high), (other_low, other_high) = inputs
        return low - other_high, high - other_low
    if isinstance(operation, ops.Multiply):
        return _extremes([first * second for first in inputs[0] for second in inputs[1]])
    if isinstance(operation, ops.MatrixProduct):
        return _matrix_product(*inputs)
    low, high = inputs[0]
    if isinstance(operation, Softmax | Standardise | Power | Exp | Log):
        return _RULES[type(operation)](operation, low, high)
    if type(operation) in CURVES:
        return range_between(operation, CURVES[type(operation)](operation).turns, low, high)
    if isinstance(operation, nn.LeakyReLU):
        ends = operation(low), operation(high)
        if operation.negative_slope >= 0:
            return ends
        # A negative slope turns at zero, where the value is zero.
        straddles = (low < 0) & (high > 0)
        lower, upper = torch.minimum(*ends), torch.maximum(*ends)
        return torch.where(straddles, lower.clamp(max=0), lower), upper
    if isinstance(operation, ops.ScaleShift):
        ends = operation(low), operation(high)
        return torch.minimum(*ends), torch.maximum(*ends)
    centre, radius = (low + high) / 2, (high - low) / 2
    if isinstance(operation, nn.Linear):
        middle, spread = operation(centre), functional.linear(radius, operation.weight.abs())
    elif isinstance(operation, nn.Conv2d):
        middle = operation(centre)
        spread = functional.conv2d(
            radius, operation.weight.abs(), None, operation.stride, operation.padding, operation.dilation,
            operation.groups,
        )  # fmt: skip
    else:
        raise UnsupportedOperationError(f"interval propagation: no rule for {ops.operation_name(operation)}")
    return middle - spread, middle + spread


def _extremes(candidates: Sequence[Tensor]) -> Interval:
    shape = ops.broadcast_shape(*(one.shape for one in candidates))
    stacked = torch.stack([one.expand(shape) for one in candidates])
    return stacked.amin(0), stacked.amax(0)


def _matrix_product(first: Interval, second: Interval) -> Interval:
    """Sums of the exact intervals of products, if the products are few; else by centres and half-widths.

    With centres m, n and half-widths r, s: |x y - m n| <= |m| s + r |n| + r s, which is wider by at most r s.
    """
    (low, high), (other_low, other_high) = first, second
    entries = low.shape[:-1].numel() * low.shape[-1] * other_low.shape[-1]
    if entries <= LARGEST_PRODUCT:
        columns, rows = [one[..., :, :, None] for one in first], [one[..., None, :, :] for one in second]
        least, largest = _extremes([one * other for one in columns for other in rows])
        return least.sum(-2), largest.sum(-2)
    middle, radius = (low + high) / 2, (high - low) / 2
    other, spread = (other_low + other_high) / 2, (other_high - other_low) / 2
    centre, away = middle @ other, middle.abs() @ spread + radius @ (other.abs() + spread)
    return centre - away, centre + away


def _softmax(operation: Softmax, low: Tensor, high: Tensor) -> Interval:
    """The largest where the entry is largest and the others are least: 1 / (1 + sum_j exp(z_j - z_i))."""
    dim = operation.dim + 1

    def share(own: Tensor, others: Tensor) -> Tensor:
        differences = others.unsqueeze(dim) - own.unsqueeze(dim + 1)  # (..., i, j, ...)
        rest = differences.movedim((dim, dim + 1), (-2, -1)).exp()
        rest = rest.masked_fill(torch.eye(rest.shape[-1], dtype=torch.bool, device=rest.device), 0.0)
        return (1 / (1 + rest.sum(-1))).movedim(-1, dim)

    return share(low, high), share(high, low)


def _standardise(operation: Standardise, low: Tensor, high: Tensor) -> Interval:
    """c / sqrt((c^2 + S) / n + epsilon) rises with c, and in size it falls with S, the squares of the others."""
    size = low.shape[-1]
    if operation.centred:
        # c_i = (1 - 1/n) x_i - (sum of the others) / n
        low, high = (
            own * (1 - 1 / size) - (other.sum(-1, keepdim=True) - other) / size
            for own, other in ((low, high), (high, low))
        )
    nearest = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs())).square()
    farthest = torch.maximum(low.abs(), high.abs()).square()
    # Sums of the others, without the cancellation of a difference from the whole.
    rest = 1 - torch.eye(size, dtype=low.dtype, device=low.device) if size <= LARGEST_MATRIX else None

    def others(squares: Tensor) -> Tensor:
        if rest is not None:
            return squares @ rest
        return (squares.cumsum(-1) - squares) + (squares.flip(-1).cumsum(-1).flip(-1) - squares)

    least, most = others(nearest).clamp(min=0), others(farthest)

    def value(centre: Tensor, squares: Tensor) -> Tensor:
        return centre / ((centre.square() + squares) / size + operation.epsilon).sqrt()

    return (
        value(low, torch.where(low < 0, least, most)),
        value(high, torch.where(high > 0, least, most)),
    )


def _power(operation: Power, low: Tensor, high: Tensor) -> Interval:
    exponent = operation.exponent
    lower, upper = _extremes([operation(low), operation(high)])
    straddles, unknown = (low < 0) & (high > 0), torch.zeros_like(low, dtype=torch.bool)
    if exponent < 0:
        unknown = (low <= 0) & (high >= 0) if operation.whole else low <= 0
    elif operation.even:
        lower = torch.where(straddles, 0.0, lower)
    elif not operation.whole:
        unknown = low < 0
    return lower.masked_fill(unknown, -torch.inf), upper.masked_fill(unknown, torch.inf)


def _exponential(operation: Exp, low: Tensor, high: Tensor) -> Interval:
    return operation(low), operation(high)


def _logarithm(operation: Log, low: Tensor, high: Tensor) -> Interval:
    unknown = low <= 0
    return operation(low).masked_fill(unknown, -torch.inf), operation(high).masked_fill(unknown, torch.inf)


_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Interval]] = {
    Softmax: _softmax, Standardise: _standardise, Power: _power, Exp: _exponential, Log: _logarithm,
}  # fmt: skip


def intersect(first: Interval, second: Interval) -> Interval:
    """The tighter of two valid intervals at every entry.

    Rounding can make two valid intervals miss each other by an ulp; the result is then the gap between
    them, turned round so that lower <= upper.
    """
    lower, upper = torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


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
