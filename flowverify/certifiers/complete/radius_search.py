"""The exact radius of one image, from both sides: trees that prove radii, counterexamples that bound them.

The search climbs towards the nearest counterexample known. Each stage is one tree at a radius between; the last one
stands just inside the counterexample, so that its proof closes the bracket. A nearer counterexample that a tree comes
across lowers the radius of that same tree: balls are nested, so nothing that is done is done again. So does the end of
the budget, for a tree that would not be done by then. Where a tree ends undecided, with neither a proof nor a
counterexample (a tie to within rounding, or a ball whose bounds are not exact), so would every larger one: radii are
then halved down to the least such.

Which radius comes next is decided from what the trees before it have cost. The size of a tree grows exponentially with
its radius, so that most of a budget belongs to the radius that closes the bracket, if that can be reached, and all
smaller ones together cost little beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.certifiers.complete.counterexamples import Adversary, NearestCounterexample
from flowverify.certifiers.complete.deadline import Deadline, Workers
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds, neuron_bounds, refine
from flowverify.certifiers.complete.problem import AffineMaps, Problem, SingleBall
from flowverify.certifiers.complete.tree import Counts, Tree
from flowverify.certifiers.options import DEFAULTS, ScheduleSettings, SearchSettings


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


@dataclass(frozen=True)
class Progress:
    """What is known while a search runs: the bracket, the radius of the present tree, its open nodes."""

    radius: float
    upper_radius: float
    trial: float
    open_nodes: int
    done: float
    nodes: int


class RadiusSearch:
    """One image's search; :meth:`run` may be called again with another deadline and goes on where it stopped.

    Attributes:
        radius: the largest radius proven; upper_radius: the smallest with a counterexample, infinite without.
        undecided: the least radius at which nothing was left to split, nothing proven, no counterexample found;
            infinite without.
        tie: whether that is for margins of 0 to within rounding.
        exhausted: whether the search has ended there.
        nearest: has the counterexample.
    """

    def __init__(
        self,
        maps: AffineMaps,
        nearest: NearestCounterexample,
        specification: Tensor,
        *,
        limit: float,
        tolerance: float,
        adversary: Adversary | None = None,
        progress: Callable[[Progress], None] | None = None,
        settings: SearchSettings = DEFAULTS,
    ) -> None:
        self.maps, self.nearest, self.specification, self.settings = maps, nearest, specification, settings
        self.limit, self.tolerance = limit, tolerance
        self.radius, self.margin = 0.0, 0.0
        self.counts, self.exhausted = Counts(), False
        self.undecided, self.tie = math.inf, False
        self._deadline, self._schedule = Deadline(), Schedule(settings=settings.schedule)
        self._workers = Workers(nearest.image.device)
        self._adversary, self._progress = adversary, progress
        self._tree: Tree | None = None
        self._trial = 0.0
        self._started = False
        self._begun, self._before = math.inf, 0  # what was left, and the nodes so far, when the tree began

    @property
    def upper_radius(self) -> float:
        return self.nearest.radius

    @property
    def finished(self) -> bool:
        """Whether the bracket is as narrow as asked, or the whole simplex is proven."""
        return self.radius >= self.limit or self.upper_radius <= self.radius * (1 + self.tolerance)

    @property
    def notes(self) -> str:
        return "" if self._tree is None else self._tree.notes

    @property
    def worst(self) -> float | None:
        """The least bound among open nodes; None without a tree."""
        return None if self._tree is None else self._tree.worst

    def ball(self, radius: float) -> SingleBall:
        """The ball of this radius; without positivity, the l1 ball of flows around it."""
        threat, images = self.nearest.threat, self.nearest.image[None]
        ball = Ball(threat, images, threat.budget(radius, images))
        return SingleBall(ball if self.nearest.positive else ball.within(Threat("l1", positive=False)))

    def problem(self, radius: float) -> Problem:
        """The margins over the ball of this radius."""
        ball = self.ball(radius)
        return Problem(self.maps, ball, self.maps.layers, self.specification, self.settings, self._workers)

    def run(self, deadline: Deadline) -> None:
        """Narrows the bracket until it is closed or time is up."""
        self._begin(deadline)
        with self._workers:
            if not self._started:
                self._start(deadline)
            while not self.finished and not self.exhausted and not deadline.stop():
                self._stage(deadline)

    def decide(self, radius: float, deadline: Deadline) -> bool | None:
        """Whether the radius is proven (True), has a counterexample within (False), or neither yet (None)."""
        self._begin(deadline)
        own = deadline.child(until=lambda: self.nearest.radius <= radius)
        if self._tree is None or self._trial != radius:
            if self._adversary is not None:
                self.nearest.ask(self._adversary)
            self.nearest.descend()
            if self.nearest.radius <= radius:
                return False
        if not self._provable:
            self.exhausted = True
            return None
        with self._workers:
            if self._tree is None or self._trial != radius:
                self._plant(radius, own)
            assert self._tree is not None
            self._tree.grow(self._watched(own))
            self.exhausted = self._tree.finished and bool(self._tree.stuck)
            self.tie = self.exhausted and self._tree.tied
        if self.nearest.radius <= radius:
            return False
        if self._tree.proven:
            self.radius, self.margin = radius, self._margin()
            return True
        return None

    def _begin(self, deadline: Deadline) -> None:
        self._deadline, self._begun = deadline, deadline.left
        self._schedule = Schedule(deadline.left, self.settings.schedule)

    def _start(self, deadline: Deadline) -> None:
        """Counterexamples without a tree, and the largest radius that its root proves."""
        if self._adversary is not None:
            self.nearest.ask(self._adversary)
        self.nearest.descend()
        if not self._provable:
            self._started = self.exhausted = True
            return
        low, high = 0.0, min(self.limit, self.nearest.radius)
        trial = min(self.settings.schedule.first_radius, high / 2)
        for _ in range(self.settings.schedule.bisections):
            if deadline.stop() or high <= low * 1.02:
                break
            margin = self._root_margin(trial)
            if margin > 0:
                low, self.margin = trial, margin
            else:
                high = trial
            trial = (
                min(2 * trial, (low + high) / 2)
                if low == 0 or high == min(self.limit, self.nearest.radius)
                else ((low + high) / 2)
            )
        self.radius, self._started = max(self.radius, low), True

    @property
    def _provable(self) -> bool:
        """Whether bounds can be positive at all: the margins of the image itself exceed their rounding."""
        rounding, image = self.maps.rounding, self.nearest.image
        if rounding is None or not len(self.specification):
            return True
        size = self.specification.abs() @ rounding.largest(-1, self.ball(0.0).reach)
        return bool(self.nearest.margins(image[None]) > rounding.gamma * size.amin())

    def _root_margin(self, radius: float) -> float:
        problem = self.problem(radius)
        tree = Tree(problem, neuron_bounds(problem, iterations=1), self.nearest, iterations=4)
        return float(tree.root_bounds.min()) if len(tree.root_bounds) else math.inf

    def _target(self) -> float:
        """The radius of the next stage."""
        upper = min(self.upper_radius, self.limit)
        if self.undecided < upper:
            return (self.radius + self.undecided) / 2
        last = upper if upper == self.limit else self._inside(upper)
        return self._schedule.target(self.radius, upper, last, self._deadline.left)

    def _inside(self, radius: float) -> float:
        """The radius of a ball just inside that of the nearest counterexample, whose proof closes the bracket."""
        return radius / (1 + self.settings.schedule.closing * self.tolerance)

    def _stage(self, deadline: Deadline) -> None:
        if self._tree is None:
            self._plant(self._target(), deadline)
        tree = self._tree
        assert tree is not None
        known = self.nearest.radius

        def turn() -> bool:
            return self.nearest.radius < min(known, self._trial) or self._lower(tree)

        tree.grow(self._watched(deadline.child(until=turn)))
        if tree.proven and self.radius < self._trial < self.nearest.radius:
            self.radius, self.margin = self._trial, self._margin()
            self._schedule.tell(self._trial, self._begun - self._deadline.left, self.counts.nodes - self._before)
        if self.nearest.radius <= self._trial:
            # The ball holds a counterexample: the tree goes on just inside of it.
            self._shrink(tree, self._inside(self.nearest.radius))
            if self._trial <= self.radius:
                self._tree = None
            return
        if not tree.finished:
            return
        if tree.stuck:
            self.undecided, self.tie = self._trial, tree.tied
            self.exhausted = self.undecided <= max(
                self.radius * (1 + self.tolerance), self.settings.schedule.least_radius
            )
            if not self.exhausted:
                self._shrink(tree, self._target())
                return
        self._tree = None

    def _lower(self, tree: Tree) -> bool:
        """Late, the radius of a tree that is not done falls towards what is proven; False, to go on."""
        if self.nearest.radius > self._trial:
            radius = self._schedule.lowered(self.radius, self._trial, self._deadline.left)
            if radius is not None:
                self._shrink(tree, radius)
        return False

    def _shrink(self, tree: Tree, radius: float) -> None:
        self._trial = radius
        problem = self.problem(radius)
        bounds = neuron_bounds(problem, iterations=1)
        small = bounds.unstable_above <= self.settings.neurons.most_refined
        tree.shrink(problem, neuron_bounds(problem) if small else bounds)

    def _plant(self, radius: float, deadline: Deadline) -> None:
        """A tree at this radius; one that is not done soon starts again from refined bounds of the neurons."""
        self._begun, self._before = self._deadline.left, self.counts.nodes
        problem = self.problem(radius)
        bounds = neuron_bounds(problem, iterations=1)
        tree = Tree(problem, bounds, self.nearest, counts=self.counts)
        if len(tree.open):
            self._tree, self._trial, known = tree, radius, self.nearest.radius
            easy = deadline.child(
                nodes=self.settings.schedule.easy_nodes, until=lambda: self.nearest.radius < min(known, radius)
            )
            tree.grow(self._watched(easy))
        if len(tree.open) and self.nearest.radius > radius and not deadline.stop():
            tree = self._strengthened(problem, bounds, deadline)
        self._tree, self._trial = tree, radius

    def _strengthened(self, problem: Problem, bounds: NeuronBounds, deadline: Deadline) -> Tree:
        """A tree from better bounds of the neurons, where they pay, with joint limits."""
        settings = self.settings.neurons
        small = bounds.unstable_above <= settings.most_refined
        if small and self.maps.layers > 1:
            part = deadline.child(share=settings.refining_share)
            bounds = refine(problem, neuron_bounds(problem, deadline=part), part)
        tree = Tree(problem, bounds, self.nearest, counts=self.counts)
        tree.limit(deadline, None if small else 1)
        return tree

    def _margin(self) -> float:
        """The margin that the tree has proven."""
        return math.inf if self._tree is None else self._tree.least

    def _watched(self, deadline: Deadline) -> Deadline:
        """The same, telling what is known whenever it is asked."""

        def tell() -> bool:
            if self._progress is not None and self._tree is not None:
                tree, nodes = self._tree, self.counts.nodes
                self._progress(Progress(self.radius, self.upper_radius, self._trial, len(tree.open), tree.done, nodes))
            return False

        return deadline.child(until=tell)
