"""The exact radius of one image, from both sides: trees that prove radii, counterexamples that bound them.

The search runs in budgets of plans (:class:`flowverify.ball.Ball`); radii are computed from what comes out.

It climbs towards the nearest counterexample known. Each stage is one tree at a budget between; the last one stands just
inside the counterexample, so that its proof closes the bracket. A nearer counterexample that a tree comes across lowers
the budget of that same tree: balls are nested, so nothing that is done is done again. So does the end of the time, for
a tree that would not be done by then. Where a tree ends undecided, with neither a proof nor a counterexample (a tie to
within rounding, or a ball whose bounds are not exact), so would every larger one: budgets are then halved down to the
least such.

Which budget comes next is decided from what the trees before it have cost. The size of a tree grows exponentially with
its ball, so that most of the time belongs to the budget that closes the bracket, if that can be reached, and all
smaller ones together cost little beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from flowverify.ball import Threat
from flowverify.certifiers.complete.counterexamples import Adversary, NearestCounterexample
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds, RootBounds, Roots, neuron_bounds, refine
from flowverify.certifiers.complete.problem import AffineMaps, Problem, SingleBall, Workers
from flowverify.certifiers.complete.tree import Counts, Tree
from flowverify.certifiers.options import DEFAULTS, ScheduleSettings, SearchSettings
from flowverify.certifiers.radius import Bracket
from flowverify.deadline import Deadline
from flowverify.grid import Grid


@dataclass
class Schedule:
    """The trees that have been finished in the time ``allowed``: budget, cost in the unit of that time, and nodes."""

    allowed: float = math.inf
    settings: ScheduleSettings = DEFAULTS.schedule
    finished: list[tuple[float, float, int]] = field(default_factory=list)
    _falls: int = 0

    def target(self, proven: float, upper: float, last: float, left: float) -> float:
        """The next budget, at most ``last``, which closes the bracket; ``upper`` is the nearest counterexample's."""
        own = self.settings
        if left == math.inf or proven >= last * (1 - own.step):
            return last
        if not self.finished:
            first = proven + own.first * (upper - proven)
            return first if proven * (1 + own.step) < first < own.near * upper else last
        budget, cost, _ = self.finished[-1]
        growth = self._growth(upper) / upper
        near = min(own.near * upper, last)
        if proven >= near * (1 - own.step) or cost * math.exp(growth * (last - budget)) <= own.safe * left:
            return last
        reached = budget + math.log(own.middle * left / cost) / growth if left > 0 else budget
        return (proven + near) / 2 if reached <= max(proven, budget) * (1 + own.step) else min(reached, near)

    def tell(self, budget: float, cost: float, nodes: int) -> None:
        """A tree was finished at this budget."""
        self.finished.append((budget, max(cost, 1e-9), max(nodes, 1)))

    def lowered(self, proven: float, budget: float, left: float) -> float | None:
        """A smaller budget for the tree that is grown, when it is time for one: once for each of ``late``."""
        late = self.settings.late
        if self._falls >= len(late) or not left < (1 - late[self._falls]) * self.allowed < math.inf:
            return None
        self._falls += 1
        return budget - self.settings.lowered * (budget - proven)

    def _growth(self, upper: float) -> float:
        """From the last two trees, if their budgets differ and they have more nodes than their roots."""
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
    """What is known while a search runs: the bracket, the radius of the present tree, its open nodes; in pixels."""

    radius: float
    upper_radius: float
    trial: float
    open_nodes: int
    done: float
    nodes: int


class RadiusSearch:
    """One image's search; :meth:`run` may be called again with another deadline and goes on where it stopped.

    Attributes:
        proven: the largest budget proven; upper: the smallest with a counterexample, infinite without.
        undecided: the least budget at which nothing was left to split, nothing proven, no counterexample found;
            infinite without.
        tie: whether that is for margins of 0 to within rounding.
        exhausted: whether the search has ended there.
        nearest: has the counterexample.
    """

    def __init__(
        self,
        maps: AffineMaps,
        roots: Roots,
        nearest: NearestCounterexample,
        specification: Tensor,
        *,
        tolerance: float,
        adversary: Adversary | None = None,
        progress: Callable[[Progress], None] | None = None,
        settings: SearchSettings = DEFAULTS,
    ) -> None:
        self.maps, self.nearest, self.specification, self.settings = maps, nearest, specification, settings
        self._roots = roots
        threat = nearest.threat
        self.limit = self.budget(threat.largest_radius(Grid.of(nearest.image[None])))
        self._tolerance = float((1 + tolerance) ** threat.cost.power) - 1  # of budgets
        self.proven, self.margin = 0.0, 0.0
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
    def upper(self) -> float:
        return self.nearest.budget

    def budget(self, radius: float) -> float:
        """What plans of this radius, in pixels, may cost."""
        return float(self.nearest.threat.budget(radius, self.nearest.image[None]))

    def radius(self, budget: float) -> float:
        """The radius of a budget, in pixels."""
        image = self.nearest.image[None]
        return float(self.nearest.threat.radius(image.new_tensor([budget]), image))

    @property
    def finished(self) -> bool:
        """Whether the bracket is as narrow as asked, or the whole simplex is proven."""
        return self.proven >= self.limit or self.upper <= self.proven * (1 + self._tolerance)

    @property
    def notes(self) -> str:
        return "" if self._tree is None else self._tree.notes

    @property
    def worst(self) -> float | None:
        """The least bound among open nodes; None without a tree."""
        return None if self._tree is None else self._tree.worst

    def ball(self, budget: float) -> SingleBall:
        """The ball of this budget; without positivity, the l1 ball of flows around it."""
        ball = self.nearest.threat.ball(self.nearest.image[None], budget)
        return SingleBall(ball if self.nearest.positive else ball.within(Threat("l1", positive=False)))

    def problem(self, budget: float) -> Problem:
        """The margins over the ball of this budget."""
        ball = self.ball(budget)
        return Problem(self.maps, ball, self.maps.layers, self.specification, self.settings, self._workers)

    def run(self, deadline: Deadline) -> None:
        """Narrows the bracket until it is closed or time is up."""
        self._begin(deadline)
        with self._workers:
            if not self._started:
                self._start(deadline)
            while not self.finished and not self.exhausted and not deadline.stop():
                self._stage(deadline)

    def decide(self, budget: float, deadline: Deadline) -> bool | None:
        """Whether the budget is proven (True), has a counterexample within (False), or neither yet (None)."""
        self._begin(deadline)
        own = deadline.child(until=lambda: self.nearest.budget <= budget)
        if self._tree is None or self._trial != budget:
            if self._adversary is not None:
                self.nearest.ask(self._adversary)
            self.nearest.descend()
            if self.nearest.budget <= budget:
                return False
        if not self._provable:
            self.exhausted = True
            return None
        with self._workers:
            if self._tree is None or self._trial != budget:
                if own.stop():  # bounds at the root of a large network take longer than some budgets
                    self._tree = None
                    return None
                self._plant(budget, own)
            assert self._tree is not None
            self._tree.grow(self._watched(own))
            self.exhausted = self._tree.finished and bool(self._tree.stuck)
            self.tie = self.exhausted and self._tree.tied
        if self.nearest.budget <= budget:
            return False
        if self._tree.proven:
            self.proven, self.margin = budget, self._margin()
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
        schedule, upper = self.settings.schedule, self.upper
        last = self.limit if upper > self.limit else self._inside(upper)
        first, least = (self.budget(radius) for radius in (schedule.first_radius, schedule.least_radius))
        clean = float(self.nearest.margins(self.nearest.image[None]))
        bracket = Bracket(0.0, clean, last, schedule.root_tolerance, min(first, last / 2), least)
        for _ in range(schedule.root_trials):
            if deadline.stop() or bracket.finished:
                break
            trial = bracket.trial()
            bracket.update(trial, self._root_margin(trial))
        if bracket.low > self.proven:
            self.proven, self.margin = bracket.low, bracket.low_margin
        self._started = True

    @property
    def _provable(self) -> bool:
        """Whether bounds can be positive at all: the margins of the image itself exceed their rounding."""
        rounding, image = self.maps.rounding, self.nearest.image
        if rounding is None or not len(self.specification):
            return True
        size = self.specification.abs() @ rounding.largest(-1, self.ball(0.0).reach)
        return bool(self.nearest.margins(image[None]) > rounding.gamma * size.amin())

    def _root_margin(self, budget: float) -> float:
        problem = self.problem(budget)
        if not len(self.specification):
            return math.inf
        known = self._roots.over(problem.ball.ball, self.specification)
        problem = problem.under(known.above)
        if bool((known.margins > 0).all()) or self._large(known.neurons):
            return float(known.margins.min())
        bounds = neuron_bounds(problem, known=known.neurons, iterations=1)
        return float(Tree(problem, bounds, self.nearest, known=known.margins, iterations=4).root_bounds.min())

    def _large(self, neurons: NeuronBounds) -> bool:
        """Whether so many neurons above the first layer have both signs that better bounds of each do not pay."""
        return neurons.unstable_above > self.settings.neurons.most_refined

    def _target(self) -> float:
        """The budget of the next stage."""
        upper = min(self.upper, self.limit)
        if self.undecided < upper:
            return (self.proven + self.undecided) / 2
        if not math.isfinite(self.upper):
            schedule = self.settings.schedule
            farther = self.proven * float(schedule.blind**self.nearest.threat.cost.power)
            return min(upper, max(farther, self.budget(schedule.first_radius)))
        last = upper if upper == self.limit else self._inside(upper)
        return self._schedule.target(self.proven, upper, last, self._deadline.left)

    def _inside(self, budget: float) -> float:
        """The budget of a ball just inside that of the nearest counterexample, whose proof closes the bracket."""
        return budget / (1 + self.settings.schedule.closing * self._tolerance)

    def _stage(self, deadline: Deadline) -> None:
        if self._tree is None:
            self._plant(self._target(), deadline)
        tree = self._tree
        assert tree is not None
        known = self.nearest.budget

        def turn() -> bool:
            return self.nearest.budget < min(known, self._trial) or self._lower(tree)

        tree.grow(self._watched(deadline.child(until=turn)))
        if tree.proven and self.proven < self._trial < self.nearest.budget:
            self.proven, self.margin = self._trial, self._margin()
            self._schedule.tell(self._trial, self._begun - self._deadline.left, self.counts.nodes - self._before)
        if self.nearest.budget <= self._trial:
            # The ball holds a counterexample: the tree goes on just inside of it.
            self._shrink(tree, self._inside(self.nearest.budget))
            if self._trial <= self.proven:
                self._tree = None
            return
        if not tree.finished:
            return
        if tree.stuck:
            self.undecided, self.tie = self._trial, tree.tied
            self.exhausted = self.undecided <= max(
                self.proven * (1 + self._tolerance), self.budget(self.settings.schedule.least_radius)
            )
            if not self.exhausted:
                self._shrink(tree, self._target())
                return
        self._tree = None

    def _lower(self, tree: Tree) -> bool:
        """Late, the budget of a tree that is not done falls towards what is proven; False, to go on."""
        if self.nearest.budget > self._trial:
            budget = self._schedule.lowered(self.proven, self._trial, self._deadline.left)
            if budget is not None:
                self._shrink(tree, budget)
        return False

    def _shrink(self, tree: Tree, budget: float) -> None:
        self._trial = budget
        problem = self.problem(budget)
        known = self._roots.over(problem.ball.ball, self.specification)
        problem = problem.under(known.above)
        iterations = 1 if problem.above is not None or self._large(known.neurons) else None
        tree.shrink(problem, neuron_bounds(problem, known=known.neurons, iterations=iterations))

    def _plant(self, budget: float, deadline: Deadline) -> None:
        """A tree at this budget; without rows, one not done soon starts again from refined bounds of the neurons."""
        self._begun, self._before = self._deadline.left, self.counts.nodes
        problem = self.problem(budget)
        known = self._roots.over(problem.ball.ball, self.specification)
        problem = problem.under(known.above)
        bounds = neuron_bounds(problem, known=known.neurons, iterations=0 if deadline.stop() else 1)
        tree = Tree(problem, bounds, self.nearest, known=known.margins, counts=self.counts)
        # Rows of moves bound ReLUs better than joint limits do, and than their own bounds could.
        if len(tree.open) and problem.above is None:
            self._tree, self._trial, upper = tree, budget, self.nearest.budget
            easy = deadline.child(
                nodes=self.settings.schedule.easy_nodes, until=lambda: self.nearest.budget < min(upper, budget)
            )
            tree.grow(self._watched(easy))
        if len(tree.open) and problem.above is None and self.nearest.budget > budget and not deadline.stop():
            tree = self._strengthened(problem, bounds, known, deadline)
        self._tree, self._trial = tree, budget

    def _strengthened(self, problem: Problem, bounds: NeuronBounds, known: RootBounds, deadline: Deadline) -> Tree:
        """A tree from better bounds of the neurons, where they pay, with joint limits."""
        small = not self._large(bounds)
        if small and self.maps.layers > 1:
            part = deadline.child(share=self.settings.neurons.refining_share)
            bounds = refine(problem, neuron_bounds(problem, known=known.neurons, deadline=part), part)
        tree = Tree(problem, bounds, self.nearest, known=known.margins, counts=self.counts)
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
                proven, upper, trial = (self.radius(budget) for budget in (self.proven, self.upper, self._trial))
                self._progress(Progress(proven, upper, trial, len(tree.open), tree.done, nodes))
            return False

        return deadline.child(until=tell)
