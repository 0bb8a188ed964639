"""Ground costs: what it costs to move one unit of mass from one pixel to another of the same channel.

A ground cost is a function of the two pixels' offset (rows, columns), in pixels, and is given by its name:

    name    = base [ "^" p ]                       l1, l2, l2^2, l1^1.5, local:5, local:5:l1^2
    base    = distance | "local:" k [ ":" distance ]

``l1`` is |di| + |dj|, ``l2`` is Euclidean. ``local:k`` moves mass within the k x k window around its pixel only, at
Euclidean cost unless another distance is named (the threat model of Wong et al. 2019, Section 4.2); outside the cost is
infinite. ``^p`` with p >= 1 is the p-th power d^p of the distance d: the threat model is then the p-Wasserstein ball,

    W_p(mu, nu) = (min over plans P of sum_ij P_ij d(i, j)^p / mass)^(1/p)  <=  radius,

so that the budget of a radius is radius^p * mass. Radii are in pixels for every cost.

Each cost is a class. Another one is added by its class alone, from anywhere (:func:`register_ground`); powers of it and
windows of it then have names, too.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.registry import find_outside, is_outside

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

ROUNDING = 1e-12  # relative, in what is asked of a cost

Amount = TypeVar("Amount", float, Tensor)


class GroundCost(ABC):
    """d(offset)^p: the price of a move. A subclass says :meth:`of_offset`, and how :attr:`l1_factor` bounds l1.

    What is asked of a distance d (:meth:`check_grid` looks at every offset of an image): 0 for what stays, and at least
    1 for all else, as pixels are one apart; the same in both directions of either axis; infinite where mass may not go.

    Attributes:
        name: the shortest name of this cost.
        forms: what a list of valid names shows for it.
        power: p >= 1.
        window: k, odd, where mass moves within k x k pixels only.
        l1_factor: a factor with |rows| + |columns| <= l1_factor * d, the least for sharp conversions.
        is_metric: whether the triangle inequality holds; then an optimal plan may leave all common mass where it is.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    power: float = 1.0
    window: int | None = None
    l1_factor: float
    is_metric: bool = True

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        """Costs of offsets, float64, for rows and columns that broadcast together."""

    @classmethod
    def parse(cls, text: str) -> GroundCost | None:
        """The cost of this name, if it is one of this class.

        Raises:
            InvalidInputError: it looks like one, with a number that is none of a cost.
        """
        made = cls()
        return made if made.name == text else None

    @property
    def distance(self) -> GroundCost:
        """d, without a power and a window."""
        return self

    def unrestricted(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        """Costs of offsets as if there were no window."""
        return self.of_offset(rows, columns)

    def l1_over_power(self, power: float) -> float:
        """A factor with |rows| + |columns| <= factor * d^power; as d >= 1, the one for d will do."""
        return self.l1_factor

    @property
    def steepness(self) -> float:
        """What is paid for l1 is at most so many times what is paid for this cost."""
        return self.l1_over_power(1.0)

    def check_grid(self, height: int, width: int) -> None:
        """Raises InvalidInputError if the cost does not fit images of this size, or is none."""
        _check_offsets(self, height, width)

    def largest_distance(self, height: int, width: int) -> float:
        """The largest radius that means anything: the longest way, in pixels, that mass may go."""
        costs = self.of_offset(*_offset_table(height, width))
        return float(costs[np.isfinite(costs)].max())

    def budget(self, radius: Amount) -> Amount:
        """radius^p: what the plans of the ball may cost, for each unit of mass."""
        return radius if self.power == 1.0 else radius**self.power

    def radius(self, cost: Tensor) -> Tensor:
        """cost^(1/p): W_p of the cost of a plan for each unit of mass."""
        return cost if self.power == 1.0 else cost ** (1.0 / self.power)

    def to_l1(self, radius: float) -> float:
        """The radius of a ball of l1 ground cost that contains the ball of this radius.

        W1_l1 <= factor * W1_d <= factor * W_p (Jensen), with :attr:`l1_factor`. As pixels are whole steps apart, also
        l1 <= steepness * d^p, so that W1_l1 <= steepness * radius^p (theory, section 9).
        """
        return min(self.l1_factor * radius, self.steepness * float(radius**self.power))

    def from_l1(self, radius: float) -> float:
        """The largest radius whose ball :meth:`to_l1` places in the l1 ball of ``radius``."""
        return max(radius / self.l1_factor, float((radius / self.steepness) ** (1.0 / self.power)))


Cost = TypeVar("Cost", bound=type[GroundCost])

GROUNDS: dict[str, type[GroundCost]] = {}  # by the first of their forms, in the order in which names are tried


def register_ground(cost: Cost) -> Cost:
    """Adds a class of ground costs, whose names are then valid everywhere; a decorator.

    Raises:
        InvalidInputError: another class has its form already.
    """
    form = (cost.forms or (str(cost.name),))[0]
    if GROUNDS.get(form, cost) is not cost:
        raise InvalidInputError(f"ground cost {form!r}: given a second class of this form, expected one")
    GROUNDS[form] = cost
    _find.cache_clear()
    return cost


@lru_cache(maxsize=64)
def _find(name: str) -> GroundCost | None:
    for cost in GROUNDS.values():
        if (found := cost.parse(name)) is not None:
            return found
    return None


@register_ground
@dataclass(frozen=True)
class L1(GroundCost):
    """|di| + |dj|: steps from pixel to pixel."""

    name = "l1"
    l1_factor = 1.0

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return np.abs(rows) + np.abs(columns)


@register_ground
@dataclass(frozen=True)
class L2(GroundCost):
    """sqrt(di^2 + dj^2)."""

    name = "l2"
    l1_factor = math.sqrt(2.0)

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return np.hypot(rows, columns)

    def l1_over_power(self, power: float) -> float:
        # The diagonal step (1, 1), or a step to a neighbour: at (a, b), l1 / l2^p <= sqrt(2) l2^(1-p), which falls with
        # l2.
        return max(1.0, math.pow(2.0, 1.0 - power / 2.0))


@register_ground
@dataclass(frozen=True)
class Local(GroundCost):
    """A distance within a k x k window, infinite outside of it.

    Attributes:
        inner: the distance.
        window: k, odd.
    """

    forms = ("local:K", "local:K:l1")
    is_metric = False

    inner: GroundCost
    window: int

    @property
    def name(self) -> str:
        return f"local:{self.window}" + ("" if self.inner == L2() else f":{self.inner.name}")

    @classmethod
    def parse(cls, text: str) -> GroundCost | None:
        found = re.fullmatch(r"local:(-?\d+)(?::(.+))?", text)
        inner = None if found is None else _find(found[2] or "l2")
        if found is None or inner is None or inner.distance is not inner:
            return None
        window = int(found[1])
        if window < 1 or window % 2 == 0:
            raise InvalidInputError(f"ground cost {text!r}: given the window {window}, expected an odd number >= 1")
        return cls(inner, window)

    @property
    def l1_factor(self) -> float:  # type: ignore[override]
        return self.inner.l1_factor

    @property
    def distance(self) -> GroundCost:
        return self.inner

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        edge = self.window // 2
        inside = (np.abs(rows) <= edge) & (np.abs(columns) <= edge)
        return np.where(inside, self.inner.of_offset(rows, columns), np.inf)

    def unrestricted(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return self.inner.of_offset(rows, columns)

    def l1_over_power(self, power: float) -> float:
        return self.inner.l1_over_power(power)

    def check_grid(self, height: int, width: int) -> None:
        if self.window > max(height, width):
            raise InvalidInputError(
                f"ground cost {self.name!r}: a window of {self.window} pixels on images of {height} x {width}: "
                f"expected at most {max(height, width)}"
            )
        super().check_grid(height, width)


@register_ground
@dataclass(frozen=True)
class Power(GroundCost):
    """The p-th power of a distance, or of one within a window.

    Attributes:
        base: the distance.
        power: p > 1.
    """

    forms = ("with ^P appended for a power P >= 1 (l2^2)",)
    is_metric = False

    base: GroundCost
    power: float

    @property
    def name(self) -> str:
        return f"{self.base.name}^{self.power:.12g}"

    @classmethod
    def parse(cls, text: str) -> GroundCost | None:
        start, mark, exponent = text.partition("^")
        base = _find(start) if mark else None
        if base is None:
            return None
        try:
            power = float(exponent)
        except ValueError:
            power = math.nan
        if not 1 <= power < math.inf:
            raise InvalidInputError(
                f"ground cost {text!r}: given the power {exponent}, expected a finite number p >= 1"
            )
        return base if power == 1.0 else cls(base, power)

    @property
    def l1_factor(self) -> float:  # type: ignore[override]
        return self.base.l1_factor

    @property
    def distance(self) -> GroundCost:
        return self.base.distance

    @property
    def window(self) -> int | None:  # type: ignore[override]
        return self.base.window

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return self.base.of_offset(rows, columns) ** self.power

    def unrestricted(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return self.base.unrestricted(rows, columns) ** self.power

    @property
    def steepness(self) -> float:
        return self.base.l1_over_power(self.power)

    def check_grid(self, height: int, width: int) -> None:
        self.base.check_grid(height, width)
        super().check_grid(height, width)

    def largest_distance(self, height: int, width: int) -> float:
        return self.base.largest_distance(height, width)


def parse_ground(name: object) -> GroundCost:
    """The ground cost of this name, or of MODULE:CLASS, which is registered then.

    Raises:
        UnknownNameError: the name is not of the form in the module's text, nor one that was registered.
        InvalidInputError: a power that is not a finite number >= 1, an even window, or one below 1; no such class.
    """
    found = _find(name) if isinstance(name, str) else None
    if found is None and _is_outside(name):
        return _outside(str(name))
    if found is None:
        raise UnknownNameError("ground cost", name, ground_forms())
    return found


def _is_outside(name: object) -> bool:
    return is_outside(name) and not str(name).startswith("local:")


@lru_cache(maxsize=64)
def _outside(name: str) -> GroundCost:
    kind = find_outside("ground cost", name, f"{__name__}:GroundCost")
    try:
        made: GroundCost = kind()
    except TypeError as error:
        raise InvalidInputError(f"ground cost {name!r}: {error}, expected a class that needs no argument") from error
    register_ground(kind)
    return made


def ground_forms() -> tuple[str, ...]:
    """What names of ground costs look like, one entry a form."""
    return tuple(form for key, cost in GROUNDS.items() for form in cost.forms or (key,))


def _offset_table(height: int, width: int) -> tuple[FloatArray, FloatArray]:
    """Offsets in which rows and columns grow, as two arrays (height, width)."""
    rows, columns = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    return rows, columns


@lru_cache(maxsize=64)
def _check_offsets(cost: GroundCost, height: int, width: int) -> None:
    """Raises InvalidInputError unless the cost is what :class:`GroundCost` asks for at every offset of an image."""
    rows, columns = _offset_table(height, width)
    own, price, l1 = cost.of_offset(rows, columns), cost.unrestricted(rows, columns), rows + columns
    low, high = 1 - ROUNDING, 1 + ROUNDING
    expected = None
    if any(getattr(costs, "shape", None) != l1.shape or costs.dtype != np.float64 for costs in (own, price)):
        expected = "a float64 number for each offset"
    elif not all(np.array_equal(own, cost.of_offset(i * rows, j * columns)) for i in (1, -1) for j in (1, -1)):
        expected = "the same number in both directions of either axis"
    elif own.flat[0] != 0 or not (own.flat[1:] >= low).all():
        expected = "0 for what stays and at least 1 for every move"
    elif not (l1 <= cost.l1_factor * price ** (1 / cost.power) * high).all():
        expected = f"|rows| + |columns| to be at most l1_factor, {cost.l1_factor:g}, times the distance"
    elif not (l1 <= cost.steepness * price * high).all():
        expected = f"|rows| + |columns| to be at most {cost.steepness:g} times the cost (l1_over_power)"
    if expected is not None:
        raise InvalidInputError(f"ground cost {cost.name!r} on images of {height} x {width}: expected {expected}")


def check_ground(name: object, grid: Grid | None = None) -> str:
    """Returns the shortest name of a ground cost; of MODULE:CLASS, that, so that other processes know it, too.

    Raises:
        UnknownNameError, InvalidInputError: as :func:`parse_ground`; with a grid, also a window that is larger
            than its images.
    """
    ground = parse_ground(name)
    if grid is not None:
        ground.check_grid(grid.height, grid.width)
    return str(name) if _is_outside(name) else ground.name


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
