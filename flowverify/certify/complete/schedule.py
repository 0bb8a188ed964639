"""Which radius a tree is grown at next, from what the trees before it have cost.

The size of a tree grows exponentially with its radius, so that most of a budget belongs to the radius that closes the
bracket, if that can be reached, and all smaller ones together cost little beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST = 0.85  # of the nearest counterexample: where the first tree stands
GROWTH = 24.0  # a tree at 1 + x times the radius costs exp(GROWTH x) times as much, until trees have told
LEAST_GROWTH, MOST_GROWTH = 16.0, 40.0
SAFE = 0.45  # of the budget left: what a tree that closes the bracket may cost by the forecast
MIDDLE = 0.7  # and one on the way
NEAR = 0.955  # of the nearest counterexample: a bracket of less than 5%, to be had before the rest is tried
STEP = 0.02  # radii that are nearer to each other are not worth a tree each
SMALL = 500  # nodes: smaller trees tell nothing about the growth
PATIENCE = 0.6  # of the budget left: a tree that has had so much makes room for one at a smaller radius
FAR = 0.92  # of a tree's radius; nearer to what is proven, a tree is kept and its radius lowered instead
LATE = (0.7, 0.88)  # shares of a budget after which it is


@dataclass
class Schedule:
    """The trees that have been finished with this budget: radius, cost in the unit of the budget, and nodes."""

    budget: float = math.inf
    finished: list[tuple[float, float, int]] = field(default_factory=list)
    _lowered: int = 0

    def target(self, proven: float, upper: float, last: float, left: float) -> float:
        """The next radius, at most ``last``, which closes the bracket; ``upper`` is the nearest counterexample's."""
        if left == math.inf or proven >= last * (1 - STEP):
            return last
        if not self.finished:
            return FIRST * upper if proven * (1 + STEP) < FIRST * upper < last else last
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

    def gives_up(self, proven: float, radius: float, begun: float, left: float) -> bool:
        """Whether what is left, of what there was when the tree began, is better spent on a smaller radius."""
        return proven < FAR * radius and left < (1 - PATIENCE) * begun < math.inf

    def lowers(self, left: float) -> bool:
        """Whether it is time to lower the radius of the tree that is grown; asked until it says so, once a time."""
        if self._lowered < len(LATE) and left < (1 - LATE[self._lowered]) * self.budget < math.inf:
            self._lowered += 1
            return True
        return False

    def _growth(self, upper: float) -> float:
        """From the last two trees, if their radii differ and they have more nodes than their roots."""
        if len(self.finished) < 2:
            return GROWTH
        (first, _, before), (second, _, after) = self.finished[-2:]
        if second <= first * (1 + STEP / 2) or before < SMALL:
            return GROWTH
        return min(max(math.log(after / before) / (second / upper - first / upper), LEAST_GROWTH), MOST_GROWTH)
