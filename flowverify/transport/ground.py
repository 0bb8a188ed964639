"""Ground costs: what it costs to move one unit of mass from one pixel to another of the same channel.

A ground cost is a function of the two pixels' offset (rows, columns), in pixels, and is given by its name:

    name    = base [ "^" p ]                       l1, l2, l2^2, l1^1.5, local:5, local:5:l1^2
    base    = "l1" | "l2" | "local:" k [ ":l1" | ":l2" ]

``l1`` is |di| + |dj|, ``l2`` is Euclidean. ``local:k`` moves mass within the k x k window around its pixel only, at
Euclidean cost unless another is named (the threat model of Wong et al. 2019, Section 4.2); outside the cost is
infinite. ``^p`` with p >= 1 is the p-th power d^p of the distance d: the threat model is then the p-Wasserstein ball,

    W_p(mu, nu) = (min over plans P of sum_ij P_ij d(i, j)^p / mass)^(1/p)  <=  radius,

so that the budget of a radius is radius^p * mass. Radii are in pixels for every cost.
"""

from __future__ import annotations

import math
import re
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

GROUNDS: tuple[str, ...] = ("l1", "l2")  # the distances on which every ground cost is built
FORMS: tuple[str, ...] = (*GROUNDS, "local:K", "local:K:l1", "with ^P appended for a power P >= 1 (l2^2)")

_L1_OVER = {"l1": 1.0, "l2": math.sqrt(2.0)}  # the least factor with l1 <= factor * distance
_NAME = re.compile(r"(l1|l2|local:(?P<window>-?\d+)(?::(?P<inner>l1|l2))?)(?:\^(?P<power>.+))?")


@dataclass(frozen=True)
class GroundCost:
    """d(offset)^power within the window, infinite outside of it; made by :func:`parse_ground`.

    Attributes:
        distance: "l1" or "l2".
        power: p >= 1.
        window: k, odd; None where mass may go anywhere.
    """

    distance: str
    power: float = 1.0
    window: int | None = None

    @property
    def name(self) -> str:
        """The shortest name of this cost."""
        base = self.distance
        if self.window is not None:
            base = f"local:{self.window}" + ("" if self.distance == "l2" else f":{self.distance}")
        return base if self.power == 1.0 else f"{base}^{self.power:.12g}"

    @property
    def is_metric(self) -> bool:
        """Whether the triangle inequality holds; then an optimal plan may leave all common mass where it is."""
        return self.power == 1.0 and self.window is None

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        """Costs of offsets, float64."""
        costs = self.unrestricted(rows, columns)
        if self.window is None:
            return costs
        edge = self.window // 2
        return np.where((np.abs(rows) <= edge) & (np.abs(columns) <= edge), costs, np.inf)

    def unrestricted(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        """Costs of offsets without the window."""
        distances = np.abs(rows) + np.abs(columns) if self.distance == "l1" else np.hypot(rows, columns)
        return distances if self.power == 1.0 else distances**self.power

    def check_grid(self, height: int, width: int) -> None:
        """Raises InvalidInputError if the window is larger than the image."""
        if self.window is not None and self.window > max(height, width):
            raise InvalidInputError(
                f"ground cost {self.name!r}: a window of {self.window} pixels on images of {height} x {width}: "
                f"expected at most {max(height, width)}"
            )

    def largest_distance(self, height: int, width: int) -> float:
        """The largest radius that means anything: the longest way, in pixels, that mass may go."""
        edge = max(height, width) if self.window is None else self.window // 2
        rows, columns = float(min(edge, height - 1)), float(min(edge, width - 1))
        return rows + columns if self.distance == "l1" else math.hypot(rows, columns)

    def budget(self, radius: Tensor) -> Tensor:
        """radius^p: what the plans of the ball may cost, for each unit of mass."""
        return radius if self.power == 1.0 else radius**self.power

    def radius(self, cost: Tensor) -> Tensor:
        """cost^(1/p): W_p of the cost of a plan for each unit of mass."""
        return cost if self.power == 1.0 else cost ** (1.0 / self.power)

    def to_l1(self, radius: float) -> float:
        """The radius of a ball of l1 ground cost that contains the ball of this radius.

        W1_l1 <= factor * W1_d <= factor * W_p (Jensen), with the factor of :func:`l1_over_ground`. As pixels
        are whole steps apart, also l1 <= steepness * d^p, so that W1_l1 <= steepness * radius^p.
        """
        return min(_L1_OVER[self.distance] * radius, self.steepness * float(radius**self.power))

    def from_l1(self, radius: float) -> float:
        """The largest radius whose ball :meth:`to_l1` places in the l1 ball of ``radius``."""
        return max(radius / _L1_OVER[self.distance], float((radius / self.steepness) ** (1.0 / self.power)))

    @property
    def steepness(self) -> float:
        """max over offsets of l1 / d^p: what is paid for l1 is at most so many times what is paid for this cost."""
        # For l2 the diagonal step (1, 1), or a step to a neighbour: at (a, b), l1 / l2^p <= sqrt(2) l2^(1-p), which
        # falls with l2.
        return 1.0 if self.distance == "l1" else max(1.0, 2.0 ** (1.0 - self.power / 2.0))


def parse_ground(name: object) -> GroundCost:
    """The ground cost of this name.

    Raises:
        UnknownNameError: the name is not of the form in the module's text.
        InvalidInputError: a power that is not a finite number >= 1, an even window, or one below 1.
    """
    return _parse(name) if isinstance(name, str) else _unknown(name)


@lru_cache(maxsize=64)
def _parse(name: str) -> GroundCost:
    found = _NAME.fullmatch(name)
    if found is None:
        return _unknown(name)
    power, window = 1.0, None
    if found["power"] is not None:
        try:
            power = float(found["power"])
        except ValueError:
            power = math.nan
        if not 1 <= power < math.inf:
            raise InvalidInputError(
                f"ground cost {name!r}: given the power {found['power']}, expected a finite number p >= 1"
            )
    if found["window"] is not None:
        window = int(found["window"])
        if window < 1 or window % 2 == 0:
            raise InvalidInputError(f"ground cost {name!r}: given the window {window}, expected an odd number >= 1")
    distance = found["inner"] or ("l2" if window is not None else found[1])
    return GroundCost(distance, power, window)


def _unknown(name: object) -> GroundCost:
    raise UnknownNameError("ground cost", name, FORMS)


def check_ground(name: object, grid: Grid | None = None) -> str:
    """Returns the shortest name of a ground cost.

    Raises:
        UnknownNameError, InvalidInputError: as :func:`parse_ground`; with a grid, also a window that is larger
            than its images.
    """
    ground = parse_ground(name)
    if grid is not None:
        ground.check_grid(grid.height, grid.width)
    return ground.name


def l1_over_ground(ground: str) -> float:
    """The least factor with W1_l1 <= factor * W_ground: 1 for costs built on l1, sqrt(2) for those on l2.

    The ground ball of radius r lies in the l1 ball of radius factor * r, and a certificate of radius r for l1 is one
    of radius r / factor for the ground cost (theory, section 9). :meth:`GroundCost.to_l1` is sharper for powers.
    """
    return _L1_OVER[parse_ground(ground).distance]


def is_metric(ground: str) -> bool:
    """Whether the cost is a metric; then an optimal plan may leave all common mass where it is."""
    return parse_ground(ground).is_metric


def pixel_costs(sources: IndexArray, targets: IndexArray, width: int, ground: str) -> FloatArray:
    """Cost from pixel to pixel, float64, for row-major indices that broadcast together."""
    return parse_ground(ground).of_offset(*_offsets(sources, targets, width))


def unrestricted_costs(sources: IndexArray, targets: IndexArray, width: int, ground: str) -> FloatArray:
    """As :func:`pixel_costs`, without the window."""
    return parse_ground(ground).unrestricted(*_offsets(sources, targets, width))


def _offsets(sources: IndexArray, targets: IndexArray, width: int) -> tuple[FloatArray, FloatArray]:
    rows, columns = np.divmod(sources, width)
    target_rows, target_columns = np.divmod(targets, width)
    return (
        np.asarray(target_rows - rows, dtype=np.float64),
        np.asarray(target_columns - columns, dtype=np.float64),
    )


def ground_cost(grid: Grid | tuple[int, int], ground: str = "l1") -> Tensor:
    """The cost matrix between the H*W pixels of one channel, row by row.

    Args:
        grid: a grid, or (height, width).
        ground: the name of a ground cost.

    Returns:
        float64 tensor (H*W, H*W), infinite where mass may not go. It is cached and shared: do not write to it.

    Raises:
        UnknownNameError: the ground cost is unknown.
        InvalidInputError: height or width is not a positive integer; as :func:`check_ground`.
    """
    if isinstance(grid, tuple):
        grid = _grid_of_pair(grid)
    return _matrix(grid.height, grid.width, check_ground(ground, grid))


def _grid_of_pair(pair: tuple[Any, ...]) -> Grid:
    if len(pair) != 2:
        raise InvalidInputError(f"grid {pair!r}: expected a Grid or (height, width)")
    return Grid(pair[0], pair[1])


@lru_cache(maxsize=8)
def _matrix(height: int, width: int, ground: str) -> Tensor:
    pixels = np.arange(height * width, dtype=np.int64)
    return torch.from_numpy(pixel_costs(pixels[:, None], pixels[None, :], width, ground))


@lru_cache(maxsize=16)
def offsets_by_cost(height: int, width: int, ground: str) -> tuple[IndexArray, FloatArray]:
    """All offsets (rows, columns) of finite cost on a grid, int64 (n, 2), with their costs (n,), cheapest first.

    Raises:
        UnknownNameError, InvalidInputError: as :func:`check_ground`.
    """
    parse_ground(ground).check_grid(height, width)
    big_height, big_width = 2 * height - 1, 2 * width - 1
    every = np.arange(big_height * big_width, dtype=np.int64)
    centre = np.array((height - 1) * big_width + width - 1, dtype=np.int64)
    costs = pixel_costs(centre, every, big_width, ground)
    order = np.argsort(costs, kind="stable")
    order = order[np.isfinite(costs[order])]
    rows, columns = np.divmod(every[order], big_width)
    return np.stack([rows - (height - 1), columns - (width - 1)], axis=1), costs[order]


@lru_cache(maxsize=16)
def steepest_offsets(height: int, width: int, ground: str) -> tuple[IndexArray, FloatArray]:
    """The offsets that decide Lip(c) = max over offsets o of |c_(i+o) - c_i| / cost(o), cheapest first.

    One of each pair +-o, and of offsets that are made of two shorter ones within their rectangle, at no more
    cost, none: c cannot be steeper along the sum than along the steeper of the two.
    """
    offsets, costs = offsets_by_cost(height, width, ground)
    table = np.full((height, width), np.inf)
    table[np.abs(offsets[:, 0]), np.abs(offsets[:, 1])] = costs
    needed = np.zeros((height, width), dtype=bool)
    for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
        part = table[: row + 1, : column + 1]
        made = part + part[::-1, ::-1]
        made[0, 0] = made[-1, -1] = np.inf
        needed[row, column] = row + column > 0 and not made.min() <= table[row, column]
    half = (offsets[:, 0] > 0) | ((offsets[:, 0] == 0) & (offsets[:, 1] > 0))
    chosen = half & needed[np.abs(offsets[:, 0]), np.abs(offsets[:, 1])]
    return offsets[chosen], costs[chosen]
