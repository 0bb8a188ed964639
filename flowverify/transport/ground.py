"""Ground costs: what it costs to move one unit of mass from one pixel to another of the same channel.

A ground cost is a function of the two pixels' offset (rows, columns), in pixels. To add one, write that
function and enter it in ``_COSTS`` with what the rest of the package may rely on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class _Cost:
    of_offset: Callable[[FloatArray, FloatArray], FloatArray]  # (row offsets, column offsets) -> costs
    l1_over_cost: float  # the least factor with l1 distance <= factor * cost; inf where there is none
    is_metric: bool  # common mass may stay where it is


def _l1(rows: FloatArray, columns: FloatArray) -> FloatArray:
    return np.abs(rows) + np.abs(columns)


def _l2(rows: FloatArray, columns: FloatArray) -> FloatArray:
    return np.hypot(rows, columns)


_COSTS: dict[str, _Cost] = {
    "l1": _Cost(_l1, 1.0, is_metric=True),
    "l2": _Cost(_l2, math.sqrt(2.0), is_metric=True),
}

GROUNDS: tuple[str, ...] = tuple(_COSTS)


def check_ground(name: object) -> str:
    """Returns the name of a ground cost, or raises UnknownNameError with the list of valid ones."""
    if not isinstance(name, str) or name not in _COSTS:
        raise UnknownNameError("ground cost", name, GROUNDS)
    return name


def l1_over_ground(ground: str) -> float:
    """The least factor with l1(p, q) <= factor * ground(p, q) for all pixels: 1 for l1, sqrt(2) for l2.

    Then W1_l1 <= factor * W1_ground, the ground ball of radius r lies in the l1 ball of radius factor * r,
    and a certificate of radius r for l1 is one of radius r / factor for the ground cost (design, section 2).
    """
    return _COSTS[check_ground(ground)].l1_over_cost


def is_metric(ground: str) -> bool:
    """Whether the cost is a metric; then an optimal plan may leave all common mass where it is."""
    return _COSTS[check_ground(ground)].is_metric


def pixel_costs(sources: IndexArray, targets: IndexArray, width: int, ground: str) -> FloatArray:
    """Cost from pixel to pixel, float64, in pixels, for row-major indices that broadcast together."""
    rows, columns = np.divmod(sources, width)
    target_rows, target_columns = np.divmod(targets, width)
    return _COSTS[check_ground(ground)].of_offset(
        np.asarray(target_rows - rows, dtype=np.float64),
        np.asarray(target_columns - columns, dtype=np.float64),
    )


def ground_cost(grid: Grid | tuple[int, int], ground: str = "l1") -> Tensor:
    """The cost matrix between the H*W pixels of one channel, row by row.

    Args:
        grid: a grid, or (height, width).
        ground: one of ``GROUNDS``.

    Returns:
        float64 tensor (H*W, H*W), in pixels. It is cached and shared: do not write to it.

    Raises:
        UnknownNameError: the ground cost is unknown.
        InvalidInputError: height or width is not a positive integer.
    """
    if isinstance(grid, tuple):
        grid = _grid_of_pair(grid)
    return _matrix(grid.height, grid.width, check_ground(ground))


def _grid_of_pair(pair: tuple[Any, ...]) -> Grid:
    if len(pair) != 2:
        raise InvalidInputError(f"grid {pair!r}: expected a Grid or (height, width)")
    return Grid(pair[0], pair[1])


@lru_cache(maxsize=8)
def _matrix(height: int, width: int, ground: str) -> Tensor:
    pixels = np.arange(height * width, dtype=np.int64)
    return torch.from_numpy(pixel_costs(pixels[:, None], pixels[None, :], width, ground))
