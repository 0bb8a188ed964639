"""Which radius a tree is grown at next, from what the trees before it have cost.

The size of a tree grows exponentially with its radius, so that most of a budget belongs to the radius that closes the
bracket, if that can be reached, and all smaller ones together cost little beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST = 0.6  # of the way from what the root proves to the nearest counterexample: where the first tree stands
GROWTH = 24.0  # a tree at 1 + x times the radius costs exp(GROWTH x) times as much, until trees have told
LEAST_GROWTH, MOST_GROWTH = 16.0, 40.0
SAFE = 0.45  # of the budget left: what a tree that closes the bracket may cost by the forecast
MIDDLE = 0.7  # and one on the way
NEAR = 0.955  # of the nearest counterexample: a bracket of less than 5%, to be had before the rest is tried
STEP = 0.02  # radii that are nearer to each other are not worth a tree each
SMALL = 500  # nodes: smaller trees tell nothing about the growth
LATE = (0.6, 0.75, 0.88)  # shares of the budget after which the radius of a tree that is not done falls,
LOWERED = 0.4  # by this share of the way to what is proven


@dataclass
class Schedule:
    """The trees that have been finished with this budget: radius, cost in the unit of the budget, and nodes."""

    budget: float = math.inf
    finished: list[tuple[float, float, int]] = field(default_factory=list)
    _falls: int = 0

    def target(self, proven: float, upper: float, last: float, left: float) -> float:
        """The next radius, at most ``last``, which closes the bracket; ``upper`` is the nearest counterexample's."""
        if left == math.inf or proven >= last * (1 - STEP):
            return last
        if not self.finished:
            first = proven + FIRST * (upper - proven)
            return first if proven * (1 + STEP) < first < NEAR * upper else last
        radius, cost, _ = self.finished[-1]
        growth = self._growth(upper) / upper
        near = min(NEAR * upper, last)
        if proven >= near * (1 - STEP) or cost * math.exp(growth * (last - radius)) <= SAFE * left:
            return last
        reached = radius + math.log(MIDDLE * left / cost) / growth if left > 0 else radius
        return (proven + near) / 2 if reached <= max(proven, radius) * (1 + STEP) else min(reached, near)

    def tell(self, radius: float, cost: float, nodes: int) -> None:
        """A tree was finished at this radius."""
        self.finished.append((radius, max(cost, 1e-9), max(nodes, 1)))

    def lowered(self, proven: float, radius: float, left: float) -> float | None:
        """A smaller radius for the tree that is grown, when it is time for one: once for each of ``LATE``."""
        if self._falls >= len(LATE) or not left < (1 - LATE[self._falls]) * self.budget < math.inf:
            return None
        self._falls += 1
        return radius - LOWERED * (radius - proven)

    def _growth(self, upper: float) -> float:
        """From the last two trees, if their radii differ and they have more nodes than their roots."""
        if len(self.finished) < 2:
            return GROWTH
        (first, _, before), (second, _, after) = self.finished[-2:]
        if second <= first * (1 + STEP / 2) or before < SMALL:
            return GROWTH
        return min(max(math.log(after / before) / (second / upper - first / upper), LEAST_GROWTH), MOST_GROWTH)
