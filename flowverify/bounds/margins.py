"""Bounds of the margins f_y - f_t, and of the neurons, over Wasserstein balls: behind every incomplete certificate."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat
from flowverify.bounds.engine import Batch, Effort, Engine, EngineOptions, Run, WarmStart, largest
from flowverify.bounds.intervals import Interval, IntervalEngine, intersect
from flowverify.bounds.recipes import ENGINES, Bound, check_bound
from flowverify.bounds.relaxations import crosses_zero
from flowverify.errors import BoundError, FlowverifyError, InvalidInputError, UnsupportedOperationError
from flowverify.network import Network, Node, fold
from flowverify.network.rounding import RunningError, SumsOfTerms, is_steep

if TYPE_CHECKING:
    from flowverify.bounds.lifted.rows import ListedRows


@dataclass(frozen=True, eq=False)
class Everything:
    """What is known about a network over a batch of balls.

    Attributes:
        neurons: lower and upper bounds (B, *shape) of what each activation reads.
        margins: lower bounds (B, S).
        rows: of moves, above what each activation puts out, less what that is at the image; None for none.
    """

    neurons: list[Interval]
    margins: Tensor
    rows: list[ListedRows | None]


class MarginBounds:
    """Bounds one network over the balls of one threat, batched, by the engines of a bound.

    Values that are affine in the image are bounded exactly; activations above them get intervals, in topological
    order, from the engines that the bound has for neurons, the tightest at every neuron. They are asked for a neuron
    only if interval arithmetic has not already shown its ReLU to be linear on the ball; the relaxation of such a ReLU
    is exact; and only above the values whose intervals are exact. The margins are the largest of those of the engines
    that the bound has for margins.

    A bound goes on, with a note, without an engine that cannot take the network or fails, if it has another one for
    the margins.

    In float64 bounds hold in exact arithmetic: intervals of what activations read are widened as they are found, and
    margins lowered, by what rounding may have changed in them (:mod:`flowverify.network.rounding`).

    Args:
        network: in canonical form; it is copied.
        threat: of the balls to come.
        bound: a name in :data:`flowverify.bounds.recipes.BOUNDS`, or another composition of engines.
        dtype: precision of the bounds.

    Attributes:
        terms: by which rounding is allowed for; None where it is not, or engines do so themselves.

    Raises:
        UnknownNameError: an unknown bound.
        UnsupportedOperationError, BoundError: an engine cannot take the network, and the bound rests on it alone.
        DependencyError: an engine needs a library that is not there.
        FoldError, InvalidInputError: flows were asked for, and the network cannot be folded, or the ground cost is
            another one than l1.
    """

    def __init__(
        self,
        network: Network,
        threat: Threat | None = None,
        bound: str | Bound = "best",
        *,
        dtype: torch.dtype = torch.float32,
        options: EngineOptions | None = None,
    ) -> None:
        self._composition = check_bound(bound)
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype
        self.threat = Threat() if threat is None else threat
        self.options = EngineOptions() if options is None else options
        if self.options.domain == "flow":
            if self.threat.ground != "l1":
                raise InvalidInputError(
                    f"domain flow with ground cost {self.threat.ground}: expected l1, or the domain image"
                )
            fold(self.network)
        self._notes: list[str] = []
        self._intervals = IntervalEngine(self.network, self.threat, dtype, self.options)
        self._engines: dict[str, Engine] = {"interval": self._intervals}
        self._failed: dict[str, FlowverifyError] = {}
        self._stand_ins: dict[str, str] = {}
        self._assemble()
        proven = dtype == torch.float64 and not is_steep(self.network)
        self.terms = SumsOfTerms(self.network) if proven else None
        # What activations read, and whether it is enough to know the sign.
        self._two_pieces = {
            node.inputs[0]: all(
                isinstance(reader.operation, nn.ReLU | nn.LeakyReLU)
                for reader in self.network.consumers(node.inputs[0])
            )
            for node in self.network.activations
        }
        widest = max(math.prod(node.shape) for node in self.network.nodes) if self.network.nodes else 1
        held = max(128, *(getattr(engine, "numbers_per_value", 0) for engine in self._engines.values()))
        fastest = min(getattr(engine, "images_at_once", math.inf) for engine in self._engines.values())
        held_at_once = max(1, self.options.chunk_entries // (max(widest, self.network.grid.pixels) * held))
        self._images_at_once = int(min(held_at_once, fastest))

    @property
    def monotone(self) -> bool:
        """Whether bounds over a ball are no looser than those over a ball around it."""
        return all(getattr(self._engines[name], "monotone", False) for name in (*self._neurons, *self._margins))

    @property
    def refines(self) -> bool:
        """Whether there are margins of less effort, looser and cheaper."""
        return any(getattr(engine, "refines", False) for engine in self._engines.values())

    @property
    def notes(self) -> list[str]:
        """What had to be done without, or in another way."""
        return [*self._notes, *(note for engine in self._engines.values() for note in engine.notes)]

    def margins(
        self,
        ball: Ball,
        labels: Tensor,
        *,
        references: Tensor | None = None,
        warm_start: WarmStart | None = None,
        effort: Effort | None = None,
    ) -> Tensor:
        """Lower bounds of f_y - f_t over each ball, for the classes t other than y.

        Args:
            ball: of the threat; its images are converted to the precision of the bounds.
            labels: y, (B,).
            references: R of equal masses, (B, C, H, W), for the flow domain; the image itself by default.
            warm_start: what an earlier call on the same images found; its ``images`` say which.
            effort: how tight the bounds need to be; as tight as the engines make them by default.

        Returns:
            (B, classes - 1), in ascending order of t.
        """
        if not len(ball):
            return ball.images.new_zeros(0, self.network.num_classes - 1, dtype=self.dtype)
        specification = margin_specification(labels, self.network.num_classes, self.dtype).to(ball.images.device)
        rows = torch.arange(len(ball)) if warm_start is None else warm_start.images
        parts = []
        for start in range(0, len(ball), self._images_at_once):
            part = slice(start, start + self._images_at_once)
            if warm_start is not None:
                warm_start.at(None, rows[part])
            own = None if references is None else references[part].to(ball.images.device)
            batch = Batch(ball[part].to(dtype=self.dtype), own, warm_start, effort=effort or Effort())
            parts.append(self._bounded(batch, specification[part]))
        if warm_start is not None:
            warm_start.at(None, rows)
        return torch.cat(parts)

    def neurons(self, ball: Ball) -> list[Interval]:
        """Lower and upper bounds (B, *shape) of what each activation reads, in the order of the activations."""
        batch = Batch(ball.to(dtype=self.dtype))
        self._bounded(batch)
        return self._read(batch)

    def everything(self, ball: Ball, specification: Tensor, most: int = 0) -> Everything:
        """Bounds of neurons as :meth:`neurons`, of linear functions (B, S, classes) of the output, and rows of moves.

        Args:
            most: no rows, where they would have more entries.
        """
        batch = Batch(ball.to(dtype=self.dtype))
        margins = self._bounded(batch, specification)
        from flowverify.bounds.lifted.moves import NEIGHBOURS  # engines are loaded when a bound asks for them

        activations = self.network.activations
        rows: list[ListedRows | None] = [None] * len(activations)
        moves = len(NEIGHBOURS) * self.network.grid.pixels
        if sum(math.prod(node.shape) for node in activations) * moves <= most:
            for run in batch.runs.values():
                above = getattr(run, "rows_above", None)
                if above is not None:
                    rows = [above(node.name) for node in activations]
        return Everything(self._read(batch), margins, rows)

    def _read(self, batch: Batch) -> list[Interval]:
        return [batch.intervals[node.inputs[0]] for node in self.network.activations]

    def _bounded(self, batch: Batch, specification: Tensor | None = None) -> Tensor:
        """The margins, where there is a specification, and the intervals of the batch; without engines that fail."""
        while True:
            try:
                if specification is None:
                    self._pass(batch)
                    return batch.ball.images.new_zeros(len(batch.ball), 0)
                if batch.effort.enough is None or self._margins[:1] != ("interval",) or len(self._margins) == 1:
                    return self._margins_of(batch, specification)
                return self._undecided(batch, specification)
            except _EngineFailed as failure:
                self._without(failure.engine, failure.error)
                batch.intervals, batch.margins, batch.widened = {}, None, False

    def _undecided(self, batch: Batch, specification: Tensor) -> Tensor:
        """Margins by intervals alone, and by all engines where these are not enough."""
        run = self._intervals.start(batch)
        error = self._start(batch)
        affine = dict(batch.intervals)
        for node in self._intervals.above:
            self._enter(node, batch, run, error)
        found = self._proven(run.margins(specification), specification, error)
        rest = (~self._enough(batch, specification, found).all(1)).nonzero().flatten()
        if not rest.numel():
            return found
        warm_start = batch.warm_start
        rows = None if warm_start is None else warm_start.images
        if warm_start is not None and rows is not None:
            warm_start.at(None, rows[rest.to(rows.device)])
        part = Batch(
            batch.ball[rest],
            None if batch.references is None else batch.references[rest],
            warm_start,
            {name: (low[rest], high[rest]) for name, (low, high) in affine.items()},
            batch.effort,
            found[rest],
            widened=True,
        )
        try:
            found[rest] = self._margins_of(part, specification[rest])
        finally:
            if warm_start is not None:
                warm_start.at(None, rows)
        return found

    def _margins_of(self, batch: Batch, specification: Tensor) -> Tensor:
        runs, error = self._pass(batch)
        for name in self._margins:
            known = batch.margins
            if known is not None and bool(self._enough(batch, specification, known).all()):
                return known
            with _blaming(name):
                found = self._proven(runs[name].margins(specification), specification, error)
            batch.margins = largest([found] if known is None else [known, found])
        assert batch.margins is not None
        return batch.margins

    def _enough(self, batch: Batch, specification: Tensor, margins: Tensor) -> Tensor:
        """Which margins need no further work, (B, S)."""
        if batch.effort.enough is None:
            return torch.zeros_like(margins, dtype=torch.bool)
        clean = (specification @ self.network(batch.ball.images)[..., None]).squeeze(-1)
        goal: Tensor = batch.effort.enough * clean
        return margins > goal

    def _pass(self, batch: Batch) -> tuple[dict[str, Run], RunningError | None]:
        """All intervals of a batch, from the image upward."""
        runs: dict[str, Run] = {}
        for name, engine in self._engines.items():
            with _blaming(name):
                runs[name] = engine.start(batch)
        batch.runs = runs
        error = self._start(batch)
        for node in self._intervals.above:
            self._enter(node, batch, runs["interval"], error)
            if node.name in self._two_pieces and node.name not in self._intervals.exact:
                self._tighten(node.name, batch, runs, error)
        return runs, error

    def _start(self, batch: Batch) -> RunningError | None:
        """What rounding may change over the balls of a batch; widens what is known of affine values."""
        if self.terms is None:
            return None
        ball = batch.ball
        budget, displaced = ball.budget.double(), torch.zeros_like(ball.budget, dtype=torch.float64)
        if batch.references is not None:
            # The flow from a reference, along a spanning tree, moves the mass at most once over every edge. It leads
            # to an image of the reference's mass.
            budget = budget + ball.mass.double() * ball.images[0].numel()
            displaced = (batch.references.double() - ball.images.double()).sum((2, 3)).abs().sum(1)
        error = RunningError(self.terms, ball.mass, budget, displaced)
        if not batch.widened:
            for name in self._two_pieces:
                if name in batch.intervals:
                    batch.intervals[name] = error.widened(name, batch.intervals[name])
            batch.widened = True
        return error

    def _enter(self, node: Node, batch: Batch, run: Run, error: RunningError | None) -> None:
        """The interval of the next value, by interval arithmetic."""
        every = torch.ones(1, dtype=torch.bool)
        batch.intervals[node.name] = run.tighten(node.name, every)
        if error is not None:
            error.enter(node, batch.intervals)
            if node.name in self._two_pieces:
                batch.intervals[node.name] = error.widened(node.name, batch.intervals[node.name])

    def _proven(self, margins: Tensor, specification: Tensor, error: RunningError | None) -> Tensor:
        return margins if error is None else margins - error.margins(specification)

    def _tighten(self, name: str, batch: Batch, runs: dict[str, Run], error: RunningError | None) -> None:
        """The interval of a value that activations read, by one engine of the bound after the other.

        What is settled for one image stays as it is, so that no image's bounds depend on the rest of its batch.
        """
        found, joined = batch.intervals[name], "interval" in self._neurons
        wanted = crosses_zero(found) if self._two_pieces[name] else torch.ones_like(found[0], dtype=torch.bool)
        for engine in self._neurons:
            if engine == "interval" or not wanted.any():
                continue
            with _blaming(engine):
                lower, upper = runs[engine].tighten(name, wanted)
                if error is not None:
                    lower, upper = error.widened(name, (lower, upper))
            usable = wanted & torch.isfinite(lower) & torch.isfinite(upper)
            lower, upper = intersect((lower, upper), found) if joined else (lower, upper)
            found, joined = (torch.where(usable, lower, found[0]), torch.where(usable, upper, found[1])), True
            batch.intervals[name] = found
            if self._two_pieces[name]:
                wanted = crosses_zero(found)

    def _assemble(self) -> None:
        """The engines of the composition: without those that failed, and those that others stand in for."""
        composition, needless = self._composition, set[str]()
        for asked in dict.fromkeys((*composition.neurons, *composition.margins)):
            name = self._stand_ins.get(asked, asked)
            if name in self._failed or name in needless:
                continue
            if name not in self._engines:
                make = ENGINES.find(name)
                try:
                    self._engines[name] = make(self.network, self.threat, self.dtype, self.options)
                except (UnsupportedOperationError, BoundError) as error:
                    other = composition.otherwise
                    taken = {*self._engines, *self._failed, *self._stand_ins.values()}
                    unknown = isinstance(error, UnsupportedOperationError) and name != other
                    if unknown and other in self._stand_ins.values() and other not in self._failed:
                        self._failed[name] = error  # what stands in for another engine does so for this one
                        self._assemble()
                    elif unknown and other and other not in taken:
                        self._notes.append(f"bounded by {other} in place of {name}: {error}")
                        self._failed[name], self._stand_ins[asked] = error, other
                        self._assemble()
                    else:
                        self._without(name, error)
                    return
            needless.update(getattr(self._engines[name], "instead_of", ()))
        usable = set(self._engines) - needless
        self._neurons, self._margins = (
            tuple(name for asked in names if (name := self._stand_ins.get(asked, asked)) in usable)
            for names in (composition.neurons, composition.margins)
        )

    def _without(self, name: str, error: FlowverifyError) -> None:
        """Goes on without an engine, where there is another one for the margins.

        Raises:
            FlowverifyError: the error, where there is none.
        """
        self._engines.pop(name, None)
        self._failed[name] = error
        left = {self._stand_ins.get(asked, asked) for asked in self._composition.margins} - set(self._failed)
        if name == "interval" or not left:
            raise type(error)(f"{error}; the bounds ibp and best take this network") from error
        self._notes.append(f"bounded without {name}: {error}")
        self._assemble()


class _EngineFailed(Exception):  # noqa: N818 - it is caught here
    def __init__(self, engine: str, error: FlowverifyError) -> None:
        super().__init__(engine)
        self.engine, self.error = engine, error


@contextlib.contextmanager
def _blaming(engine: str) -> Iterator[None]:
    try:
        yield
    except (BoundError, UnsupportedOperationError) as error:
        raise _EngineFailed(engine, error) from error


def margin_specification(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows e_y - e_t for every t != y in ascending order: (B,) -> (B, classes - 1, classes)."""
    identity = torch.eye(classes, dtype=dtype, device=labels.device)
    differences = identity[labels][:, None] - identity
    others = torch.arange(classes, device=labels.device) != labels[:, None]
    return differences[others].reshape(labels.shape[0], classes - 1, classes)
