"""What each ATen operator of an exported program becomes: the table behind :mod:`from_torch`.

An argument is a :class:`Value` (depends on the input; shapes without the batch) or a constant. In a constant
tensor that has a batch dimension, that dimension has size 1. Dimensions in arguments count the batch as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from flowverify.errors import UnsupportedOperationError
from flowverify.network.builder import Builder, Pair, Sides, Value, times

Arguments = dict[str, Any]
Handler = Callable[[Builder, Arguments, str], Any]


def sample_dim(dim: int, value: Value) -> int:
    """A dimension of the batch as a dimension of the sample.

    Raises:
        UnsupportedOperationError: it is the batch dimension.
    """
    position = dim + value.rank + 1 if dim < 0 else dim
    if position < 1:
        raise UnsupportedOperationError("an operation along the batch dimension is not supported")
    return position - 1


def _pair(numbers: Any) -> Pair:
    listed = [numbers] * 2 if isinstance(numbers, int) else list(numbers)
    return (listed[0], listed[-1])


def _sides(padding: Any) -> Sides:
    rows, columns = _pair(padding)
    return (columns, columns, rows, rows)


def _sum(builder: Builder, a: Arguments, label: str) -> Value:
    return _combine(builder, a["self"], a["other"], 1.0, a.get("alpha", 1), label)


def _difference(builder: Builder, a: Arguments, label: str) -> Value:
    return _combine(builder, a["self"], a["other"], 1.0, -a.get("alpha", 1), label)


def _reversed_difference(builder: Builder, a: Arguments, label: str) -> Value:
    return _combine(builder, a["self"], a["other"], -a.get("alpha", 1), 1.0, label)


def _combine(builder: Builder, first: Any, second: Any, alpha: float, beta: float, label: str) -> Value:
    """alpha * first + beta * second."""
    if not isinstance(first, Value):
        first, second, alpha, beta = second, first, beta, alpha
    if not isinstance(second, Value):
        shift = times(second, beta) if isinstance(second, Tensor) else beta * second
        return builder.scale_shift(first, alpha, shift, label)
    if (alpha, beta) == (1, -1):
        return builder.difference(first, second, label)
    scaled = [builder.scale_shift(value, by, 0.0, label) for value, by in ((first, alpha), (second, beta))]
    return builder.total(scaled, label)


def _product(builder: Builder, a: Arguments, label: str) -> Value:
    first, second = a["self"], a["other"]
    if isinstance(first, Value) and isinstance(second, Value):
        raise UnsupportedOperationError("a product of two values that both depend on the input is not supported")
    value, factor = (first, second) if isinstance(first, Value) else (second, first)
    return builder.scale_shift(value, factor, 0.0, label)


def _quotient(builder: Builder, a: Arguments, label: str) -> Value:
    if isinstance(a["other"], Value) or a.get("rounding_mode") is not None:
        raise UnsupportedOperationError("division by a value that depends on the input, or rounded, is not supported")
    return builder.divide(a["self"], a["other"], label)


def _linear(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("weight or bias", a["weight"], a["bias"])
    return builder.linear(a["input"], a["weight"], a["bias"], label)


def _addmm(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("matrix or bias", a["mat2"], a["self"])
    product = builder.linear(a["mat1"], times(a["mat2"].t(), a["alpha"]), None, label)
    return builder.scale_shift(product, 1.0, times(a["self"], a["beta"]), label)


def _matmul(builder: Builder, a: Arguments, label: str) -> Value:
    first, second = a["self"], a["other"] if "other" in a else a["mat2"]
    if isinstance(first, Value) and isinstance(second, Value):
        raise UnsupportedOperationError("a product of two values that both depend on the input is not supported")
    if isinstance(second, Value):
        if first.ndim != 2:
            raise UnsupportedOperationError(f"a constant of rank {first.ndim} times a value is not supported")
        return builder.left_multiply(first, second, label)
    if second.ndim == 1:
        product = builder.linear(first, second[None], None, label)
        return builder.reshape(product, product.shape[:-1], label)
    if second.ndim != 2:
        raise UnsupportedOperationError(f"a value times a constant of rank {second.ndim} is not supported")
    return builder.linear(first, second.t(), None, label)


def _convolution(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("weight or bias", a["weight"], a["bias"])
    weight, padding = a["weight"], a["padding"]
    if isinstance(padding, str):
        spans = [_pair(a["dilation"])[axis] * (weight.shape[axis + 2] - 1) for axis in (0, 1)]
        rows, columns = spans if padding == "same" else (0, 0)
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    else:
        sides = _sides(padding)
    return builder.convolution(
        a["input"], weight, a["bias"], label, stride=_pair(a["stride"]), padding=sides,
        dilation=_pair(a["dilation"]), groups=a["groups"],
    )  # fmt: skip


def _constants(what: str, *arguments: Any) -> None:
    if any(isinstance(argument, Value) for argument in arguments):
        raise UnsupportedOperationError(f"a {what} that depends on the input is not supported")


def _activation(make: Callable[[Arguments], nn.Module]) -> Handler:
    return lambda builder, a, label: builder.add(make(a), [a["self"]], label)


def _average_pool(builder: Builder, a: Arguments, label: str) -> Value:
    if a["divisor_override"] is not None:
        raise UnsupportedOperationError("average pooling with divisor_override is not supported")
    kernel = _pair(a["kernel_size"])
    return builder.average_pool(
        a["self"], kernel, label, stride=_pair(a["stride"] or kernel), padding=_sides(a["padding"]),
        ceil=a["ceil_mode"], count_padding=a["count_include_pad"],
    )  # fmt: skip


def _adaptive_pool(builder: Builder, a: Arguments, label: str) -> Value:
    value, target = a["self"], _pair(a["output_size"])
    sizes = value.shape[-2:]
    if value.rank != 3 or any(size % goal for size, goal in zip(sizes, target, strict=True)):
        raise UnsupportedOperationError(
            f"adaptive average pooling of {sizes} to {target} is not supported: expected an integer ratio"
        )
    kernel = (sizes[0] // target[0], sizes[1] // target[1])
    return builder.average_pool(value, kernel, label, stride=kernel)


def _max_pool(builder: Builder, a: Arguments, label: str) -> Value:
    kernel = _pair(a["kernel_size"])
    return builder.max_pool(
        a["self"], kernel, label, stride=_pair(a["stride"] or kernel), padding=_sides(a["padding"]),
        dilation=_pair(a["dilation"]), ceil=a["ceil_mode"],
    )  # fmt: skip


def _batch_norm(builder: Builder, a: Arguments, label: str) -> Any:
    if a.get("training", False):
        raise UnsupportedOperationError("batch normalisation in training mode is not supported")
    parameters = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
    _constants("weight or bias", *parameters)
    return builder.batch_norm(a["input"], parameters, a["eps"], label)


def _dropout(builder: Builder, a: Arguments, label: str) -> Value:
    if a["train"] and a["p"] != 0:
        raise UnsupportedOperationError("dropout in training mode is not supported")
    return _same(builder, a, label)


def _same(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"] if "self" in a else a["input"]
    return value


def _cast(builder: Builder, a: Arguments, label: str) -> Value:
    if a.get("dtype") not in (None, builder.dtype):
        raise UnsupportedOperationError(f"a change of precision to {a['dtype']} is not supported")
    return _same(builder, a, label)


def _permute(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    dims = [dim % (value.rank + 1) for dim in a["dims"]]
    if dims[0] != 0:
        raise UnsupportedOperationError("moving the batch dimension is not supported")
    return builder.permute(value, [dim - 1 for dim in dims[1:]], label)


def _transpose(builder: Builder, a: Arguments, label: str) -> Value:
    first, second = sample_dim(a["dim0"], a["self"]), sample_dim(a["dim1"], a["self"])
    dims = list(range(a["self"].rank))
    dims[first], dims[second] = second, first
    return builder.permute(a["self"], dims, label)


def _slice(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    if a["dim"] in (0, -value.rank - 1):
        if a["start"] not in (None, 0) or a["step"] != 1 or (a["end"] or 0) < 2**62:
            raise UnsupportedOperationError("slicing the batch is not supported")
        return value
    return builder.index(value, sample_dim(a["dim"], value), slice(a["start"], a["end"], a["step"]), label)


def _select(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.index(a["self"], sample_dim(a["dim"], a["self"]), a["index"], label)


def _index_select(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("index", a["index"])
    return builder.index(a["self"], sample_dim(a["dim"], a["self"]), a["index"].tolist(), label)


def _flip(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    for dim in a["dims"]:
        value = builder.index(value, sample_dim(dim, value), slice(None, None, -1), label)
    return value


def _unbind(builder: Builder, a: Arguments, label: str) -> list[Value]:
    dim = sample_dim(a["dim"], a["self"])
    return [builder.index(a["self"], dim, position, label) for position in range(a["self"].shape[dim])]


def _split(builder: Builder, a: Arguments, label: str) -> list[Value]:
    dim = sample_dim(a["dim"], a["self"])
    size = a["self"].shape[dim]
    if "chunks" in a:
        sizes: Any = -(-size // a["chunks"])
    else:
        sizes = a["split_sizes"] if "split_sizes" in a else a["split_size"]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    parts, start = [], 0
    for length in sizes:
        parts.append(builder.index(a["self"], dim, slice(start, start + length), label))
        start += length
    return parts


def _concatenate(builder: Builder, a: Arguments, label: str) -> Value:
    values: Sequence[Any] = a["tensors"]
    if not all(isinstance(value, Value) for value in values):
        raise UnsupportedOperationError("concatenating a value with a constant is not supported")
    return builder.concatenate(values, sample_dim(a["dim"], values[0]), label)


def _pad(builder: Builder, a: Arguments, label: str) -> Value:
    amounts = list(a["pad"])
    if a.get("mode", "constant") != "constant" or (a["value"] or 0) != 0:
        raise UnsupportedOperationError("padding with anything but zeros is not supported")
    if any(amounts[4:]) or a["self"].rank < 2 or len(amounts) not in (2, 4, 6, 8):
        raise UnsupportedOperationError(f"padding by {amounts} is not supported: expected height and width only")
    left, right, top, bottom = (*amounts, 0, 0)[:4]
    return builder.pad(a["self"], (left, right, top, bottom), label)


def _mean(builder: Builder, a: Arguments, label: str) -> Value:
    if a.get("dtype") not in (None, builder.dtype):
        raise UnsupportedOperationError(f"a mean in {a['dtype']} is not supported")
    dims = range(a["self"].rank + 1) if a["dim"] is None else a["dim"]
    return builder.mean(a["self"], [sample_dim(dim, a["self"]) for dim in dims], a["keepdim"], label)


def _negative(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.scale_shift(a["self"], -1.0, 0.0, label)


RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")

HANDLERS: dict[str, Handler] = {
    "add": _sum, "sub": _difference, "rsub": _reversed_difference, "mul": _product, "div": _quotient,
    "neg": _negative, "linear": _linear, "addmm": _addmm, "matmul": _matmul, "mm": _matmul,
    "conv2d": _convolution, "avg_pool2d": _average_pool, "adaptive_avg_pool2d": _adaptive_pool,
    "max_pool2d": _max_pool, "mean": _mean, "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": lambda builder, a, label: [_batch_norm(builder, a, label)],
    "dropout": _dropout, "permute": _permute, "transpose": _transpose, "slice": _slice, "select": _select,
    "index_select": _index_select, "flip": _flip, "unbind": _unbind, "split": _split, "chunk": _split,
    "split_with_sizes": _split, "cat": _concatenate, "concat": _concatenate,
    "constant_pad_nd": _pad, "pad": _pad,
    "relu": _activation(lambda a: nn.ReLU()),
    "leaky_relu": _activation(lambda a: nn.LeakyReLU(float(a["negative_slope"]))),
    "sigmoid": _activation(lambda a: nn.Sigmoid()),
    "tanh": _activation(lambda a: nn.Tanh()),
    "clone": _same, "contiguous": _same, "detach": _same, "alias": _same, "lift_fresh_copy": _same,
    "to": _cast, "_to_copy": _cast,
}  # fmt: skip
