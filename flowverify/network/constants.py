"""Constants that conversion computes, as the float64 numbers nearest to their exact values."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

BITS = 256  # of the square root: what it is off by is nothing beside the rounding of the result


def times(constant: Tensor, factor: float) -> Tensor:
    """constant * factor; in float64 where the product needs it."""
    return constant * factor if factor in (1, -1) else constant.double() * factor


def normalisation(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(variance + epsilon) and shift = bias - mean * scale, float64, for tensors of shape (C,).

    Computed in rational arithmetic: in floating point the difference may cancel all digits, and no bound on rounding
    that sees the result alone would cover it. Where a value is not finite, or not positive under the root, so is the
    result not.
    """
    tensors = [tensor.detach().double().cpu() for tensor in (weight, bias, mean, variance)]
    if len({tuple(tensor.shape) for tensor in tensors}) > 1 or tensors[0].ndim != 1:
        weight, bias, mean, variance = tensors
        scale = (variance + epsilon).rsqrt() * weight
        return scale, bias - mean * scale
    channels = zip(*(tensor.tolist() for tensor in tensors), strict=True)
    pairs = [_channel(w, b, m, v, epsilon) for w, b, m, v in channels]
    scale, shift = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T.contiguous()
    return scale, shift


def _channel(weight: float, bias: float, mean: float, variance: float, epsilon: float) -> tuple[float, float]:
    if not all(map(math.isfinite, (weight, bias, mean, variance, epsilon))):
        return math.nan, math.nan
    total = Fraction(variance) + Fraction(epsilon)
    if total <= 0:
        return math.nan, math.nan
    scale = Fraction(weight) / _root(total)
    return _nearest(scale), _nearest(Fraction(bias) - Fraction(mean) * scale)


def _root(number: Fraction) -> Fraction:
    """The square root of a positive number, to a relative 2^-BITS."""
    shift = max(0, 2 * BITS - number.numerator.bit_length() + number.denominator.bit_length())
    shift += shift % 2
    return Fraction(math.isqrt((number.numerator << shift) // number.denominator), 1 << (shift // 2))


def _nearest(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
