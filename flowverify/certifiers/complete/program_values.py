"""The values of a network as affine functions of a program's columns, and how far the network itself may be off.

What is written down is in floating point, and the network is not: rounding is bounded a priori by sums of absolute
values (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from flowverify.network.rounding import FEW, INFLATED, TINY, UNIT

Array = NDArray[np.float64]


def gamma(roundings: int) -> float:
    """The relative error of a sum of products with so many roundings on any of them."""
    share = roundings * UNIT
    return INFLATED * share / (1 - share)


@dataclass(frozen=True)
class Value:
    """matrix x + constant, for the columns x of the program.

    Attributes:
        magnitude: of the sum of all terms' absolute values, for any x of the program.
        error: how far the network's exact value is off, at most.
        path: the sum of absolute values along all paths of the network, for the rounding of bounds by relaxations.
    """

    matrix: Any
    constant: Array
    magnitude: Array
    error: Array
    path: Array


def _run(operation: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = operation(*inputs)
    return result.reshape(len(result), -1)


def at_zero(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Array:
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    result: Array = _run(operation, zeros)[0].numpy()
    return result


def matrices_of(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The matrix of an operation without biases for each of its inputs: images of unit vectors, without rounding.

    (An average is rounded once.)
    """
    if isinstance(operation, nn.Linear) and len(shapes[0]) == 1:
        return [sparse.csr_array(operation.weight.detach().numpy())]
    result = []
    for position, shape in enumerate(shapes):
        size, parts = int(np.prod(shape)), []
        for start in range(0, size, 512):
            stop = min(size, start + 512)
            inputs = [torch.zeros(stop - start, *other, dtype=torch.float64) for other in shapes]
            inputs[position] = torch.eye(size, dtype=torch.float64)[start:stop].reshape(-1, *shape)
            parts.append(sparse.csr_array(_run(operation, inputs).T.numpy()))
        result.append(sparse.hstack(parts).tocsr())
    return result


def affine_value(matrices: Sequence[Any], bias: Array, values: Sequence[Value]) -> Value:
    width = max(value.matrix.shape[1] for value in values)
    matrix: Any = sparse.csr_array((len(bias), width))
    constant, magnitude, error, path = bias, np.abs(bias), np.zeros(len(bias)), np.abs(bias)
    for own, value in zip(matrices, values, strict=True):
        missing = sparse.csr_array((value.matrix.shape[0], width - value.matrix.shape[1]))
        matrix = matrix + own @ sparse.hstack([value.matrix, missing]).tocsr()
        size = abs(own)
        constant, magnitude = constant + own @ value.constant, magnitude + size @ value.magnitude
        error, path = error + size @ value.error, path + size @ value.path
    terms = sum(own.shape[1] for own in matrices) + FEW
    return Value(sparse.csr_array(matrix), constant, magnitude, error + gamma(terms) * magnitude + TINY, path)
