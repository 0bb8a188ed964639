"""Interval propagation through one canonical operation.

Gowal et al. 2018 (arXiv:1810.12715): an affine operation maps centre and half-width by W and |W|; a
non-decreasing operation maps the two ends. What the intervals start from is not this file's business: over
a Wasserstein ball they start at the first layer, where they are exact (:mod:`flowverify.bounds.first_layer`;
theory, section 13).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.errors import UnsupportedOperationError
from flowverify.network import operations as ops

Interval = tuple[Tensor, Tensor]

_NON_DECREASING: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Flatten,
    ops.Reshape,
    ops.Permute,
    ops.Index,
    ops.Pad,
    ops.Add,
    ops.Concatenate,
)


def propagate(operation: nn.Module, inputs: Sequence[Interval]) -> Interval:
    """Bounds of ``operation`` over the product of the input intervals, each (B, *shape).

    Raises:
        UnsupportedOperationError: an operation that is not canonical.
    """
    if isinstance(operation, _NON_DECREASING):
        lower, upper = operation(*(low for low, _ in inputs)), operation(*(high for _, high in inputs))
        return lower, upper
    if isinstance(operation, ops.Subtract):
        (low, high), (other_low, other_high) = inputs
        return low - other_high, high - other_low
    low, high = inputs[0]
    if isinstance(operation, nn.LeakyReLU):
        ends = operation(low), operation(high)
        if operation.negative_slope >= 0:
            return ends
        # A negative slope turns at zero, where the value is zero.
        straddles = (low < 0) & (high > 0)
        lower, upper = torch.minimum(*ends), torch.maximum(*ends)
        return torch.where(straddles, lower.clamp(max=0), lower), upper
    if isinstance(operation, ops.ScaleShift):
        ends = operation(low), operation(high)
        return torch.minimum(*ends), torch.maximum(*ends)
    centre, radius = (low + high) / 2, (high - low) / 2
    if isinstance(operation, nn.Linear):
        middle, spread = operation(centre), functional.linear(radius, operation.weight.abs())
    elif isinstance(operation, nn.Conv2d):
        middle = operation(centre)
        spread = functional.conv2d(
            radius, operation.weight.abs(), None, operation.stride, operation.padding, operation.dilation,
            operation.groups,
        )  # fmt: skip
    else:
        raise UnsupportedOperationError(f"interval propagation: no rule for {ops.operation_name(operation)}")
    return middle - spread, middle + spread


def intersect(first: Interval, second: Interval) -> Interval:
    """The tighter of two valid intervals at every entry.

    Rounding can make two valid intervals miss each other by an ulp; the result is then the gap between
    them, turned round so that lower <= upper.
    """
    lower, upper = torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])
    return torch.minimum(lower, upper), torch.maximum(lower, upper)
