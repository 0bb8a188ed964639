"""The closed set of canonical operations, and what the certifiers need to know about each of them.

A canonical operation maps batches to batches, sample by sample: dimension 0 is the batch and nothing else.
All dimensions in this file are counted within one sample (dimension 0 is the channel of an image).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.curves import CURVES, FUNCTIONS, Curve, Erf, Exp, Log, Power, Softplus, check_curve


class ScaleShift(nn.Module):
    """x * scale + shift, both constants broadcast against one sample.

    Covers addition, subtraction, multiplication and division by constants, and batch normalisation in
    evaluation mode.

    Raises:
        InvalidInputError: the two constants do not broadcast against each other.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> None:
        super().__init__()
        first, second = (_constant(value) for value in (scale, shift))
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = first.to(dtype), second.to(dtype)
        try:
            shape = broadcast_shape(first.shape, second.shape)
        except RuntimeError:
            raise InvalidInputError(
                f"ScaleShift: given scale {tuple(first.shape)} and shift {tuple(second.shape)}, expected "
                "shapes that broadcast"
            ) from None
        self.has_scale = not bool((first == 1).all())
        self.has_shift = bool((second != 0).any()) or (not self.has_scale and len(shape) > 0)
        if not self.has_scale:
            first, second = first.new_ones(()), second.expand(shape)
        if not self.has_shift:
            first, second = first.expand(shape), second.new_zeros(())
        self.register_buffer("scale", first.contiguous().clone())
        self.register_buffer("shift", second.contiguous().clone())

    def forward(self, value: Tensor) -> Tensor:
        if self.has_scale:
            value = value * self.scale
        return value + self.shift if self.has_shift else value

    def extra_repr(self) -> str:
        return f"scale={tuple(self.scale.shape)}, shift={tuple(self.shift.shape)}"


class Reshape(nn.Module):
    """Reshapes every sample to ``shape``, row by row."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)

    def forward(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


class Permute(nn.Module):
    """Permutes the dimensions of every sample: output dimension k is input dimension ``dims[k]``."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(int(dim) for dim in dims)

    def forward(self, value: Tensor) -> Tensor:
        return value.permute(0, *(dim + 1 for dim in self.dims))

    def extra_repr(self) -> str:
        return str(self.dims)


class Index(nn.Module):
    """Picks entries along one dimension of every sample.

    ``selection`` is an integer (the dimension disappears), a slice, or a sequence of integers. Negative
    integers count from the end; a slice has a positive step (write a reversal as a sequence).
    """

    positions: Tensor

    def __init__(self, dim: int, selection: int | slice | Sequence[int]) -> None:
        super().__init__()
        if isinstance(selection, slice) and (selection.step or 1) < 1:
            raise InvalidInputError(f"Index: given step {selection.step}, expected a positive step")
        listed = not isinstance(selection, int | slice)
        self.dim = int(dim)
        self.selection: int | slice | tuple[int, ...] = (
            tuple(int(position) for position in selection) if not isinstance(selection, int | slice) else selection
        )
        self.register_buffer(
            "positions", torch.tensor(self.selection if listed else [], dtype=torch.int64), persistent=listed
        )

    def forward(self, value: Tensor) -> Tensor:
        if isinstance(self.selection, int):
            return value.select(self.dim + 1, self.selection)
        if isinstance(self.selection, slice):
            return value[(slice(None),) * (self.dim + 1) + (self.selection,)]
        size = value.shape[self.dim + 1]
        return value.index_select(self.dim + 1, torch.where(self.positions < 0, self.positions + size, self.positions))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, selection={self.selection}"


class Pad(nn.Module):
    """Surrounds the last two dimensions with zeros: ``(left, right, top, bottom)``, all nonnegative."""

    def __init__(self, amounts: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.amounts = (int(amounts[0]), int(amounts[1]), int(amounts[2]), int(amounts[3]))
        if min(self.amounts) < 0:
            raise UnsupportedOperationError(f"Pad: given amounts {self.amounts}, expected none negative")

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.pad(value, self.amounts)

    def extra_repr(self) -> str:
        return str(self.amounts)


class Add(nn.Module):
    """The sum of two or more values."""

    def forward(self, *values: Tensor) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


class Subtract(nn.Module):
    """The first value minus the second."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - second


class Concatenate(nn.Module):
    """Concatenates values along one dimension of the sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = int(dim)

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.dim + 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Multiply(nn.Module):
    """The product of two values, entry by entry; sizes of 1 broadcast."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second


class MatrixProduct(nn.Module):
    """The matrix product of two values along their last two dimensions; the dimensions before broadcast."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second


class Softmax(nn.Module):
    """exp(x) divided by its sum along one dimension of the sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = int(dim)

    def forward(self, value: Tensor) -> Tensor:
        return value.softmax(self.dim + 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Standardise(nn.Module):
    """c / sqrt(mean(c^2) + epsilon) along the last dimension, c = x - mean(x), or x itself if not ``centred``.

    Layer, group and instance normalisation less their scales and shifts; not centred, that by the root mean square.

    Raises:
        InvalidInputError: epsilon is not a positive number.
    """

    def __init__(self, epsilon: float, centred: bool = True) -> None:
        super().__init__()
        self.epsilon, self.centred = float(epsilon), bool(centred)
        if not 0 < self.epsilon < math.inf:
            raise InvalidInputError(f"Standardise: given epsilon {epsilon}, expected a positive number")

    def forward(self, value: Tensor) -> Tensor:
        if self.centred:
            value = value - value.mean(-1, keepdim=True)
        return value * (value.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, centred={self.centred}"


@dataclass(frozen=True)
class OperationRecord:
    """What is known about one canonical operation: the readers, the bounds and the tests all go by these records.

    Attributes:
        kind: the class, exactly.
        affine: whether it is an affine function of its inputs, taken jointly.
        arity: how many inputs it has; 0 for any number from two on.
        options: the options that are taken as they come.
        fixed: the options that are taken at one value only; any other one is refused by name.
        candidates: instances, one a choice of options, some of which take samples of the given shape.
        steep: whether it has no largest slope, or rounding no rule for it (theory, section 15): only intervals bound
            networks with it, and they carry their own rounding.
        tried_on: an interval of numbers that it takes and does not make too large, or None for all.
    """

    kind: type[nn.Module]
    affine: bool
    arity: int
    options: tuple[str, ...]
    fixed: dict[str, object]
    candidates: Callable[[tuple[int, ...]], list[nn.Module]]
    steep: bool = False
    tried_on: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return self.kind.__name__

    def variants(self, shape: Sequence[int]) -> list[nn.Module]:
        """Instances for samples of this shape, with every choice of options; weights are torch's random ones."""
        found = []
        for operation in self.candidates(tuple(shape)):
            try:
                output_shape(operation, [tuple(shape)] * (self.arity or 2))
            except InvalidInputError:
                continue
            found.append(operation)
        return found


def _convolutions(shape: tuple[int, ...]) -> list[nn.Module]:
    channels = shape[0]
    chosen: list[dict[str, Any]] = [
        {"kernel_size": 1}, {"kernel_size": (2, 3)}, {"kernel_size": 3, "bias": False},
        {"kernel_size": 2, "stride": 2}, {"kernel_size": 2, "stride": (2, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": 2}, {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 2, "dilation": 2}, {"kernel_size": 2, "dilation": (1, 2)},
        {"kernel_size": 2, "dilation": (3, 1)},
        {"kernel_size": 3, "stride": (1, 3), "padding": (2, 1), "dilation": (2, 1)},
    ]  # fmt: skip
    grouped = [{**options, "groups": channels} for options in chosen[3:6]] if channels > 1 else []
    return [nn.Conv2d(channels, 2 * channels, **options) for options in [*chosen, *grouped]]


def _average_pools(shape: tuple[int, ...]) -> list[nn.Module]:
    chosen: list[dict[str, Any]] = [
        {"kernel_size": 2}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 1},
        {"kernel_size": (1, 2)}, {"kernel_size": (2, 1), "stride": (1, 2)}, {"kernel_size": 2, "stride": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "padding": (0, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "count_include_pad": False},
    ]  # fmt: skip
    return [nn.AvgPool2d(**options) for options in chosen]


def _maximum_pools(shape: tuple[int, ...]) -> list[nn.Module]:
    chosen: list[dict[str, Any]] = [
        {"kernel_size": 2}, {"kernel_size": (1, 2)}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 1},
        {"kernel_size": (2, 1), "stride": (2, 2)}, {"kernel_size": 2, "stride": (2, 1)},
        {"kernel_size": 2, "stride": 3},
        {"kernel_size": 2, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
        {"kernel_size": 2, "stride": 2, "dilation": 2}, {"kernel_size": 2, "stride": 1, "dilation": (1, 2)},
        {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3},
        {"kernel_size": (2, 1)}, {"kernel_size": (2, 1), "dilation": 2},
    ]  # fmt: skip
    return [nn.MaxPool2d(**options) for options in chosen]


def _scale_shifts(shape: tuple[int, ...]) -> list[nn.Module]:
    by_first = torch.linspace(-1.5, 2.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    full = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    return [ScaleShift(1.7), ScaleShift(1.0, -0.3), ScaleShift(by_first, 0.2), ScaleShift(-2.0, full), ScaleShift(full)]


def _permutations(shape: tuple[int, ...]) -> list[nn.Module]:
    orders = [order for order in itertools.permutations(range(len(shape))) if order != tuple(range(len(shape)))]
    return [Permute(order) for order in orders[1:4] or orders]


def _selections(shape: tuple[int, ...]) -> list[nn.Module]:
    chosen: list[int | slice | tuple[int, ...]] = [
        slice(1, None), slice(0, None, 2), (-1, 0), slice(-2, None), (0, -1, 0), slice(0, -1), 0, -1
    ]  # fmt: skip
    if len(shape) == 1:
        chosen = [selection for selection in chosen if not isinstance(selection, int)]
    return [Index(number % len(shape), selection) for number, selection in enumerate(chosen)]


def _reshapes(shape: tuple[int, ...]) -> list[nn.Module]:
    size = math.prod(shape)
    shapes = {(1, *shape), tuple(reversed(shape)), (shape[0], size // shape[0]), (size,)} - {shape}
    return [Reshape(other) for other in sorted(shapes)]


def _softmaxes(shape: tuple[int, ...]) -> list[nn.Module]:
    return [Softmax(dim) for dim in range(len(shape))]


def _standardisations(shape: tuple[int, ...]) -> list[nn.Module]:
    return [Standardise(1e-5), Standardise(0.1), Standardise(1e-3, centred=False)]


def _powers(exponents: Sequence[float]) -> Callable[[tuple[int, ...]], list[nn.Module]]:
    return lambda shape: [Power(exponent) for exponent in exponents]


def _slopes(shape: tuple[int, ...]) -> list[nn.Module]:
    return [nn.LeakyReLU(slope) for slope in (0.01, 0.3, 1.0, 2.0, 5.0, -0.5, 0.0)]


OPERATIONS: tuple[OperationRecord, ...] = (
    OperationRecord(
        nn.Linear, True, 1, ("in_features", "out_features", "bias"), {},
        lambda shape: [nn.Linear(shape[-1], 3), nn.Linear(shape[-1], 5, bias=False)],
    ),
    OperationRecord(
        nn.Conv2d, True, 1,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
        {"padding_mode": "zeros", "output_padding": (0, 0), "transposed": False}, _convolutions,
    ),
    OperationRecord(
        nn.AvgPool2d, True, 1, ("kernel_size", "stride", "padding", "count_include_pad"),
        {"ceil_mode": False, "divisor_override": None}, _average_pools,
    ),
    OperationRecord(
        nn.MaxPool2d, False, 1, ("kernel_size", "stride", "padding", "dilation"),
        {"ceil_mode": False, "return_indices": False}, _maximum_pools,
    ),
    OperationRecord(nn.ReLU, False, 1, (), {"inplace": False}, lambda shape: [nn.ReLU()]),
    OperationRecord(nn.LeakyReLU, False, 1, ("negative_slope",), {"inplace": False}, _slopes),
    OperationRecord(nn.Sigmoid, False, 1, (), {}, lambda shape: [nn.Sigmoid()]),
    OperationRecord(nn.Tanh, False, 1, (), {}, lambda shape: [nn.Tanh()]),
    OperationRecord(
        nn.ELU, False, 1, ("alpha",), {"inplace": False},
        lambda shape: [nn.ELU(alpha) for alpha in (1.0, 0.3, 1.7, -0.5)],
    ),
    OperationRecord(
        nn.GELU, False, 1, ("approximate",), {}, lambda shape: [nn.GELU(form) for form in ("none", "tanh")]
    ),
    OperationRecord(nn.SiLU, False, 1, (), {"inplace": False}, lambda shape: [nn.SiLU()]),
    OperationRecord(nn.Mish, False, 1, (), {"inplace": False}, lambda shape: [nn.Mish()]),
    OperationRecord(nn.Hardswish, False, 1, (), {"inplace": False}, lambda shape: [nn.Hardswish()]),
    OperationRecord(nn.Softsign, False, 1, (), {}, lambda shape: [nn.Softsign()]),
    OperationRecord(Softplus, False, 1, (), {}, lambda shape: [Softplus()]),
    OperationRecord(Erf, False, 1, (), {}, lambda shape: [Erf()]),
    OperationRecord(Exp, False, 1, (), {}, lambda shape: [Exp()], steep=True, tried_on=(-2.0, 3.0)),
    OperationRecord(Log, False, 1, (), {}, lambda shape: [Log()], steep=True, tried_on=(0.1, 3.0)),
    OperationRecord(
        Power, False, 1, ("exponent",), {}, _powers((2.0, 0.5, -1.0, -0.5, 1.7)), steep=True,
        tried_on=(0.1, 3.0),
    ),
    OperationRecord(Multiply, False, 2, (), {}, lambda shape: [Multiply()], steep=True),
    OperationRecord(MatrixProduct, False, 2, (), {}, lambda shape: [MatrixProduct()], steep=True),
    OperationRecord(Softmax, False, 1, ("dim",), {}, _softmaxes, steep=True),
    OperationRecord(Standardise, False, 1, ("epsilon", "centred"), {}, _standardisations, steep=True),
    OperationRecord(nn.Flatten, True, 1, (), {"start_dim": 1, "end_dim": -1}, lambda shape: [nn.Flatten()]),
    OperationRecord(ScaleShift, True, 1, ("scale", "shift"), {}, _scale_shifts),
    OperationRecord(Reshape, True, 1, ("shape",), {}, _reshapes),
    OperationRecord(Permute, True, 1, ("dims",), {}, _permutations),
    OperationRecord(Index, True, 1, ("dim", "selection"), {}, _selections),
    OperationRecord(
        Pad, True, 1, ("amounts",), {},
        lambda shape: [Pad((1, 0, 0, 0)), Pad((0, 1, 2, 0)), Pad((1, 1, 1, 1)), Pad((0, 0, 1, 3))],
    ),
    OperationRecord(Add, True, 0, (), {}, lambda shape: [Add()]),
    OperationRecord(Subtract, True, 2, (), {}, lambda shape: [Subtract()]),
    OperationRecord(
        Concatenate, True, 0, ("dim",), {}, lambda shape: [Concatenate(dim) for dim in range(len(shape))]
    ),
)  # fmt: skip

RECORDS: dict[type[nn.Module], OperationRecord] = {record.kind: record for record in OPERATIONS}
CANONICAL: tuple[type[nn.Module], ...] = tuple(RECORDS)
AFFINE: tuple[type[nn.Module], ...] = tuple(record.kind for record in OPERATIONS if record.affine)
ADDED: dict[type[nn.Module], OperationRecord] = {}  # by :func:`register_activation`
WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
STEEP: tuple[type[nn.Module], ...] = tuple(record.kind for record in OPERATIONS if record.steep)
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, *CURVES)


def register_activation(kind: type[nn.Module], curve: Callable[[Any], Curve], options: tuple[str, ...] = ()) -> None:
    """Adds an activation of one's own: a module that applies one function, with a largest slope, to every entry.

    From then on it is read as a layer of an ``nn.Sequential``, and known to intervals, lines, lifted bounds, zonotopes,
    rounding and attacks. CROWN and exported files do without it.

    Args:
        kind: the class; it takes batches of any shape, in float32 and float64.
        curve: from an instance to what is known of its function. It is looked at whenever a network has one.
        options: what torch lists in its ``__constants__``.
    """
    CURVES[kind] = FUNCTIONS[kind] = curve
    RECORDS[kind] = ADDED[kind] = OperationRecord(kind, False, 1, options, {}, lambda shape: [])


def is_affine(operation: nn.Module) -> bool:
    """Whether the operation is an affine function of its inputs, taken jointly."""
    return type(operation) in AFFINE


def is_elementwise_activation(operation: nn.Module) -> bool:
    """Whether the operation applies one non-affine scalar function, with a largest slope, to every entry."""
    return type(operation) in ACTIVATIONS or type(operation) in ADDED


def operation_name(operation: nn.Module) -> str:
    """The name of an operation for messages, such as ``Conv2d``."""
    return type(operation).__name__


def check_operation(operation: nn.Module) -> None:
    """Checks that an operation is canonical, options included.

    Raises:
        UnsupportedOperationError: naming the operation and the option at fault.
    """
    name = operation_name(operation)
    record = RECORDS.get(type(operation))
    if record is None:
        known = ", ".join(sorted(kind.__name__ for kind in RECORDS))
        raise UnsupportedOperationError(f"operation {name} is not supported: expected one of {known}")
    if type(operation) in ADDED:
        check_curve(operation, CURVES[type(operation)](operation))
    # torch lists a module's options there: one that a newer release adds is not to be passed over.
    unknown = set(getattr(operation, "__constants__", ())) - set(record.options) - set(record.fixed)
    faults = {
        **{
            f"{option}={getattr(operation, option, value)!r}": getattr(operation, option, value) != value
            for option, value in record.fixed.items()
        },
        **{f"the option {option}, which is not known,": True for option in sorted(unknown)},
        "padding given as a word": isinstance(getattr(operation, "padding", 0), str),
        "hooks": bool(operation._forward_hooks or operation._forward_pre_hooks),
    }
    for fault, present in faults.items():
        if present:
            raise UnsupportedOperationError(f"operation {name} with {fault} is not supported")


def output_shape(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The per-sample output shape for per-sample input shapes, found by running zeros.

    Raises:
        UnsupportedOperationError: the operation is not canonical.
        InvalidInputError: it cannot take inputs of these shapes, or it touches the batch dimension.
    """
    check_operation(operation)
    name = operation_name(operation)
    fault = _shape_fault(operation, shapes)
    if fault:
        raise InvalidInputError(f"{name}: given {_shapes_text(shapes)}, {fault}")
    like = next((t for t in _tensors(operation) if t.is_floating_point()), torch.zeros(()))
    try:
        with torch.no_grad():
            result = operation(*(like.new_zeros(2, *shape) for shape in shapes))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{name}: given {_shapes_text(shapes)}: {first_line(error)}") from None
    if result.ndim < 2 or result.shape[0] != 2 or result.numel() == 0:
        raise InvalidInputError(
            f"{name}: given {_shapes_text(shapes)}, expected a non-empty result with the batch first, "
            f"got {tuple(result.shape)} for a batch of 2"
        )
    if not bool(torch.isfinite(result).all()) and isinstance(operation, nn.MaxPool2d):
        raise InvalidInputError(f"{name}: given {_shapes_text(shapes)}: a window lies in the padding as a whole")
    return tuple(int(size) for size in result.shape[1:])


def _shape_fault(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> str:
    """What is wrong with these input shapes that running the operation would not reveal ("" if nothing)."""
    if isinstance(operation, Add | Subtract | Concatenate | Multiply | MatrixProduct):
        few = 1 if isinstance(operation, Concatenate) else 2
        two = isinstance(operation, Subtract | Multiply | MatrixProduct)
        if len(shapes) < few or (two and len(shapes) != 2):
            return f"expected {'exactly' if two else 'at least'} {few} inputs"
        if len({len(shape) for shape in shapes}) > 1:
            return "expected inputs of one rank"
    elif len(shapes) != 1:
        return "expected one input"
    rank = len(shapes[0])
    if isinstance(operation, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d) and rank != 3:
        return "expected (channels, height, width)"
    if isinstance(operation, Pad | MatrixProduct) and rank < 2:
        return "expected a rank of at least 2"
    if isinstance(operation, Index | Concatenate | Softmax) and not 0 <= operation.dim < rank:
        return f"expected a dimension below {rank}, got {operation.dim}"
    if isinstance(operation, Permute) and sorted(operation.dims) != list(range(rank)):
        return f"expected a permutation of 0..{rank - 1}, got {operation.dims}"
    if isinstance(operation, Reshape) and math.prod(operation.shape) != math.prod(shapes[0]):
        return f"expected as many entries as {operation.shape} has"
    if isinstance(operation, ScaleShift) and max(operation.scale.ndim, operation.shift.ndim) > rank:
        return f"expected a rank of at least {max(operation.scale.ndim, operation.shift.ndim)}"
    return ""


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that these broadcast to; RuntimeError if they do not."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _tensors(operation: nn.Module) -> list[Tensor]:
    return [*operation.parameters(), *operation.buffers()]


def _constant(value: Tensor | float) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _shapes_text(shapes: Sequence[tuple[int, ...]]) -> str:
    return "samples of shape " + ", ".join(str(shape) for shape in shapes)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
