"""Where to look next for the zero of a falling function: the bracketing search behind every radius."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Bracket:
    """The largest r in (low, limit] with margin(r) > 0, for a margin that falls nearly linearly.

    The two evaluations nearest to zero predict the crossing by a secant. Trials stand just inside of it, so
    that two of them close the bracket; where predictions do not halve it (in log scale), bisection does.

    Attributes:
        low: the largest radius known to have a positive margin.
        high: the smallest trial above it that had none; infinite at first.
        limit: radii beyond it are of no interest.
        tolerance: the search ends when high <= low * (1 + tolerance).
        first: the first trial, where low is 0.
        smallest: radii below it count as 0.
        growth: from trial to trial until one has no positive margin.
    """

    low: float
    low_margin: float
    limit: float
    tolerance: float
    first: float
    smallest: float
    growth: float = 2.0
    high: float = math.inf
    _points: list[tuple[float, float]] = field(default_factory=list)
    _slow: int = 0

    def __post_init__(self) -> None:
        self._points.append((self.low, self.low_margin))

    @property
    def finished(self) -> bool:
        closed = self.low > 0 and self.high <= self.low * (1 + self.tolerance)
        return closed or self.low >= self.limit or self.high <= self.smallest

    def trial(self) -> float:
        """The next radius to evaluate."""
        if self.high == math.inf:
            return min(self.limit, self.first if self.low == 0 else self.growth * self.low)
        estimate = self._estimate()
        inside, step = 0.45 * self.tolerance, 0.95 * self.tolerance
        if self.low > 0 and self.low < estimate < self.low * (1 + self.tolerance):
            trial = self.low * (1 + step)
        elif self.high * (1 - inside) < estimate < self.high:
            trial = self.high / (1 + step)
        elif self._slow < 2:
            trial = estimate * (1 - inside)
        else:
            trial = math.nan
        return trial if self.low < trial < self.high else math.sqrt(max(self.low, self.high / 100) * self.high)

    def update(self, radius: float, margin: float) -> None:
        """Takes in the margin at a trial; anything but a positive number counts as not certified."""
        before = self._width()
        if margin > 0:
            self.low, self.low_margin = radius, margin
        else:
            self.high = radius
        if math.isfinite(margin):
            self._points.append((radius, margin))
        self._slow = self._slow + 1 if self._width() > before / 2 else 0

    def _width(self) -> float:
        return math.log(self.high / self.low) if self.low > 0 and self.high < math.inf else math.inf

    def _estimate(self) -> float:
        """The zero of the line through the two evaluations whose margins are nearest to zero."""
        if len(self._points) < 2:
            return math.nan
        (first, at_first), (second, at_second) = sorted(self._points, key=lambda point: abs(point[1]))[:2]
        if at_first == at_second:
            return math.nan
        return first - at_first * (second - first) / (at_second - at_first)
