"""What each ONNX operator becomes: the table behind :mod:`from_onnx`.

Everything is evaluated for a batch of one: an argument is a :class:`Value` (depends on the input; shapes
without the batch) or a constant tensor, whose batch dimension, where it has one, has size 1. An attribute
that a handler does not take is refused by the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.aten import sample_dim
from flowverify.network.builder import Builder, Pair, Sides, Value, times

Attributes = dict[str, Any]
Handler = Callable[[Builder, list[Any], Attributes, str], Any]


def depends(*arguments: Any) -> bool:
    """Whether one of these depends on the network's input."""
    return any(isinstance(argument, Value) for argument in arguments)


def integers(argument: Any, what: str) -> list[int]:
    """A constant list of integers.

    Raises:
        UnsupportedOperationError: it depends on the input.
        InvalidInputError: it is not a list of integers.
    """
    if isinstance(argument, Tensor) and not argument.is_floating_point() and argument.ndim <= 1:
        return [int(number) for number in argument.reshape(-1)]
    if isinstance(argument, list) and all(isinstance(number, int) for number in argument):
        return argument
    kind = UnsupportedOperationError if isinstance(argument, Value) else InvalidInputError
    raise kind(f"{what}: expected constant integers")


def listed(inputs: list[Any], position: int, attributes: Attributes, name: str) -> list[int] | None:
    """Integers given as an input (newer operator sets) or as an attribute (older ones)."""
    given = inputs[position] if len(inputs) > position else None
    if given is None:
        given = attributes.pop(name, None)
    return None if given is None else integers(given, name)


def _flatten(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    axis = attributes.pop("axis", 1)
    if axis % (value.rank + 1) != 1:
        raise UnsupportedOperationError(f"Flatten with axis={axis} is not supported: expected 1")
    return builder.reshape(value, (math.prod(value.shape),), label)


def _reshape(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    target = listed(inputs, 1, attributes, "shape") or []
    whole = (1, *value.shape)
    if not attributes.pop("allowzero", 0):
        if any(size == 0 and axis >= len(whole) for axis, size in enumerate(target)):
            raise InvalidInputError(f"Reshape to {target}: expected zeros only for dimensions of {whole}")
        target = [whole[axis] if size == 0 else size for axis, size in enumerate(target)]
    if target.count(-1) == 1:
        rest = -math.prod(target)
        target = [math.prod(whole) // rest if rest > 0 and size == -1 else size for size in target]
    if min(target, default=0) < 1 or math.prod(target) != math.prod(whole):
        raise InvalidInputError(f"Reshape to {target}: expected as many entries as {whole}")
    if target[0] != 1:
        raise UnsupportedOperationError(f"Reshape of {whole} to {target} mixes the batch dimension")
    return builder.reshape(value, target[1:], label)


def _squeeze(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    axes = listed(inputs, 1, attributes, "axes")
    if axes is None:
        raise UnsupportedOperationError("Squeeze without axes is not supported")
    dims = {sample_dim(axis, value) for axis in axes}
    if any(dim >= value.rank or value.shape[dim] != 1 for dim in dims):
        raise InvalidInputError(f"Squeeze of dimensions {axes}: expected size 1 in samples {value.shape}")
    return builder.reshape(value, [size for dim, size in enumerate(value.shape) if dim not in dims], label)


def _unsqueeze(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    axes = listed(inputs, 1, attributes, "axes") or []
    rank = value.rank + len(axes)
    dims = {(axis + rank + 1 if axis < 0 else axis) - 1 for axis in axes}
    if len(dims) != len(axes) or min(dims, default=-1) < 0 or max(dims) >= rank:
        raise UnsupportedOperationError(f"Unsqueeze with axes {axes} is not supported: expected 1..{rank}")
    sizes = iter(value.shape)
    return builder.reshape(value, [1 if dim in dims else next(sizes) for dim in range(rank)], label)


def _transpose(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    order = attributes.pop("perm", list(range(value.rank, -1, -1)))
    if sorted(order) != list(range(value.rank + 1)) or order[0] != 0:
        raise UnsupportedOperationError(f"Transpose with perm={order} is not supported: expected the batch first")
    return builder.permute(value, [axis - 1 for axis in order[1:]], label)


def _slice(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    starts, ends, axes, steps = (
        listed(inputs, position, attributes, name)
        for position, name in enumerate(("starts", "ends", "axes", "steps"), start=1)
    )
    if starts is None or ends is None:
        raise InvalidInputError("Slice: expected starts and ends")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis in (0, -value.rank - 1) and start == 0 and end >= 2**31 - 1 and step == 1:
            continue
        value = builder.index(value, sample_dim(axis, value), slice(start, end, step), label)
    return value


def _gather(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, positions = inputs
    if not isinstance(value, Value) or depends(positions) or positions.ndim > 1:
        raise UnsupportedOperationError("Gather is supported with a constant index of rank 0 or 1 only")
    selection = int(positions) if positions.ndim == 0 else integers(positions, "indices")
    return builder.index(value, sample_dim(attributes.pop("axis", 0), value), selection, label)


def _concatenate(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    if not all(isinstance(value, Value) for value in inputs):
        raise UnsupportedOperationError("Concat of a value with a constant is not supported")
    return builder.concatenate(inputs, sample_dim(attributes.pop("axis", 1), inputs[0]), label)


def _split(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Any:
    value: Value = inputs[0]
    dim = sample_dim(attributes.pop("axis", 0), value)
    sizes = listed(inputs, 1, attributes, "split")
    if sizes is None or sum(sizes) != value.shape[dim]:
        raise UnsupportedOperationError(f"Split is supported with sizes that add up to {value.shape[dim]} only")
    parts, start = [], 0
    for size in sizes:
        parts.append(builder.index(value, dim, slice(start, start + size), label))
        start += size
    return parts


def _pad(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    amounts = listed(inputs, 1, attributes, "pads")
    constant = inputs[2] if len(inputs) > 2 and inputs[2] is not None else attributes.pop("value", 0.0)
    axes = integers(inputs[3], "axes") if len(inputs) > 3 and inputs[3] is not None else range(value.rank + 1)
    mode = attributes.pop("mode", b"constant").decode()
    if mode != "constant" or depends(constant) or float(constant) != 0 or amounts is None:
        raise UnsupportedOperationError("only padding with constant zeros is supported")
    half = len(axes)
    if len(amounts) != 2 * half or value.rank < 2:
        raise InvalidInputError(f"pads {amounts}: expected two for each of {half} dimensions")
    around = {axis % (value.rank + 1): (amounts[k], amounts[k + half]) for k, axis in enumerate(axes)}
    top, bottom = around.pop(value.rank - 1, (0, 0))
    left, right = around.pop(value.rank, (0, 0))
    if any(any(pair) for pair in around.values()):
        raise UnsupportedOperationError("padding other than of height and width is not supported")
    return builder.pad(value, (left, right, top, bottom), label)


SHAPE_HANDLERS: dict[str, Handler] = {
    "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": _transpose, "Slice": _slice, "Gather": _gather, "Concat": _concatenate, "Split": _split,
    "Pad": _pad,
}  # fmt: skip


Argument = Value | Tensor | None
PRODUCT = "a product or quotient of two values that both depend on the input is not supported"


def _gemm(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, weight, bias = (*inputs, None)[:3]
    alpha, beta = attributes.pop("alpha", 1.0), attributes.pop("beta", 1.0)
    if attributes.pop("transA", 0) or not isinstance(value, Value):
        raise UnsupportedOperationError("Gemm that transposes the batch, or of a constant, is not supported")
    if isinstance(weight, Value) or isinstance(bias, Value) or weight.ndim != 2:
        raise UnsupportedOperationError("Gemm with a weight or bias that depends on the input is not supported")
    matrix = weight if attributes.pop("transB", 0) else weight.t()
    scaled = None if bias is None else times(bias, beta)
    if scaled is not None and scaled.ndim == 2 and scaled.shape[0] == 1:
        scaled = scaled[0]
    return builder.linear(value, times(matrix, alpha), scaled, label)


def _matmul(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    first, second = inputs
    if isinstance(first, Value) and isinstance(second, Value):
        raise UnsupportedOperationError(PRODUCT)
    matrix = first if isinstance(second, Value) else second
    if matrix.ndim != 2:
        raise UnsupportedOperationError(f"MatMul with a constant of rank {matrix.ndim} is not supported")
    if isinstance(second, Value):
        return builder.left_multiply(first, second, label)
    return builder.linear(first, second.t(), None, label)


def _add(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    first, second = inputs
    if isinstance(first, Value) and isinstance(second, Value):
        return builder.total([first, second], label)
    value, constant = (first, second) if isinstance(first, Value) else (second, first)
    return builder.scale_shift(value, 1.0, constant, label)


def _subtract(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    first, second = inputs
    if isinstance(first, Value) and isinstance(second, Value):
        return builder.difference(first, second, label)
    if isinstance(first, Value):
        return builder.scale_shift(first, 1.0, -second, label)
    return builder.scale_shift(second, -1.0, first, label)


def _multiply(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    first, second = inputs
    if isinstance(first, Value) and isinstance(second, Value):
        raise UnsupportedOperationError(PRODUCT)
    value, constant = (first, second) if isinstance(first, Value) else (second, first)
    return builder.scale_shift(value, constant, 0.0, label)


def _divide(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    if isinstance(inputs[1], Value):
        raise UnsupportedOperationError(PRODUCT)
    return builder.divide(inputs[0], inputs[1], label)


def _negate(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return builder.scale_shift(inputs[0], -1.0, 0.0, label)


def _total(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    result = inputs[0]
    for other in inputs[1:]:
        either = depends(result, other)
        result = _add(builder, [result, other], attributes, label) if either else result.double() + other.double()
    return result  # type: ignore[no-any-return]


def _window(value: Value, attributes: Attributes, kernel: Pair) -> tuple[Pair, Sides, Pair]:
    """Strides, padding (left, right, top, bottom) and dilations of a convolution or pooling."""
    stride = _two(attributes.pop("strides", [1, 1]), "strides")
    dilation = _two(attributes.pop("dilations", [1, 1]), "dilations")
    pads = integers(attributes.pop("pads", [0, 0, 0, 0]), "pads")
    automatic = attributes.pop("auto_pad", b"NOTSET").decode()
    if len(pads) != 4 or value.rank != 3 or min(stride) < 1:
        raise InvalidInputError(f"pads {pads}, strides {stride}: expected a 2d window on samples (C, H, W)")
    sides = (pads[1], pads[3], pads[0], pads[2])
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for axis in (0, 1):
            size = value.shape[axis + 1]
            outputs = math.ceil(size / stride[axis])
            totals.append(max(0, (outputs - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size))
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        first, last = (small, large) if automatic == "SAME_UPPER" else (large, small)
        sides = (first[1], last[1], first[0], last[0])
    elif automatic == "VALID":
        sides = (0, 0, 0, 0)
    elif automatic not in ("NOTSET", ""):
        raise UnsupportedOperationError(f"auto_pad {automatic!r} is not supported")
    return stride, sides, dilation


def _two(numbers: Any, what: str) -> Pair:
    listed = integers(numbers, what)
    if len(listed) != 2:
        raise UnsupportedOperationError(f"{what} {listed}: only two dimensions are supported")
    return (listed[0], listed[1])


def _convolution(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, weight, bias = (*inputs, None)[:3]
    if depends(weight, bias) or not isinstance(value, Value) or weight.ndim != 4:
        raise UnsupportedOperationError("only 2d convolutions with a constant weight and bias are supported")
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    if _two(attributes.pop("kernel_shape", list(kernel)), "kernel_shape") != kernel:
        raise InvalidInputError(f"kernel_shape: expected the weight's, {kernel}")
    groups = attributes.pop("group", 1)
    stride, sides, dilation = _window(value, attributes, kernel)
    return builder.convolution(
        value, weight, bias, label, stride=stride, padding=sides, dilation=dilation, groups=groups
    )


def _average_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    kernel = _two(attributes.pop("kernel_shape", []), "kernel_shape")
    stride, sides, dilation = _window(inputs[0], attributes, kernel)
    if dilation != (1, 1):
        raise UnsupportedOperationError("average pooling with dilation is not supported")
    ceil, count = bool(attributes.pop("ceil_mode", 0)), bool(attributes.pop("count_include_pad", 0))
    return builder.average_pool(inputs[0], kernel, label, stride=stride, padding=sides, ceil=ceil, count_padding=count)


def _max_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    kernel = _two(attributes.pop("kernel_shape", []), "kernel_shape")
    stride, sides, dilation = _window(inputs[0], attributes, kernel)
    attributes.pop("storage_order", 0)
    ceil = bool(attributes.pop("ceil_mode", 0))
    return builder.max_pool(inputs[0], kernel, label, stride=stride, padding=sides, dilation=dilation, ceil=ceil)


def _global_average_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return builder.mean(inputs[0], [1, 2], True, label)


def _mean(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    axes = listed(inputs, 1, attributes, "axes")
    keep = bool(attributes.pop("keepdims", 1))
    if axes is None or attributes.pop("noop_with_empty_axes", 0):
        raise UnsupportedOperationError("a mean over all dimensions is not supported")
    return builder.mean(inputs[0], [sample_dim(axis, inputs[0]) for axis in axes], keep, label)


def _batch_norm(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    attributes.pop("momentum", None)
    if attributes.pop("training_mode", 0) or not attributes.pop("spatial", 1) or depends(*inputs[1:]):
        raise UnsupportedOperationError("batch normalisation other than in inference mode is not supported")
    return builder.batch_norm(inputs[0], inputs[1:5], attributes.pop("epsilon", 1e-5), label)


def _identity(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return inputs[0]  # type: ignore[no-any-return]


def _dropout(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    attributes.pop("ratio", None), attributes.pop("seed", None)
    training = inputs[2] if len(inputs) > 2 and inputs[2] is not None else torch.tensor(False)
    if depends(training) or bool(training):
        raise UnsupportedOperationError("Dropout in training mode is not supported")
    return inputs[0]  # type: ignore[no-any-return]


def _softmax(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    raise UnsupportedOperationError("is not supported: export the network's logits, without the softmax")


def _activation(make: Callable[[Attributes], nn.Module]) -> Handler:
    return lambda builder, inputs, attributes, label: builder.add(make(attributes), [inputs[0]], label)


HANDLERS: dict[str, Handler] = {
    **SHAPE_HANDLERS,
    "Gemm": _gemm, "MatMul": _matmul, "Add": _add, "Sub": _subtract, "Mul": _multiply, "Div": _divide,
    "Neg": _negate, "Sum": _total, "Conv": _convolution, "AveragePool": _average_pool, "MaxPool": _max_pool,
    "GlobalAveragePool": _global_average_pool, "ReduceMean": _mean, "BatchNormalization": _batch_norm,
    "Identity": _identity, "Dropout": _dropout, "Softmax": _softmax, "LogSoftmax": _softmax,
    "Relu": _activation(lambda attributes: nn.ReLU()),
    "LeakyRelu": _activation(lambda attributes: nn.LeakyReLU(attributes.pop("alpha", 0.01))),
    "Sigmoid": _activation(lambda attributes: nn.Sigmoid()),
    "Tanh": _activation(lambda attributes: nn.Tanh()),
}  # fmt: skip


def check_value_first(inputs: Sequence[Argument]) -> None:
    """Most operators are known only with a first input that depends on the network's input.

    Raises:
        UnsupportedOperationError: it is a constant.
    """
    if not inputs or not isinstance(inputs[0], Value):
        raise UnsupportedOperationError("a constant first input is not supported")
