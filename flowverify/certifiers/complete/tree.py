"""Branch and bound at one radius: proves that no class overtakes the label in the ball, or comes across one that does.

A tree covers the ball for every other class whose bound is not positive at once. Nodes are taken from the end of a
stack, many at a time; a node whose bound is positive is done. Balls are nested, so a tree may go on when its radius
becomes smaller: whatever is done stays done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.branching import branch, most_relaxed
from flowverify.certifiers.complete.hunt import Hunt
from flowverify.certifiers.complete.joint_search import limit_jointly, spent
from flowverify.certifiers.complete.leaf import LeafProgram
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds, improve, tighten
from flowverify.certifiers.complete.nodes import Nodes, join, roots
from flowverify.certifiers.complete.workers import SMALL, count, each, parts

ROOT_ITERATIONS = 30
ITERATIONS = 10
LEAF_ITERATIONS = 50
LEAF_PACES = 0.15, 2.0, 20.0
FEW = 24  # unstable neurons
POLISHING, POLISHING_PACE = 40, 0.15
BATCH = 128
TIGHTENED = 6  # neurons of every layer that get new bounds after a split below them
LIMITED_EVERY = 3  # splits
FIRST_LIMITS, UPPER_LIMITS = (5, 6), (4, 8)  # joint limits of the first layer and of those above: groups, members
DESCENT_EVERY = 16  # batches
TIED = 1e-8  # of the largest logit at the image: a bound that is below zero by more is not zero to within rounding


@dataclass
class Counts:
    """What a search has done: nodes bounded, linear programs solved, nodes left without a decision."""

    nodes: int = 0
    programs: int = 0
    stuck: int = 0


class Tree:
    """The open nodes at one radius.

    Args:
        maps: of the network.
        ball: around the image.
        bounds: of the neurons over the ball.
        specification: e_y - e_t for each other class, (classes - 1, classes).
        hunt: sees the minimiser of every bound.
        enough: a node is done once its bound exceeds this.

    Attributes:
        least: the least bound of what is done: what a tree without open nodes proves.
    """

    def __init__(
        self,
        maps: AffineMaps,
        ball: Polytope,
        bounds: NeuronBounds,
        specification: Tensor,
        hunt: Hunt,
        *,
        enough: float = 0.0,
        counts: Counts | None = None,
        iterations: int = ROOT_ITERATIONS,
    ) -> None:
        self.maps, self.ball, self.specification = maps, ball, specification
        self.enough, self.hunt = enough, hunt
        self.counts = Counts() if counts is None else counts
        self.batch_size, self.notes = BATCH, ""
        self._limited = False
        self._leaf: LeafProgram | None = None
        self._batches, self._lock = 0, Lock()
        self.stuck: list[Nodes] = []
        self.done = 0.0
        rows = torch.arange(len(specification), device=specification.device)
        nodes = roots(rows, bounds.lower, bounds.upper)
        if len(nodes):
            nodes = self._improve(nodes, iterations)
        self.root_bounds = nodes.bound
        undone = self._undone(nodes)
        self.least = float(nodes.bound[~undone].min()) if bool((~undone).any()) else float("inf")
        self.open = nodes[undone]
        if len(self.open):
            self.open.share /= self.open.share.sum()

    @property
    def finished(self) -> bool:
        """Whether nothing is open; then, if nothing is stuck either, the radius is proven."""
        return not len(self.open)

    @property
    def proven(self) -> bool:
        return self.finished and not self.stuck

    @property
    def tied(self) -> bool:
        """Whether what is stuck is so for a margin of zero to within rounding."""
        return all(float(node.bound.min()) >= -TIED * self.hunt.largest for node in self.stuck)

    @property
    def worst(self) -> float:
        """The least bound among open nodes; infinite without any."""
        return (
            float(torch.cat([self.open.bound, *(node.bound for node in self.stuck)]).min())
            if (len(self.open) or self.stuck)
            else float("inf")
        )

    def shrink(self, ball: Polytope, bounds: NeuronBounds) -> None:
        """Goes on with a smaller ball around the same image; what was stuck is open again."""
        self.ball = ball
        if self.stuck:
            self.open = join([*self.stuck, self.open])
            self.stuck = []
        for layer, (low, high) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
            self.open.lower[layer] = torch.maximum(self.open.lower[layer], low)
            self.open.upper[layer] = torch.minimum(self.open.upper[layer], high)
            empty = (self.open.lower[layer] > self.open.upper[layer]).any(1)
            self.open.bound = torch.where(empty, torch.inf, self.open.bound)
        if len(self.open):
            taken = self.open
            rows = torch.arange(len(taken), device=taken.row.device)
            self.open = join(each(lambda own: self._improve(taken[own], ITERATIONS), parts(rows, self.batch_size)))
            self.open = self.open[self._settle(self.open)]

    def limit(self, stop: Callable[[], bool], layers: int | None = None) -> None:
        """Joint limits for the open nodes and their descendants: of the first ``layers`` layers, by default of all."""
        self._limited = True
        for layer in range(self.maps.layers if layers is None else layers):
            if not len(self.open) or stop():
                return
            groups, size = FIRST_LIMITS if layer == 0 else UPPER_LIMITS
            nodes = limit_jointly(
                self.maps, self.ball, layer, self.maps.layers, self.specification, self.open, groups, size, stop
            )
            nodes = self._improve(nodes, ROOT_ITERATIONS)
            self.open = nodes[self._settle(nodes)]

    def grow(self, stop: Callable[[], bool]) -> None:
        """Splits nodes until none is open or ``stop`` says so, which is asked after every batch."""
        while len(self.open) and not stop() and len(self.open):  # a watcher may close nodes
            size = min(self.batch_size * count(), len(self.open))
            taken = self.open[slice(len(self.open) - size, None)]
            try:
                grown = each(lambda rows: self._process(taken[rows], stop), _dealt(size))  # noqa: B023
            except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.batch_size == 1:
                    raise
                self.batch_size = max(1, min(self.batch_size, size) // 2)
                self.notes = f"out of memory: continued with {self.batch_size} nodes at a time"
                continue
            rest = self.open[slice(0, len(self.open) - size)]
            self.open = join([rest, *(one for one in grown if one is not None)])
            self._batches += 1

    def _process(self, nodes: Nodes, stop: Callable[[], bool]) -> Nodes | None:
        """The children of these nodes that stay open, and decided nodes that wait; None if there are none."""
        can = nodes.open_neurons() > 0
        waiting = self._solve_leaves(nodes[~can], stop) if not bool(can.all()) else None
        if not bool(can.any()):
            return waiting
        children, neuron = branch(
            self.maps, self.ball, len(self.maps.stages) - 1, self.specification, nodes[can], self.enough
        )
        undone = self._settle(children)
        with self._lock:
            self.counts.nodes += len(children)
        children, neuron = children[undone], neuron.repeat(2)[undone]
        below = neuron < sum(self.maps.widths[:-1])  # splits of the last layer say nothing about a layer above
        if bool(below.any()):
            affected = children[below]
            chosen = most_relaxed(self.maps, self.ball, self.specification, affected, TIGHTENED)
            affected = tighten(self.maps, self.ball, affected, chosen)
            children = join([affected, children[~below]])
        if len(children):
            children = self._polish(self._improve(self._limited_again(children), ITERATIONS))
            children = children[self._settle(children)]
        kept = [part for part in (waiting, children) if part is not None and len(part)]
        return join(kept) if kept else None

    def _settle(self, nodes: Nodes) -> Tensor:
        """Which nodes are not done, (N,); the others' share counts."""
        undone = self._undone(nodes)
        with self._lock:
            self.done += float(nodes.share[~undone].sum())
            if not bool(undone.all()):
                self.least = min(self.least, float(nodes.bound[~undone].min()))
        return undone

    def _limited_again(self, nodes: Nodes) -> Nodes:
        """New joint limits of the first layer for nodes, every few splits, that have split the members of theirs."""
        if not self._limited:
            return nodes
        depth = torch.stack([sign.ne(0).sum(1) for sign in nodes.signs]).sum(0)
        again = (depth % LIMITED_EVERY == 0) & spent(self.maps, 0, self.maps.layers, self.specification, nodes)
        if not bool(again.any()):
            return nodes
        renewed = limit_jointly(
            self.maps, self.ball, 0, self.maps.layers, self.specification, nodes[again], *FIRST_LIMITS
        )
        return join([renewed, nodes[~again]])

    def _undone(self, nodes: Nodes) -> Tensor:
        return ~(nodes.bound > self.enough)  # a NaN proves nothing

    def _improve(self, nodes: Nodes, iterations: int, pace: float = 1.0, precise: bool = False) -> Nodes:
        nodes, points = improve(
            self.maps, self.ball, len(self.maps.stages) - 1, self.specification, nodes, iterations, self.enough,
            pace, precise,
        )  # fmt: skip
        descend = self._batches % DESCENT_EVERY == 0
        self.hunt.offer(points[self._undone(nodes)], descend=descend)
        return nodes

    def _polish(self, nodes: Nodes) -> Nodes:
        """More and smaller steps where few ReLUs are open: many splits, whose multipliers are worth more than new ones.

        Without it the search is slow where the margin is nearly zero, next to the nearest counterexample.
        """
        few = nodes.open_neurons() <= FEW
        last = (few & self._undone(nodes)).nonzero().flatten()
        if not len(last):
            return nodes
        rest = torch.ones(len(nodes), dtype=torch.bool, device=last.device)
        rest[last] = False
        return join([nodes[rest], self._improve(nodes[last], POLISHING, POLISHING_PACE, True)])

    def _solve_leaves(self, nodes: Nodes, stop: Callable[[], bool]) -> Nodes | None:
        """Decides nodes without unstable neurons; what is left over when time is up, or None.

        Most need no linear program, only more steps on the multipliers of their splits: large ones where the splits
        contradict each other, for their prices are to grow without limit.
        """
        alone = nodes.unlimited()
        for pace in LEAF_PACES:
            if len(nodes):
                alone = self._improve(alone, LEAF_ITERATIONS, pace, True)
                undone = self._settle(alone)
                alone, nodes = alone[undone], nodes[undone]
        for index in range(len(nodes)):
            if stop():
                return nodes[slice(index, None)]
            one = slice(index, index + 1)
            leaf, kept = alone[one], nodes[one]
            done = self._solve_leaf(leaf)
            kept.bound = leaf.bound
            if not done:
                with self._lock:
                    self.stuck.append(kept)
                    self.counts.stuck += 1
        return None

    def _solve_leaf(self, node: Nodes) -> bool:
        """Whether the node is done."""
        if not self.ball.is_program:
            node, _ = improve(
                self.maps, self.ball, len(self.maps.stages) - 1, self.specification, node, 10 * LEAF_ITERATIONS,
                self.enough,
            )  # fmt: skip
            return not bool(self._settle(node).any())
        with self._lock:
            if self._leaf is None:
                self._leaf = LeafProgram(self.maps, self.ball.image, self.ball.feasible)
            self.counts.programs += 1
        specification = self.specification[node.row[0]]
        bound, point = self._leaf.bound(self.ball, len(self.maps.stages) - 1, specification, node)
        node.bound = node.bound.new_tensor([bound])
        undone = bool(self._settle(node).any())
        if undone and point is not None:
            self.hunt.offer(point)
        return not undone


def _dealt(size: int) -> list[Tensor]:
    """The rows of a batch, dealt to the threads in turn."""
    hands = min(count(), max(1, size // SMALL))
    return [torch.arange(first, size, hands) for first in range(hands)]


def _out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )
