"""Rounding to float32 towards one side, so that a written constraint is never tighter than the one that is meant."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


def round_up(values: FloatArray) -> FloatArray:
    """The least float32 numbers that are not below the given ones, as float64."""
    nearest = np.asarray(values, dtype=np.float64).astype(np.float32)
    raised = np.nextafter(nearest, np.float32(np.inf))
    return np.where(nearest.astype(np.float64) < values, raised, nearest).astype(np.float64)


def round_down(values: FloatArray) -> FloatArray:
    """The largest float32 numbers that are not above the given ones, as float64."""
    return -round_up(-np.asarray(values, dtype=np.float64))


def tensor_up(values: Tensor) -> Tensor:
    """:func:`round_up` for a tensor; the result is float64."""
    return torch.from_numpy(round_up(values.detach().cpu().double().numpy()))


def scalar_up(value: float) -> float:
    """:func:`round_up` for one number."""
    return float(round_up(np.array(value)))


def decimal(value: float) -> str:
    """A plain decimal that reads back as the same float64: no exponent, and always a point.

    Raises:
        ValueError: the number is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"given {value}, expected a finite number")
    return str(np.format_float_positional(value + 0.0, unique=True, trim="0"))
