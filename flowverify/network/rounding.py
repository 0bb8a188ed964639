"""How far float64 arithmetic may be from exact arithmetic, by bounds that see cancellation: a priori, and over balls.

Every number that bounds of a network are made of is a sum of products along the network's paths: of weights, of slopes
of activations, of what the image or a bias puts in at the start. Computed in any order with at most n roundings on each
product, it is off by at most gamma_n = n u / (1 - n u), u = 2^-53, times the same sum of absolute values (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1 and section 3.1). :func:`magnitudes` are these sums,

    P(image) = reach * (largest coefficient of a pixel),     P(z) = |W| P(a) + |b|,     P(a) = gain * P(z) + |f(0)|.

With k activations on a path, bounds over a ball are off by at most (1 + k/2) gamma_n P. Theory, section 15, has the
theorem, its hypotheses and its proof; in short:

*Reach*, 8 (mass + budget), is at least the sum of what multiplies the largest coefficient in all terms at the image.

*Gain*, 2 for ReLU and 6 L for what else has the Lipschitz constant L, covers the slope and the intercept of a
relaxation (3 L), and what a relaxation does beyond a neuron's bounds that are off themselves: where k comes from.

*Roundings.* On a path through an operation lie at most: the products and sums of a value and, going backward, of a
coefficient (fan-in and fan-out), one sum over all its entries (biases and intercepts), and a few for constants (which
are the float64 numbers nearest to the user's, see :mod:`flowverify.network.builder`), slopes, intercepts, ends and the
activation itself: ``FEW``. At the image: sums over pixels, edges and the scan's rows and columns. n is the sum of all.

Assumed about bounds that are computed elsewhere (auto_LiRPA's): matrix products and convolutions are sums of products,
in any order (no Strassen, Winograd or Fourier transform); relaxations are lines as above; steps of optimisers need no
care, as any slope within [0, L] is sound. Underflow is covered by ``TINY``.

*Over given balls* (:class:`SumsOfTerms`, :class:`RunningError`). The sums above are made before anything is computed,
as if every activation could be anywhere. Over one ball most of a ReLU network's activations are settled: those that
are off pass nothing on, those that are on pass on just what they get. Sums of sizes are made beside the bounds, from
the image upward, with the intervals that are known:

    S(z) = |W| S(a) + |b|,     S(a) = slope * S(z) + offset,

``slope`` and ``offset`` being the largest sizes of those of a line by which any engine bounds the activation on its
interval. Bounds of a value are off by at most gamma_n S, and its interval is widened by twice as much before anything
is made of it: then it holds all exact values of the ball, and all computed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.errors import UnsupportedOperationError
from flowverify.network.curves import CURVES, Exp, Log, Power
from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import (
    STEEP,
    Add,
    Concatenate,
    Index,
    MatrixProduct,
    Multiply,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Softmax,
    Standardise,
    Subtract,
    is_affine,
    operation_name,
)

UNIT = 2.0**-53
FEW = 32  # roundings of one operation beside its sums
TINY = 1e-290  # far above what underflow loses, far below what matters
INFLATED = 1 + 1e-6  # magnitudes are sums of nonnegative terms: their own rounding is a tiny share of them

PRODUCTS = 1 << 33  # multiplications at most for the magnitudes of a network
CHUNK_ENTRIES = 1 << 23

# Their weights are not negative: they are their own |W|.
_POSITIVE = (nn.AvgPool2d, nn.Flatten, Reshape, Permute, Index, Pad, Add, Concatenate)


def reach(mass: Tensor, budget: Tensor | float) -> Tensor:
    """By what the largest coefficient of a pixel is multiplied, for images of this mass and balls of this budget."""
    return 8 * (mass + budget)


def roundings(network: Graph) -> int:
    """n: how many roundings lie on any path of a computation of bounds."""
    count = 4 * math.prod(network.input_shape) + 4 * sum(network.input_shape[1:]) + 2 * FEW
    for node in network.nodes:
        count += math.prod(node.shape) + len(node.inputs) + FEW + sum(_fans(node.operation))
    return count


def _fans(operation: nn.Module) -> tuple[int, int]:
    """How many products an entry is the sum of, and in how many an entry takes part."""
    if isinstance(operation, nn.Linear):
        return operation.in_features, operation.out_features
    if isinstance(operation, nn.Conv2d):
        window = math.prod(operation.kernel_size)
        channels = operation.in_channels // operation.groups, operation.out_channels // operation.groups
        return channels[0] * window, channels[1] * window
    if isinstance(operation, nn.AvgPool2d | nn.MaxPool2d):
        size = operation.kernel_size
        window = size * size if isinstance(size, int) else math.prod(size)
        return window, window
    return 1, 1


def operations_count(nodes: Sequence[Node]) -> int:
    """Multiplications of one pass through these nodes."""
    return sum(math.prod(node.shape) * _fans(node.operation)[0] for node in nodes)


def fan_in(operation: nn.Module) -> int:
    """How many products an entry of an operation's result is the sum of."""
    return _fans(operation)[0]


def sum_of_terms(operation: nn.Module, inputs: list[Tensor], *, biased: bool) -> Tensor:
    """Sums of the sizes of all terms of an affine operation, from those of its inputs; with or without constants."""
    found = through(operation, [one.double() for one in inputs], biased=biased)
    return found.to(inputs[0].dtype)


def gamma(network: Graph) -> float:
    """gamma_n of a network; infinite for one that is too large for any claim."""
    share = roundings(network) * UNIT
    return share / (1 - share) if share < 0.5 else math.inf


def depth(network: Graph) -> int:
    """The largest number of activations on a path."""
    deepest, activations = {INPUT: 0}, {node.name for node in network.activations}
    for node in network.nodes:
        deepest[node.name] = max(deepest[name] for name in node.inputs) + (node.name in activations)
    return deepest[network.output]


def magnitudes(network: Graph, *, relaxed: bool) -> dict[str, Tensor]:
    """P of each value, in two parts (2, *shape), float64: P = first + reach * second.

    The second part takes one pass through the network for each pixel. For networks for which that would be
    ``PRODUCTS`` or more, pixels share passes: the sum of their coefficients is no less than the largest.

    Args:
        relaxed: for what passes through relaxations; otherwise the gain is L, and P bounds the values.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """
    device = next((tensor.device for tensor in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
    pixels = math.prod(network.input_shape)
    products = operations_count(network.nodes)
    passes = min(pixels, max(1, PRODUCTS // max(1, products)))
    widest = max([pixels, *(math.prod(node.shape) for node in network.nodes)])
    groups = (torch.arange(pixels, device=device) * passes) // pixels
    nothing = torch.zeros(1, *network.input_shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        fixed = _propagate(network, nothing, relaxed, biased=True)
        moving = {name: torch.zeros_like(value) for name, value in fixed.items()}
        for part in torch.split(torch.arange(passes, device=device), max(1, CHUNK_ENTRIES // widest)):
            together = (groups == part[:, None]).double().reshape(-1, *network.input_shape)
            for name, value in _propagate(network, together, relaxed, biased=False).items():
                moving[name] = torch.maximum(moving[name], value.amax(0, keepdim=True))
    return {name: torch.cat([fixed[name], moving[name]]) * INFLATED for name in fixed}


def _propagate(network: Graph, start: Tensor, relaxed: bool, *, biased: bool) -> dict[str, Tensor]:
    """P of each value from P of the image (N, *input_shape), with or without what does not depend on the image."""
    values = {INPUT: start}
    for node in network.nodes:
        value = through(node.operation, [values[name] for name in node.inputs], relaxed=relaxed, biased=biased)
        values[node.name] = value + TINY if biased else value
    return values


def through(operation: nn.Module, inputs: list[Tensor], *, biased: bool, relaxed: bool = False) -> Tensor:
    """The sums of an operation's result from those of its inputs, each (N, *shape), with or without constants."""
    value = inputs[0]
    if isinstance(operation, nn.Linear):
        bias = operation.bias.double().abs() if biased and operation.bias is not None else None
        return functional.linear(value, operation.weight.double().abs(), bias)
    if isinstance(operation, nn.Conv2d):
        bias = operation.bias.double().abs() if biased and operation.bias is not None else None
        return functional.conv2d(
            value, operation.weight.double().abs(), bias, operation.stride, operation.padding, operation.dilation,
            operation.groups,
        )  # fmt: skip
    if isinstance(operation, ScaleShift):
        scaled = value * operation.scale.double().abs()
        shift = operation.shift.double().abs()
        return scaled + (shift if biased else torch.zeros_like(shift))
    if isinstance(operation, Subtract):
        return inputs[0] + inputs[1]
    if isinstance(operation, _POSITIVE):
        return operation(*inputs)  # type: ignore[no-any-return]
    gain, at_zero = largest_slope(operation)
    if relaxed:
        gain *= 2.0 if isinstance(operation, nn.ReLU) else 6.0
    if isinstance(operation, nn.MaxPool2d):
        return gain * operation(value)  # type: ignore[no-any-return]
    return gain * value + (at_zero if biased else 0.0)


def largest_slope(operation: nn.Module) -> tuple[float, float]:
    """The Lipschitz constant and |f(0)| of an activation.

    Raises:
        UnsupportedOperationError: there is no rule.
    """
    if type(operation) in CURVES:
        curve = CURVES[type(operation)](operation)
        return curve.steepest, abs(curve.at_zero)
    if type(operation) not in _LIPSCHITZ:
        raise UnsupportedOperationError(f"rounding: no rule for operation {operation_name(operation)}")
    return _LIPSCHITZ[type(operation)](operation), _AT_ZERO.get(type(operation), 0.0)


# The largest slope. With a gain of 6 L, LeakyReLU may as well be computed as a x + (1 - a) relu(x).
_LIPSCHITZ: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.ReLU: lambda operation: 1.0,
    nn.LeakyReLU: lambda operation: max(1.0, abs(float(operation.negative_slope))),
    nn.Sigmoid: lambda operation: 0.25,
    nn.Tanh: lambda operation: 1.0,
    nn.MaxPool2d: lambda operation: 1.0,
}
_AT_ZERO: dict[type[nn.Module], float] = {nn.Sigmoid: 0.5}


def is_steep(network: Graph) -> bool:
    """Whether the network has operations without a largest slope, so that its bounds must carry their own rounding."""
    return any(type(node.operation) in STEEP for node in network.nodes)


def rounding_of_operation(operation: nn.Module, inputs: list[Tensor], result: Tensor) -> Tensor:
    """By how much computed ends of the interval of an operation may be off, given those of its inputs.

    Args:
        inputs: the larger of the sizes of both ends of each input, (B, *shape).
        result: the same of the operation's interval, before it is widened.

    Raises:
        UnsupportedOperationError: there is no rule.
    """
    largest = inputs[0].shape[-1]
    if isinstance(operation, Multiply | Exp | Log | Power):
        return FEW * UNIT * result + TINY
    if isinstance(operation, MatrixProduct):
        return (largest + FEW) * UNIT * INFLATED * (inputs[0] @ inputs[1]) + TINY
    if isinstance(operation, Softmax):
        return torch.full_like(result, (result.shape[operation.dim + 1] + FEW) * UNIT)
    if isinstance(operation, Standardise):
        share = (largest + FEW) * UNIT * INFLATED
        centre = 2 * share * inputs[0].amax(-1, keepdim=True) / math.sqrt(operation.epsilon)
        off = 2 * (1 + math.sqrt(largest)) * centre + share * math.sqrt(largest)
        return torch.where(centre < 1, off, torch.inf).expand_as(result)
    terms = sum_of_terms(operation, inputs, biased=True)
    return (_fans(operation)[0] + FEW) * UNIT * INFLATED * terms + TINY


class RoundingBound:
    """What rounding may change in lower bounds of margins of one network, and in its margins themselves.

    Nothing for a steep network (:func:`is_steep`): its bounds are those of intervals that are widened as they are
    computed (:mod:`flowverify.bounds.intervals`), and other engines refuse it.

    Args:
        network: in float64.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """

    def __init__(self, network: Graph) -> None:
        self._steep = is_steep(network)
        if self._steep:
            return
        self._gamma = gamma(network) * (1 + depth(network) / 2)
        self._output = magnitudes(network, relaxed=True)[network.output].flatten(1)

    def margins(self, mass: Tensor, budget: Tensor | float = 0.0) -> Tensor:
        """By how much bounds of f_y - f_t for images of this mass (B,) over balls of this budget may be off, (B,).

        Infinite or NaN where nothing can be said.
        """
        if self._steep:
            return torch.zeros_like(mass, dtype=torch.float64)
        fixed, moving = self._output.to(mass.device)
        logits = fixed + reach(mass.double(), budget)[:, None] * moving
        found: Tensor = 2 * self._gamma * logits.amax(1)
        return found


def rounding_of_value(network: Graph, name: str, batch: Tensor) -> Tensor:
    """By how much two computations of a value may differ in the precision of the batch (B, ...), (B, *shape)."""
    fixed, moving = magnitudes(network, relaxed=False)[name]
    mass = reach(batch.double().flatten(1).abs().sum(1), 0.0).reshape(-1, *([1] * fixed.ndim))
    coarser = torch.finfo(batch.dtype).eps / 2 / UNIT
    size: Tensor = fixed + mass * moving
    return 2 * coarser * gamma(network) * size


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
