"""What each ONNX operator becomes: the table behind :mod:`from_onnx`.

Everything is evaluated for a batch of one: an argument is a :class:`Value` (depends on the input; shapes
without the batch) or a constant tensor, whose batch dimension, where it has one, has size 1. An attribute
that a handler does not take is refused by the reader.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx.reference
import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import compositions as compose
from flowverify.network.aten import permuted, sample_dim
from flowverify.network.builder import Builder, Pair, Sides, Value, times
from flowverify.network.curves import Erf, Exp, Log
from flowverify.network.operations import broadcast_shape

OPSET = "operator set"  # the name under which handlers find it among the attributes
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
    if axis % (value.rank + 1) not in (0, 1):
        raise UnsupportedOperationError(f"Flatten with axis={axis} is not supported: expected 0 or 1")
    flat = builder.reshape(value, (math.prod(value.shape),), label)
    return merged(builder, flat, label) if axis % (value.rank + 1) == 0 else flat  # (1, all entries)


def whole_shape(value: Value) -> list[int]:
    """The shape with the batch, of one, in its place."""
    return [*value.shape] if value.merged else [*value.shape[: value.batch], 1, *value.shape[value.batch :]]


def _reshape(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    target, place = list(listed(inputs, 1, attributes, "shape") or []), None
    whole = tuple(whole_shape(value))
    if not attributes.pop("allowzero", 0):
        if any(size == 0 and axis >= len(whole) for axis, size in enumerate(target)):
            raise InvalidInputError(f"Reshape to {target}: expected zeros only for dimensions of {whole}")
        target = [whole[axis] if size == 0 else size for axis, size in enumerate(target)]
    if target.count(-1) == 1:
        rest = -math.prod(target)
        place = target.index(-1)
        target[place] = math.prod(whole) // rest if rest > 0 else -1
    if min(target, default=0) < 1 or math.prod(target) != math.prod(whole):
        raise InvalidInputError(f"Reshape to {target}: expected as many entries as {whole}")
    if value.merged:
        return builder.reshape(value, target, label)
    if target[: value.batch + 1] != list(whole[: value.batch + 1]):
        if not _takes_in(target, math.prod(whole[: value.batch]), place):
            raise UnsupportedOperationError(f"Reshape of {whole} to {target} mixes the batch dimension")
        return replace(builder.reshape(value, target, label), merged=True)
    sizes = [*target[: value.batch], *target[value.batch + 1 :]]
    return replace(builder.reshape(value, sizes, label), batch=value.batch)


def _takes_in(shape: list[int], before: int, place: int | None) -> bool:
    """Whether one dimension of a shape has the batch in it, with this many entries of an image before it.

    The batch is in the dimension at ``place``, where the file leaves a size free.
    """
    ends = [1, *itertools.accumulate(shape, operator.mul)]
    around = itertools.pairwise(ends)
    fitting = [axis for axis, (start, end) in enumerate(around) if before % start == 0 and end % before == 0]
    return bool(fitting) if place is None else place in fitting


def _squeeze(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    axes = listed(inputs, 1, attributes, "axes")
    if axes is None:
        raise UnsupportedOperationError("Squeeze without axes is not supported")
    dims = {sample_dim(axis, value) for axis in axes}
    if any(dim >= value.rank or value.shape[dim] != 1 for dim in dims):
        raise InvalidInputError(f"Squeeze of dimensions {axes}: expected size 1 in samples {value.shape}")
    squeezed = builder.reshape(value, [size for dim, size in enumerate(value.shape) if dim not in dims], label)
    return replace(squeezed, batch=value.batch - sum(dim < value.batch for dim in dims))


def _unsqueeze(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    axes = listed(inputs, 1, attributes, "axes") or []
    rank = len(whole_shape(value)) + len(axes)
    places = {axis + rank if axis < 0 else axis for axis in axes}
    if len(places) != len(axes) or min(places, default=-1) < 0 or max(places) >= rank:
        raise UnsupportedOperationError(f"Unsqueeze with axes {axes} is not supported: expected 0..{rank - 1}")
    kept = [place for place in range(rank) if place not in places]
    if value.merged:
        sizes = iter(value.shape)
        return builder.reshape(value, [1 if place in places else next(sizes) for place in range(rank)], label)
    batch, sizes = kept[value.batch], iter(value.shape)
    if batch != value.batch and not value.batch:
        raise UnsupportedOperationError(f"Unsqueeze with axes {axes} is not supported: expected 1..{rank - 1}")
    shape = [1 if place in places else next(sizes) for place in range(rank) if place != batch]
    return replace(builder.reshape(value, shape, label), batch=batch)


def _transpose(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    rank = len(whole_shape(value))
    order = attributes.pop("perm", list(range(rank - 1, -1, -1)))
    if sorted(order) != list(range(rank)):
        raise InvalidInputError(f"Transpose with perm={order}: expected an order of {rank} dimensions")
    return permuted(builder, value, order, label)


def _slice(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    batch = value.batch
    starts, ends, axes, steps = (
        listed(inputs, position, attributes, name)
        for position, name in enumerate(("starts", "ends", "axes", "steps"), start=1)
    )
    if starts is None or ends is None:
        raise InvalidInputError("Slice: expected starts and ends")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if (
            not value.merged
            and axis in (batch, batch - value.rank - 1)
            and start == 0
            and end >= 2**31 - 1
            and step == 1
        ):
            continue
        picked = builder.index(value, sample_dim(axis, value), slice(start, end, step), label)
        value = replace(picked, batch=batch, merged=value.merged)
    return value


def _gather(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, positions = inputs
    if not isinstance(value, Value) or depends(positions):
        raise UnsupportedOperationError("Gather is supported with a constant index only")
    axis = attributes.pop("axis", 0)
    dim = sample_dim(axis, value)
    before = dim < value.batch
    if positions.ndim == 0:
        return replace(builder.index(value, dim, int(positions), label), batch=value.batch - before)
    picked = builder.index(value, dim, integers(positions.flatten(), "indices"), label)
    shape = (*picked.shape[:dim], *positions.shape, *picked.shape[dim + 1 :])
    return replace(builder.reshape(picked, shape, label), batch=value.batch + before * (positions.ndim - 1))


def _concatenate(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    dim = sample_dim(attributes.pop("axis", 1), next(value for value in inputs if isinstance(value, Value)))
    whole = any(isinstance(value, Value) and value.merged for value in inputs)
    parts = [value if isinstance(value, Value) else (value if whole else value[0]).double() for value in inputs]
    return compose.with_constant(builder, parts, dim, label)


def _split(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Any:
    value: Value = inputs[0]
    dim = sample_dim(attributes.pop("axis", 0), value)
    sizes, count = listed(inputs, 1, attributes, "split"), attributes.pop("num_outputs")
    if sizes is None:
        each = -(-value.shape[dim] // count)
        sizes = [min(each, value.shape[dim] - start) for start in range(0, value.shape[dim], each)]
    if sum(sizes) != value.shape[dim]:
        raise InvalidInputError(f"Split into {sizes}: expected sizes that add up to {value.shape[dim]}")
    parts, start = [], 0
    for size in sizes:
        picked = builder.index(value, dim, slice(start, start + size), label)
        parts.append(replace(picked, batch=value.batch))
        start += size
    return parts


def _pad(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    amounts = listed(inputs, 1, attributes, "pads")
    constant = inputs[2] if len(inputs) > 2 and inputs[2] is not None else attributes.pop("value", 0.0)
    axes = integers(inputs[3], "axes") if len(inputs) > 3 and inputs[3] is not None else range(value.rank + 1)
    mode = attributes.pop("mode", b"constant").decode()
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if depends(constant) or amounts is None or mode not in names:
        raise UnsupportedOperationError(f"padding in mode {mode!r}, or with a value that depends on the input")
    half = len(axes)
    if len(amounts) != 2 * half:
        raise InvalidInputError(f"pads {amounts}: expected two for each of {half} dimensions")
    around = {axis % (value.rank + 1): (amounts[k], amounts[k + half]) for k, axis in enumerate(axes)}
    if any(around.pop(0, (0, 0))):
        raise UnsupportedOperationError("padding along the batch is not supported")
    dims = {axis - 1: pair for axis, pair in around.items() if any(pair)}
    plain = names[mode] == "constant" and not float(constant) and min(amounts) >= 0
    if plain and value.rank > 1 and set(dims) <= {value.rank - 2, value.rank - 1}:
        sides = (*dims.get(value.rank - 1, (0, 0)), *dims.get(value.rank - 2, (0, 0)))
        return builder.pad(value, sides, label)
    return builder.surround(value, dims, label, mode=names[mode], constant=float(constant))


def _expand(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    target = list(integers(inputs[1], "shape"))
    whole = broadcast_shape(whole_shape(value), target)
    if len(whole) != value.rank + 1 or whole[0] != 1:
        raise UnsupportedOperationError(f"Expand of {whole_shape(value)} to {target} changes the batch")
    return builder.widen(value, whole[1:], label)


def _tile(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value: Value = inputs[0]
    counts = integers(inputs[1], "repeats")
    if len(counts) != value.rank + 1 or counts[0] != 1:
        raise UnsupportedOperationError(f"Tile by {counts} changes the batch")
    for dim, count in enumerate(counts[1:]):
        if count != 1:
            value = builder.index(value, dim, [*range(value.shape[dim])] * count, label)
    return value


def _blocks(make: Callable[..., Value]) -> Handler:
    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        columns_first = attributes.pop("mode", b"DCR") == b"CRD"
        return make(builder, inputs[0], attributes.pop("blocksize"), label, columns_first=columns_first)

    return handle


SHAPE_HANDLERS: dict[str, Handler] = {
    "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": _transpose, "Slice": _slice, "Gather": _gather, "Concat": _concatenate, "Split": _split,
    "Pad": _pad, "Expand": _expand, "Tile": _tile, "DepthToSpace": _blocks(compose.depth_to_space),
    "SpaceToDepth": _blocks(compose.space_to_depth),
}  # fmt: skip


Argument = Value | Tensor | None


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
        return compose.matrix_product(builder, first, second, label)
    left = isinstance(second, Value)
    return builder.matrices(second if left else first, first if left else second, label, left=left)


def _add(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return compose.combined(builder, inputs[0], inputs[1], 1.0, label)


def _subtract(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return compose.combined(builder, inputs[0], inputs[1], -1.0, label)


def _multiply(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    first, second = inputs
    if isinstance(first, Value) and isinstance(second, Value):
        return compose.product(builder, first, second, label)
    value, constant = (first, second) if isinstance(first, Value) else (second, first)
    return builder.scale_shift(value, constant, 0.0, label)


def _divide(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    if isinstance(inputs[1], Value):
        return compose.quotient(builder, inputs[0], inputs[1], label)
    return builder.divide(inputs[0], inputs[1], label)


def _negate(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return builder.scale_shift(inputs[0], -1.0, 0.0, label)


def _total(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    result = inputs[0]
    for other in inputs[1:]:
        either = depends(result, other)
        result = _add(builder, [result, other], attributes, label) if either else result.double() + other.double()
    return result  # type: ignore[no-any-return]


def _window(value: Value, attributes: Attributes, kernel: Pair, ceil: bool = False) -> tuple[Pair, Sides, Pair]:
    """Strides, padding (left, right, top, bottom) and dilations of a convolution or pooling of an image."""
    stride = _two(attributes.pop("strides", [1, 1]), "strides")
    dilation = _two(attributes.pop("dilations", [1, 1]), "dilations")
    pads = integers(attributes.pop("pads", [0, 0, 0, 0]), "pads")
    automatic = attributes.pop("auto_pad", b"NOTSET").decode()
    if len(pads) == 2:
        pads = [0, pads[0], 0, pads[1]]
    if len(pads) != 4 or value.rank != 3 or min(stride) < 1:
        raise InvalidInputError(f"pads {pads}, strides {stride}: expected a 2d window on samples (C, H, W)")
    sides = (pads[1], pads[3], pads[0], pads[2])
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for axis in (0, 1):
            size = value.shape[axis + 1]
            outputs = math.ceil(size / stride[axis])
            totals.append(max(0, (outputs - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size))
        sides = _shared(totals, automatic)
    elif automatic == "VALID":
        sides = (0, 0, 0, 0)
    elif automatic not in ("NOTSET", ""):
        raise UnsupportedOperationError(f"auto_pad {automatic!r} is not supported")
    return stride, sides, dilation


def _shared(totals: list[int], automatic: str) -> Sides:
    """The padding of rows and of columns on both sides; an odd pixel comes last for SAME_UPPER."""
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    first, last = (small, large) if automatic == "SAME_UPPER" else (large, small)
    return (first[1], last[1], first[0], last[0])


def _two(numbers: Any, what: str) -> Pair:
    """An option of both axes; of one axis it is that of the columns of an image of one row."""
    listed = integers(numbers, what)
    if len(listed) == 1:
        return (1, listed[0])
    if len(listed) != 2:
        raise UnsupportedOperationError(f"{what} {listed}: only one or two dimensions are supported")
    return (listed[0], listed[1])


def _on_images(handler: Handler) -> Handler:
    """Takes sequences (channels, length) as images of one row."""

    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        value = inputs[0]
        if not isinstance(value, Value) or value.rank != 2:
            return handler(builder, inputs, attributes, label)  # type: ignore[no-any-return]
        row = builder.reshape(value, (value.shape[0], 1, value.shape[1]), label)
        others = [one[:, :, None] if isinstance(one, Tensor) and one.ndim == 3 else one for one in inputs[1:]]
        result: Value = handler(builder, [row, *others], attributes, label)
        return builder.reshape(result, (result.shape[0], result.shape[2]), label)

    return handle


def _convolution(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, weight, bias = (*inputs, None)[:3]
    _check_kernel(value, weight, bias)
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    if _two(attributes.pop("kernel_shape", list(kernel)), "kernel_shape") != kernel:
        raise InvalidInputError(f"kernel_shape: expected the weight's, {kernel}")
    groups = attributes.pop("group", 1)
    stride, sides, dilation = _window(value, attributes, kernel)
    return builder.convolution(
        value, weight, bias, label, stride=stride, padding=sides, dilation=dilation, groups=groups
    )


def _check_kernel(value: Any, weight: Any, bias: Any) -> None:
    if depends(weight, bias) or not isinstance(value, Value) or weight.ndim != 4:
        raise UnsupportedOperationError("only 1d and 2d convolutions with a constant weight and bias are supported")


def _transposed_convolution(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, weight, bias = (*inputs, None)[:3]
    _check_kernel(value, weight, bias)
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    attributes.pop("kernel_shape", None)
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    same, goal = automatic.startswith("SAME"), attributes.pop("output_shape", None)
    if same:
        attributes.pop("auto_pad")
    stride, sides, dilation = _window(value, attributes, kernel)
    more = _two(attributes.pop("output_padding", [0, 0]), "output_padding")
    if len(weight.shape) == 4 and value.shape[1] == 1 and kernel[0] == 1:
        more = (0, more[1])  # of a sequence
    if same or goal is not None:
        sizes = [size * step for size, step in zip(value.shape[1:], stride, strict=True)] if goal is None else goal[-2:]
        totals = [
            stride[axis] * (value.shape[axis + 1] - 1)
            + more[axis]
            + (kernel[axis] - 1) * dilation[axis]
            + 1
            - sizes[axis]
            for axis in (0, 1)
        ]
        sides = _shared(totals, automatic if same else "SAME_LOWER")
    return compose.transposed_convolution(
        builder, value, weight, bias, label, stride=stride, padding=sides, output_padding=more, dilation=dilation,
        groups=attributes.pop("group", 1),
    )  # fmt: skip


def _average_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    kernel = _two(attributes.pop("kernel_shape", []), "kernel_shape")
    stride, sides, dilation = _window(inputs[0], attributes, kernel)
    if dilation != (1, 1):
        raise UnsupportedOperationError("average pooling with dilation is not supported")
    ceil, count = bool(attributes.pop("ceil_mode", 0)), bool(attributes.pop("count_include_pad", 0))
    return builder.average_pool(inputs[0], kernel, label, stride=stride, padding=sides, ceil=ceil, count_padding=count)


def _norm_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """(sum of |x|^p)^(1/p) over windows, for p of 1 or 2."""
    kernel = _two(attributes.pop("kernel_shape", []), "kernel_shape")
    stride, sides, dilation = _window(inputs[0], attributes, kernel)
    order, ceil = attributes.pop("p", 2), bool(attributes.pop("ceil_mode", 0))
    if dilation != (1, 1):
        raise UnsupportedOperationError("norm pooling with dilation is not supported")
    terms = _of_order(builder, inputs[0], order, label)
    total = builder.average_pool(terms, kernel, label, stride=stride, padding=sides, ceil=ceil, divisor=1)
    return total if order == 1 else compose.power(builder, total, 0.5, label)


def _of_order(builder: Builder, value: Value, order: int, label: str) -> Value:
    """|x|^p for p of 1 or 2."""
    if order not in (1, 2):
        raise UnsupportedOperationError(f"a norm of order {order} is not supported: expected 1 or 2")
    return compose.absolute(builder, value, label) if order == 1 else compose.power(builder, value, 2, label)


def _max_pool(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    kernel = _two(attributes.pop("kernel_shape", []), "kernel_shape")
    stride, sides, dilation = _window(inputs[0], attributes, kernel)
    attributes.pop("storage_order", 0)
    ceil = bool(attributes.pop("ceil_mode", 0))
    return builder.max_pool(inputs[0], kernel, label, stride=stride, padding=sides, dilation=dilation, ceil=ceil)


def _over_places(reduce: Callable[..., Value]) -> Handler:
    """A reduction over all dimensions but the channel."""

    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        return reduce(builder, inputs[0], list(range(1, inputs[0].rank)), True, label)

    return handle


def _norm_over_places(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    dims, order = list(range(1, inputs[0].rank)), attributes.pop("p", 2)
    total = builder.sum(_of_order(builder, inputs[0], order, label), dims, True, label)
    return total if order == 1 else compose.power(builder, total, 0.5, label)


def _reduction(reduce: Callable[..., Value]) -> Handler:
    """A reduction over given dimensions, ``reduce(builder, value, dims, keep, label)``."""

    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        value: Value = inputs[0]
        axes, keep = listed(inputs, 1, attributes, "axes"), bool(attributes.pop("keepdims", 1))
        if attributes.pop("noop_with_empty_axes", 0) and not axes:
            return value
        if not axes:
            raise UnsupportedOperationError("a reduction over all dimensions, the batch among them, is not supported")
        return reduce(builder, value, [sample_dim(axis, value) for axis in axes], keep, label)

    return handle


def _smallest(builder: Builder, value: Value, dims: list[int], keep: bool, label: str) -> Value:
    turned = builder.scale_shift(value, -1.0, 0.0, label)
    return builder.scale_shift(builder.largest(turned, dims, keep, label), -1.0, 0.0, label)


def _total_of(order: int, root: bool) -> Callable[..., Value]:
    def reduce(builder: Builder, value: Value, dims: list[int], keep: bool, label: str) -> Value:
        total = builder.sum(_of_order(builder, value, order, label), dims, keep, label)
        return compose.power(builder, total, 0.5, label) if root else total

    return reduce


def _resized(builder: Builder, value: Value, scales: Any, sizes: Any, attributes: Attributes, label: str) -> Value:
    """Each axis by a matrix: what the operator makes of unit vectors, by onnx's own reference."""
    if depends(scales, sizes):
        raise UnsupportedOperationError("resizing by sizes that depend on the input is not supported")
    chosen = {name: attributes.pop(name) for name in list(attributes)}
    mode = chosen.get("coordinate_transformation_mode", b"half_pixel")
    if mode == b"tf_crop_and_resize" or chosen.pop("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise UnsupportedOperationError("resizing to a region, or to a given ratio, is not supported")
    axes = chosen.pop("axes", list(range(value.rank + 1)))
    for axis, factor in zip(axes, scales if sizes is None else sizes, strict=True):
        length = 1 if axis % (value.rank + 1) == 0 else value.shape[sample_dim(axis, value)]
        if float(factor) == (1.0 if sizes is None else length):
            continue
        node = onnx.helper.make_node("Resize", ["x", "", "s"] if sizes is None else ["x", "", "", "s"], ["y"], **chosen)
        pair = np.array([1, factor], np.float32) if sizes is None else np.array([length, int(factor)], np.int64)
        model = onnx.helper.make_model(
            onnx.helper.make_graph(
                [node], "resize", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [length, length])],
                [onnx.helper.make_empty_tensor_value_info("y")], [onnx.numpy_helper.from_array(pair, "s")],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 19)],
        )  # fmt: skip
        made: Any = onnx.reference.ReferenceEvaluator(model).run(None, {"x": np.eye(length)})
        matrix = torch.from_numpy(np.ascontiguousarray(np.asarray(made[0], dtype=np.float64).T))
        value = compose.along(builder, value, sample_dim(axis, value), matrix, label)
    return value


def _resize(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    if len(inputs) == 2:  # operator set 10
        return _upsample(builder, inputs, attributes, label)
    scales, sizes = (*inputs[2:], None)[:2]
    scales = None if scales is None or (isinstance(scales, Tensor) and not scales.numel()) else scales
    return _resized(builder, inputs[0], scales, sizes if scales is None else None, attributes, label)


def _upsample(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """Resizing where pixel k of the result is read at k / scale."""
    scales = inputs[1] if len(inputs) > 1 else attributes.pop("scales")
    attributes |= {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
    return _resized(builder, inputs[0], scales, None, attributes, label)


def _normalised(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Any:
    """LayerNormalization and RMSNormalization; their further outputs are not computed."""
    value, weight, bias = (*inputs, None)[:3]
    attributes.pop("stash_type", 1)
    axis = attributes.pop("axis", -1)
    count = value.rank - sample_dim(axis, value)
    return [
        compose.layer_norm(
            builder, value, count, attributes.pop("epsilon", 1e-5), weight, bias, label,
            centred=attributes.pop("centred", True),
        )
    ]  # fmt: skip


def _root_mean_square(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Any:
    return _normalised(builder, inputs, attributes | {"centred": False}, label)


def _group_normalised(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """GroupNormalization, and InstanceNormalization with as many groups as channels."""
    value, weight, bias = inputs
    groups = attributes.pop("num_groups", value.shape[0])
    attributes.pop("stash_type", 1)
    epsilon = attributes.pop("epsilon", 1e-5)
    if depends(weight, bias):
        raise UnsupportedOperationError("normalisation with a scale that depends on the input is not supported")
    if weight.numel() == groups != value.shape[0]:  # operator set 18
        weight, bias = (one.repeat_interleave(value.shape[0] // groups) for one in (weight, bias))
    return compose.group_norm(builder, value, groups, epsilon, weight, bias, label)


def _response_norm(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """x / (bias + alpha / size * (sum of squares over neighbouring channels))^beta."""
    value, size = inputs[0], attributes.pop("size")
    alpha, beta, bias = attributes.pop("alpha", 1e-4), attributes.pop("beta", 0.75), attributes.pop("bias", 1.0)
    channel = torch.arange(value.shape[0])
    distance = channel[None] - channel[:, None]
    near = (distance >= -((size - 1) // 2)) & (distance <= size // 2)
    squares = compose.power(builder, value, 2, label)
    total = builder.scale_shift(compose.along(builder, squares, 0, near.double(), label), alpha / size, bias, label)
    return compose.product(builder, value, compose.power(builder, total, -beta, label), label)


_ACTIVATION_NAMES = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_GATE_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # torch's gates among ONNX's


def _recurrent(kind: str) -> Handler:
    """LSTM, GRU and RNN: sequences (steps, batch, features), or with layout 1 (batch, steps, features)."""

    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Any:
        value, weight, hidden, bias, lengths, state, memory, peepholes = (*inputs, *[None] * 8)[:8]
        layout, direction = attributes.pop("layout", 0), attributes.pop("direction", b"forward").decode()
        sides = 2 if direction == "bidirectional" else 1
        names = [name.decode() for name in attributes.pop("activations", [])] or _ACTIVATION_NAMES[kind] * sides
        cells: dict[str, compose.Cell] = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
        cell = cells[kind]
        if kind == "RNN" and names == ["Relu"] * sides:
            cell, names = "rnn_relu", _ACTIVATION_NAMES[kind] * sides
        attributes.pop("hidden_size", None)
        reset_after = bool(attributes.pop("linear_before_reset", 0))
        if attributes.pop("input_forget", 0) or names != _ACTIVATION_NAMES[kind] * sides or peepholes is not None:
            raise UnsupportedOperationError(f"{kind} with peepholes, coupled gates or activations {names}")
        if depends(weight, hidden, bias, state, memory) or not isinstance(value, Value) or value.rank != 2:
            raise UnsupportedOperationError(f"{kind} with weights or first states that depend on the input")
        if value.batch != (0 if layout else 1):
            raise UnsupportedOperationError(f"{kind}: expected the batch as dimension {0 if layout else 1}")
        if lengths is not None and (depends(lengths) or lengths.flatten().tolist() != [value.shape[0]]):
            raise UnsupportedOperationError(f"{kind} over a part of the sequence is not supported")
        size = hidden.shape[2]
        parts = []
        for side in range(sides):
            biases = weight.new_zeros(2, len(_GATE_ORDER[kind]) * size) if bias is None else bias[side].reshape(2, -1)
            own = [
                torch.cat([one.reshape(-1, size, *one.shape[1:])[gate] for gate in _GATE_ORDER[kind]])
                for one in (weight[side], hidden[side], biases[0], biases[1])
            ]
            first, second = (
                None if one is None else one[0, side] if layout else one[side, 0] for one in (state, memory)
            )
            directed = compose.Direction(own[0], own[1], own[2], own[3], first, second, reset_after)
            backward = direction == "reverse" or side == 1
            parts.append(compose.passed(builder, cell, value, directed, label, backward=backward))
        rows = [builder.reshape(part.states, (value.shape[0], 1, size), label) for part in parts]
        states = replace(builder.concatenate(rows, 1, label), batch=0 if layout else 2)
        result = [states]
        for kept in ([part.last for part in parts], [part.memory for part in parts if part.memory is not None]):
            if kept:
                ends = [builder.reshape(one, (1, size), label) for one in kept]
                result.append(replace(builder.concatenate(ends, 0, label), batch=0 if layout else 1))
        return result

    return handle


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


def _softmax(make: Callable[..., Value]) -> Handler:
    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        value: Value = inputs[0]
        old = attributes.pop(OPSET) < 13
        axis = attributes.pop("axis", 1 if old else -1)
        dim = sample_dim(axis, value)
        if not old or dim == value.rank - 1:
            return make(builder, value, dim, label)
        # Older operator sets take all dimensions from the axis on as one.
        flat = builder.reshape(value, (*value.shape[:dim], math.prod(value.shape[dim:])), label)
        return builder.reshape(make(builder, flat, dim, label), value.shape, label)

    return handle


def _clip(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    ends = []
    for position, name in ((1, "min"), (2, "max")):
        given = inputs[position] if len(inputs) > position else None
        given = attributes.pop(name, None) if given is None else given
        if depends(given):
            raise UnsupportedOperationError("clipping by values that depend on the input is not supported")
        ends.append(None if given is None else float(given))
    return compose.clip(builder, inputs[0], ends[0], ends[1], label)


def _elu(alpha: float, gamma: float) -> Handler:
    def handle(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        chosen = {"alpha": attributes.pop("alpha", alpha), "scale": attributes.pop("gamma", gamma)}
        return compose.elu(builder, inputs[0], label, **chosen)

    return handle


def _celu(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    alpha = attributes.pop("alpha", 1.0)
    return compose.elu(builder, inputs[0], label, alpha=alpha, input_scale=1 / alpha)


def _parametric(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    value, slope = inputs
    if depends(slope):
        raise UnsupportedOperationError("PRelu with a slope that depends on the input is not supported")
    slope = slope[0] if slope.ndim == value.rank + 1 else slope
    return compose.parametric(builder, value, slope, label)


def _power(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    if depends(inputs[1]) or inputs[1].numel() != 1:
        raise UnsupportedOperationError("Pow is supported with one constant exponent only")
    return compose.power(builder, inputs[0], float(inputs[1]), label)


def _to_the(exponent: float) -> Handler:
    return lambda builder, inputs, attributes, label: compose.power(builder, inputs[0], exponent, label)


def _hard_sigmoid(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    alpha, beta = attributes.pop("alpha", 0.2), attributes.pop("beta", 0.5)
    return compose.hard_sigmoid(builder, inputs[0], label, alpha=alpha, beta=beta)


def _shrink(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    bound, bias = attributes.pop("lambd", 0.5), attributes.pop("bias", 0.0)
    if bound != bias:
        raise UnsupportedOperationError(f"Shrink with lambd={bound}, bias={bias} jumps; expected both equal")
    return compose.soft_shrink(builder, inputs[0], bound, label)


def _among(combine: Callable[..., Value]) -> Handler:
    """A combination of any number of operands."""
    return lambda builder, inputs, attributes, label: compose.folded(builder, combine, inputs, label)


def _average_of(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    return builder.divide(_total(builder, inputs, attributes, label), float(len(inputs)), label)


def refused(instead: str) -> Handler:
    """What cannot be bounded, and the nearest thing that can."""

    def refuse(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
        raise UnsupportedOperationError(f"is not supported: {instead}")

    return refuse


def _activation(make: Callable[[Attributes], nn.Module]) -> Handler:
    return lambda builder, inputs, attributes, label: builder.add(make(attributes), [inputs[0]], label)


_REARRANGING = (
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Identity", "Dropout", "Cast",
)  # fmt: skip
# These take values with the batch in another place than the first.
ANY_PLACE = (*_REARRANGING, "LSTM", "GRU", "RNN")
# These take all dimensions of a value as they are for one image: along any of them, or entry by entry.
ANY_DIMENSION = (
    *_REARRANGING, "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Neg", "Sum", "Max", "Min", "Mean", "Concat",
    "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp", "LayerNormalization", "RMSNormalization", "Relu", "LeakyRelu", "Sigmoid",
    "Tanh", "Gelu", "Erf", "Exp", "Log", "Softplus", "Swish", "Mish", "HardSwish", "Softsign", "Elu", "Selu",
    "Celu", "HardSigmoid", "Shrink", "Clip", "Abs", "Sqrt", "Pow", "Reciprocal",
)  # fmt: skip

HANDLERS: dict[str, Handler] = {
    **SHAPE_HANDLERS,
    "Gemm": _gemm, "MatMul": _matmul, "Add": _add, "Sub": _subtract, "Mul": _multiply, "Div": _divide,
    "Neg": _negate, "Sum": _total, "Conv": _on_images(_convolution), "AveragePool": _on_images(_average_pool),
    "MaxPool": _on_images(_max_pool),
    "GlobalAveragePool": _over_places(Builder.mean), "GlobalMaxPool": _over_places(Builder.largest),
    "LpPool": _on_images(_norm_pool), "GlobalLpPool": _norm_over_places,
    "ReduceMean": _reduction(Builder.mean), "ReduceSum": _reduction(Builder.sum),
    "ReduceMax": _reduction(Builder.largest), "ReduceMin": _reduction(_smallest),
    "ReduceL1": _reduction(_total_of(1, False)), "ReduceL2": _reduction(_total_of(2, True)),
    "ReduceSumSquare": _reduction(_total_of(2, False)), "ReduceLogSumExp": _reduction(compose.log_sum_exp),
    "BatchNormalization": _batch_norm, "LayerNormalization": _normalised, "RMSNormalization": _root_mean_square,
    "GroupNormalization": _group_normalised, "InstanceNormalization": _group_normalised, "LRN": _response_norm,
    "ConvTranspose": _on_images(_transposed_convolution), "Resize": _resize, "Upsample": _upsample,
    "Identity": _identity, "Dropout": _dropout, "Softmax": _softmax(compose.softmax),
    "LogSoftmax": _softmax(compose.log_softmax), "LSTM": _recurrent("LSTM"), "GRU": _recurrent("GRU"),
    "RNN": _recurrent("RNN"), "Max": _among(compose.maximum), "Min": _among(compose.minimum), "Mean": _average_of,
    "Clip": _clip, "Elu": _elu(1.0, 1.0), "Selu": _elu(1.67326319217681884765625, 1.05070102214813232421875),
    "Celu": _celu, "PRelu": _parametric, "HardSigmoid": _hard_sigmoid, "Shrink": _shrink,
    "Pow": _power, "Sqrt": _to_the(0.5), "Reciprocal": _to_the(-1),
    "Abs": lambda builder, inputs, attributes, label: compose.absolute(builder, inputs[0], label),
    "Softplus": lambda builder, inputs, attributes, label: compose.softplus(builder, inputs[0], label),
    "Swish": lambda builder, inputs, attributes, label: compose.swish(
        builder, inputs[0], attributes.pop("alpha", 1.0), label
    ),
    "Gelu": _activation(lambda attributes: nn.GELU(attributes.pop("approximate", b"none").decode())),
    "Mish": _activation(lambda attributes: nn.Mish()), "HardSwish": _activation(lambda attributes: nn.Hardswish()),
    "Softsign": _activation(lambda attributes: nn.Softsign()), "Erf": _activation(lambda attributes: Erf()),
    "Exp": _activation(lambda attributes: Exp()), "Log": _activation(lambda attributes: Log()),
    "If": refused("a branch; export the branch that is taken, or fold its condition into a constant"),
    "Loop": refused("a loop; write its steps out, as LSTM, GRU and RNN are here"),
    "Scan": refused("a loop; write its steps out, or use LSTM, GRU or RNN"),
    "NonZero": refused("its shape depends on the data; Gather with a constant index is the nearest operation"),
    "Compress": refused("its shape depends on the data; Gather with a constant index is the nearest operation"),
    "Unique": refused("its shape depends on the data; nothing in place of it is"),
    "NonMaxSuppression": refused("its shape depends on the data; end the file with what it reads"),
    "TopK": refused("sorting; ReduceMax and MaxPool are the nearest operations"),
    "ArgMax": refused("the class is read off the logits; end the file with these"),
    "ArgMin": refused("the class is read off the logits; end the file with these"),
    "Sign": refused("it jumps; Clip of a steep line is the nearest function"),
    "Floor": refused("it jumps; leave rounding out of the file"),
    "Ceil": refused("it jumps; leave rounding out of the file"),
    "Round": refused("it jumps; leave rounding out of the file"),
    "ThresholdedRelu": refused("it jumps; Relu of a shifted input is the nearest function"),
    "QuantizeLinear": refused("it jumps; export the network before quantisation"),
    "DequantizeLinear": refused("export the network before quantisation"),
    "LpNormalization": refused("it divides by a norm; at the very end, over all classes, it is dropped"),
    "Einsum": refused("write it with MatMul and Transpose"),
    "Relu": _activation(lambda attributes: nn.ReLU()),
    "LeakyRelu": _activation(lambda attributes: nn.LeakyReLU(attributes.pop("alpha", 0.01))),
    "Sigmoid": _activation(lambda attributes: nn.Sigmoid()),
    "Tanh": _activation(lambda attributes: nn.Tanh()),
}  # fmt: skip


def merged(builder: Builder, value: Value, label: str) -> Value:
    """A value with all of its dimensions, as they are for one image."""
    return value if value.merged else replace(builder.reshape(value, whole_shape(value), label), merged=True)


def with_batch_first(builder: Builder, value: Value, label: str) -> Value:
    """The inverse of :func:`merged`, where the first dimension has size 1: for one image it is the batch."""
    if not value.merged or value.shape[0] != 1 or value.rank == 1:
        return value
    return builder.reshape(value, value.shape[1:], label)


def check_value_first(inputs: Sequence[Argument]) -> None:
    """Most operators are known only with a first input that depends on the network's input.

    Raises:
        UnsupportedOperationError: it is a constant.
    """
    if not inputs or not isinstance(inputs[0], Value):
        raise UnsupportedOperationError("a constant first input is not supported")
