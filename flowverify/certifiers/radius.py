"""The largest budget at which a falling margin is positive: bracketing searches, many side by side.

A search runs in what margins fall with about linearly, the budget for each unit of mass; its zero is bracketed by
secants, in one evaluation for all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST = 0.05  # the order of what is found on plainly trained networks (theory, section 20)
SMALLEST = 1e-7
NEAR, CLOSE = 0.1, 0.1  # rough margins lead to a bracket as narrow, or to as small a share of the margin at the start
REFINED = 1.1  # from trial to trial, above what rough margins have led to

MarginFunction = Callable[[Tensor, Tensor], Tensor]  # (rows, budgets) -> margins


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
        close: the search ends where a margin is within close of zero, too.
        expected: where the zero is thought to be, and
        fall: of margins for each unit of radius; from margins that are never larger, NaN for unknown.
    """

    low: float
    low_margin: float
    limit: float
    tolerance: float
    first: float
    smallest: float
    growth: float = 2.0
    close: float = 0.0
    expected: float = math.nan
    fall: float = math.nan
    high: float = math.inf
    _points: list[tuple[float, float]] = field(default_factory=list)
    _slow: int = 0

    def __post_init__(self) -> None:
        self._points.append((self.low, self.low_margin))

    @property
    def finished(self) -> bool:
        closed = self.low > 0 and self.high <= self.low * (1 + self.tolerance)
        near = len(self._points) > 1 and min(abs(margin) for _, margin in self._points) <= self.close
        return closed or near or self.low >= self.limit or self.high <= self.smallest

    def trial(self) -> float:
        """The next radius to evaluate."""
        if self.high == math.inf:
            return min(self.limit, self._further())
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

    def _further(self) -> float:
        """A trial above all that had a positive margin: just beyond the zero, where that can be told."""
        beyond = 1 + 0.45 * self.tolerance
        if self.low == 0:
            return self.expected * beyond if self.expected > 0 else self.first
        known = len(self._points) == 1 and self.expected > self.low
        guess = self.expected if known else self.low + self.low_margin / self.fall
        least, most = self.low * (1 + 0.95 * self.tolerance), guess * beyond if known else self.growth * self.low
        return max(least, min(most, guess * beyond)) if math.isfinite(guess) else most

    def refined(self, tolerance: float, growth: float) -> Bracket:
        """The search with margins that are never smaller, from where this one has led."""
        expected = self._estimate() if self.high < math.inf else math.nan
        points = sorted(self._points, key=lambda point: abs(point[1]))[:2]
        (first, at_first), (second, at_second) = points if len(points) == 2 else (points[0], (math.nan, math.nan))
        fall = (at_first - at_second) / (second - first) if second != first else math.nan
        return Bracket(
            self.low, self.low_margin, self.limit, tolerance, self.first, self.smallest, growth,
            expected=expected, fall=fall if fall > 0 else math.nan,
        )  # fmt: skip

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


def of_rows(evaluate: MarginFunction, rows: Tensor) -> MarginFunction:
    """The same function, of indices among ``rows``."""
    return lambda index, budget: evaluate(rows[index], budget)


def bracket(
    evaluate: MarginFunction,
    start: Tensor,
    at_start: Tensor,
    limit: float,
    tolerance: float,
    growth: float = 2.0,
    rough: MarginFunction | None = None,
) -> Tensor:
    """The largest budgets with a positive margin, to ``tolerance``, from those of ``start`` with these margins.

    Args:
        rough: margins that are never larger than those of ``evaluate``, and cheaper: they lead to near the radius.
    """
    brackets = [
        Bracket(low, margin, limit, tolerance if rough is None else max(NEAR, tolerance), FIRST, SMALLEST, growth,
                close=0.0 if rough is None else CLOSE * margin)
        for low, margin in zip(start.tolist(), at_start.tolist(), strict=True)
    ]  # fmt: skip
    if rough is not None:
        _close(rough, brackets)
        brackets = [one.refined(tolerance, REFINED) for one in brackets]
    _close(evaluate, brackets)
    return torch.tensor([bracket.low for bracket in brackets], dtype=torch.float64)


def _close(evaluate: MarginFunction, brackets: list[Bracket]) -> None:
    """Searches on until all brackets are finished."""
    while active := [index for index, bracket in enumerate(brackets) if not bracket.finished]:
        trials = [brackets[index].trial() for index in active]
        margins = evaluate(torch.tensor(active), torch.tensor(trials, dtype=torch.float64)).tolist()
        for index, trial, margin in zip(active, trials, margins, strict=True):
            brackets[index].update(trial, margin)


def confirm(evaluate: MarginFunction, budget: Tensor, clean: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Lowers each budget until its margin is positive in this evaluation; 0 keeps the clean margin."""
    budget, margin = budget.clone(), clean.clone()
    active = (budget > 0).nonzero().flatten()
    step = tolerance / 4
    while active.numel():
        value = evaluate(active, budget[active])
        margin[active] = value
        active = active[~(value > 0)]
        budget[active] *= 1 - step
        step = min(2 * step, 0.5)
        gone = active[budget[active] < SMALLEST]
        budget[gone], margin[gone] = 0.0, clean[gone]
        active = active[budget[active] > 0]
    return budget, margin
