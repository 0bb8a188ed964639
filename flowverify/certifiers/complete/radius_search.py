"""The exact radius of one image, from both sides: trees that prove radii, counterexamples that bound them.

The search climbs towards the nearest counterexample known. Each stage is one tree at a radius between; the last one
stands just inside the counterexample, so that its proof closes the bracket. A nearer counterexample that a tree comes
across lowers the radius of that same tree: balls are nested, so nothing that is done is done again. So does the end of
the budget, for a tree that would not be done by then. Where a tree ends undecided, with neither a proof nor a
counterexample (a tie to within rounding, or a ball whose bounds are not exact), so would every larger one: radii are
then halved down to the least such.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import FlowBall, Polytope
from flowverify.certifiers.complete.budget import Budget, Progress
from flowverify.certifiers.complete.hunt import Adversary, Hunt
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds, neuron_bounds, refine
from flowverify.certifiers.complete.schedule import Schedule
from flowverify.certifiers.complete.tree import Counts, Tree
from flowverify.certifiers.complete.workers import workers
from flowverify.transport.ground import parse_ground

CLOSING = 0.95  # the last stage leaves this share of the tolerance to use
BISECTIONS = 10
FIRST_RADIUS = 0.05
EASY = 400  # nodes after which a tree is worth better bounds of the neurons
ROUNDS = 24  # splits for each side of each unstable neuron
MAX_REFINED = 512  # unstable neurons; beyond, their trees cost more than they give
REFINING_SHARE = 0.15  # of the time left
LEAST_RADIUS = 1e-9  # pixels: a search that has proven nothing at this radius ends


class RadiusSearch:
    """One image's search; :meth:`run` may be called again with a larger budget and goes on where it stopped.

    Attributes:
        radius: the largest radius proven; upper_radius: the smallest with a counterexample, infinite without.
        undecided: the least radius at which nothing was left to split, nothing proven, no counterexample found;
            infinite without.
        tie: whether that is for margins of 0 to within rounding.
        exhausted: whether the search has ended there.
        hunt: has the counterexample.
    """

    def __init__(
        self,
        maps: AffineMaps,
        hunt: Hunt,
        specification: Tensor,
        *,
        limit: float,
        tolerance: float,
        adversary: Adversary | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.maps, self.hunt, self.specification = maps, hunt, specification
        self.limit, self.tolerance = limit, tolerance
        self.radius, self.margin = 0.0, 0.0
        self.counts, self.seconds, self.exhausted = Counts(), 0.0, False
        self.undecided, self.tie = math.inf, False
        self._left: Callable[[], float] = lambda: math.inf  # of the budget, in its unit
        self._schedule = Schedule()
        self._adversary, self._progress = adversary, progress
        self._tree: Tree | None = None
        self._trial = 0.0
        self._started = False
        self._begun, self._before = math.inf, 0  # what was left, and the nodes so far, when the tree began

    @property
    def upper_radius(self) -> float:
        return self.hunt.radius

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

    def ball(self, radius: float) -> Polytope:
        """The ball of this radius; without positivity, the l1 ball of flows around it."""
        hunt, ground = self.hunt, parse_ground(self.hunt.ground)
        if not hunt.feasible:
            return FlowBall(hunt.image, ground.to_l1(radius) * hunt.mass)
        budget = float(ground.budget(torch.tensor(radius, dtype=torch.float64))) * hunt.mass
        return Polytope(hunt.image, budget, hunt.ground, hunt.cap)

    def run(self, budget: Budget) -> None:
        """Narrows the bracket until it is closed or the budget is spent."""
        begin, stop = budget.clock(), self._begin(budget)
        try:
            with workers(self.hunt.image.device):
                if not self._started:
                    self._start(stop)
                while not self.finished and not self.exhausted and not stop():
                    self._stage(stop)
        finally:
            self.seconds += budget.clock() - begin

    def decide(self, radius: float, budget: Budget) -> bool | None:
        """Whether the radius is proven (True), has a counterexample within (False), or neither yet (None)."""
        begin, spent = budget.clock(), self._begin(budget)

        def stop() -> bool:
            return spent() or self.hunt.radius <= radius

        try:
            if self._tree is None or self._trial != radius:
                if self._adversary is not None:
                    self.hunt.ask(self._adversary)
                self.hunt.descend()
                if self.hunt.radius <= radius:
                    return False
            if not self._provable:
                self.exhausted = True
                return None
            with workers(self.hunt.image.device):
                if self._tree is None or self._trial != radius:
                    self._plant(radius, stop)
                assert self._tree is not None
                self._tree.grow(self._watched(stop))
                self.exhausted = self._tree.finished and bool(self._tree.stuck)
                self.tie = self.exhausted and self._tree.tied
        finally:
            self.seconds += budget.clock() - begin
        if self.hunt.radius <= radius:
            return False
        if self._tree.proven:
            self.radius, self.margin = radius, self._margin()
            return True
        return None

    def _begin(self, budget: Budget) -> Callable[[], bool]:
        """What tells whether this budget is spent, from now on."""
        begin, before = budget.clock(), self.counts.nodes

        def left() -> float:
            seconds, nodes = budget.seconds, budget.nodes
            if seconds is not None:
                return seconds - (budget.clock() - begin)
            return math.inf if nodes is None else nodes - (self.counts.nodes - before)

        self._left, self._begun, self._schedule = left, left(), Schedule(left())
        return lambda: left() <= 0 or (budget.nodes is not None and self.counts.nodes - before >= budget.nodes)

    def _start(self, stop: Callable[[], bool]) -> None:
        """Counterexamples without a tree, and the largest radius that its root proves."""
        if self._adversary is not None:
            self.hunt.ask(self._adversary)
        self.hunt.descend()
        if not self._provable:
            self._started = self.exhausted = True
            return
        low, high = 0.0, min(self.limit, self.hunt.radius)
        trial = min(FIRST_RADIUS, high / 2)
        for _ in range(BISECTIONS):
            if stop() or high <= low * 1.02:
                break
            margin = self._root_margin(trial)
            if margin > 0:
                low, self.margin = trial, margin
            else:
                high = trial
            trial = (
                min(2 * trial, (low + high) / 2)
                if low == 0 or high == min(self.limit, self.hunt.radius)
                else ((low + high) / 2)
            )
        self.radius, self._started = max(self.radius, low), True

    @property
    def _provable(self) -> bool:
        """Whether bounds can be positive at all: the margins of the image itself exceed their rounding."""
        rounding, image = self.maps.rounding, self.hunt.image
        if rounding is None or not len(self.specification):
            return True
        size = self.specification.abs() @ rounding.largest(-1, self.ball(0.0).reach)
        return bool(self.hunt.margins(image[None]) > rounding.gamma * size.amin())

    def _root_margin(self, radius: float) -> float:
        ball = self.ball(radius)
        bounds = neuron_bounds(self.maps, ball, iterations=1)
        tree = Tree(self.maps, ball, bounds, self.specification, self.hunt, iterations=4)
        return float(tree.root_bounds.min()) if len(tree.root_bounds) else math.inf

    def _target(self) -> float:
        """The radius of the next stage."""
        upper = min(self.upper_radius, self.limit)
        if self.undecided < upper:
            return (self.radius + self.undecided) / 2
        last = upper if upper == self.limit else upper / (1 + CLOSING * self.tolerance)
        return self._schedule.target(self.radius, upper, last, self._left())

    def _stage(self, stop: Callable[[], bool]) -> None:
        if self._tree is None:
            self._plant(self._target(), stop)
        tree = self._tree
        assert tree is not None
        known = self.hunt.radius

        def turn() -> bool:
            return stop() or self.hunt.radius < min(known, self._trial) or self._lower(tree)

        tree.grow(self._watched(turn))
        if tree.proven and self.radius < self._trial < self.hunt.radius:
            self.radius, self.margin = self._trial, self._margin()
            self._schedule.tell(self._trial, self._begun - self._left(), self.counts.nodes - self._before)
        if self.hunt.radius <= self._trial:
            # The ball holds a counterexample: the tree goes on just inside of it.
            self._shrink(tree, self.hunt.radius / (1 + CLOSING * self.tolerance))
            if self._trial <= self.radius:
                self._tree = None
            return
        if not tree.finished:
            return
        if tree.stuck:
            self.undecided, self.tie = self._trial, tree.tied
            self.exhausted = self.undecided <= max(self.radius * (1 + self.tolerance), LEAST_RADIUS)
            if not self.exhausted:
                self._shrink(tree, self._target())
                return
        self._tree = None

    def _lower(self, tree: Tree) -> bool:
        """Late, the radius of a tree that is not done falls towards what is proven; False, to go on."""
        if self.hunt.radius > self._trial:
            radius = self._schedule.lowered(self.radius, self._trial, self._left())
            if radius is not None:
                self._shrink(tree, radius)
        return False

    def _shrink(self, tree: Tree, radius: float) -> None:
        self._trial = radius
        ball = self.ball(radius)
        bounds = neuron_bounds(self.maps, ball, iterations=1)
        tree.shrink(ball, neuron_bounds(self.maps, ball) if bounds.unstable_above <= MAX_REFINED else bounds)

    def _plant(self, radius: float, stop: Callable[[], bool]) -> None:
        """A tree at this radius; one that is not done soon starts again from refined bounds of the neurons."""
        self._begun, self._before = self._left(), self.counts.nodes
        ball = self.ball(radius)
        bounds = neuron_bounds(self.maps, ball, iterations=1)
        tree = Tree(self.maps, ball, bounds, self.specification, self.hunt, counts=self.counts)
        if len(tree.open):
            self._tree, self._trial = tree, radius
            enough, known = self.counts.nodes + EASY, self.hunt.radius
            tree.grow(
                self._watched(lambda: stop() or self.counts.nodes >= enough or self.hunt.radius < min(known, radius))
            )
        if len(tree.open) and self.hunt.radius > radius and not stop():
            tree = self._strengthened(ball, bounds, stop)
        self._tree, self._trial = tree, radius

    def _strengthened(self, ball: Polytope, bounds: NeuronBounds, stop: Callable[[], bool]) -> Tree:
        """A tree from better bounds of the neurons, where they pay, with joint limits."""
        small = bounds.unstable_above <= MAX_REFINED
        if small and self.maps.layers > 1:
            left = self._left() * (1 - REFINING_SHARE)

            def refined_enough() -> bool:
                return stop() or self._left() < left

            bounds = neuron_bounds(self.maps, ball, stop=refined_enough)
            bounds = refine(self.maps, ball, bounds, ROUNDS, refined_enough)
        tree = Tree(self.maps, ball, bounds, self.specification, self.hunt, counts=self.counts)
        tree.limit(stop, None if small else 1)
        return tree

    def _margin(self) -> float:
        """The margin that the tree has proven."""
        return math.inf if self._tree is None else self._tree.least

    def _watched(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        def watched() -> bool:
            if self._progress is not None and self._tree is not None:
                self._progress(
                    Progress(
                        self.radius, self.upper_radius, self._trial, len(self._tree.open), self._tree.done,
                        self.counts.nodes,
                    )
                )  # fmt: skip
            return stop()

        return watched
