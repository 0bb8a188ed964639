"""Interval propagation through one canonical operation.

Gowal et al. 2018 (arXiv:1810.12715): an affine operation maps centre and half-width by W and |W|; a
non-decreasing operation maps the two ends. What the intervals start from is not this file's business: over
a Wasserstein ball they start at the first layer, where they are exact (:mod:`flowverify.bounds.interval_engine`;
theory, section 13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.errors import UnsupportedOperationError
from flowverify.network import operations as ops
from flowverify.network.curves import CURVES, Exp, Log, Power, range_between
from flowverify.network.operations import Softmax, Standardise

Interval = tuple[Tensor, Tensor]

LARGEST_PRODUCT = 1 << 22  # entries of all products that a matrix product of intervals adds up
LARGEST_MATRIX = 1024  # rows of the matrix that adds up all entries but one

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
    if isinstance(operation, ops.Multiply):
        return _extremes([first * second for first in inputs[0] for second in inputs[1]])
    if isinstance(operation, ops.MatrixProduct):
        return _matrix_product(*inputs)
    low, high = inputs[0]
    if isinstance(operation, Softmax | Standardise | Power | Exp | Log):
        return _RULES[type(operation)](operation, low, high)
    if type(operation) in CURVES:
        return range_between(operation, CURVES[type(operation)](operation).turns, low, high)
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


def _extremes(candidates: Sequence[Tensor]) -> Interval:
    shape = ops.broadcast_shape(*(one.shape for one in candidates))
    stacked = torch.stack([one.expand(shape) for one in candidates])
    return stacked.amin(0), stacked.amax(0)


def _matrix_product(first: Interval, second: Interval) -> Interval:
    """Sums of the exact intervals of products, if the products are few; else by centres and half-widths.

    With centres m, n and half-widths r, s: |x y - m n| <= |m| s + r |n| + r s, which is wider by at most r s.
    """
    (low, high), (other_low, other_high) = first, second
    entries = low.shape[:-1].numel() * low.shape[-1] * other_low.shape[-1]
    if entries <= LARGEST_PRODUCT:
        columns, rows = [one[..., :, :, None] for one in first], [one[..., None, :, :] for one in second]
        least, largest = _extremes([one * other for one in columns for other in rows])
        return least.sum(-2), largest.sum(-2)
    middle, radius = (low + high) / 2, (high - low) / 2
    other, spread = (other_low + other_high) / 2, (other_high - other_low) / 2
    centre, away = middle @ other, middle.abs() @ spread + radius @ (other.abs() + spread)
    return centre - away, centre + away


def _softmax(operation: Softmax, low: Tensor, high: Tensor) -> Interval:
    """The largest where the entry is largest and the others are least: 1 / (1 + sum_j exp(z_j - z_i))."""
    dim = operation.dim + 1

    def share(own: Tensor, others: Tensor) -> Tensor:
        differences = others.unsqueeze(dim) - own.unsqueeze(dim + 1)  # (..., i, j, ...)
        rest = differences.movedim((dim, dim + 1), (-2, -1)).exp()
        rest = rest.masked_fill(torch.eye(rest.shape[-1], dtype=torch.bool, device=rest.device), 0.0)
        return (1 / (1 + rest.sum(-1))).movedim(-1, dim)

    return share(low, high), share(high, low)


def _standardise(operation: Standardise, low: Tensor, high: Tensor) -> Interval:
    """c / sqrt((c^2 + S) / n + epsilon) rises with c, and in size it falls with S, the squares of the others."""
    size = low.shape[-1]
    if operation.centred:
        # c_i = (1 - 1/n) x_i - (sum of the others) / n
        low, high = (
            own * (1 - 1 / size) - (other.sum(-1, keepdim=True) - other) / size
            for own, other in ((low, high), (high, low))
        )
    nearest = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs())).square()
    farthest = torch.maximum(low.abs(), high.abs()).square()
    # Sums of the others, without the cancellation of a difference from the whole.
    rest = 1 - torch.eye(size, dtype=low.dtype, device=low.device) if size <= LARGEST_MATRIX else None

    def others(squares: Tensor) -> Tensor:
        if rest is not None:
            return squares @ rest
        return (squares.cumsum(-1) - squares) + (squares.flip(-1).cumsum(-1).flip(-1) - squares)

    least, most = others(nearest).clamp(min=0), others(farthest)

    def value(centre: Tensor, squares: Tensor) -> Tensor:
        return centre / ((centre.square() + squares) / size + operation.epsilon).sqrt()

    return (
        value(low, torch.where(low < 0, least, most)),
        value(high, torch.where(high > 0, least, most)),
    )


def _power(operation: Power, low: Tensor, high: Tensor) -> Interval:
    exponent = operation.exponent
    lower, upper = _extremes([operation(low), operation(high)])
    straddles, unknown = (low < 0) & (high > 0), torch.zeros_like(low, dtype=torch.bool)
    if exponent < 0:
        unknown = (low <= 0) & (high >= 0) if operation.whole else low <= 0
    elif operation.even:
        lower = torch.where(straddles, 0.0, lower)
    elif not operation.whole:
        unknown = low < 0
    return lower.masked_fill(unknown, -torch.inf), upper.masked_fill(unknown, torch.inf)


def _exponential(operation: Exp, low: Tensor, high: Tensor) -> Interval:
    return operation(low), operation(high)


def _logarithm(operation: Log, low: Tensor, high: Tensor) -> Interval:
    unknown = low <= 0
    return operation(low).masked_fill(unknown, -torch.inf), operation(high).masked_fill(unknown, torch.inf)


_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Interval]] = {
    Softmax: _softmax, Standardise: _standardise, Power: _power, Exp: _exponential, Log: _logarithm,
}  # fmt: skip


def intersect(first: Interval, second: Interval) -> Interval:
    """The tighter of two valid intervals at every entry.

    Rounding can make two valid intervals miss each other by an ulp; the result is then the gap between
    them, turned round so that lower <= upper.
    """
    lower, upper = torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])
    return torch.minimum(lower, upper), torch.maximum(lower, upper)
