"""Builds a network operation by operation: what the readers of torch modules and of ONNX files share.

Each method lowers one operation, in the general form that the formats know, to canonical operations, and leaves out
what changes nothing. Dimensions are counted within one sample; constants have no batch dimension. Those that conversion
computes are the float64 numbers nearest to their exact values. Sizes of windows are (height, width) pairs and (left,
right, top, bottom).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.graph import INPUT, Network, Node
from flowverify.network.operations import (
    Add,
    Concatenate,
    Index,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Subtract,
    broadcast_shape,
    operation_name,
    output_shape,
)

BITS = 256  # of the square root: what it is off by is nothing beside the rounding of the result


def times(constant: Tensor, factor: float) -> Tensor:
    """constant * factor; in float64 where the product needs it."""
    return constant * factor if factor in (1, -1) else constant.double() * factor


def normalisation(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(variance + epsilon) and shift = bias - mean * scale, float64, for tensors of shape (C,).

    Computed in rational arithmetic: in floating point the difference may cancel all digits, and no bound on rounding
    that sees the result alone would cover it. Where a value is not finite, or not positive under the root, so is the
    result not.
    """
    tensors = [tensor.detach().double().cpu() for tensor in (weight, bias, mean, variance)]
    if len({tuple(tensor.shape) for tensor in tensors}) > 1 or tensors[0].ndim != 1:
        weight, bias, mean, variance = tensors
        scale = (variance + epsilon).rsqrt() * weight
        return scale, bias - mean * scale
    channels = zip(*(tensor.tolist() for tensor in tensors), strict=True)
    pairs = [_channel(w, b, m, v, epsilon) for w, b, m, v in channels]
    scale, shift = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T.contiguous()
    return scale, shift


def _channel(weight: float, bias: float, mean: float, variance: float, epsilon: float) -> tuple[float, float]:
    if not all(map(math.isfinite, (weight, bias, mean, variance, epsilon))):
        return math.nan, math.nan
    total = Fraction(variance) + Fraction(epsilon)
    if total <= 0:
        return math.nan, math.nan
    scale = Fraction(weight) / _root(total)
    return _nearest(scale), _nearest(Fraction(bias) - Fraction(mean) * scale)


def _root(number: Fraction) -> Fraction:
    """The square root of a positive number, to a relative 2^-BITS."""
    shift = max(0, 2 * BITS - number.numerator.bit_length() + number.denominator.bit_length())
    shift += shift % 2
    return Fraction(math.isqrt((number.numerator << shift) // number.denominator), 1 << (shift // 2))


def _nearest(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


Pair = tuple[int, int]
Sides = tuple[int, int, int, int]
LARGEST = 4096


def check_window(stride: Pair, padding: Sides, dilation: Pair, kernel: Pair = (1, 1)) -> None:
    """Checks the sizes of a window before anything of that size is allocated.

    Raises:
        InvalidInputError: a stride, dilation or kernel is not in 1..LARGEST.
        UnsupportedOperationError: the padding is not in 0..LARGEST.
    """
    if min(*stride, *dilation, *kernel) < 1 or max(*stride, *dilation, *kernel) > LARGEST:
        raise InvalidInputError(
            f"window with kernel {kernel}, stride {stride}, dilation {dilation}: expected 1..{LARGEST}"
        )
    if not 0 <= min(padding) <= max(padding) <= LARGEST:
        raise UnsupportedOperationError(f"padding {padding} is not supported: expected 0..{LARGEST}")


def window_starts(size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool) -> range:
    """Where the windows of a pooling begin along one axis; rounded up, the last one still begins before the padding.

    Raises:
        InvalidInputError: no window fits.
    """
    free = size + before + after - dilation * (kernel - 1) - 1
    if free < 0:
        raise InvalidInputError(f"window of {kernel} pixels, dilation {dilation}: given {size + before + after} pixels")
    count = free // stride + 1
    if ceil and free % stride and count * stride < size + before:
        count += 1
    return range(-before, -before + count * stride, stride)


@dataclass(frozen=True)
class Value:
    """A value of the network that depends on the input.

    Attributes:
        name: of its node.
        shape: of one sample.
        batch: where a format has the batch among all dimensions; canonical operations have it first.
        merged: whether the format has the batch in one dimension with others: the shape is that of all dimensions, as
            they are for one image, and ``batch`` says nothing.
    """

    name: str
    shape: tuple[int, ...]
    batch: int = 0
    merged: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)


class Builder:
    """Collects nodes; :meth:`finish` makes the network out of those that the output needs.

    Raises:
        UnsupportedOperationError: from any method, for what the canonical operations cannot express.
        InvalidInputError: from any method, for shapes that do not match.
    """

    def __init__(self, input_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.input = Value(INPUT, tuple(int(size) for size in input_shape))
        self._nodes: list[Node] = []
        self._names = {INPUT}
        self._shared: dict[tuple[object, ...], tuple[nn.Module, Tensor, Tensor | None]] = {}

    def add(self, operation: nn.Module, inputs: Sequence[Value], label: str) -> Value:
        """Appends an operation (which the builder then owns) under a name made from ``label``.

        Constants that it has in float64, and that the builder's precision cannot hold, are kept with it.
        """
        _round(operation, self.dtype)
        shape = output_shape(operation, [value.shape for value in inputs])
        name = label or operation_name(operation)
        attempt = 1
        while name in self._names:
            attempt += 1
            name = f"{label or operation_name(operation)}_{attempt}"
        self._names.add(name)
        self._nodes.append(Node(name, operation, tuple(value.name for value in inputs), shape))
        return Value(name, shape)

    def finish(self, output: Value) -> Network:
        """The network that computes ``output``."""
        needed, kept = {output.name}, []
        for node in reversed(self._nodes):
            if node.name in needed:
                needed.update(node.inputs)
                kept.append(node)
        kept.reverse()
        if kept and kept[-1].name != output.name:
            raise InvalidInputError(f"output {output.name!r}: expected the last value that is computed")
        return Network(self.input.shape, kept)

    def scale_shift(self, value: Value, scale: Tensor | float, shift: Tensor | float, label: str) -> Value:
        """value * scale + shift; a constant of the value's rank plus one must have batch size 1."""
        sample_scale, sample_shift = (self._sample_constant(constant, value) for constant in (scale, shift))
        constants = [c for c in (sample_scale, sample_shift) if isinstance(c, Tensor)]
        same_shape = all(broadcast_shape(c.shape, value.shape) == value.shape for c in constants)
        if same_shape and _equals(sample_scale, 1) and _equals(sample_shift, 0):
            return value
        return self.add(ScaleShift(sample_scale, sample_shift), [value], label)

    def _sample_constant(self, constant: Tensor | float, value: Value) -> Tensor | float:
        if not isinstance(constant, Tensor):
            return torch.tensor(constant, dtype=torch.float64)
        if constant.ndim > value.rank:
            if constant.ndim > value.rank + 1 or constant.shape[0] != 1:
                raise UnsupportedOperationError(
                    f"constant of shape {tuple(constant.shape)} combined with samples of shape {value.shape} "
                    "is not supported: expected it to broadcast to one sample"
                )
            constant = constant[0]
        try:
            broadcast_shape(constant.shape, value.shape)
        except RuntimeError:
            raise InvalidInputError(
                f"constant of shape {tuple(constant.shape)}: expected one that broadcasts to {value.shape}"
            ) from None
        return constant.detach().double()

    def divide(self, value: Value, divisor: Tensor | float, label: str) -> Value:
        """value / divisor for a constant divisor, whose inverse is taken in float64."""
        inverse = 1 / torch.as_tensor(divisor, dtype=torch.float64)
        return self.scale_shift(value, inverse, 0.0, label)

    def batch_norm(self, value: Value, parameters: Sequence[Tensor | None], epsilon: float, label: str) -> Value:
        """Evaluation-mode batch normalisation over dimension 0; parameters: weight, bias, mean, variance."""
        weight, bias, mean, variance = parameters
        if mean is None or variance is None:
            raise UnsupportedOperationError("batch normalisation without running statistics is not supported")
        weight = torch.ones_like(variance) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        scale, shift = normalisation(weight, bias, mean, variance, epsilon)
        if value.rank < 1 or scale.shape != (value.shape[0],):
            raise InvalidInputError(f"batch normalisation of {tuple(scale.shape)} channels: expected {value.shape[:1]}")
        shape = (-1,) + (1,) * (value.rank - 1)
        return self.scale_shift(value, scale.reshape(shape), shift.reshape(shape), label)

    def linear(self, value: Value, weight: Tensor, bias: Tensor | None, label: str) -> Value:
        """value @ weight.T + bias along the last dimension; weight (out, in)."""
        if weight.ndim != 2 or value.shape[-1] != weight.shape[1]:
            raise InvalidInputError(
                f"linear weight of shape {tuple(weight.shape)}: expected (outputs, {value.shape[-1]})"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            linear = self.linear(value, weight, None, label)
            return self.scale_shift(linear, 1.0, bias, label)
        key = ("linear", id(weight), id(bias))
        if key not in self._shared:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            self._shared[key] = (self._fill(module, weight, bias), weight, bias)
        return self.add(self._shared[key][0], [value], label)

    def left_multiply(self, weight: Tensor, value: Value, label: str) -> Value:
        """weight @ value for samples of rank at least 2; weight (out, in)."""
        if value.rank < 2:
            raise UnsupportedOperationError("a constant matrix times a batch of vectors mixes the batch")
        order = (*range(value.rank - 2), value.rank - 1, value.rank - 2)
        turned = self.linear(self.permute(value, order, label), weight, None, label)
        return self.permute(turned, order, label)

    def matrices(self, value: Value, weights: Tensor, label: str, *, left: bool = False) -> Value:
        """value @ weights, or weights @ value: a matrix for each matrix of every sample, of its last two dimensions.

        Args:
            weights: their leading dimensions broadcast to those of samples; or a vector, behind the value.
        """
        if weights.ndim == 1:
            if left:
                raise UnsupportedOperationError("a constant vector times a value is not supported")
            product = self.linear(value, weights[None], None, label)
            return self.reshape(product, product.shape[:-1], label)
        while weights.ndim > 2 and len(weights) == 1:
            weights = weights[0]
        if weights.ndim == 2:
            return self.left_multiply(weights, value, label) if left else self.linear(value, weights.t(), None, label)
        leading, sizes = value.shape[:-2], weights.shape[:-2]
        if len(sizes) > len(leading) or any(
            size not in (1, own) for size, own in zip(reversed(sizes), reversed(leading), strict=False)
        ):
            raise UnsupportedOperationError(
                f"constant matrices of shape {tuple(weights.shape)}: not supported with samples of shape {value.shape}"
            )
        rows = self.reshape(value, (math.prod(leading), *value.shape[-2:]), label)
        parts = [
            self.matrices(self.index(rows, 0, slice(place, place + 1), label), matrix, label, left=left)
            for place, matrix in enumerate(weights.expand(*leading, -1, -1).flatten(0, -3))
        ]
        product = self.concatenate(parts, 0, label)
        return self.reshape(product, (*leading, *product.shape[1:]), label)

    def convolution(
        self,
        value: Value,
        weight: Tensor,
        bias: Tensor | None,
        label: str,
        *,
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Value:
        """A 2d convolution; padding is (left, right, top, bottom), with zeros."""
        if weight.ndim != 4 or value.rank != 3 or value.shape[0] != weight.shape[1] * groups or groups < 1:
            raise InvalidInputError(
                f"convolution weight of shape {tuple(weight.shape)} in {groups} groups: not for samples of "
                f"shape {value.shape}"
            )
        check_window(stride, padding, dilation)
        value, symmetric = self._symmetric(value, padding, label)
        key = ("convolution", id(weight), id(bias), stride, symmetric, dilation, groups)
        if key not in self._shared:
            module = nn.Conv2d(
                value.shape[0], weight.shape[0], (weight.shape[2], weight.shape[3]), stride, symmetric,
                dilation, groups, bias is not None,
            )  # fmt: skip
            self._shared[key] = (self._fill(module, weight, bias), weight, bias)
        return self.add(self._shared[key][0], [value], label)

    def _fill(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
        module.double()
        module.load_state_dict(
            {"weight": weight.detach().clone()} | ({} if bias is None else {"bias": bias.detach().clone()})
        )
        return module

    def _symmetric(self, value: Value, padding: Sides, label: str) -> tuple[Value, Pair]:
        left, right, top, bottom = padding
        if left == right and top == bottom:
            return value, (top, left)
        return self.pad(value, padding, label), (0, 0)

    def average_pool(
        self,
        value: Value,
        kernel: Pair,
        label: str,
        *,
        stride: Pair,
        padding: Sides = (0, 0, 0, 0),
        ceil: bool = False,
        count_padding: bool = True,
        divisor: int | None = None,
    ) -> Value:
        """The average over windows; without ``count_padding`` only over the pixels inside the image.

        Args:
            ceil: whether a last window that reaches beyond the padding counts, with what it has of it.
            divisor: what sums are divided by instead of the number of pixels.
        """
        starts = self._windows(value, kernel, stride, padding, (1, 1), ceil)
        left, right, top, bottom = padding
        beyond = [
            max(0, begin[-1] + size - length - after)
            for begin, size, length, after in zip(starts, kernel, value.shape[1:], (bottom, right), strict=True)
        ]
        if left == right and top == bottom and not any(beyond) and divisor is None:
            module = nn.AvgPool2d(kernel, stride, (top, left), count_include_pad=count_padding)
            return self.add(module, [value], label)
        padded = self.pad(value, (left, right + beyond[1], top, bottom + beyond[0]), label)
        counts = []
        for begin, size, length, after in zip(starts, kernel, value.shape[1:], (bottom, right), strict=True):
            least, most = (-size, length + after) if count_padding else (0, length)
            counts.append([min(at + size, most) - max(at, least) for at in begin])
        rows, columns = (torch.tensor(count, dtype=torch.float64) for count in counts)
        if divisor is not None:
            rows, columns = torch.full_like(rows, divisor), torch.ones_like(columns)
        if min(float(rows.min()), float(columns.min())) <= 0:
            raise UnsupportedOperationError("average pooling of a window without pixels is not supported")
        pooled = self.add(nn.AvgPool2d(kernel, stride), [padded], label)
        if pooled.shape[1:] != (len(starts[0]), len(starts[1])):
            pooled = self.index(pooled, 1, slice(0, len(starts[0])), label)
            pooled = self.index(pooled, 2, slice(0, len(starts[1])), label)
        share = kernel[0] * kernel[1] / (rows[:, None] * columns)
        return self.scale_shift(pooled, share, 0.0, label)

    def max_pool(
        self,
        value: Value,
        kernel: Pair,
        label: str,
        *,
        stride: Pair,
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        ceil: bool = False,
    ) -> Value:
        """The maximum over windows; padding never wins.

        Windows that torch's own pooling does not have are put side by side, each pixel as often as it is read.
        """
        starts = self._windows(value, kernel, stride, padding, dilation, ceil)
        plain = self._windows(value, kernel, stride, padding, dilation, False)
        if padding[0] == padding[1] and padding[2] == padding[3] and starts == plain:
            return self.add(nn.MaxPool2d(kernel, stride, (padding[2], padding[0]), dilation), [value], label)
        channels, height, width = value.shape
        read = []
        for begin, size, step, length in zip(starts, kernel, dilation, (height, width), strict=True):
            index = torch.tensor(begin)[None] + step * torch.arange(size)[:, None]
            inside = torch.where((index >= 0) & (index < length), index, -1)
            if int(inside.amax(0).min()) < 0:
                raise InvalidInputError("max pooling: given a window that lies in the padding as a whole")
            read.append(torch.where(inside < 0, inside.amax(0), inside))
        rows, columns = read
        positions = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten().tolist()
        flat = self.reshape(value, (channels, height * width), label)
        places = len(starts[0]) * len(starts[1])
        apart = self.reshape(self.index(flat, 1, positions, label), (channels, len(positions) // places, places), label)
        largest = self.add(nn.MaxPool2d((len(positions) // places, 1)), [apart], label)
        return self.reshape(largest, (channels, len(starts[0]), len(starts[1])), label)

    def _windows(
        self, value: Value, kernel: Pair, stride: Pair, padding: Sides, dilation: Pair, ceil: bool
    ) -> tuple[range, range]:
        """Where windows begin, by rows and by columns."""
        check_window(stride, padding, dilation, kernel)
        if value.rank != 3:
            raise InvalidInputError(f"pooling of samples of shape {value.shape}: expected (channels, height, width)")
        left, right, top, bottom = padding
        return (
            window_starts(value.shape[1], kernel[0], stride[0], top, bottom, dilation[0], ceil),
            window_starts(value.shape[2], kernel[1], stride[1], left, right, dilation[1], ceil),
        )

    def mean(self, value: Value, dims: Sequence[int], keep: bool, label: str) -> Value:
        """The mean over dimensions."""
        if value.rank == 3 and sorted(dims) == [1, 2]:
            size = (value.shape[1], value.shape[2])
            pooled = self.average_pool(value, size, label, stride=size)
            return pooled if keep else self.reshape(pooled, value.shape[:1], label)
        return self.sum(value, dims, keep, label, divisor=math.prod(value.shape[dim] for dim in dims))

    def sum(self, value: Value, dims: Sequence[int], keep: bool, label: str, *, divisor: int = 1) -> Value:
        """The sum over dimensions, divided by a number: a dense layer along them."""
        rows, shape = self._reduced(value, dims, keep, label)
        weight = torch.full((1, rows.shape[-1]), 1 / divisor, dtype=torch.float64)
        return self.reshape(self.linear(rows, weight, None, label), shape, label)

    def largest(self, value: Value, dims: Sequence[int], keep: bool, label: str) -> Value:
        """The maximum over dimensions."""
        rows, shape = self._reduced(value, dims, keep, label)
        columns = self.reshape(rows, (math.prod(rows.shape[:-1]), rows.shape[-1], 1), label)
        return self.reshape(self.add(nn.MaxPool2d((rows.shape[-1], 1)), [columns], label), shape, label)

    def _reduced(self, value: Value, dims: Sequence[int], keep: bool, label: str) -> tuple[Value, tuple[int, ...]]:
        """The value with all of these dimensions as the last one, and the shape of what is made of it without them."""
        if not dims or len(set(dims)) != len(dims) or not all(0 <= dim < value.rank for dim in dims):
            raise InvalidInputError(f"reduction over dimensions {tuple(dims)}: expected some of samples {value.shape}")
        kept = [dim for dim in range(value.rank) if dim not in dims]
        shape = tuple(value.shape[dim] for dim in kept) or (1,)
        if keep:
            shape = tuple(1 if dim in dims else size for dim, size in enumerate(value.shape))
        elif not kept:
            raise UnsupportedOperationError("a reduction of a whole sample to a number without dimensions")
        turned = self.permute(value, [*kept, *sorted(dims)], label)
        sizes = [value.shape[dim] for dim in kept]
        return self.reshape(turned, (*sizes, math.prod(value.shape[dim] for dim in dims)), label), shape

    def reshape(self, value: Value, shape: Sequence[int], label: str) -> Value:
        """Reshapes every sample."""
        if tuple(shape) == value.shape:
            return value
        flat = len(shape) == 1 and value.rank > 1 and shape[0] == math.prod(value.shape)
        return self.add(nn.Flatten() if flat else Reshape(shape), [value], label)

    def permute(self, value: Value, dims: Sequence[int], label: str) -> Value:
        """Permutes the dimensions of every sample."""
        return value if list(dims) == list(range(value.rank)) else self.add(Permute(dims), [value], label)

    def index(self, value: Value, dim: int, selection: int | slice | Sequence[int], label: str) -> Value:
        """Selects along one dimension; a slice may have a negative step."""
        if not 0 <= dim < value.rank:
            raise InvalidInputError(f"index along dimension {dim}: expected 0..{value.rank - 1}")
        size = value.shape[dim]
        if isinstance(selection, slice):
            positions = range(size)[selection]
            if positions == range(size):
                return value
            forward = positions.step > 0
            selection = slice(positions.start, positions.stop, positions.step) if forward else tuple(positions)
            if not positions:
                raise UnsupportedOperationError(f"an empty slice of dimension {dim} (size {size})")
        elif isinstance(selection, int):
            if not -size <= selection < size:
                raise InvalidInputError(f"index {selection}: expected one that fits size {size}")
        elif not all(-size <= position < size for position in selection):
            raise InvalidInputError(f"index {tuple(selection)}: expected entries that fit size {size}")
        return self.add(Index(dim, selection), [value], label)

    def pad(self, value: Value, amounts: Sides, label: str) -> Value:
        """Surrounds the last two dimensions with zeros: (left, right, top, bottom)."""
        check_window((1, 1), amounts, (1, 1))
        return value if not any(amounts) else self.add(Pad(amounts), [value], label)

    def surround(
        self, value: Value, around: dict[int, Pair], label: str, *, mode: str = "constant", constant: float = 0.0
    ) -> Value:
        """Pads dimensions, each before and after; negative amounts cut off.

        Args:
            mode: "constant", "reflect", "replicate" or "circular".
        """
        for dim, (before, after) in around.items():
            size = value.shape[dim]
            if max(abs(before), abs(after)) > LARGEST:
                raise UnsupportedOperationError(f"padding {(before, after)} is not supported: expected 0..{LARGEST}")
            if mode != "constant":
                value = self.index(value, dim, _mirrored(size, before, after, mode), label)
                continue
            if min(before, after) < 0:
                value = self.index(value, dim, slice(max(0, -before), size + min(0, after)), label)
                before, after = max(0, before), max(0, after)
            if not before and not after:
                continue
            last = (*(k for k in range(value.rank) if k != dim), dim)
            turned = self.permute(value, last, label)
            turned = self.reshape(turned, (1, *turned.shape), label) if turned.rank == 1 else turned
            padded = self.pad(turned, (before, after, 0, 0), label)
            if constant:
                shift = torch.zeros(padded.shape[-1], dtype=torch.float64)
                shift[:before] = shift[padded.shape[-1] - after :] = constant
                padded = self.scale_shift(padded, 1.0, shift, label)
            padded = self.reshape(padded, padded.shape[1:], label) if value.rank == 1 else padded
            value = self.permute(padded, [last.index(k) for k in range(value.rank)], label)
        return value

    def widen(self, value: Value, shape: Sequence[int], label: str) -> Value:
        """Repeats what has size 1, or is not there, up to a shape."""
        shape = tuple(shape)
        if len(shape) < value.rank:
            raise InvalidInputError(f"widening samples {value.shape} to {shape}: expected no fewer dimensions")
        value = self.reshape(value, (*[1] * (len(shape) - value.rank), *value.shape), label)
        for dim, size in enumerate(shape):
            if value.shape[dim] != size:
                if value.shape[dim] != 1:
                    raise InvalidInputError(f"widening samples {value.shape} to {shape}: expected sizes of 1")
                value = self.index(value, dim, [0] * size, label)
        return value

    def total(self, values: Sequence[Value], label: str) -> Value:
        """The sum of values."""
        return values[0] if len(values) == 1 else self.add(Add(), values, label)

    def difference(self, first: Value, second: Value, label: str) -> Value:
        """The first value minus the second."""
        return self.add(Subtract(), [first, second], label)

    def concatenate(self, values: Sequence[Value], dim: int, label: str) -> Value:
        """Values side by side along one dimension."""
        return values[0] if len(values) == 1 else self.add(Concatenate(dim), values, label)


def _mirrored(size: int, before: int, after: int, mode: str) -> list[int]:
    """Which entries stand where a dimension is padded by its own entries."""
    places = range(-before, size + after)
    if mode == "replicate":
        return [min(max(place, 0), size - 1) for place in places]
    if mode == "circular":
        return [place % size for place in places]
    if mode == "reflect" and max(before, after) < size:
        return [abs(place) if place < size else 2 * (size - 1) - place for place in places]
    raise UnsupportedOperationError(f"padding of {size} entries by {(before, after)} in mode {mode} is not supported")


def _equals(constant: Tensor | float, number: float) -> bool:
    return bool((torch.as_tensor(constant) == number).all())


def _round(operation: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the operation's constants to this precision; those that change stay with it as ``exact``."""
    before = {
        name: tensor.detach().clone()
        for name, tensor in [*operation.named_parameters(), *operation.named_buffers()]
        if tensor.dtype == torch.float64 and dtype != torch.float64
    }
    operation.to(dtype)
    exact = {name: value for name, value in before.items() if not torch.equal(getattr(operation, name).double(), value)}
    if exact:
        operation.exact = exact  # type: ignore[assignment]
