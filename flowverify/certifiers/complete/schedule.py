"""Which radius a tree is grown at next, from what the trees before it have cost.

The size of a tree grows exponentially with its radius, so that most of a budget belongs to the radius that closes the
bracket, if that can be reached, and all smaller ones together cost little beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flowverify.certifiers.complete.settings import DEFAULTS, ScheduleSettings


@dataclass
class Schedule:
    """The trees that have been finished with this budget: radius, cost in the unit of the budget, and nodes."""

    budget: float = math.inf
    settings: ScheduleSettings = DEFAULTS.schedule
    finished: list[tuple[float, float, int]] = field(default_factory=list)
    _falls: int = 0

    def target(self, proven: float, upper: float, last: float, left: float) -> float:
        """The next radius, at most ``last``, which closes the bracket; ``upper`` is the nearest counterexample's."""
        own = self.settings
        if left == math.inf or proven >= last * (1 - own.step):
            return last
        if not self.finished:
            first = proven + own.first * (upper - proven)
            return first if proven * (1 + own.step) < first < own.near * upper else last
        radius, cost, _ = self.finished[-1]
        growth = self._growth(upper) / upper
        near = min(own.near * upper, last)
        if proven >= near * (1 - own.step) or cost * math.exp(growth * (last - radius)) <= own.safe * left:
            return last
        reached = radius + math.log(own.middle * left / cost) / growth if left > 0 else radius
        return (proven + near) / 2 if reached <= max(proven, radius) * (1 + own.step) else min(reached, near)

    def tell(self, radius: float, cost: float, nodes: int) -> None:
        """A tree was finished at this radius."""
        self.finished.append((radius, max(cost, 1e-9), max(nodes, 1)))

    def lowered(self, proven: float, radius: float, left: float) -> float | None:
        """A smaller radius for the tree that is grown, when it is time for one: once for each of ``late``."""
        late = self.settings.late
        if self._falls >= len(late) or not left < (1 - late[self._falls]) * self.budget < math.inf:
            return None
        self._falls += 1
        return radius - self.settings.lowered * (radius - proven)

    def _growth(self, upper: float) -> float:
        """From the last two trees, if their radii differ and they have more nodes than their roots."""
        own = self.settings
        if len(self.finished) < 2:
            return own.growth
        (first, _, before), (second, _, after) = self.finished[-2:]
        if second <= first * (1 + own.step / 2) or before < own.small:
            return own.growth
        least, most = own.growth_range
        return min(max(math.log(after / before) / (second / upper - first / upper), least), most)
