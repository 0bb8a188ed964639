"""How far float64 arithmetic may be from exact arithmetic over given balls, value by value: theory, section 15.

:mod:`flowverify.network.rounding` adds up the sizes of all terms of all bounds before anything is computed, as if every
activation could be anywhere. Over one ball most of a ReLU network's activations are settled: those that are off pass
nothing on, those that are on pass on just what they get. Here the sums of sizes are made beside the bounds, from the
image upward, with the intervals that are known:

    S(z) = |W| S(a) + |b|,     S(a) = slope * S(z) + offset,

``slope`` and ``offset`` being the largest sizes of those of a line by which any engine bounds the activation on its
interval. Bounds of a value are off by at most gamma_n S, and its interval is widened by twice as much before anything
is made of it: then it holds all exact values of the ball, and all computed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import is_affine
from flowverify.network.rounding import (
    CHUNK_ENTRIES,
    INFLATED,
    PRODUCTS,
    TINY,
    depth,
    gamma,
    largest_slope,
    operations_count,
    reach,
    through,
)

Interval = tuple[Tensor, Tensor]

BLOCKS = 4  # of pixels along either side of an image
FROM_A_POINT = 4  # times slope and size: terms of an offset that is computed from a point of the interval
SETTLED = 2e-8  # below it, auto_LiRPA draws chords of ReLUs that are off: it never divides by less than 1e-8


class SumsOfTerms:
    """Sums of the sizes of all terms of one network's bounds, as far as they do not depend on the ball.

    Pixels share *blocks*: what is kept of a block is, for each entry, the largest of its pixels' coefficients. A window
    of a convolution then counts pixels near it only.

    Args:
        network: in float64, without steep operations.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """

    def __init__(self, network: Graph) -> None:
        share = gamma(network)
        # Sums are inflated to cover intervals that are widened by twice the error, activation by activation.
        few = 4 * (1 + depth(network)) * share < INFLATED - 1
        self.network, self.gamma = network, share if few else math.inf
        for node in network.activations:
            if not isinstance(node.operation, nn.MaxPool2d):
                largest_slope(node.operation)  # raises
        affine = network.affine_of_input()
        self.above = [node for node in network.nodes if node.name not in affine]
        self._ends = {name for node in self.above for name in node.inputs if name in affine}
        if network.output in affine:
            self._ends.add(network.output)
        self.last_reader = {name: node.name for node in network.nodes for name in node.inputs}
        self.start = self._affine([node for node in network.nodes if node.name in affine])

    def _affine(self, nodes: list[Node]) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of values that are affine in the image: constants (1, *shape), and coefficients (blocks, *shape)."""
        network = self.network
        device = next((tensor.device for tensor in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
        shape = network.input_shape
        rows, columns = (torch.arange(size) * min(BLOCKS, size) // size for size in shape[1:])
        blocks = (rows[:, None] * BLOCKS + columns).expand(shape).flatten()
        order = blocks.argsort(stable=True)  # pixels that share a pass are of few blocks
        pixels = len(order)
        passes = min(pixels, max(1, PRODUCTS // max(1, operations_count(nodes))))
        share = torch.arange(pixels) * passes // pixels
        widest = max([pixels, *(math.prod(node.shape) for node in nodes)])
        with torch.no_grad():
            nothing = torch.zeros(1, *shape, dtype=torch.float64, device=device)
            fixed = self._propagated(nodes, nothing, biased=True)
            count = int(blocks.max()) + 1
            moving = {name: value.new_zeros(count, *value.shape[1:]) for name, value in fixed.items()}
            for part in torch.split(torch.arange(passes), max(1, CHUNK_ENTRIES // widest)):
                together = torch.zeros(len(part), pixels, dtype=torch.float64)
                chosen = (share >= int(part[0])) & (share <= int(part[-1]))
                together[share[chosen] - int(part[0]), order[chosen]] = 1
                found = self._propagated(nodes, together.reshape(-1, *shape).to(device), biased=False)
                members = torch.zeros(len(part), count, dtype=torch.bool)
                members[share[chosen] - int(part[0]), blocks[order[chosen]]] = True
                for name, value in found.items():
                    for block in members.any(0).nonzero().flatten().tolist():
                        own = value[members[:, block].to(device)].amax(0)
                        moving[name][block] = torch.maximum(moving[name][block], own)
        return {name: (fixed[name] * INFLATED, moving[name] * INFLATED) for name in fixed}

    def _propagated(self, nodes: Sequence[Node], start: Tensor, *, biased: bool) -> dict[str, Tensor]:
        values = {INPUT: start}
        for node in nodes:
            value = through(node.operation, [values[name] for name in node.inputs], biased=biased)
            values[node.name] = value + TINY if biased else value
        return {name: values[name] for name in self._ends}

    def at(self, images: Tensor) -> Tensor:
        """By how much differences of the outputs for images (B, C, H, W) may be off, (B,).

        Infinite or NaN where nothing can be said.
        """
        images = images.double()
        sums = RunningError(self, images.flatten(1).sum(1))
        values, intervals = self.network.values(images), dict[str, Interval]()
        for name in self._ends:
            intervals[name] = sums.widened(name, (values[name], values[name]))
        for node in self.above:
            sums.enter(node, intervals)
            intervals[node.name] = sums.widened(node.name, (values[node.name], values[node.name]))
        found: Tensor = 2 * sums.off(self.network.output).flatten(1).amax(1)
        return found


class RunningError:
    """The sums for one batch of balls, value by value from the image upward.

    Args:
        mass: of the images, (B,).
        budget: of the balls, (B,).
        displaced: mass by which the centres that are computed with differ from the images, (B,).
    """

    def __init__(
        self, terms: SumsOfTerms, mass: Tensor, budget: Tensor | float = 0.0, displaced: Tensor | float = 0.0
    ) -> None:
        self._terms = terms
        self._share = terms.gamma * INFLATED
        self._reach = reach(mass.double(), budget)
        self._displaced = torch.as_tensor(displaced, dtype=torch.float64, device=mass.device).expand_as(self._reach)
        self._sums = {
            name: (fixed.to(mass.device), moving[None].to(mass.device)) for name, (fixed, moving) in terms.start.items()
        }

    def enter(self, node: Node, intervals: dict[str, Interval]) -> None:
        """Takes in the next node above the affine part, given the widened intervals of what activations read.

        What nothing reads any more is forgotten.
        """
        self._sums[node.name] = self._entered(node, intervals)
        for name in set(node.inputs):
            if self._terms.last_reader[name] == node.name:
                del self._sums[name]

    def _entered(self, node: Node, intervals: dict[str, Interval]) -> tuple[Tensor, Tensor]:
        inputs = [self._sums[name] for name in node.inputs]
        if is_affine(node.operation):
            batch = max(len(one) for one, _ in inputs)
            whole = [one.expand(batch, *one.shape[1:]) for one, _ in inputs]
            fixed = through(node.operation, whole, biased=True) + TINY
            return fixed, _by_blocks(node.operation, [one for _, one in inputs])
        (fixed, moving), (lower, upper) = inputs[0], intervals[node.inputs[0]]
        if isinstance(node.operation, nn.MaxPool2d):
            # Slopes are nonnegative with a sum of at most 1.
            size = torch.maximum(lower.abs(), upper.abs())
            fixed = node.operation(fixed.expand_as(size)) + FROM_A_POINT * node.operation(size)
            return fixed, _by_blocks(node.operation, [moving])
        slope, offset = _lines(node.operation, lower, upper)
        return slope * fixed + offset + TINY, slope[:, None] * moving

    def off(self, name: str) -> Tensor:
        """By how much bounds of a value may be off, (B, *shape)."""
        fixed, moving = self._sums[name]
        largest = moving.amax(1)
        like = [-1, *[1] * (fixed.ndim - 1)]
        found: Tensor = self._share * (fixed + self._reach.reshape(like) * largest)
        return found + self._displaced.reshape(like) * largest

    def widened(self, name: str, interval: Interval) -> Interval:
        """An interval that is off by no more than :meth:`off`, so that it holds exact and computed values."""
        off = 2 * self.off(name)
        return interval[0] - off.to(interval[0]), interval[1] + off.to(interval[1])

    def margins(self, specification: Tensor) -> Tensor:
        """By how much bounds of linear functions (B, S, classes) of the output may be off, (B, S)."""
        off = self.off(self._terms.network.output)
        found: Tensor = INFLATED * (specification.double().abs() @ off[..., None]).squeeze(-1)
        return found


def _by_blocks(operation: nn.Module, inputs: list[Tensor]) -> Tensor:
    """An affine operation or a maximum of what blocks (B or 1, blocks, *shape) put in."""
    batch = max(len(one) for one in inputs)
    flat = [one.expand(batch, *one.shape[1:]).flatten(0, 1) for one in inputs]
    found = operation(flat[0]) if isinstance(operation, nn.MaxPool2d) else through(operation, flat, biased=False)
    return found.reshape(batch, inputs[0].shape[1], *found.shape[1:])


def _lines(operation: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The largest sizes of slope and offset of any line by which an engine bounds an activation on an interval.

    Lines may be written from the origin, or from the activation's value at a point of the interval.
    """
    size = torch.maximum(lower.abs(), upper.abs())
    if isinstance(operation, nn.ReLU | nn.LeakyReLU):
        left = float(getattr(operation, "negative_slope", 0.0))
        bend = abs(1 - left)
        # Either on its own pieces, or as left * x + (1 - left) * relu(x).
        on, off = lower >= 0, (upper <= 0) & (lower <= -SETTLED)
        slope = torch.where(off, abs(left), max(1.0, abs(left) + bend))
        return slope.to(size), torch.where(on | off, 0.0, FROM_A_POINT * slope * (size + SETTLED))
    steepest, at_zero = largest_slope(operation)
    return torch.full_like(size, steepest), at_zero + FROM_A_POINT * steepest * size
