"""The exact linear map from the image to a value of a network that is affine in its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError
from flowverify.network.graph import Graph
from flowverify.network.operations import ScaleShift

CHUNK_ENTRIES = 1 << 23


def affine_rows(network: Graph, node_name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows and bias with value(x) = rows @ x.flatten() + bias, for a value of ``affine_of_input()``.

    The value's entries and the image's pixels are counted in row-major order. The rows are the images of
    the unit vectors under the linear part (all biases set to zero), computed in float64 and rounded once.

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
    with torch.no_grad():
        bias = part(zero).flatten().to(dtype)
        drop_biases(part)
        pixels, entries = math.prod(part.input_shape), math.prod(part.output_shape)
        rows = torch.empty(entries, pixels, dtype=dtype)
        widest = max([pixels, *(math.prod(node.shape) for node in part.nodes)])
        chunk = max(1, CHUNK_ENTRIES // widest)
        for start in range(0, pixels, chunk):
            count = min(chunk, pixels - start)
            basis = torch.zeros(count, pixels, dtype=torch.float64)
            basis[torch.arange(count), torch.arange(start, start + count)] = 1
            rows[:, start : start + count] = part(basis.reshape(count, *part.input_shape)).flatten(1).T
    return rows, bias


def drop_biases(graph: Graph) -> None:
    """Makes the affine operations of a graph linear, in place."""
    for node in graph.nodes:
        operation = node.operation
        if isinstance(operation, nn.Linear | nn.Conv2d) and operation.bias is not None:
            operation.bias.zero_()
        elif isinstance(operation, ScaleShift):
            operation.shift.zero_()
