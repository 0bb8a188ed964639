"""What each ATen operator of an exported program becomes: the table behind :mod:`from_torch`.

An argument is a :class:`Value` (depends on the input; shapes without the batch) or a constant. In a constant
tensor that has a batch dimension, that dimension has size 1. Dimensions in arguments count the batch as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import UnsupportedOperationError
from flowverify.network import compositions as compose
from flowverify.network.builder import Builder, Pair, Sides, Value, times
from flowverify.network.curves import Erf, Exp, Log

Arguments = dict[str, Any]
Handler = Callable[[Builder, Arguments, str], Any]


def sample_dim(dim: int, value: Value) -> int:
    """A dimension of the batch as a dimension of the sample.

    Raises:
        UnsupportedOperationError: it is the batch dimension.
    """
    if value.merged and -value.rank <= dim < value.rank:
        return dim % value.rank
    position = dim + value.rank + 1 if dim < 0 else dim
    if position == value.batch or position < 0:
        raise UnsupportedOperationError("an operation along the batch dimension is not supported")
    return position - (position > value.batch)


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
        shift = compose.finite(times(second, beta)) if isinstance(second, Tensor) else beta * second
        return builder.scale_shift(first, alpha, shift, label)
    first, second = compose.ranked(builder, first, second, label)
    if (alpha, beta) == (1, -1):
        return builder.difference(first, second, label)
    scaled = [builder.scale_shift(value, by, 0.0, label) for value, by in ((first, alpha), (second, beta))]
    return builder.total(scaled, label)


def _product(builder: Builder, a: Arguments, label: str) -> Value:
    first, second = a["self"], a["other"]
    if isinstance(first, Value) and isinstance(second, Value):
        return compose.product(builder, first, second, label)
    value, factor = (first, second) if isinstance(first, Value) else (second, first)
    return builder.scale_shift(value, factor, 0.0, label)


def _quotient(builder: Builder, a: Arguments, label: str) -> Value:
    if a.get("rounding_mode") is not None:
        raise UnsupportedOperationError("division that rounds is not supported")
    if isinstance(a["other"], Value):
        return compose.quotient(builder, a["self"], a["other"], label)
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
        return compose.matrix_product(builder, first, second, label)
    left = isinstance(second, Value)
    return builder.matrices(second if left else first, first if left else second, label, left=left)


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
    kernel = _pair(a["kernel_size"])
    return builder.average_pool(
        a["self"], kernel, label, stride=_pair(a["stride"] or kernel), padding=_sides(a["padding"]),
        ceil=a["ceil_mode"], count_padding=a["count_include_pad"], divisor=a["divisor_override"],
    )  # fmt: skip


def _adaptive_pool(builder: Builder, a: Arguments, label: str) -> Value:
    """Means over parts of about one size: along each axis a matrix of its own, where they are not of one size."""
    value: Value = a["self"]
    target, sizes = _pair(a["output_size"]), value.shape[-2:]
    if value.rank != 3:
        raise UnsupportedOperationError(f"adaptive average pooling of samples of shape {value.shape} is not supported")
    if not any(size % goal for size, goal in zip(sizes, target, strict=True)):
        kernel = (sizes[0] // target[0], sizes[1] // target[1])
        return builder.average_pool(value, kernel, label, stride=kernel)
    for dim, size, goal in ((1, sizes[0], target[0]), (2, sizes[1], target[1])):
        matrix = torch.zeros(goal, size, dtype=torch.float64)
        for place in range(goal):
            begin, end = place * size // goal, -(-(place + 1) * size // goal)
            matrix[place, begin:end] = 1 / (end - begin)
        value = compose.along(builder, value, dim, matrix, label)
    return value


def _adaptive_max_pool(builder: Builder, a: Arguments, label: str) -> list[Value]:
    value, target = a["self"], _pair(a["output_size"])
    sizes = value.shape[-2:]
    if value.rank != 3 or any(size % goal for size, goal in zip(sizes, target, strict=True)):
        raise UnsupportedOperationError(
            f"adaptive max pooling of {sizes} to {target} is not supported: expected an integer ratio"
        )
    kernel = (sizes[0] // target[0], sizes[1] // target[1])
    return [builder.max_pool(value, kernel, label, stride=kernel)]


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


def permuted(builder: Builder, value: Value, dims: Sequence[int], label: str) -> Value:
    """All dimensions in another order, the batch among them."""
    if value.merged:
        return replace(builder.permute(value, dims, label), merged=True)
    sample = [sample_dim(dim, value) for dim in dims if dim != value.batch]
    return replace(builder.permute(value, sample, label), batch=list(dims).index(value.batch))


def _permute(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    return permuted(builder, value, [dim % (value.rank + 1) for dim in a["dims"]], label)


def _transpose(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    dims = list(range(value.rank + 1))
    first, second = (a[name] % len(dims) for name in ("dim0", "dim1"))
    dims[first], dims[second] = second, first
    return permuted(builder, value, dims, label)


def _slice(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    if a["dim"] in (value.batch, value.batch - value.rank - 1):
        if a["start"] not in (None, 0) or a["step"] != 1 or (a["end"] or 0) < 2**62:
            raise UnsupportedOperationError("slicing the batch is not supported")
        return value
    picked = builder.index(value, sample_dim(a["dim"], value), slice(a["start"], a["end"], a["step"]), label)
    return replace(picked, batch=value.batch)


def _select(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    dim = sample_dim(a["dim"], value)
    return replace(builder.index(value, dim, a["index"], label), batch=value.batch - (dim < value.batch))


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
    dim = sample_dim(a["dim"], next(value for value in values if isinstance(value, Value)))
    return compose.with_constant(builder, [_sample(value) for value in values], dim, label)


def _stack(builder: Builder, a: Arguments, label: str) -> Value:
    values: Sequence[Any] = a["tensors"]
    like = next(value for value in values if isinstance(value, Value))
    dim = a["dim"] + like.rank + 1 if a["dim"] < 0 else a["dim"] - 1
    if dim < 0:
        raise UnsupportedOperationError("stacking along the batch dimension is not supported")
    parts = [_sample(value) for value in values]
    apart = [
        builder.reshape(one, (*one.shape[:dim], 1, *one.shape[dim:]), label)
        if isinstance(one, Value)
        else one.unsqueeze(dim)
        for one in parts
    ]
    return compose.with_constant(builder, apart, dim, label)


def _sample(part: Any) -> Any:
    """A value, or what a constant with a batch of one is for a sample."""
    return part if isinstance(part, Value) else part[0].double()


def _pad(builder: Builder, a: Arguments, label: str) -> Value:
    return _surrounded(builder, a["self"], list(a["pad"]), a.get("mode", "constant"), a["value"] or 0.0, label)


def _pad_by_itself(mode: str) -> Handler:
    return lambda builder, a, label: _surrounded(builder, a["self"], list(a["padding"]), mode, 0.0, label)


def _surrounded(builder: Builder, value: Value, amounts: list[int], mode: str, constant: float, label: str) -> Value:
    """Padding in torch's order, from the last dimension on."""
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if any(any(pair) for pair in pairs[value.rank :]):
        raise UnsupportedOperationError(f"padding by {amounts} is not supported: expected nothing along the batch")
    left, right, top, bottom = (*amounts, 0, 0)[:4]
    plain = mode == "constant" and not constant and value.rank > 1
    if plain and len(amounts) <= 4 and min(left, right, top, bottom) >= 0:
        return builder.pad(value, (left, right, top, bottom), label)
    around = {value.rank - 1 - k: pair for k, pair in enumerate(pairs[: value.rank]) if any(pair)}
    return builder.surround(value, around, label, mode=mode, constant=float(constant))


def _dims(builder: Builder, a: Arguments) -> list[int]:
    """The dimensions of a reduction, within the sample."""
    if a.get("dtype") not in (None, builder.dtype):
        raise UnsupportedOperationError(f"a reduction in {a['dtype']} is not supported")
    given = a.get("dim")
    dims = range(a["self"].rank + 1) if given in (None, []) else [given] if isinstance(given, int) else given
    return [sample_dim(dim, a["self"]) for dim in dims]


def _mean(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.mean(a["self"], _dims(builder, a), a["keepdim"], label)


def _total(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.sum(a["self"], _dims(builder, a), a["keepdim"], label)


def _largest(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.largest(a["self"], _dims(builder, a), a["keepdim"], label)


def _smallest(builder: Builder, a: Arguments, label: str) -> Value:
    turned = builder.scale_shift(a["self"], -1.0, 0.0, label)
    largest = builder.largest(turned, _dims(builder, a), a["keepdim"], label)
    return builder.scale_shift(largest, -1.0, 0.0, label)


def _first_result(handler: Handler) -> Handler:
    """Of an operator whose further results nothing here can compute."""
    return lambda builder, a, label: [handler(builder, a, label)]


def _maximum(builder: Builder, a: Arguments, label: str) -> Any:
    if "dim" in a:
        return [_largest(builder, a, label)]
    return compose.maximum(builder, a["self"], a["other"], label)


def _minimum(builder: Builder, a: Arguments, label: str) -> Any:
    if "dim" in a:
        return [_smallest(builder, a, label)]
    return compose.minimum(builder, a["self"], a["other"], label)


def _clip(builder: Builder, a: Arguments, label: str) -> Value:
    low, high = (a.get("min", a.get("min_val")), a.get("max", a.get("max_val")))
    if not any(isinstance(end, Value | Tensor) for end in (low, high)):
        return compose.clip(builder, a["self"], low, high, label)
    value: Value = a["self"]
    if low is not None:
        value = compose.maximum(builder, value, low, label)
    return value if high is None else compose.minimum(builder, value, high, label)


def _elu(builder: Builder, a: Arguments, label: str) -> Value:
    scales = {name: float(a[name]) for name in ("alpha", "scale", "input_scale") if name in a}
    return compose.elu(builder, a["self"], label, **scales)


def _selu(builder: Builder, a: Arguments, label: str) -> Value:
    return compose.elu(builder, a["self"], label, alpha=compose.SELU_ALPHA, scale=compose.SELU_SCALE)


def _celu(builder: Builder, a: Arguments, label: str) -> Value:
    alpha = float(a["alpha"])
    return compose.elu(builder, a["self"], label, alpha=alpha, input_scale=1 / alpha)


def _prelu(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("slope", a["weight"])
    slope = a["weight"].flatten()
    return compose.parametric(builder, a["self"], slope.reshape(-1, *[1] * (a["self"].rank - 1)), label)


def _softplus(builder: Builder, a: Arguments, label: str) -> Value:
    return compose.softplus(builder, a["self"], label, beta=float(a["beta"]), threshold=float(a["threshold"]))


def _power(builder: Builder, a: Arguments, label: str) -> Value:
    exponent = a["exponent"]
    if isinstance(exponent, Value) or not isinstance(a["self"], Value):
        raise UnsupportedOperationError("a power with an exponent that depends on the input is not supported")
    return compose.power(builder, a["self"], float(exponent), label)


def _to_the(exponent: float) -> Handler:
    return lambda builder, a, label: compose.power(builder, a["self"], exponent, label)


def _softmax(make: Callable[..., Value]) -> Handler:
    def handle(builder: Builder, a: Arguments, label: str) -> Value:
        if a.get("dtype") not in (None, builder.dtype) or a.get("half_to_float"):
            raise UnsupportedOperationError("a softmax in another precision is not supported")
        return make(builder, a["self"], sample_dim(a["dim"], a["self"]), label)

    return handle


def _layer_norm(builder: Builder, a: Arguments, label: str) -> Any:
    _constants("weight or bias", a["weight"], a.get("bias"))
    epsilon = a["eps"] if a["eps"] is not None else torch.finfo(builder.dtype).eps
    return compose.layer_norm(
        builder, a["input"], len(a["normalized_shape"]), epsilon, a["weight"], a.get("bias"), label,
        centred="bias" in a,
    )  # fmt: skip


def _group_norm(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("weight or bias", a["weight"], a["bias"])
    groups = a["num_groups"] if "num_groups" in a else a["input"].shape[0]
    if "use_input_stats" in a and not a["use_input_stats"]:
        parameters = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
        return builder.batch_norm(a["input"], parameters, a["eps"], label)
    return compose.group_norm(builder, a["input"], groups, a["eps"], a["weight"], a["bias"], label)


def _attention(builder: Builder, a: Arguments, label: str) -> Value:
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    _constants("mask", mask)
    if not all(isinstance(one, Value) for one in (query, key, value)) or a["dropout_p"] or a["enable_gqa"]:
        raise UnsupportedOperationError("attention with dropout, shared heads or constants is not supported")
    if a["is_causal"]:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return compose.attention(builder, query, key, value, label, scale=a["scale"], mask=mask)


def _convolution_1d(builder: Builder, a: Arguments, label: str) -> Value:
    """As in two dimensions, along rows of one pixel's height."""
    _constants("weight or bias", a["weight"], a["bias"])
    given = dict(a) | {"input": _as_row(builder, a["input"], label), "weight": a["weight"][:, :, None]}
    for name in ("stride", "dilation"):
        given[name] = (1, _pair(a[name])[1])
    given["padding"] = a["padding"] if isinstance(a["padding"], str) else (0, _pair(a["padding"])[1])
    given["groups"] = a["groups"]
    return _as_line(builder, _convolution(builder, given, label), label)


def _pool_1d(handler: Handler) -> Handler:
    def handle(builder: Builder, a: Arguments, label: str) -> Value:
        given = dict(a) | {"self": _as_row(builder, a["self"], label), "divisor_override": None}
        for name, other in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if name in a:
                given[name] = (other, _pair(a[name])[1]) if a[name] not in ([], None) else a[name]
        given |= {name: a[name] for name in ("ceil_mode", "count_include_pad") if name in a}
        return _as_line(builder, handler(builder, given, label), label)

    return handle


def _as_row(builder: Builder, value: Value, label: str) -> Value:
    return builder.reshape(value, (value.shape[0], 1, *value.shape[1:]), label)


def _as_line(builder: Builder, value: Value, label: str) -> Value:
    return builder.reshape(value, (value.shape[0], *value.shape[2:]), label)


def _transposed_convolution(builder: Builder, a: Arguments, label: str) -> Value:
    _constants("weight or bias", a["weight"], a["bias"])
    return compose.transposed_convolution(
        builder, a["input"], a["weight"], a["bias"], label, stride=_pair(a["stride"]), padding=_sides(a["padding"]),
        output_padding=_pair(a["output_padding"]), dilation=_pair(a["dilation"]), groups=a["groups"],
    )  # fmt: skip


def _resize(name: str, *options: str) -> Handler:
    """Each axis by a matrix: what the operator itself makes of unit vectors along a row."""

    def handle(builder: Builder, a: Arguments, label: str) -> Value:
        value: Value = a["input"] if "input" in a else a["self"]
        factors = a.get("scale_factors") or [None, None]
        size = a["output_size"]
        if value.rank != 3:
            raise UnsupportedOperationError(f"resizing samples of shape {value.shape} is not supported")
        operator = getattr(torch.ops.aten, name).vec
        for dim in (1, 2):
            length = value.shape[dim]
            units = torch.eye(length, dtype=torch.float64)[None, :, None]
            goal = None if size is None else [1, int(size[dim - 1])]
            factor = None if factors[dim - 1] is None else [1.0, float(factors[dim - 1])]
            matrix = operator(units, goal, *(a[option] for option in options), factor)[0, :, 0].T
            if matrix.shape[0] != length or not torch.equal(matrix, torch.eye(length, dtype=torch.float64)):
                value = compose.along(builder, value, dim, matrix.contiguous(), label)
        return value

    return handle


def _expand(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    sizes = list(a["size"])
    if len(sizes) != value.rank + 1:
        raise UnsupportedOperationError("expanding by a dimension before the batch is not supported")
    shape = [own if size == -1 else int(size) for own, size in zip(value.shape, sizes[1:], strict=True)]
    return builder.widen(value, shape, label)


def _repeat(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    times_each = [int(count) for count in (a["repeats"] if "repeats" in a else a["dims"])]
    if len(times_each) != value.rank + 1 or times_each[0] != 1:
        raise UnsupportedOperationError("repeating the batch, or by a dimension before it, is not supported")
    for dim, count in enumerate(times_each[1:]):
        if count != 1:
            value = builder.index(value, dim, [*range(value.shape[dim])] * count, label)
    return value


def _roll(builder: Builder, a: Arguments, label: str) -> Value:
    value: Value = a["self"]
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        position = sample_dim(dim, value)
        size = value.shape[position]
        value = builder.index(value, position, [(place - shift) % size for place in range(size)], label)
    return value


def _index(builder: Builder, a: Arguments, label: str) -> Value:
    """x[..., positions, ...] with constant positions along one dimension."""
    indices = list(a["indices"])
    used = [dim for dim, index in enumerate(indices) if index is not None]
    _constants("index", *indices)
    if len(used) != 1 or indices[used[0]].dtype == torch.bool:
        raise UnsupportedOperationError("indexing along several dimensions at once, or by a mask, is not supported")
    dim, positions = sample_dim(used[0], a["self"]), indices[used[0]]
    picked = builder.index(a["self"], dim, positions.flatten().tolist(), label)
    return builder.reshape(picked, (*picked.shape[:dim], *positions.shape, *picked.shape[dim + 1 :]), label)


def _gated(builder: Builder, a: Arguments, label: str) -> Value:
    """The first half times the sigmoid of the second."""
    dim = sample_dim(a["dim"], a["self"])
    half = a["self"].shape[dim] // 2
    first, second = (builder.index(a["self"], dim, part, label) for part in (slice(0, half), slice(half, None)))
    return compose.product(builder, first, builder.add(nn.Sigmoid(), [second], label), label)


def _variance(builder: Builder, a: Arguments, label: str) -> Value:
    value, dims = a["self"], _dims(builder, a)
    correction = float(a["correction"] if a.get("correction") is not None else a.get("unbiased", True))
    count = math.prod(value.shape[dim] for dim in dims)
    mean = builder.mean(value, dims, True, label)
    squares = compose.power(builder, builder.difference(value, mean, label), 2, label)
    mean_of_squares = builder.mean(squares, dims, a["keepdim"], label)
    return builder.scale_shift(mean_of_squares, count / (count - correction), 0.0, label)


def _norm(builder: Builder, a: Arguments, label: str) -> Value:
    value, dims = a["self"], _dims(builder, a)
    if a["ord"] == 1:
        return builder.sum(compose.absolute(builder, value, label), dims, a["keepdim"], label)
    if a["ord"] == 2:
        total = builder.sum(compose.power(builder, value, 2, label), dims, a["keepdim"], label)
        return compose.power(builder, total, 0.5, label)
    if a["ord"] == math.inf:
        return builder.largest(compose.absolute(builder, value, label), dims, a["keepdim"], label)
    raise UnsupportedOperationError(f"a norm of order {a['ord']} is not supported: expected 1, 2 or infinity")


def _recurrent(cell: compose.Cell) -> Handler:
    """Layers of one cell, written out; the states that they begin with are constants, with the batch second."""

    def handle(builder: Builder, a: Arguments, label: str) -> list[Any]:
        value: Value = a["input"]
        begin = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
        _constants("weight or first state", *a["params"], *begin)
        if value.rank != 2 or value.batch != (0 if a["batch_first"] else 1) or a["train"]:
            raise UnsupportedOperationError(f"{cell} is supported in evaluation mode, on batches of (steps, features)")
        number = 4 if a["has_biases"] else 2
        sides = 2 if a["bidirectional"] else 1
        if len(a["params"]) != number * sides * a["num_layers"]:
            raise UnsupportedOperationError(
                f"{cell} with projections is not supported: expected states of their own size"
            )
        states: list[Value] = []
        memories: list[Value | None] = []
        for layer in range(a["num_layers"]):
            parts = []
            for side in range(sides):
                at = layer * sides + side
                own = a["params"][at * number : (at + 1) * number]
                zeros = own[0].new_zeros(len(own[0]))
                weights = compose.Direction(
                    own[0], own[1], *(own[2:] if number == 4 else (zeros, zeros)), *(one[at, 0] for one in begin)
                )
                parts.append(compose.passed(builder, cell, value, weights, label, backward=side == 1))
            states += [part.last for part in parts]
            memories += [part.memory for part in parts]
            value = builder.concatenate([part.states for part in parts], 1, label)
        result: list[Any] = [replace(value, batch=0 if a["batch_first"] else 1)]
        ends: list[Sequence[Value | None]] = [states, memories] if cell == "lstm" else [states]
        for kept in ends:
            rows = [builder.reshape(one, (1, *one.shape), label) for one in kept if one is not None]
            result.append(replace(builder.concatenate(rows, 0, label), batch=1))
        return result

    return handle


def _shuffled(make: Callable[..., Value], factor: str) -> Handler:
    return lambda builder, a, label: make(builder, a["self"], int(a[factor]), label, columns_first=True)


def _on_self(make: Callable[..., Value], *names: str) -> Handler:
    """A composition of a value and options."""
    return lambda builder, a, label: make(builder, a["self"], *(float(a[name]) for name in names), label)


def _refused(instead: str) -> Handler:
    """What cannot be bounded, and the nearest thing that can."""

    def refuse(builder: Builder, a: Arguments, label: str) -> Value:
        raise UnsupportedOperationError(f"is not supported: {instead}")

    return refuse


def _negative(builder: Builder, a: Arguments, label: str) -> Value:
    return builder.scale_shift(a["self"], -1.0, 0.0, label)


RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")

# These take values with the batch in another place than the first.
ANY_PLACE = ("permute", "transpose", "slice", "select", "clone", "contiguous", "lstm", "gru", "rnn_tanh", "rnn_relu")

HANDLERS: dict[str, Handler] = {
    "add": _sum, "sub": _difference, "rsub": _reversed_difference, "mul": _product, "div": _quotient,
    "neg": _negative, "linear": _linear, "addmm": _addmm, "matmul": _matmul, "mm": _matmul,
    "conv2d": _convolution, "avg_pool2d": _average_pool, "adaptive_avg_pool2d": _adaptive_pool,
    "max_pool2d": _max_pool, "mean": _mean, "batch_norm": _batch_norm, "sum": _total, "amax": _largest,
    "max_pool2d_with_indices": _first_result(_max_pool), "adaptive_max_pool2d": _adaptive_max_pool,
    "amin": _smallest, "max": _maximum, "min": _minimum, "maximum": _maximum, "minimum": _minimum,
    "clamp": _clip, "clip": _clip, "clamp_min": _clip, "clamp_max": _clip, "hardtanh": _clip,
    "relu6": lambda builder, a, label: compose.clip(builder, a["self"], 0.0, 6.0, label),
    "abs": _on_self(compose.absolute), "prelu": _prelu, "_prelu_kernel": _prelu,
    "elu": _elu, "selu": _selu, "celu": _celu, "softplus": _softplus,
    "hardsigmoid": _on_self(compose.hard_sigmoid), "log_sigmoid": _on_self(compose.log_sigmoid),
    "softshrink": _on_self(compose.soft_shrink, "lambd"),
    "gelu": _activation(lambda a: nn.GELU(a["approximate"])), "silu": _activation(lambda a: nn.SiLU()),
    "mish": _activation(lambda a: nn.Mish()), "hardswish": _activation(lambda a: nn.Hardswish()),
    "erf": _activation(lambda a: Erf()), "exp": _activation(lambda a: Exp()), "log": _activation(lambda a: Log()),
    "pow": _power, "square": _to_the(2), "sqrt": _to_the(0.5), "rsqrt": _to_the(-0.5), "reciprocal": _to_the(-1),
    "softmax": _softmax(compose.softmax), "_softmax": _softmax(compose.softmax),
    "log_softmax": _softmax(compose.log_softmax), "_log_softmax": _softmax(compose.log_softmax),
    "logsumexp": lambda builder, a, label: compose.log_sum_exp(
        builder, a["self"], _dims(builder, a), a["keepdim"], label
    ),
    "layer_norm": _layer_norm, "rms_norm": _layer_norm, "group_norm": _group_norm, "instance_norm": _group_norm,
    "scaled_dot_product_attention": _attention, "bmm": _matmul,
    "conv1d": _convolution_1d, "avg_pool1d": _pool_1d(_average_pool), "max_pool1d": _pool_1d(_max_pool),
    "conv_transpose2d": _transposed_convolution,
    "upsample_nearest2d": _resize("upsample_nearest2d"),
    "_upsample_nearest_exact2d": _resize("_upsample_nearest_exact2d"),
    "upsample_bilinear2d": _resize("upsample_bilinear2d", "align_corners"),
    "upsample_bicubic2d": _resize("upsample_bicubic2d", "align_corners"),
    "expand": _expand, "repeat": _repeat, "tile": _repeat, "roll": _roll, "index": _index, "stack": _stack,
    "pixel_shuffle": _shuffled(compose.depth_to_space, "upscale_factor"),
    "pixel_unshuffle": _shuffled(compose.space_to_depth, "downscale_factor"),
    "reflection_pad1d": _pad_by_itself("reflect"), "reflection_pad2d": _pad_by_itself("reflect"),
    "replication_pad1d": _pad_by_itself("replicate"), "replication_pad2d": _pad_by_itself("replicate"),
    "glu": _gated, "var": _variance, "linalg_vector_norm": _norm,
    "lstm": _recurrent("lstm"), "gru": _recurrent("gru"), "rnn_tanh": _recurrent("rnn_tanh"),
    "rnn_relu": _recurrent("rnn_relu"),
    "einsum": _refused("write it with matmul and permute"),
    "cond": _refused("a branch on values; export the branch that is taken"),
    "while_loop": _refused("a loop on values; write its steps out"),
    "argmax": _refused("the class is read off the logits; end the module with these"),
    "topk": _refused("sorting is not bounded; amax and max pooling are"),
    "sort": _refused("sorting is not bounded; amax and max pooling are"),
    "sign": _refused("it jumps; a steep hardtanh is the nearest function that is bounded"),
    "round": _refused("it jumps; leave rounding out of the network"),
    "floor": _refused("it jumps; leave rounding out of the network"),
    "conv3d": _refused("images are (channels, height, width); conv2d is the nearest operation"),
    "nonzero": _refused("its shape depends on the data; select by constant positions"),
    "masked_select": _refused("its shape depends on the data; select by constant positions"),
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
