"""Operations that the formats know, written as several canonical ones: exactly, up to rounding.

A maximum of two values is b + relu(a - b): every engine and every outside verifier knows it. What divides by a value,
or multiplies two, is bounded by intervals alone (:data:`flowverify.network.operations.STEEP`).

Recurrent layers are written out step by step: rows of the sequence are the rows of a sample (steps, features). Gates
stand in torch's order: LSTM input, forget, cell, output; GRU reset, update, new. With i, f, o the sigmoids and g, n the
tangents, LSTM: c' = f c + i g, h' = o tanh(c'); GRU: h' = n + z (h - n), n of r times the hidden part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.builder import Builder, Pair, Value
from flowverify.network.curves import Exp, Log, Power, Softplus
from flowverify.network.operations import MatrixProduct, Multiply, Softmax, Standardise

Operand = Value | Tensor | float
MASKED = -1e30  # in the place of minus infinity, as masks add it before a softmax: the share left is 0 in float64
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934


def activated(builder: Builder, operation: nn.Module, value: Value, label: str) -> Value:
    """An operation of one input."""
    return builder.add(operation, [value], label)


def clip(builder: Builder, value: Value, low: float | None, high: float | None, label: str) -> Value:
    """min(max(x, low), high).

    Raises:
        UnsupportedOperationError: low > high, of which formats differ in what they make.
    """
    if low is not None and high is not None and low > high:
        raise UnsupportedOperationError(f"clipping to {low}..{high} is not supported: expected ascending numbers")
    if low is not None and low > -torch.finfo(torch.float32).max:
        above = activated(builder, nn.ReLU(), builder.scale_shift(value, 1.0, -low, label), label)
        value = builder.scale_shift(above, 1.0, low, label)
    if high is not None and high < torch.finfo(torch.float32).max:
        below = activated(builder, nn.ReLU(), builder.scale_shift(value, -1.0, high, label), label)
        value = builder.scale_shift(below, -1.0, high, label)
    return value


def absolute(builder: Builder, value: Value, label: str) -> Value:
    """|x|: a leaky ReLU of slope -1."""
    return activated(builder, nn.LeakyReLU(-1.0), value, label)


def parametric(builder: Builder, value: Value, slope: Tensor, label: str) -> Value:
    """PReLU: x, and slope * x below 0, the slopes in the shape of a sample but for sizes of 1."""
    if slope.numel() == 1:
        return activated(builder, nn.LeakyReLU(float(slope)), value, label)
    falling = activated(builder, nn.ReLU(), builder.scale_shift(value, -1.0, 0.0, label), label)
    below = builder.scale_shift(falling, -slope.double(), 0.0, label)
    return builder.total([activated(builder, nn.ReLU(), value, label), below], label)


def elu(
    builder: Builder, value: Value, label: str, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    """ELU, SELU and CELU: scale * x, and scale * alpha * (exp(input_scale * x) - 1) below 0."""
    if input_scale != 1:
        # Above 0 it is scale * x all the same: x = (input_scale * x) / input_scale.
        inner = builder.scale_shift(value, input_scale, 0.0, label)
        alpha, scale, value = alpha * input_scale, scale / input_scale, inner
    return builder.scale_shift(activated(builder, nn.ELU(alpha), value, label), scale, 0.0, label)


def softplus(builder: Builder, value: Value, label: str, *, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """log(1 + exp(beta x)) / beta.

    Raises:
        UnsupportedOperationError: a threshold at which torch's own jumps by more than the rounding of float32.
    """
    if threshold < 14 or not beta > 0:
        raise UnsupportedOperationError(
            f"softplus with beta={beta}, threshold={threshold} is not supported: expected beta > 0 and a threshold of "
            "14 or more, below which it is not a continuous function"
        )
    inner = builder.scale_shift(value, beta, 0.0, label)
    return builder.divide(activated(builder, Softplus(), inner, label), beta, label)


def hard_sigmoid(builder: Builder, value: Value, label: str, *, alpha: float = 1 / 6, beta: float = 0.5) -> Value:
    """min(max(alpha x + beta, 0), 1)."""
    return clip(builder, builder.scale_shift(value, alpha, beta, label), 0.0, 1.0, label)


def soft_shrink(builder: Builder, value: Value, bound: float, label: str) -> Value:
    """relu(x - bound) - relu(-x - bound)."""
    above = activated(builder, nn.ReLU(), builder.scale_shift(value, 1.0, -bound, label), label)
    below = activated(builder, nn.ReLU(), builder.scale_shift(value, -1.0, -bound, label), label)
    return builder.difference(above, below, label)


def log_sigmoid(builder: Builder, value: Value, label: str) -> Value:
    """-softplus(-x)."""
    inner = builder.scale_shift(value, -1.0, 0.0, label)
    return builder.scale_shift(activated(builder, Softplus(), inner, label), -1.0, 0.0, label)


def swish(builder: Builder, value: Value, alpha: float, label: str) -> Value:
    """x * sigmoid(alpha x)."""
    inner = builder.scale_shift(value, alpha, 0.0, label)
    return builder.divide(activated(builder, nn.SiLU(), inner, label), alpha, label)


def maximum(builder: Builder, first: Operand, second: Operand, label: str) -> Value:
    """The larger of two operands, entry by entry; at least one of them is a value."""
    difference = combined(builder, first, second, -1.0, label)
    larger = activated(builder, nn.ReLU(), difference, label)
    return combined(builder, larger, second, 1.0, label)


def minimum(builder: Builder, first: Operand, second: Operand, label: str) -> Value:
    """The smaller of two operands: first - relu(first - second)."""
    difference = combined(builder, first, second, -1.0, label)
    larger = activated(builder, nn.ReLU(), difference, label)
    turned = builder.scale_shift(larger, -1.0, 0.0, label)
    return combined(builder, turned, first, 1.0, label)


def combined(builder: Builder, first: Operand, second: Operand, factor: float, label: str) -> Value:
    """first + factor * second for a factor of 1 or -1; what a constant has of minus infinity is :data:`MASKED`."""
    if isinstance(first, Value) and isinstance(second, Value):
        first, second = ranked(builder, first, second, label)
        return builder.total([first, second], label) if factor > 0 else builder.difference(first, second, label)
    if isinstance(first, Value):
        assert not isinstance(second, Value)
        return builder.scale_shift(first, 1.0, finite(second * factor), label)
    assert isinstance(second, Value)
    return builder.scale_shift(second, factor, finite(first), label)


def finite(constant: Tensor | float) -> Tensor | float:
    """A constant to add, with :data:`MASKED` for minus infinity."""
    return constant.clamp(min=MASKED) if isinstance(constant, Tensor) and constant.is_floating_point() else constant


def ranked(builder: Builder, first: Value, second: Value, label: str) -> tuple[Value, Value]:
    """Two values with as many dimensions, for operations that broadcast from the last one on.

    Raises:
        UnsupportedOperationError: they have different ranks: the batch of one would meet a dimension of the other.
    """
    if first.rank != second.rank:
        raise UnsupportedOperationError(
            f"values of shapes {first.shape} and {second.shape} are not combined: expected as many dimensions"
        )
    return first, second


def product(builder: Builder, first: Value, second: Value, label: str) -> Value:
    """The product of two values; of a value with itself, its square."""
    if first.name == second.name:
        return activated(builder, Power(2.0), first, label)
    return builder.add(Multiply(), list(ranked(builder, first, second, label)), label)


def quotient(builder: Builder, first: Operand, second: Value, label: str) -> Value:
    """first / second."""
    inverse = activated(builder, Power(-1.0), second, label)
    if isinstance(first, Value):
        return product(builder, first, inverse, label)
    return builder.scale_shift(inverse, first, 0.0, label)


def power(builder: Builder, value: Value, exponent: float, label: str) -> Value:
    """x ** exponent."""
    return value if exponent == 1 else activated(builder, Power(exponent), value, label)


def matrix_product(builder: Builder, first: Value, second: Value, label: str) -> Value:
    """The matrix product of two values along their last two dimensions."""
    first, second = ranked(builder, first, second, label)
    return builder.add(MatrixProduct(), [first, second], label)


def softmax(builder: Builder, value: Value, dim: int, label: str) -> Value:
    """The softmax along a dimension."""
    return activated(builder, Softmax(dim), value, label)


def log_softmax(builder: Builder, value: Value, dim: int, label: str) -> Value:
    """The logarithm of the softmax along a dimension."""
    return activated(builder, Log(), softmax(builder, value, dim, label), label)


def log_sum_exp(builder: Builder, value: Value, dims: Sequence[int], keep: bool, label: str) -> Value:
    """log(sum(exp(x)))."""
    total = builder.sum(activated(builder, Exp(), value, label), dims, keep, label)
    return activated(builder, Log(), total, label)


def standardised(
    builder: Builder,
    value: Value,
    shape: Sequence[int],
    epsilon: float,
    weight: Tensor | None,
    bias: Tensor | None,
    label: str,
    *,
    centred: bool = True,
) -> Value:
    """A sample as rows of ``shape``, each standardised along its last dimension; then scale and shift of the sample."""
    rows = builder.reshape(value, shape, label)
    result = builder.reshape(activated(builder, Standardise(epsilon, centred), rows, label), value.shape, label)
    return builder.scale_shift(result, 1.0 if weight is None else weight, 0.0 if bias is None else bias, label)


def layer_norm(
    builder: Builder,
    value: Value,
    count: int,
    epsilon: float,
    weight: Tensor | None,
    bias: Tensor | None,
    label: str,
    *,
    centred: bool = True,
) -> Value:
    """Normalisation over the last ``count`` dimensions."""
    if not 1 <= count <= value.rank:
        raise UnsupportedOperationError(f"normalisation over {count} dimensions of samples {value.shape}")
    shape = (*value.shape[: value.rank - count], math.prod(value.shape[value.rank - count :]))
    return standardised(builder, value, shape, epsilon, weight, bias, label, centred=centred)


def group_norm(
    builder: Builder, value: Value, groups: int, epsilon: float, weight: Tensor | None, bias: Tensor | None, label: str
) -> Value:
    """Normalisation over groups of channels and all that they hold; with one channel a group, instance normalisation.

    Scale and shift have an entry a channel.
    """
    channels = value.shape[0]
    if groups < 1 or channels % groups:
        raise InvalidInputError(f"normalisation in {groups} groups: expected a divisor of {channels} channels")
    scales = [None if one is None else one.reshape(channels, *[1] * (value.rank - 1)) for one in (weight, bias)]
    shape = (groups, math.prod(value.shape) // groups)
    return standardised(builder, value, shape, epsilon, scales[0], scales[1], label)


def attention(
    builder: Builder, query: Value, key: Value, value: Value, label: str, *, scale: float | None, mask: Tensor | None
) -> Value:
    """softmax(scale * query key^T + mask) value, along the last two dimensions."""
    order = (*range(key.rank - 2), key.rank - 1, key.rank - 2)
    scores = matrix_product(builder, query, builder.permute(key, order, label), label)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = builder.scale_shift(scores, factor, 0.0 if mask is None else finite(mask), label)
    return matrix_product(builder, softmax(builder, scores, scores.rank - 1, label), value, label)


def along(builder: Builder, value: Value, dim: int, matrix: Tensor, label: str) -> Value:
    """A constant matrix (outputs, inputs) along one dimension."""
    last = (*(k for k in range(value.rank) if k != dim), dim)
    turned = builder.linear(builder.permute(value, last, label), matrix, None, label)
    return builder.permute(turned, [last.index(k) for k in range(value.rank)], label)


def transposed_convolution(
    builder: Builder,
    value: Value,
    weight: Tensor,
    bias: Tensor | None,
    label: str,
    *,
    stride: Pair,
    padding: tuple[int, int, int, int],
    output_padding: Pair,
    dilation: Pair,
    groups: int,
) -> Value:
    """Zeros between the pixels, then a convolution by the kernel turned round.

    Args:
        weight: (inputs, outputs / groups, height, width).
        padding: (left, right, top, bottom), of the result.
    """
    if weight.ndim != 4 or value.rank != 3 or value.shape[0] != weight.shape[0] or weight.shape[0] % groups:
        raise InvalidInputError(
            f"transposed convolution weight of shape {tuple(weight.shape)} in {groups} groups: not for samples of "
            f"shape {value.shape}"
        )
    inputs, outputs, height, width = weight.shape
    kernel = weight.reshape(groups, inputs // groups, outputs, height, width).transpose(1, 2).flip(-1, -2)
    kernel = kernel.reshape(groups * outputs, inputs // groups, height, width).contiguous()
    for dim, step in ((1, stride[0]), (2, stride[1])):
        value = _with_zeros_between(builder, value, dim, step, label)
    reach = (dilation[0] * (height - 1), dilation[1] * (width - 1))
    left, right, top, bottom = padding
    around = {
        1: (reach[0] - top, reach[0] - bottom + output_padding[0]),
        2: (reach[1] - left, reach[1] - right + output_padding[1]),
    }
    value = builder.surround(value, around, label)
    return builder.convolution(value, kernel, bias, label, dilation=dilation, groups=groups)


def _with_zeros_between(builder: Builder, value: Value, dim: int, step: int, label: str) -> Value:
    """``step`` - 1 zeros between neighbours along a dimension."""
    if step == 1:
        return value
    shape = list(value.shape)
    apart = builder.reshape(value, (*shape[: dim + 1], 1, math.prod(shape[dim + 1 :])), label)
    padded = builder.pad(apart, (0, 0, 0, step - 1), label)
    shape[dim] *= step
    return builder.index(builder.reshape(padded, shape, label), dim, slice(0, shape[dim] - step + 1), label)


def with_constant(builder: Builder, values: Sequence[Value | Tensor], dim: int, label: str) -> Value:
    """Values and constants side by side along a dimension: constants are shifts of zeros beside the values."""
    sizes = [part.shape[dim] for part in values]
    if all(isinstance(part, Value) for part in values):
        return builder.concatenate([part for part in values if isinstance(part, Value)], dim, label)
    like = next(part for part in values if isinstance(part, Value))
    shape = (*like.shape[:dim], sum(sizes), *like.shape[dim + 1 :])
    shift, start, parts = torch.zeros(shape, dtype=torch.float64), 0, []
    run: list[Value] = []
    begin = 0
    for part, size in zip(values, sizes, strict=True):
        if isinstance(part, Value):
            begin = begin if run else start
            run.append(part)
        else:
            assert isinstance(part, Tensor)
            shift.narrow(dim, start, size).copy_(part)
            if run:
                parts.append((begin, start, builder.concatenate(run, dim, label)))
                run = []
        start += size
    if run:
        parts.append((begin, start, builder.concatenate(run, dim, label)))
    placed = [builder.surround(value, {dim: (first, shape[dim] - last)}, label) for first, last, value in parts]
    return builder.scale_shift(builder.total(placed, label), 1.0, shift, label)


def depth_to_space(builder: Builder, value: Value, block: int, label: str, *, columns_first: bool = False) -> Value:
    """Channels as blocks of pixels; ``columns_first``: those of one channel follow each other (torch, ONNX's CRD)."""
    channels, height, width = value.shape
    fewer = channels // block**2
    if columns_first:
        apart, order = (fewer, block, block, height, width), (0, 3, 1, 4, 2)
    else:
        apart, order = (block, block, fewer, height, width), (2, 3, 0, 4, 1)
    blocks = builder.permute(builder.reshape(value, apart, label), order, label)
    return builder.reshape(blocks, (fewer, height * block, width * block), label)


def space_to_depth(builder: Builder, value: Value, block: int, label: str, *, columns_first: bool = False) -> Value:
    """The inverse of :func:`depth_to_space`."""
    channels, height, width = value.shape
    blocks = builder.reshape(value, (channels, height // block, block, width // block, block), label)
    order = (0, 2, 4, 1, 3) if columns_first else (2, 4, 0, 1, 3)
    shape = (channels * block**2, height // block, width // block)
    return builder.reshape(builder.permute(blocks, order, label), shape, label)


def folded(builder: Builder, combine: Callable[..., Value], operands: Sequence[Operand], label: str) -> Value:
    """A combination of two, over all operands; constants must not come together before there is a value."""
    ordered = sorted(operands, key=lambda one: not isinstance(one, Value))
    result = ordered[0]
    for other in ordered[1:]:
        result = combine(builder, result, other, label)
    if not isinstance(result, Value):
        raise UnsupportedOperationError("a combination of constants alone is not supported here")
    return result


Cell = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LONGEST = 1024


@dataclass(frozen=True)
class Direction:
    """One layer in one direction.

    Attributes:
        inputs, hidden: weights (gates * H, features) and (gates * H, H).
        input_bias, hidden_bias: (gates * H,).
        state, memory: (H,), what it begins with; None for zeros.
        reset_after: for GRU, whether the reset gate multiplies W h + b (torch), or h itself (the original cell).
    """

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor
    hidden_bias: Tensor
    state: Tensor | None = None
    memory: Tensor | None = None
    reset_after: bool = True


@dataclass(frozen=True)
class Passed:
    """All states (steps, H) in the order of the sequence, the last one computed (H,), and the last memory of LSTM."""

    states: Value
    last: Value
    memory: Value | None


def passed(builder: Builder, cell: Cell, value: Value, weights: Direction, label: str, *, backward: bool) -> Passed:
    """A sequence (steps, features) on its way through one layer in one direction."""
    size = weights.hidden.shape[1]
    if value.rank != 2 or weights.inputs.shape != (GATES[cell] * size, value.shape[1]):
        raise InvalidInputError(
            f"{cell} with input weights {tuple(weights.inputs.shape)}: not for samples of shape {value.shape}"
        )
    steps = value.shape[0]
    if steps > LONGEST:
        raise UnsupportedOperationError(f"{cell} over {steps} steps: expected at most {LONGEST}, which are written out")
    projected = builder.linear(value, weights.inputs, weights.input_bias, label)
    states: dict[int, Value] = {}
    state: Value | Tensor = _start(weights.state, weights.hidden)
    memory: Value | Tensor = _start(weights.memory, weights.hidden)
    for step in reversed(range(steps)) if backward else range(steps):
        given = builder.index(projected, 0, step, label)
        if cell == "lstm":
            state, memory = _lstm(builder, given, state, memory, weights, size, label)
        elif cell == "gru":
            state = _gru(builder, given, state, weights, size, label)
        else:
            summed = _added(builder, given, _times(builder, state, weights.hidden, weights.hidden_bias, label), label)
            state = activated(builder, nn.Tanh() if cell == "rnn_tanh" else nn.ReLU(), summed, label)
        states[step] = state
    assert isinstance(state, Value)
    rows = [builder.reshape(states[step], (1, size), label) for step in range(steps)]
    return Passed(builder.concatenate(rows, 0, label), state, memory if isinstance(memory, Value) else None)


def _start(given: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[1], dtype=torch.float64) if given is None else given.double()


def _times(builder: Builder, state: Value | Tensor, weight: Tensor, bias: Tensor, label: str) -> Value | Tensor:
    if isinstance(state, Value):
        return builder.linear(state, weight, bias, label)
    return weight.double() @ state + bias.double()


def _added(builder: Builder, value: Value, other: Value | Tensor, label: str) -> Value:
    if isinstance(other, Value):
        return builder.total([value, other], label)
    return builder.scale_shift(value, 1.0, other, label)


def _multiplied(builder: Builder, value: Value, other: Value | Tensor, label: str) -> Value:
    if isinstance(other, Value):
        return product(builder, value, other, label)
    return builder.scale_shift(value, other, 0.0, label)


def _gate(builder: Builder, value: Value, number: int, size: int, label: str) -> Value:
    return builder.index(value, 0, slice(number * size, (number + 1) * size), label)


def _lstm(
    builder: Builder,
    given: Value,
    state: Value | Tensor,
    memory: Value | Tensor,
    weights: Direction,
    size: int,
    label: str,
) -> tuple[Value, Value]:
    summed = _added(builder, given, _times(builder, state, weights.hidden, weights.hidden_bias, label), label)
    opened = {
        name: activated(
            builder, nn.Tanh() if name == "cell" else nn.Sigmoid(), _gate(builder, summed, k, size, label), label
        )
        for k, name in enumerate(("input", "forget", "cell", "output"))
    }
    written = product(builder, opened["input"], opened["cell"], label)
    if isinstance(memory, Value) or bool((memory != 0).any()):
        written = builder.total([_multiplied(builder, opened["forget"], memory, label), written], label)
    shown = activated(builder, nn.Tanh(), written, label)
    return product(builder, opened["output"], shown, label), written


def _gru(builder: Builder, given: Value, state: Value | Tensor, weights: Direction, size: int, label: str) -> Value:
    turned, bias = weights.hidden[2 * size :], weights.hidden_bias[2 * size :]
    gates = _times(builder, state, weights.hidden[: 2 * size], weights.hidden_bias[: 2 * size], label)
    summed = _added(builder, builder.index(given, 0, slice(0, 2 * size), label), gates, label)
    opened = activated(builder, nn.Sigmoid(), summed, label)
    reset, update = (_gate(builder, opened, k, size, label) for k in (0, 1))
    if weights.reset_after:
        recalled: Value | Tensor = _multiplied(builder, reset, _times(builder, state, turned, bias, label), label)
    else:
        recalled = _times(builder, _multiplied(builder, reset, state, label), turned, bias, label)
    own = _added(builder, _gate(builder, given, 2, size, label), recalled, label)
    new = activated(builder, nn.Tanh(), own, label)
    if isinstance(state, Value):
        kept = product(builder, update, builder.difference(state, new, label), label)
    else:
        kept = product(builder, update, builder.scale_shift(new, -1.0, state, label), label)
    return builder.total([new, kept], label)
