"""What the ONNX operators that only rearrange values become; see :mod:`onnx_operators`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.aten import sample_dim
from flowverify.network.builder import Builder, Value

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
