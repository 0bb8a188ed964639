"""Secants from the centre: how activations are bounded by lines through their value at the centre of the ball.

For z in [l, u], t = z - z0, an activation f with f(z) - f(z0) <= s t for t >= 0, s the largest slope from the centre to
the right, and the least to the left for t < 0. Where the first is not above the second one line bounds f from above;
else f(z) - f(z0) <= max(s+ t, s- t). The same from below, with the signs turned (theory, section 21).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.bounds.relaxations import pieces
from flowverify.errors import UnsupportedOperationError
from flowverify.network.curves import CURVES, Curve, slopes_between
from flowverify.network.operations import operation_name

BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class Secants:
    """Slopes of secants of one activation from the centre, each (B, *shape)."""

    most_right: Tensor
    least_left: Tensor
    least_right: Tensor
    most_left: Tensor


def secants(operation: nn.Module, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Extreme slopes of (f(z) - f(z0)) / (z - z0) over z in [lower, upper], lower <= centre <= upper.

    Rounding is on the safe side up to a few units in the last place, as section 15 of the theory allows for.

    Raises:
        UnsupportedOperationError: an activation without a rule, named.
    """
    if isinstance(operation, nn.ReLU):
        return _two_pieces(0.0, lower, centre, upper)
    if isinstance(operation, nn.LeakyReLU):
        return _two_pieces(float(operation.negative_slope), lower, centre, upper)
    if isinstance(operation, nn.Sigmoid | nn.Tanh):
        return _s_shaped(operation, lower, centre, upper)
    if type(operation) in CURVES:
        return _curved(operation, CURVES[type(operation)](operation), lower, centre, upper)
    raise UnsupportedOperationError(f"lifted bounds: no rule for {operation_name(operation)}")


def _two_pieces(slope: float, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """z for z >= 0, slope * z below: slopes lie between those of the pieces, by how much of the way each takes."""
    tiny = torch.finfo(centre.dtype).tiny
    on = (centre >= 0).to(centre.dtype)
    own = on + (1 - on) * slope
    # The share of the way to the end that lies beyond zero; both terms of the sum are of one sign.
    beyond = torch.where(upper > 0, upper / (upper - centre).clamp(min=tiny), 0.0).clamp(0, 1)
    right = torch.where(centre >= 0, 1.0, slope + (1 - slope) * beyond)
    before = torch.where(lower < 0, lower / (lower - centre).clamp(max=-tiny), 0.0).clamp(0, 1)
    left = torch.where(centre >= 0, 1.0 + (slope - 1.0) * before, slope)
    # At a centre of exactly zero nothing is known but the pieces themselves.
    left = torch.where((centre == 0) & (lower < 0), slope, left)
    own_left = torch.where((centre == 0) & (lower < 0), slope, own)
    four = (
        torch.maximum(own, right),
        torch.minimum(own_left, left),
        torch.minimum(own, right),
        torch.maximum(own_left, left),
    )
    settled = torch.where(upper <= 0, torch.full_like(centre, slope), 1.0)
    return Secants(*(torch.where((lower >= 0) | (upper <= 0), settled, one) for one in four))


def _s_shaped(operation: nn.Module, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Convex up to zero, concave above: slopes from the centre rise up to a tangent and fall from there."""

    def value(z: Tensor) -> Tensor:
        found: Tensor = operation(z)
        return found

    def derivative(z: Tensor) -> Tensor:
        at = value(-z.abs())  # at the side where nothing cancels
        return at * (1 - at) if isinstance(operation, nn.Sigmoid) else (1 - at) * (1 + at)

    steepest = 0.25 if isinstance(operation, nn.Sigmoid) else 1.0
    epsilon = 4 * torch.finfo(centre.dtype).eps

    def extremes(end: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """The least and the largest slope from the centre to one side, up to the end."""
        far = (end - centre).abs()
        safe = far.clamp(min=torch.finfo(centre.dtype).tiny)
        doubt = epsilon / safe + epsilon
        here, chord = derivative(centre), (value(end) - value(centre)).abs() / safe
        chord = torch.where(far > 0, chord, here)
        least = (torch.minimum(here, chord - doubt) * (1 - epsilon)).clamp(min=0)
        # Where the centre lies on the other side of zero, the largest is at a tangent: below it, on the way from zero,
        # derivatives are above the slope, so that any point there gives an upper bound.
        near, most = torch.zeros_like(centre), -centre.abs() * 0
        beyond = end.abs()
        for _ in range(BISECTIONS):
            middle = (near + beyond) / 2
            point = sign * middle
            slope = (value(point) - value(centre)).abs() / (point - centre).abs().clamp(
                min=torch.finfo(centre.dtype).tiny
            )
            short = derivative(point) >= slope
            near, beyond = torch.where(short, middle, near), torch.where(short, beyond, middle)
        turned = derivative(sign * near)
        reaches = sign * end > 0
        over = sign * centre < 0
        tangent_or_end = torch.where(reaches & (derivative(end) < chord), turned, chord + doubt)
        most = torch.where(over, torch.maximum(tangent_or_end, here), here)
        return least, (most * (1 + epsilon) + torch.finfo(centre.dtype).tiny).clamp(max=steepest)

    least_right, most_right = extremes(upper, +1)
    least_left, most_left = extremes(lower, -1)
    return Secants(most_right, least_left, least_right, most_left)


def _curved(operation: nn.Module, curve: Curve, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Piece by piece: for z from a to b, f(z) is at most f(a) + s (z - a), s the largest slope on the piece.

    The slope of the secant to z is then at most (f(a) - f(z0) + s (z - a)) / (z - z0), which is monotone in z: the
    largest of it is at an end of the piece, on the first piece it is s itself. It holds on both sides of z0, and for
    the least slopes as well.
    """
    epsilon, tiny = 4 * torch.finfo(centre.dtype).eps, torch.finfo(centre.dtype).tiny
    value = operation(centre)

    def extremes(end: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest slope from the centre to one side, up to the end."""
        begin, stop = pieces(centre, end)
        least, largest = slopes_between(curve, torch.minimum(begin, stop), torch.maximum(begin, stop))
        known = operation(begin)
        gain = known - value
        doubt = epsilon * (known.abs() + value.abs())

        def quotients(place: Tensor, numerator: Tensor) -> tuple[Tensor, Tensor]:
            far = place - centre
            size = far.abs().clamp(min=tiny)
            slope, off = numerator * far.sign() / size, doubt / size
            return slope - off, slope + off

        at_begin, way = quotients(begin, gain), stop - begin
        low = torch.cat([at_begin[0][1:], quotients(stop, gain + least * way)[0][1:], least[:1]]).amin(0)
        high = torch.cat([at_begin[1][1:], quotients(stop, gain + largest * way)[1][1:], largest[:1]]).amax(0)
        return torch.maximum(low, least.amin(0)), torch.minimum(high, largest.amax(0))

    least_right, most_right = extremes(upper)
    least_left, most_left = extremes(lower)
    return Secants(most_right, least_left, least_right, most_left)
