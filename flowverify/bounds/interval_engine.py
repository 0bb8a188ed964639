"""The engine of intervals: exact where the affine part of a network ends, interval arithmetic above."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.engine import Batch, EngineOptions
from flowverify.bounds.first_layer import AffineValue
from flowverify.bounds.intervals import Interval, propagate
from flowverify.bounds.outward import Outward
from flowverify.network import Network
from flowverify.network import operations as ops
from flowverify.network.rounding import is_steep

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
