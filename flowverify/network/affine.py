"""Affine maps as matrices: the one place where an operation or a part of a network becomes rows and a constant.

The columns of a matrix are the values of the map's linear part at the unit vectors. The linear part is the same
operations without their constants, so that no constant cancels in it: f(e) - f(0) would round at the size of f(0).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError
from flowverify.network.graph import Graph
from flowverify.network.operations import ScaleShift

CHUNK_ENTRIES = 1 << 23


def columns(
    linear: Callable[[Tensor], Tensor], shape: Sequence[int], *, like: Tensor, widest: int = 0
) -> Iterator[Tensor]:
    """The matrix of a linear map, a few columns at a time: tensors (n, entries), one row a column of the matrix.

    Args:
        linear: from (n, *shape) to (n, ...).
        like: of the precision and on the device of the result.
        widest: entries of the largest value in between, which decides how many columns are computed at once.
    """
    size = math.prod(shape)
    count = max(1, CHUNK_ENTRIES // max(size, widest))
    for start in range(0, size, count):
        units = like.new_zeros(min(count, size - start), size)
        units[torch.arange(len(units)), start + torch.arange(len(units))] = 1
        yield linear(units.reshape(-1, *shape)).flatten(1)


def matrix(linear: Callable[[Tensor], Tensor], shape: Sequence[int], *, like: Tensor, widest: int = 0) -> Tensor:
    """The matrix of a linear map as a whole, (entries, inputs); the arguments of :func:`columns`."""
    result, start = None, 0
    for part in columns(linear, shape, like=like, widest=widest):
        if result is None:
            result = part.new_empty(part.shape[1], math.prod(shape))
        result[:, start : start + len(part)] = part.T
        start += len(part)
    assert result is not None
    return result


def linear_part(operation: nn.Module) -> nn.Module:
    """A copy of an affine operation, or of a graph with all its affine operations, without their constants."""
    operation = copy.deepcopy(operation)
    drop_biases(operation)
    return operation


def drop_biases(module: nn.Module) -> None:
    """Makes affine operations linear, in place: a single one, or all of a graph."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                part.bias.zero_()
            elif isinstance(part, ScaleShift):
                part.shift.zero_()


def operation_matrices(
    operation: nn.Module, shapes: Sequence[tuple[int, ...]], like: Tensor
) -> tuple[list[Iterator[Tensor]], Tensor]:
    """Of an affine operation on inputs of these shapes, jointly: the :func:`columns` by input, and the constant.

    The constant has the shape (entries,). Nothing is differentiated.
    """
    linear, zeros = linear_part(operation), [like.new_zeros(1, *shape) for shape in shapes]

    def alone(position: int) -> Callable[[Tensor], Tensor]:
        def value(units: Tensor) -> Tensor:
            given = [zero.expand(len(units), *zero.shape[1:]) for zero in zeros]
            given[position] = units
            with torch.no_grad():
                return linear(*given)  # type: ignore[no-any-return]

        return value

    with torch.no_grad():
        constant = operation(*zeros).flatten()
    return [
        columns(alone(position), shape, like=like, widest=constant.numel()) for position, shape in enumerate(shapes)
    ], constant


def affine_rows(network: Graph, node_name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows and bias with value(x) = rows @ x.flatten() + bias, for a value of ``affine_of_input()``.

    The value's entries and the image's pixels are counted in row-major order. Computed in float64 and rounded once.

    Returns:
        rows (entries, pixels) and bias (entries,), on the CPU.

    Raises:
        InvalidInputError: the network has no such value, or it is not affine in the input.
    """
    known = network.affine_of_input()
    if node_name not in known:
        raise InvalidInputError(f"value {node_name!r}: expected one that is affine in the input: {sorted(known)}")
    part = network.before(node_name).cpu().double()
    zero = torch.zeros(1, *part.input_shape, dtype=torch.float64)
    linear = linear_part(part)
    widest = max((math.prod(node.shape) for node in part.nodes), default=0)
    with torch.no_grad():
        bias = part(zero).flatten()
        rows = matrix(lambda units: linear(units).to(dtype), part.input_shape, like=zero, widest=widest)
    return rows, bias.to(dtype)
