"""The largest budget at which a falling margin is positive: bracketing searches, many side by side.

A search runs in what margins fall with about linearly, the budget for each unit of mass. What a margin has fallen by
grows about as a power of the budget, which each search fits to its trials: it predicts the zero, and a search may end
where it is sure of it. All images are evaluated together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowverify.bounds.engine import Effort

MarginFunction = Callable[[Tensor, Tensor], Tensor]  # (rows, budgets) -> margins


@dataclass(frozen=True)
class RadiusSettings:
    """How radii are searched: for speed alone, as what is found is confirmed.

    Attributes:
        first_share: the first trial, as a share of the budget at which the margin's linear part ends it.
        first: the first trial where there is no such budget.
        smallest: radii below it count as 0.
        growth: from trial to trial, at most, until one has no positive margin.
        least_growth: from trial to trial, at least, where margins are so large that they were left as they are.
        exponent: of the budget, in what margins fall by, until trials tell.
        rough_share: rough margins are searched until a trial is within this share of the zero that they predict.
        lift: by which refined margins are expected to raise it.
        sure: how many tolerances a trial is within the predicted zero when a search ends.
        inside: how many tolerances below the predicted zero what is to be confirmed lies.
        raised_growth: from trial to trial, above a budget that a looser bound has certified.
        raising_steps: above what is confirmed, where its margin says that much more is to be had.
        linear_steps: towards the budget that the first trial is a share of.
        refuting_steps: towards an image that shows a looser bound to be of no use.
        rough, searching, confirming: what margins are asked for.
    """

    first_share: float = 0.6
    first: float = 0.05
    smallest: float = 1e-7
    growth: float = 2.0
    least_growth: float = 1.2
    exponent: float = 1.5
    rough_share: float = 0.3
    lift: float = 1.03
    sure: float = 3.0
    inside: float = 0.45
    raised_growth: float = 1.25
    raising_steps: int = 2
    linear_steps: int = 3
    refuting_steps: int = 3
    rough: Effort = field(default_factory=lambda: Effort(rough=True, enough=0.2))
    searching: Effort = field(default_factory=lambda: Effort(enough=0.2))
    confirming: Effort = field(default_factory=lambda: Effort(enough=1e-4))


@dataclass
class Bracket:
    """The largest r in (low, limit] with margin(r) > 0, for a margin that falls as clean - c r^p, about.

    The two evaluations nearest to zero predict the crossing, by this curve where the margin at 0 is known, else by a
    line. Trials stand just inside of it, so that two of them close the bracket; where predictions do not halve it (in
    log scale), bisection does.

    Attributes:
        low: the largest radius known to have a positive margin.
        high: the smallest trial above it that had none; infinite at first.
        limit: radii beyond it are of no interest.
        tolerance: the search ends when high <= low * (1 + tolerance).
        first: the first trial, where low is 0.
        smallest: radii below it count as 0.
        growth: from trial to trial until one has no positive margin.
        clean: the margin at 0, NaN for unknown.
        exponent: p, as long as one trial is all that is known.
        sure: the search ends where the predicted zero is within this share of a trial, too.
        expected: where the zero is thought to be before there is any trial.
        enough: a share of clean, above which margins may be left smaller than they are.
        least_growth: from a trial with such a margin to the next.
    """

    low: float
    low_margin: float
    limit: float
    tolerance: float
    first: float
    smallest: float
    growth: float = 2.0
    clean: float = math.nan
    exponent: float = math.nan
    sure: float = 0.0
    expected: float = math.nan
    enough: float = math.inf
    least_growth: float = 1.0
    high: float = math.inf
    _points: list[tuple[float, float]] = field(default_factory=list)
    _trials: int = 0
    _slow: int = 0
    _learnt: bool = False

    def __post_init__(self) -> None:
        if math.isfinite(self.low_margin) and math.isnan(self.expected):
            self._points.append((self.low, self.low_margin))

    @property
    def finished(self) -> bool:
        closed = self.low > 0 and self.high <= self.low * (1 + self.tolerance)
        return closed or self._settled or self.low >= self.limit or self.high <= self.smallest

    @property
    def _settled(self) -> bool:
        """Whether the predicted zero is so near to a trial that no more are needed."""
        estimate = self._estimate()
        if not self._trials or not self.sure or not self._consistent(estimate):
            return False
        near = [margin for radius, margin in self._points if abs(estimate - radius) <= self.sure * radius]
        return any(not self._loose(margin) for margin in near)

    def _loose(self, margin: float) -> bool:
        """Whether a margin may be larger than it is said to be."""
        return margin > self.enough * self.clean

    def _consistent(self, estimate: float) -> bool:
        """Whether a predicted zero is not beyond what trials have told, to a hundredth of the tolerance."""
        slack = 1 + self.tolerance / 100
        return self.low <= estimate * slack and estimate <= self.high * slack

    def proposal(self, inside: float) -> float:
        """What is to be confirmed when the search has ended: as many tolerances below the predicted zero."""
        if not self._settled or self.low >= self.limit:
            return self.low
        return min(self.limit, min(self._estimate(), self.high) / (1 + inside * self.tolerance))

    def trial(self) -> float:
        """The next radius to evaluate."""
        if self.high == math.inf:
            return min(self.limit, self._further())
        estimate = self._estimate()
        inside, step = 0.45 * self.tolerance, 0.95 * self.tolerance
        if self.high * (1 - inside) < estimate < self.high:
            # Once: margins that are just below zero for long predict the last trial again and again.
            trial = math.nan if self._slow else self.high / (1 + step)
        elif self.sure and self.low < estimate < self.high and self._slow < 2:
            trial = estimate
        elif self.low > 0 and self.low < estimate < self.low * (1 + self.tolerance):
            trial = self.low * (1 + step)
        elif self._slow < 2:
            trial = estimate * (1 - inside)
        else:
            trial = math.nan
        return trial if self.low < trial < self.high else math.sqrt(max(self.low, self.high / 100) * self.high)

    def _further(self) -> float:
        """A trial above all that had a positive margin: just beyond the zero, where that can be told."""
        beyond = 1 if self.sure else 1 + 0.45 * self.tolerance
        if not self._trials and self.expected > self.low:
            return self.expected * beyond
        if self.low == 0:
            return self.first
        guess = self._estimate()
        least, most = self.low * (1 + 0.95 * self.tolerance), self.growth * self.low
        if self._loose(self.low_margin):
            least = min(self.least_growth, self.growth) * self.low
        return max(least, min(most, guess * beyond)) if guess > self.low else most

    def refined(self, tolerance: float, sure: float, lift: float) -> Bracket:
        """The search with margins that are never smaller, from where this one has led."""
        estimate = self._estimate()
        known = math.isfinite(estimate) and self._consistent(estimate)
        further = max(lift * estimate, self.low * (1 + 0.95 * tolerance))
        return Bracket(
            self.low, self.low_margin, self.limit, tolerance, self.first, self.smallest, self.growth, self.clean,
            self._exponent() if known else self.exponent, sure, further if known else math.nan,
            self.enough, self.least_growth,
        )  # fmt: skip

    def update(self, radius: float, margin: float) -> None:
        """Takes in the margin at a trial; anything but a positive number counts as not certified."""
        before, high = self._width(), self.high
        if margin > 0:
            self.low, self.low_margin = radius, margin
        else:
            self.high = radius
        if math.isfinite(margin):
            self._points.append((radius, margin))
        self._trials += 1
        slow = self._width() > before / 2 if self.low > 0 else self.high > 0.8 * high
        self._slow = self._slow + 1 if slow else 0

    def learn(self, radius: float, margin: float) -> float:
        """Where the zero of similar margins is thought to be, given one more of them; only the exponent is kept."""
        if not self._learnt:
            self.exponent, self._points, self._learnt = self._exponent(), [], True
        if math.isfinite(margin):
            self._points.append((radius, margin))
        return self._estimate()

    def _width(self) -> float:
        return math.log(self.high / self.low) if self.low > 0 and self.high < math.inf else math.inf

    def _nearest(self) -> list[tuple[float, float]]:
        """The two evaluations on both sides of zero, else those with margins nearest to it, away from the clean one."""
        points = self._points
        if self.clean > 0:
            points = [(radius, margin) for radius, margin in points if radius > 0 and margin < self.clean]
        below, above = ([one for one in points if (one[1] > 0) is positive] for positive in (True, False))
        if below and above and max(below)[0] < min(above)[0]:
            points = [max(below), min(above)]
        return sorted(points, key=lambda point: abs(point[1]))[:2]

    def _exponent(self) -> float:
        """p, from the two evaluations that are nearest to zero; within what is plausible, unless zero is between."""
        points = self._nearest()
        if self.clean > 0 and len(points) == 2 and points[0][0] != points[1][0]:
            (first, at_first), (second, at_second) = points
            fallen = math.log((self.clean - at_first) / (self.clean - at_second))
            power = fallen / math.log(first / second)
            return power if at_first * at_second < 0 and power > 0 else min(4.0, max(0.5, power))
        return self.exponent

    def _estimate(self) -> float:
        """The zero of the curve through the two evaluations whose margins are nearest to zero."""
        points = self._nearest()
        if self.clean > 0:
            if not points:
                return math.nan
            radius, margin = points[0]
            power = self._exponent()
            return math.exp(math.log(radius) - math.log1p(-margin / self.clean) / power) if power > 0 else math.nan
        if len(points) < 2:
            return math.nan
        (first, at_first), (second, at_second) = points
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
    clean: Tensor,
    limit: float,
    tolerance: float,
    settings: RadiusSettings,
    growth: float | None = None,
    rough: MarginFunction | None = None,
    first: Tensor | None = None,
) -> list[Bracket]:
    """Searches the largest budgets with a positive margin, to ``tolerance``, from ``start`` with these margins.

    Args:
        clean: margins at a budget of 0.
        first: trials where ``start`` is 0; NaN for none.
        rough: margins that are never larger than those of ``evaluate``, and cheaper: they lead to near the radius.
    """
    sure = settings.sure * tolerance
    trials = torch.full_like(start, settings.first) if first is None else first.nan_to_num(nan=settings.first)
    trials = trials.clamp(min=settings.smallest, max=max(limit, settings.smallest))
    brackets = [
        Bracket(low, margin, limit, tolerance, trial, settings.smallest, growth or settings.growth, at_zero,
                settings.exponent, sure if rough is None else settings.rough_share,
                enough=math.inf if settings.searching.enough is None else settings.searching.enough,
                least_growth=settings.least_growth)
        for low, margin, at_zero, trial in zip(
            start.tolist(), at_start.tolist(), clean.tolist(), trials.tolist(), strict=True
        )
    ]  # fmt: skip
    if rough is not None:
        _close(rough, brackets)
        brackets = [one.refined(tolerance, sure, settings.lift) for one in brackets]
    _close(evaluate, brackets)
    return brackets


def _close(evaluate: MarginFunction, brackets: list[Bracket]) -> None:
    """Searches on until all brackets are finished."""
    while active := [index for index, bracket in enumerate(brackets) if not bracket.finished]:
        trials = [brackets[index].trial() for index in active]
        margins = evaluate(torch.tensor(active), torch.tensor(trials, dtype=torch.float64)).tolist()
        for index, trial, margin in zip(active, trials, margins, strict=True):
            brackets[index].update(trial, margin)


def prove(
    evaluate: MarginFunction, brackets: list[Bracket], clean: Tensor, tolerance: float, settings: RadiusSettings
) -> tuple[Tensor, Tensor]:
    """Budgets with a positive margin in this evaluation, near those that searches have led to, and their margins.

    Trials are lower as long as none is positive, and higher for a few times where much more is to be had. 0 keeps the
    clean margin.
    """
    found, margin = torch.zeros(len(brackets), dtype=torch.float64), clean.clone()
    trials = {k: trial for k, one in enumerate(brackets) if (trial := one.proposal(settings.inside)) > 0}
    steps, raises = [tolerance / 4] * len(brackets), [settings.raising_steps] * len(brackets)
    while trials:
        active, budgets = list(trials), list(trials.values())
        values = evaluate(torch.tensor(active), torch.tensor(budgets, dtype=torch.float64)).tolist()
        trials = {}
        for k, budget, value in zip(active, budgets, values, strict=True):
            estimate = brackets[k].learn(budget, value)
            inside = estimate / (1 + settings.inside * tolerance)
            if value > 0:
                found[k], margin[k] = budget, value
                if estimate > budget * (1 + tolerance) and raises[k] > 0 and budget < brackets[k].limit:
                    raises[k] -= 1
                    trials[k] = min(inside, brackets[k].limit)
            elif not found[k] > 0:
                raises[k] = min(raises[k], 1)
                lower = budget * (1 - steps[k])
                lower, steps[k] = min(lower, inside) if inside > budget / 2 else lower, min(2 * steps[k], 0.5)
                if lower >= settings.smallest:
                    trials[k] = lower
    return found, margin


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
        gone = active[budget[active] < RadiusSettings.smallest]
        budget[gone], margin[gone] = 0.0, clean[gone]
        active = active[budget[active] > 0]
    return budget, margin
