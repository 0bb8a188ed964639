"""Grey-scale dilation of an image by the l1 cone: D_lambda(c)_i = max_j c_j - lambda * d(i, j).

For the l1 ground cost the cone is a sum over the two axes, so the dilation is a row pass followed by a
column pass, each two running maxima: O(pixels), no transport solver. This is the torch implementation
(any device, any dtype), the reference for the compiled kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dilation(NamedTuple):
    """``value`` is D_lambda(c); ``distance`` and ``origin`` belong to a maximiser j of every pixel i."""

    value: Tensor  # (..., C, H, W)
    distance: Tensor  # (..., C, H, W), l1 distance from i to j
    origin: Tensor  # (..., C, H, W), int64 index of j within its channel's H*W pixels


def dilate(coefficients: Tensor, multiplier: Tensor) -> Dilation:
    """Dilates each image of a batch by its own cone.

    Args:
        coefficients: c, of shape (..., C, H, W). Channels are dilated independently.
        multiplier: lambda >= 0, of shape (...).

    Returns:
        The dilation with, for every pixel i, a pixel j that attains max_j c_j - lambda * d(i, j). A pixel
        whose own value attains the maximum stays (distance 0).
    """
    width = coefficients.shape[-1]
    slope = multiplier[..., None, None, None]
    value, column = _running_maximum(coefficients, slope)
    by_column = value.transpose(-1, -2)
    value_t, row_t = _running_maximum(by_column, slope)
    row = row_t.transpose(-1, -2)
    column = column.gather(-2, row)
    rows = torch.arange(row.shape[-2], device=row.device)[:, None]
    columns = torch.arange(width, device=row.device)
    distance = (row - rows).abs() + (column - columns).abs()
    return Dilation(value_t.transpose(-1, -2), distance.to(coefficients.dtype), row * width + column)


def _running_maximum(values: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """max_j values_j - slope * |i - j| along the last axis, and its argmax (i itself where it attains it)."""
    position = torch.arange(values.shape[-1], device=values.device)
    ramp = slope * position
    forward = (values + ramp).cummax(-1).indices
    flipped = (values - ramp).flip(-1).cummax(-1).indices
    backward = values.shape[-1] - 1 - flipped.flip(-1)
    best, origin = values, position.expand(values.shape)
    for candidate in (forward, backward):
        # Evaluated from the index: adding and subtracting the ramp would round the stationary value.
        value = values.gather(-1, candidate) - slope * (candidate - position).abs()
        better = value > best
        best = torch.where(better, value, best)
        origin = torch.where(better, candidate, origin)
    return best, origin


def lipschitz_constant(coefficients: Tensor) -> Tensor:
    """Lip(c) = max over neighbouring pixels of |c_i - c_j| = ||A^T c||_inf, (..., C, H, W) -> (...).

    It is the Lipschitz constant of c for the l1 ground cost, and D_lambda(c) = c for every lambda >= Lip(c).
    """
    largest = coefficients.new_zeros(coefficients.shape[:-3])
    for axis in (-1, -2):
        difference = coefficients.diff(dim=axis).abs()
        if difference.numel():
            largest = torch.maximum(largest, difference.flatten(-3).amax(-1))
    return largest
