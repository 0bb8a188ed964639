"""Scalar functions that networks apply to every entry of a value, and what bounds know about each.

A function is cut where it turns (its slope changes sign) and where it bends (its slope turns): between two turns it is
monotone, between two bends its slope is. Its range on an interval, and that of its slope, are then among few numbers
(theory, section 13). A *curve* has a largest slope, and rounding a rule (theory, section 15); the functions of
:data:`POWERS` have none, and those but Exp are functions of a part of the line only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.errors import InvalidInputError, UnsupportedOperationError


class Softplus(nn.Module):
    """log(1 + exp(x)), which torch replaces by x where both are equal to its precision."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.logaddexp(value, torch.zeros_like(value))


class Erf(nn.Module):
    """The error function."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.erf(value)


class Exp(nn.Module):
    """The exponential function."""

    def forward(self, value: Tensor) -> Tensor:
        return value.exp()


class Log(nn.Module):
    """The natural logarithm, of positive numbers."""

    def forward(self, value: Tensor) -> Tensor:
        return value.log()


class Power(nn.Module):
    """x ** exponent for a constant exponent.

    A whole exponent takes every number (a negative one all but 0), another one the numbers >= 0 (a negative one > 0).

    Raises:
        UnsupportedOperationError: an exponent that is not finite, or 0.
    """

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = float(exponent)
        if not math.isfinite(self.exponent) or self.exponent == 0:
            raise UnsupportedOperationError(f"Power: given exponent {exponent}, expected a finite number other than 0")

    @property
    def whole(self) -> bool:
        """Whether the exponent is an integer."""
        return self.exponent.is_integer()

    @property
    def even(self) -> bool:
        """Whether x and -x have the same power."""
        return self.whole and self.exponent % 2 == 0

    def forward(self, value: Tensor) -> Tensor:
        if self.exponent == 0.5:
            return value.sqrt()
        return value.rsqrt() if self.exponent == -0.5 else value.pow(self.exponent)

    def extra_repr(self) -> str:
        return str(self.exponent)


@dataclass(frozen=True)
class Bend:
    """Where the slope of a function turns or jumps, and the least and the largest of the slopes on its two sides."""

    place: float
    least: float
    largest: float


@dataclass(frozen=True)
class Curve:
    """A function with a largest slope.

    Attributes:
        slope: the derivative; at a jump, that on either side.
        turns: where the function goes from falling to rising or back, in ascending order.
        bends: in ascending order; between two of them, and beyond the last ones, the slope is monotone.
        steepest: no slope is larger in size.
        at_zero: f(0).
    """

    slope: Callable[[Tensor], Tensor]
    turns: tuple[float, ...]
    bends: tuple[Bend, ...]
    steepest: float
    at_zero: float


def _turning(place: float, slope: float) -> Bend:
    return Bend(place, slope, slope)


def _elu(operation: Any) -> Curve:
    alpha = float(operation.alpha)
    return Curve(
        lambda x: torch.where(x > 0, torch.ones_like(x), alpha * x.clamp(max=0).exp()),
        (0.0,) if alpha < 0 else (),
        (Bend(0.0, min(1.0, alpha), max(1.0, alpha)),),
        max(1.0, abs(alpha)),
        0.0,
    )


def _gelu(operation: Any) -> Curve:
    if operation.approximate == "tanh":

        def slope(x: Tensor) -> Tensor:
            x = x.clamp(-20, 20)  # beyond, slopes are 0 and 1
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            near = torch.sigmoid(2 * inner)
            return near + 2 * x * near * torch.sigmoid(-2 * inner) * math.sqrt(2 / math.pi) * (1 + 0.134145 * x**2)

        place, least, turn = 1.4185040087908283555, -0.12899306865877176546, -0.75246142207101625849
    else:

        def slope(x: Tensor) -> Tensor:
            density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
            share: Tensor = torch.special.ndtr(x)
            return share + (x * density).nan_to_num(nan=0.0)

        place, least, turn = math.sqrt(2.0), -0.12890414518515478634, -0.75179152469356445746
    return Curve(slope, (turn,), (_turning(-place, least), _turning(place, 1 - least)), 1 - least, 0.0)


def _silu(operation: Any) -> Curve:
    def slope(x: Tensor) -> Tensor:
        near, far = torch.sigmoid(x), torch.sigmoid(-x)
        return near * (1 + x * far)

    place, most = 2.3993572805154676678, 1.099839320128866917
    return Curve(
        slope, (-1.2784645427610737951,), (_turning(-place, 1 - most), _turning(place, most)), most, 0.0
    )  # fmt: skip


def _mish(operation: Any) -> Curve:
    def slope(x: Tensor) -> Tensor:
        level = torch.tanh(functional.softplus(x, threshold=40))
        return level + x * torch.sigmoid(x) * (1 - level) * (1 + level)

    bends = (
        _turning(-2.25637639636079312, -0.11252612238946255641),
        _turning(1.4905711794854284593, 1.0884981612517278612),
    )
    return Curve(slope, (-1.1924312145154952121,), bends, 1.0884981612517278612, 0.0)


def _hardswish(operation: Any) -> Curve:
    def slope(x: Tensor) -> Tensor:
        return torch.where(x >= 3, 1.0, torch.where(x <= -3, 0.0, (2 * x + 3) / 6))

    return Curve(slope, (-1.5,), (Bend(-3.0, -0.5, 0.0), Bend(3.0, 1.0, 1.5)), 1.5, 0.0)


def _softplus(operation: Any) -> Curve:
    return Curve(torch.sigmoid, (), (), 1.0, math.log(2.0))


def _erf(operation: Any) -> Curve:
    steepest = 2 / math.sqrt(math.pi)
    return Curve(lambda x: steepest * (-x.square()).exp(), (), (_turning(0.0, steepest),), steepest, 0.0)


def _softsign(operation: Any) -> Curve:
    return Curve(lambda x: (1 + x.abs()) ** -2, (), (_turning(0.0, 1.0),), 1.0, 0.0)


CURVES: dict[type[nn.Module], Callable[[Any], Curve]] = {
    nn.ELU: _elu, nn.GELU: _gelu, nn.SiLU: _silu, nn.Mish: _mish, nn.Hardswish: _hardswish, nn.Softsign: _softsign,
    Softplus: _softplus, Erf: _erf,
}  # fmt: skip
POWERS: tuple[type[nn.Module], ...] = (Exp, Log, Power)


def _two_pieces(operation: Any) -> Curve:
    left = float(getattr(operation, "negative_slope", 0.0))
    bend = Bend(0.0, min(left, 1.0), max(left, 1.0))
    turns = (0.0,) if left < 0 else ()
    return Curve(lambda x: torch.where(x > 0, 1.0, left).to(x), turns, (bend,), max(1.0, abs(left)), 0.0)


def _sigmoid(operation: Any) -> Curve:
    return Curve(lambda x: torch.sigmoid(x) * torch.sigmoid(-x), (), (_turning(0.0, 0.25),), 0.25, 0.5)


def _tanh(operation: Any) -> Curve:
    return Curve(lambda x: 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x), (), (_turning(0.0, 1.0),), 1.0, 0.0)


def _power(operation: Any) -> Curve:
    exponent = operation.exponent
    bends = (_turning(0.0, 0.0),) if operation.whole and not operation.even and exponent > 1 else ()
    turns = (0.0,) if operation.even and exponent > 0 else ()
    return Curve(lambda x: exponent * x.pow(exponent - 1), turns, bends, math.inf, math.nan)


FUNCTIONS: dict[type[nn.Module], Callable[[Any], Curve]] = {
    **CURVES, nn.ReLU: _two_pieces, nn.LeakyReLU: _two_pieces, nn.Sigmoid: _sigmoid, nn.Tanh: _tanh,
    Exp: lambda operation: Curve(torch.exp, (), (), math.inf, 1.0),
    Log: lambda operation: Curve(torch.reciprocal, (), (), math.inf, math.nan), Power: _power,
}  # fmt: skip
"""All functions of one number, those without a largest slope among them."""


LOOKED_AT = torch.linspace(-30, 30, 12001, dtype=torch.float64)


def check_curve(operation: nn.Module, curve: Curve) -> None:
    """Looks at a curve of somebody else's at many places; what it says beyond them is believed.

    Raises:
        InvalidInputError: its value at 0, its slopes, or where it turns and bends are not what they are said to be.
    """
    with torch.no_grad():
        values, slopes = operation(LOOKED_AT), curve.slope(LOOKED_AT)
        at_zero = float(operation(LOOKED_AT.new_zeros(())))
    name = type(operation).__name__
    steps = (values[1:] - values[:-1]) / (LOOKED_AT[1:] - LOOKED_AT[:-1])
    least, largest = slopes_between(curve, LOOKED_AT[:-1], LOOKED_AT[1:])
    room = 1e-7 * (1 + curve.steepest)
    faults = {
        "values that are not finite": not bool(torch.isfinite(values).all() & torch.isfinite(slopes).all()),
        f"f(0) = {at_zero:g}, not {curve.at_zero:g}": not abs(at_zero - curve.at_zero) <= 1e-12 * (1 + abs(at_zero)),
        f"a slope larger than {curve.steepest:g}": not bool((slopes.abs() <= curve.steepest + room).all()),
        "differences of values beyond the slopes there": not bool(
            ((steps >= least - room) & (steps <= largest + room)).all()
        ),
        "a place where it turns that is not named": _changes(steps, curve.turns, room),
        "a place where its slope turns that is not named": _changes(
            slopes[1:] - slopes[:-1], tuple(bend.place for bend in curve.bends), 1e-12 * (1 + curve.steepest)
        ),
    }
    for fault, present in faults.items():
        if present:
            raise InvalidInputError(f"curve of {name}: {fault}")


def _changes(differences: Tensor, places: tuple[float, ...], room: float) -> bool:
    """Whether differences between neighbours have both signs between two places."""
    ends = [-math.inf, *places, math.inf]
    for low, high in itertools.pairwise(ends):
        inside = differences[(LOOKED_AT[:-1] > low) & (LOOKED_AT[1:] < high)]
        if bool((inside > room).any()) and bool((inside < -room).any()):
            return True
    return False


def slopes_between(curve: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest slope of a curve on [lower, upper], entry by entry."""
    ends = curve.slope(lower), curve.slope(upper)
    least, largest = torch.minimum(*ends), torch.maximum(*ends)
    for bend in curve.bends:
        within = (lower <= bend.place) & (upper >= bend.place)
        least = torch.where(within, least.clamp(max=bend.least), least)
        largest = torch.where(within, largest.clamp(min=bend.largest), largest)
    return least, largest


def range_between(
    operation: nn.Module, turns: tuple[float, ...], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The least and the largest value of a function on [lower, upper], given where it turns."""
    ends = operation(lower), operation(upper)
    least, largest = torch.minimum(*ends), torch.maximum(*ends)
    for place in turns:
        within = (lower <= place) & (upper >= place)
        value = operation(lower.new_tensor(place))
        least = torch.where(within, torch.minimum(least, value), least)
        largest = torch.where(within, torch.maximum(largest, value), largest)
    return least, largest
