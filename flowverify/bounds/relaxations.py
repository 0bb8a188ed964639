"""Lines below and above an activation on an interval: all that a linear bound knows about it.

On l <= x <= u the two lines of :func:`relax` lie below and above the activation:

- two linear pieces that meet at 0 (ReLU, LeakyReLU): between l < 0 < u the chord on the hollow side, and on the other
  side the piece that leaves the smaller area to the curve (CROWN: Zhang et al. 2018, arXiv:1811.00866, section 3.2);
- sigmoid and tanh: on one side of 0 the chord and the tangent in the middle; across 0, through either end, the line
  with the smaller of the two ends' slopes, which is the least slope in between (Singh et al. 2019, DeepPoly).

They are differentiable in the ends of the interval. Where an end is not a number, neither are the lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval
from flowverify.errors import UnsupportedOperationError
from flowverify.network import operation_name

SHORTEST_CHORD = 1e-5  # of a curve: the slope of a shorter one is rounding


@dataclass(frozen=True)
class Relaxation:
    """lower_slope * x + lower_offset <= f(x) <= upper_slope * x + upper_offset, entry by entry."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


def relaxable(operation: nn.Module) -> bool:
    """Whether :func:`relax` has lines for an operation."""
    return isinstance(operation, nn.ReLU | nn.LeakyReLU | nn.Sigmoid | nn.Tanh)


def crosses_zero(interval: Interval) -> Tensor:
    """Which entries may lie on either side of 0, in the shape of the interval."""
    lower, upper = interval
    return (lower < 0) & (upper > 0)


def relax(operation: nn.Module, interval: Interval) -> Relaxation:
    """Lines around an elementwise activation on an interval, in the shape of the interval.

    Raises:
        UnsupportedOperationError: another operation.
    """
    if isinstance(operation, nn.ReLU | nn.LeakyReLU):
        return _two_pieces(float(getattr(operation, "negative_slope", 0.0)), interval)
    if isinstance(operation, nn.Sigmoid | nn.Tanh):
        return _s_shaped(operation, interval)
    raise UnsupportedOperationError(
        f"linear relaxation of {operation_name(operation)}: expected ReLU, LeakyReLU, Sigmoid or Tanh"
    )


def _two_pieces(left: float, interval: Interval) -> Relaxation:
    """Slope ``left`` below 0, 1 above: convex for ``left`` <= 1, else concave."""
    lower, upper = interval
    across, one, slope = crosses_zero(interval), torch.ones_like(lower), torch.full_like(lower, left)
    settled = torch.where(lower >= 0, one, slope)
    # Nothing infinite, not even where it is not chosen: its gradient would be no number.
    rise = (upper - left * lower) / torch.where(across, upper - lower, one)
    chord = torch.where(across, rise, settled)
    offset = torch.where(across, (left - chord) * lower, 0.0)
    piece = torch.where(across, torch.where(upper > -lower, one, slope), settled)
    # Comparisons pass over what is not a number.
    nothing = torch.zeros_like(lower).masked_fill(torch.isnan(lower) | torch.isnan(upper), torch.nan)
    offset = offset + nothing
    return Relaxation(piece, nothing, chord, offset) if left <= 1 else Relaxation(chord, offset, piece, nothing)


def _s_shaped(function: nn.Module, interval: Interval) -> Relaxation:
    """Convex below 0, concave above, with the steepest slope at 0."""
    lower, upper = interval
    low, high, middle = function(lower), function(upper), (lower + upper) / 2
    least = torch.minimum(_slope(function, lower), _slope(function, upper))
    chord = (high - low) / (upper - lower).clamp(min=SHORTEST_CHORD)
    tangent = _slope(function, middle)
    long = upper - lower > SHORTEST_CHORD
    convex, concave = long & (upper <= 0), long & (lower >= 0)
    touching = function(middle) - tangent * middle
    below = torch.where(convex, tangent, torch.where(concave, chord, least))
    above = torch.where(concave, tangent, torch.where(convex, chord, least))
    return Relaxation(
        below,
        torch.where(convex, touching, low - below * lower),
        above,
        torch.where(concave, touching, high - above * upper),
    )


def _slope(function: nn.Module, value: Tensor) -> Tensor:
    """The derivative, without the cancellation of 1 - tanh^2 or s (1 - s) far from 0."""
    if isinstance(function, nn.Tanh):
        return 4 * torch.sigmoid(2 * value) * torch.sigmoid(-2 * value)
    return torch.sigmoid(value) * torch.sigmoid(-value)
