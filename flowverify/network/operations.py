"""The closed set of canonical operations, and what the certifiers need to know about each of them.

A canonical operation maps batches to batches, sample by sample: dimension 0 is the batch and nothing else.
All dimensions in this file are counted within one sample (dimension 0 is the channel of an image).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError


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


WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
MULTIPLE_INPUTS: tuple[type[nn.Module], ...] = (Add, Subtract, Concatenate)
AFFINE: tuple[type[nn.Module], ...] = (
    *WEIGHTED, nn.AvgPool2d, nn.Flatten, ScaleShift, Reshape, Permute, Index, Pad, *MULTIPLE_INPUTS,
)  # fmt: skip
CANONICAL: tuple[type[nn.Module], ...] = (*AFFINE, *ACTIVATIONS, nn.MaxPool2d)


def is_affine(operation: nn.Module) -> bool:
    """Whether the operation is an affine function of its inputs, taken jointly."""
    return type(operation) in AFFINE


def is_elementwise_activation(operation: nn.Module) -> bool:
    """Whether the operation applies one non-affine scalar function to every entry."""
    return type(operation) in ACTIVATIONS


def operation_name(operation: nn.Module) -> str:
    """The name of an operation for messages, such as ``Conv2d``."""
    return type(operation).__name__


def check_operation(operation: nn.Module) -> None:
    """Checks that an operation is canonical, options included.

    Raises:
        UnsupportedOperationError: naming the operation and the option at fault.
    """
    name = operation_name(operation)
    if type(operation) not in CANONICAL:
        known = ", ".join(sorted(kind.__name__ for kind in CANONICAL))
        raise UnsupportedOperationError(f"operation {name} is not supported: expected one of {known}")
    faults = {
        "inplace=True": getattr(operation, "inplace", False),
        "ceil_mode=True": getattr(operation, "ceil_mode", False),
        "return_indices=True": getattr(operation, "return_indices", False),
        "divisor_override": getattr(operation, "divisor_override", None) is not None,
        "a padding mode other than zeros": getattr(operation, "padding_mode", "zeros") != "zeros",
        "padding given as a word": isinstance(getattr(operation, "padding", 0), str),
        "dimensions other than (1, -1)": isinstance(operation, nn.Flatten)
        and (operation.start_dim, operation.end_dim) != (1, -1),
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
    return tuple(int(size) for size in result.shape[1:])


def _shape_fault(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> str:
    """What is wrong with these input shapes that running the operation would not reveal ("" if nothing)."""
    if isinstance(operation, Add | Subtract | Concatenate):
        few = 1 if isinstance(operation, Concatenate) else 2
        if len(shapes) < few or (isinstance(operation, Subtract) and len(shapes) != 2):
            return f"expected {'exactly' if isinstance(operation, Subtract) else 'at least'} {few} inputs"
        if len({len(shape) for shape in shapes}) > 1:
            return "expected inputs of one rank"
    elif len(shapes) != 1:
        return "expected one input"
    rank = len(shapes[0])
    if isinstance(operation, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d) and rank != 3:
        return "expected (channels, height, width)"
    if isinstance(operation, Pad) and rank < 2:
        return "expected a rank of at least 2"
    if isinstance(operation, Index | Concatenate) and not 0 <= operation.dim < rank:
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
