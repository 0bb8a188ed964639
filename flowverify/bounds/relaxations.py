"""Linear bounds: lines below and above activations, and the backward pass that bounds a network by them.

A line is all that a linear bound knows about an activation on an interval. On l <= x <= u the two lines of
:func:`relax` lie below and above the activation:

- two linear pieces that meet at 0 (ReLU, LeakyReLU): between l < 0 < u the chord on the hollow side, and on the other
  side the piece that leaves the smaller area to the curve (CROWN: Zhang et al. 2018, arXiv:1811.00866, section 3.2);
- sigmoid and tanh: on one side of 0 the chord and the tangent in the middle; across 0, through either end, the line
  with the smaller of the two ends' slopes, which is the least slope in between (Singh et al. 2019, DeepPoly);
- other curves: the chord on the hollow side and the tangent in the middle on the other, and where the slope neither
  only rises nor only falls, lines of the chord's slope; how far the curve departs from a line is bounded piece by
  piece, by the slopes on each.

They are differentiable in the ends of the interval. Where an end is not a number, neither are the lines.

The backward pass, :func:`pull_back`, is CROWN's (Zhang et al. 2018, arXiv:1811.00866), and gradients flow through it.
A linear function of a value becomes one of the values below that is nowhere less: from the value down, an affine
operation hands its coefficients through its adjoint, and an activation hands them on through the line above it where
they are positive and below it where they are negative. What remains at the
bottom is maximised over the ball as one function, so that its terms share the budget; interval bounds give the whole
budget to every neuron.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval, propagate
from flowverify.errors import UnsupportedOperationError
from flowverify.network import INPUT, Graph, is_affine, is_elementwise_activation, operation_name
from flowverify.network.curves import CURVES, FUNCTIONS, Curve, slopes_between

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
    return is_elementwise_activation(operation)


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
    if type(operation) in CURVES:
        return _curved(operation, CURVES[type(operation)](operation), interval)
    raise UnsupportedOperationError(
        f"linear relaxation of {operation_name(operation)}: expected an elementwise activation with a largest slope"
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


PIECES = 16  # of an interval, on each of which the slopes of a curve are bounded


def pieces(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Ends (PIECES, *shape) of pieces of the way from ``start`` to ``end``, of which the first and last are exact."""
    shares = torch.linspace(0, 1, PIECES + 1, dtype=start.dtype, device=start.device)[1:-1]
    inner = start + shares.reshape(-1, *[1] * start.ndim) * (end - start)
    return torch.cat([start[None], inner]), torch.cat([inner, end[None]])


def _curved(function: nn.Module, curve: Curve, interval: Interval) -> Relaxation:
    lower, upper = interval
    low, high, middle = function(lower), function(upper), (lower + upper) / 2
    tangent = curve.slope(middle)
    long = upper - lower > SHORTEST_CHORD
    chord = torch.where(long, (high - low) / (upper - lower).clamp(min=SHORTEST_CHORD), tangent)
    begin, end = pieces(lower, upper)
    least, largest = slopes_between(curve, begin, end)
    # Nothing is claimed of the slopes that are chosen: the lines are put where the curve is, whatever it is like.
    ends = curve.slope(begin), curve.slope(end)
    rising, falling = (ends[0] <= ends[1]).all(0), (ends[0] >= ends[1]).all(0)
    below, above = torch.where(rising, tangent, chord), torch.where(falling, tangent, chord)
    values = function(begin), function(end)
    return Relaxation(
        below,
        -_largest_excess(begin, end, (-values[0], -values[1]), (-largest, -least), -below),
        above,
        _largest_excess(begin, end, values, (least, largest), above),
    )


def chord_and_departure(function: nn.Module, interval: Interval) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slope of the chord of any function of one number, and bounds of f(x) - slope * x on the interval.

    Returns:
        slope, least, largest, and the largest size of f's own slopes; none of them finite where f has not a value
        everywhere.
    """
    lower, upper = interval
    curve = FUNCTIONS[type(function)](function)
    long = upper - lower > SHORTEST_CHORD
    chord = (function(upper) - function(lower)) / (upper - lower).clamp(min=SHORTEST_CHORD)
    slope = torch.where(long, chord, curve.slope((lower + upper) / 2))
    begin, end = pieces(lower, upper)
    least, largest = slopes_between(curve, begin, end)
    values = function(begin), function(end)
    below = -_largest_excess(begin, end, (-values[0], -values[1]), (-largest, -least), -slope)
    above = _largest_excess(begin, end, values, (least, largest), slope)
    # Comparisons pass over what is not a number.
    known = propagate(function, [interval])
    outside = ~(torch.isfinite(known[0]) & torch.isfinite(known[1]))
    nothing = torch.zeros_like(slope).masked_fill(outside, torch.nan)
    return slope + nothing, below, above, torch.maximum(least.abs(), largest.abs()).amax(0)


def _largest_excess(begin: Tensor, end: Tensor, values: Interval, slopes: Interval, slope: Tensor) -> Tensor:
    """An upper bound of f(x) - slope * x over all pieces, from values at their ends and slopes in between."""
    first, last = (value - slope * place for value, place in zip(values, (begin, end), strict=True))
    up, down = slopes[1] - slope, slope - slopes[0]  # how fast it rises from the left end, and from the right one
    length, bent = end - begin, (up > 0) & (down > 0)
    share = (last - first + down * length) / torch.where(bent, up + down, 1.0)
    crossing = first + up * torch.minimum(share.clamp(min=0), length)
    found = torch.where(up <= 0, first, torch.where(down <= 0, last, crossing))
    return torch.maximum(torch.maximum(first, last), found).amax(0)


def _slope(function: nn.Module, value: Tensor) -> Tensor:
    """The derivative, without the cancellation of 1 - tanh^2 or s (1 - s) far from 0."""
    if isinstance(function, nn.Tanh):
        return 4 * torch.sigmoid(2 * value) * torch.sigmoid(-2 * value)
    return torch.sigmoid(value) * torch.sigmoid(-value)


def pull_back(
    graph: Graph, name: str, coefficients: Tensor, intervals: Mapping[str, Interval], bottom: Collection[str] = (INPUT,)
) -> tuple[dict[str, Tensor], Tensor]:
    """Linear functions of the values at the bottom that are nowhere less than the given ones of a value above.

    The claim holds wherever the inputs of the activations lie in ``intervals``. It is differentiable in the
    coefficients, the intervals and the weights, where gradients are enabled.

    Args:
        name: a value of the graph.
        coefficients: of the value, (B, S, *shape).
        intervals: of what the activations between the bottom and the value read, each (B, *shape).
        bottom: names of values; every way from the input to the value leads through one of them.

    Returns:
        Coefficients (B, S, *shape) of the values at the bottom that have an influence, and the constants (B, S).

    Raises:
        UnsupportedOperationError: an activation that has no linear relaxation.
    """
    found: dict[str, Tensor] = {name: coefficients}
    constant = torch.zeros_like(coefficients.flatten(2)[..., 0])
    for node in reversed(graph.nodes):
        if node.name not in found or node.name in bottom:
            continue
        outer = found.pop(node.name)
        if is_affine(node.operation):
            parts, offset = _through_affine(node.operation, outer, [graph.shape(read) for read in node.inputs])
        else:
            inner, offset = _through_activation(node.operation, outer, intervals[node.inputs[0]])
            parts = [inner]
        constant = constant + offset
        for read, part in zip(node.inputs, parts, strict=True):
            found[read] = found[read] + part if read in found else part
    return found, constant


def _through_activation(operation: nn.Module, outer: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
    """Coefficients and constants of lines above ``outer`` * activation on the interval."""
    lines, rising = relax(operation, interval), outer > 0
    offset = torch.where(rising, lines.upper_offset[:, None], lines.lower_offset[:, None])
    inner = outer * torch.where(rising, lines.upper_slope[:, None], lines.lower_slope[:, None])
    return inner, (outer * offset).flatten(2).sum(2)


def _through_affine(
    operation: nn.Module, outer: Tensor, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Tensor], Tensor]:
    flat = outer.flatten(0, 1)
    if isinstance(operation, nn.Linear):
        bias = outer.new_zeros(outer.shape[:2])
        if operation.bias is not None:
            bias = (outer @ operation.bias).reshape(*outer.shape[:2], -1).sum(2)
        return [outer @ operation.weight], bias
    # Any other affine operation: its adjoint by differentiation at 0, where its value is the constant.
    trained = torch.is_grad_enabled()
    points = [flat.new_zeros(len(flat), *shape).requires_grad_(True) for shape in shapes]
    with torch.enable_grad():
        total = (flat * operation(*points)).flatten(1).sum(1)
        parts = torch.autograd.grad(total.sum(), points, create_graph=trained)
    if not trained:
        total = total.detach()
    return [part.reshape(*outer.shape[:2], *part.shape[1:]) for part in parts], total.reshape(outer.shape[:2])
