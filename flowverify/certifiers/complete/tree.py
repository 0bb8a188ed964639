"""Branch and bound at one radius: proves that no class overtakes the label in the ball, or comes across one that does.

A tree covers the ball for every other class whose bound is not positive at once. Nodes are taken from the end of a
stack, many at a time; a node whose bound is positive is done. Balls are nested, so a tree may go on when its radius
becomes smaller: whatever is done stays done.

On a node whose ReLUs are all decided the network is affine, so the least value of the specification over the ball and
the splits is a linear program in the flows. HiGHS solves it; the dual prices of the splits become the gamma of
:func:`~flowverify.certifiers.complete.relaxation.lower_bound`, which is sound for any, and exact for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.neuron_bounds import (
    NeuronBounds,
    improve,
    limit_jointly,
    neuron_bounds,
    spent,
    tighten,
)
from flowverify.certifiers.complete.nodes import TreeNodes, branch, join, most_relaxed, roots
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import Relaxation, lower_bound
from flowverify.deadline import Deadline
from flowverify.grid import Grid

_INFEASIBLE = 2  # SciPy's code


class LeafProgram:
    """The linear programs over one ball.

    Args:
        problem: on l1 ground cost, without a cap.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._maps = problem, problem.maps
        self._tolerance = problem.settings.tree.solver_tolerance
        image = problem.ball.image
        self._incidence = Grid.of(image[None]).incidence_scipy().tocsr()
        self._image = image.detach().cpu().double().numpy().reshape(-1)

    def bound(self, node: TreeNodes) -> tuple[float, Tensor | None]:
        """The least value on one node (a batch of one), and a point (1, pixels) that attains it.

        An empty node is at infinity if multipliers prove it. Where HiGHS fails, the bound is the node's own.
        """
        ball, stage = self._problem.ball, self._problem.stage
        if not self._incidence.shape[1]:
            return self._proven(node), ball.flat[None]  # nothing can move
        rows, constants, signs, places = self._splits(node)
        objective, _ = self._affine(self._problem.specification[node.row[0]], node, stage)
        edges = self._incidence
        unit = max(ball.budget, 1e-300)
        # Flows are counted in units of the budget, so that the solver's tolerances are relative to it.
        to_flow = sparse.hstack([edges, -edges]).tocsr() * unit
        limits: list[Any] = [sparse.csr_array(np.ones((1, to_flow.shape[1])))]
        right = [np.ones(1)]
        if ball.positive:
            limits.append(-to_flow / unit)
            right.append(self._image / unit)
        if len(rows):
            # s z(x) >= 0, each row scaled to a largest coefficient of one.
            normal = -(signs[:, None] * rows) @ to_flow
            value = signs * (rows @ self._image + constants)
            scale = np.maximum(np.abs(normal).max(1), 1e-300)
            limits.append(sparse.csr_array(normal / scale[:, None]))
            right.append(value / scale)
        system = sparse.vstack(limits).tocsr(), np.concatenate(right)
        cost = objective @ to_flow
        size = max(float(np.abs(cost).max(initial=0.0)), 1e-300)
        solution = self._solve(cost / size, *system)
        if solution.status == 0:
            point = torch.from_numpy(self._image + to_flow @ solution.x)[None].to(ball.flat)
            if len(rows):
                self._price(node, -solution.ineqlin.marginals[-len(rows) :] * size / scale, signs, places)
            return max(float(node.bound[0]), self._proven(node)), point
        if solution.status == _INFEASIBLE and len(rows):
            # How far the splits are from holding together: the prices of that prove the node empty.
            slack = np.zeros((system[0].shape[0], 1))
            slack[-len(rows) :] = -1.0
            wider = sparse.hstack([system[0], sparse.csr_array(slack)]).tocsr()
            apart = self._solve(np.append(np.zeros(len(cost)), 1.0), wider, system[1])
            if apart.status == 0 and apart.fun > self._tolerance:
                known = float(node.bound[0])
                weight = 2 * (1 + (max(0.0, -known) if np.isfinite(known) else 0.0)) / apart.fun
                for _ in range(4):
                    self._price(node, -apart.ineqlin.marginals[-len(rows) :] * weight / scale, signs, places)
                    if self._proven(node) > 0:
                        return float("inf"), None
                    weight *= 10
        return float(node.bound[0]), None

    def _price(self, node: TreeNodes, prices: Any, signs: Any, places: list[tuple[int, int]]) -> None:
        for (layer, neuron), price, sign in zip(places, prices, signs, strict=True):
            node.multipliers.gamma[layer][0, neuron] = -sign * max(float(price), 0.0)

    def _proven(self, node: TreeNodes) -> float:
        relaxation = Relaxation.of(self._problem.rows(node.row), node.lower, node.upper)
        return float(lower_bound(relaxation, node.multipliers, tolerance=1e-12).value[0])

    def _phases(self, node: TreeNodes) -> list[Tensor]:
        return [(low[0] >= 0).double() for low in node.lower]

    def _affine(self, specification: Tensor, node: TreeNodes, stage: int) -> tuple[Any, float]:
        """The coefficients on pixels, and the constant, of a linear function of a stage on a decided node."""
        phases, value = self._phases(node), float(specification @ self._maps.stages[stage].bias)
        carried = {s: specification @ w for s, w in self._maps.stages[stage].weights.items()}
        for layer in range(stage, 0, -1):
            own = carried.pop(layer, None)
            if own is None:
                continue
            own = own * phases[layer - 1]
            value += float(own @ self._maps.stages[layer - 1].bias)
            for source, weight in self._maps.stages[layer - 1].weights.items():
                carried[source] = carried.get(source, 0.0) + own @ weight
        pixels = carried.get(0)
        return (np.zeros(self._image.size) if pixels is None else pixels.cpu().numpy()), value

    def _splits(self, node: TreeNodes) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
        rows, constants, signs, places = [], [], [], []
        for layer, split in enumerate(node.signs):
            for neuron in split[0].nonzero().flatten().tolist():
                unit = torch.zeros_like(node.lower[layer][0])
                unit[neuron] = 1.0
                row, constant = self._affine(unit, node, layer)
                rows.append(row)
                constants.append(constant)
                signs.append(float(split[0, neuron]))
                places.append((layer, neuron))
        return np.array(rows), np.array(constants), np.array(signs), places

    def _solve(self, cost: Any, system: Any, right: Any) -> Any:
        options = {
            "primal_feasibility_tolerance": self._tolerance,
            "dual_feasibility_tolerance": self._tolerance,
        }
        return linprog(cost, A_ub=system, b_ub=right, bounds=(0, None), method="highs", options=options)


@dataclass
class Counts:
    """What a search has done: nodes bounded, linear programs solved, nodes left without a decision."""

    nodes: int = 0
    programs: int = 0
    stuck: int = 0


class Tree:
    """The open nodes at one radius.

    Args:
        problem: e_y - e_t for each other class, over the ball.
        bounds: of the neurons over the ball.
        nearest: sees the minimiser of every bound.
        enough: a node is done once its bound exceeds this.
        known: lower bounds (R,) of the rows over the ball from elsewhere.
        iterations: for the bounds of the roots, where not those of the settings.

    Attributes:
        least: the least bound of what is done: what a tree without open nodes proves.
    """

    def __init__(
        self,
        problem: Problem,
        bounds: NeuronBounds,
        nearest: NearestCounterexample,
        *,
        enough: float = 0.0,
        known: Tensor | None = None,
        counts: Counts | None = None,
        iterations: int | None = None,
    ) -> None:
        self.problem, self.settings = problem, problem.settings.tree
        self.enough, self.nearest = enough, nearest
        self.counts = Counts() if counts is None else counts
        self.batch_size, self.notes = self.settings.batch, ""
        self._limited = False
        self._leaf: LeafProgram | None = None
        self._batches, self._lock = 0, Lock()
        self.stuck: list[TreeNodes] = []
        self.done = 0.0
        rows = torch.arange(len(problem.specification), device=problem.specification.device)
        nodes = roots(rows, bounds.lower, bounds.upper, problem.first_share)
        if known is not None:
            nodes.bound = torch.maximum(nodes.bound, known)
        rest = self._undone(nodes)
        if bool(rest.any()):
            better = self._improve(nodes[rest], self.settings.root_iterations if iterations is None else iterations)
            nodes = join([nodes[~rest], better])
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
        return all(float(node.bound.min()) >= -self.settings.tied * self.nearest.largest for node in self.stuck)

    @property
    def _iterations(self) -> int:
        return self.settings.iterations if self.problem.above is None else self.settings.row_iterations

    @property
    def worst(self) -> float:
        """The least bound among open nodes; infinite without any."""
        return (
            float(torch.cat([self.open.bound, *(node.bound for node in self.stuck)]).min())
            if (len(self.open) or self.stuck)
            else float("inf")
        )

    def shrink(self, problem: Problem, bounds: NeuronBounds) -> None:
        """Goes on with a smaller ball around the same image; what was stuck is open again."""
        self.problem, self._leaf = problem, None
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
            iterations, workers = self._iterations, self.problem.workers
            better = workers.each(
                lambda own: self._improve(taken[own], iterations), workers.parts(rows, self.batch_size)
            )
            self.open = join(better)
            self.open = self.open[self._settle(self.open)]

    def limit(self, deadline: Deadline, layers: int | None = None) -> None:
        """Joint limits for the open nodes and their descendants: of the first ``layers`` layers, by default of all."""
        self._limited = True
        shapes = self.problem.settings.joint
        for layer in range(self.problem.maps.layers if layers is None else layers):
            if not len(self.open) or deadline.stop():
                return
            shape = shapes.first_layer if layer == 0 else shapes.upper_layers
            nodes = limit_jointly(self.problem, layer, self.open, shape, deadline)
            nodes = self._improve(nodes, self.settings.root_iterations)
            self.open = nodes[self._settle(nodes)]

    def grow(self, deadline: Deadline) -> None:
        """Splits nodes until none is open or the deadline, which is asked after every batch."""
        workers = self.problem.workers
        while len(self.open) and not deadline.stop() and len(self.open):  # what ends it may close nodes
            size = min(self.batch_size * workers.count, len(self.open))
            taken = self.open[slice(len(self.open) - size, None)]
            try:
                grown = workers.each(lambda rows: self._process(taken[rows], deadline), workers.dealt(size))  # noqa: B023
            except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.batch_size == 1:
                    raise
                self.batch_size = max(1, min(self.batch_size, size) // 2)
                self.notes = f"out of memory: continued with {self.batch_size} nodes at a time"
                continue
            rest = self.open[slice(0, len(self.open) - size)]
            self.open = join([rest, *(one for one in grown if one is not None)])
            self._batches += 1

    def _process(self, nodes: TreeNodes, deadline: Deadline) -> TreeNodes | None:
        """The children of these nodes that stay open, and decided nodes that wait; None if there are none."""
        can = nodes.open_neurons() > 0
        waiting = self._solve_leaves(nodes[~can], deadline) if not bool(can.all()) else None
        if not bool(can.any()):
            return waiting
        children, neuron = branch(self.problem, nodes[can], self.enough)
        undone = self._settle(children)
        with self._lock:
            self.counts.nodes += len(children)
            deadline.spend(len(children))
        children, neuron = children[undone], neuron.repeat(2)[undone]
        below = neuron < sum(self.problem.maps.widths[:-1])  # splits of the last layer say nothing about a layer above
        if bool(below.any()) and self.problem.above is None:
            affected = children[below]
            chosen = most_relaxed(self.problem, affected, self.problem.settings.branching.tightened)
            affected = tighten(self.problem, affected, chosen)
            children = join([affected, children[~below]])
        if len(children):
            children = self._polish(self._improve(self._limited_again(children), self._iterations))
            children = children[self._settle(children)]
        kept = [part for part in (waiting, children) if part is not None and len(part)]
        return join(kept) if kept else None

    def _settle(self, nodes: TreeNodes) -> Tensor:
        """Which nodes are not done, (N,); the others' share counts."""
        undone = self._undone(nodes)
        with self._lock:
            self.done += float(nodes.share[~undone].sum())
            if not bool(undone.all()):
                self.least = min(self.least, float(nodes.bound[~undone].min()))
        return undone

    def _limited_again(self, nodes: TreeNodes) -> TreeNodes:
        """New joint limits of the first layer for nodes, every few splits, that have split the members of theirs."""
        if not self._limited:
            return nodes
        depth = torch.stack([sign.ne(0).sum(1) for sign in nodes.signs]).sum(0)
        settings = self.problem.settings.joint
        again = (depth % settings.renewed_every == 0) & spent(self.problem, 0, nodes)
        if not bool(again.any()):
            return nodes
        renewed = limit_jointly(self.problem, 0, nodes[again], settings.first_layer)
        return join([renewed, nodes[~again]])

    def _undone(self, nodes: TreeNodes) -> Tensor:
        return ~(nodes.bound > self.enough)  # a NaN proves nothing

    def _improve(self, nodes: TreeNodes, iterations: int, pace: float = 1.0, precise: bool = False) -> TreeNodes:
        nodes, points = improve(self.problem, nodes, iterations, self.enough, pace, precise)
        descend = self._batches % self.settings.descent_every == 0
        self.nearest.offer(points[self._undone(nodes)], descend=descend)
        return nodes

    def _polish(self, nodes: TreeNodes) -> TreeNodes:
        """More and smaller steps where few ReLUs are open: many splits, whose multipliers are worth more than new ones.

        Without it the search is slow where the margin is nearly zero, next to the nearest counterexample.
        """
        few = nodes.open_neurons() <= self.settings.few_open
        last = (few & self._undone(nodes)).nonzero().flatten()
        if not len(last):
            return nodes
        rest = torch.ones(len(nodes), dtype=torch.bool, device=last.device)
        rest[last] = False
        iterations, pace = self.settings.polishing_iterations, self.settings.polishing_pace
        return join([nodes[rest], self._improve(nodes[last], iterations, pace, True)])

    def _solve_leaves(self, nodes: TreeNodes, deadline: Deadline) -> TreeNodes | None:
        """Decides nodes without unstable neurons; what is left over when time is up, or None.

        Most need no linear program, only more steps on the multipliers of their splits: large ones where the splits
        contradict each other, for their prices are to grow without limit.
        """
        alone = nodes.unlimited()
        for pace in self.settings.leaf_paces:
            if len(nodes):
                alone = self._improve(alone, self.settings.leaf_iterations, pace, True)
                undone = self._settle(alone)
                alone, nodes = alone[undone], nodes[undone]
        for index in range(len(nodes)):
            if deadline.stop():
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

    def _solve_leaf(self, node: TreeNodes) -> bool:
        """Whether the node is done."""
        if not self.problem.ball.is_program:
            node, _ = improve(self.problem, node, 10 * self.settings.leaf_iterations, self.enough)
            return not bool(self._settle(node).any())
        with self._lock:
            if self._leaf is None:
                self._leaf = LeafProgram(self.problem)
            self.counts.programs += 1
        bound, point = self._leaf.bound(node)
        node.bound = node.bound.new_tensor([bound])
        undone = bool(self._settle(node).any())
        if undone and point is not None:
            self.nearest.offer(point)
        return not undone


def _out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )


@dataclass(frozen=True)
class LeastMargin:
    """min over the ball and over t of f_y - f_t lies in [lower, upper]; ``upper`` is attained in the ball."""

    lower: float
    upper: float


def least_margin(problem: Problem, nearest: NearestCounterexample, tolerance: float, deadline: Deadline) -> LeastMargin:
    """Branch and bound on the value itself: a node is done once it cannot be lower than what has been seen.

    Args:
        problem: e_y - e_t for each other class.
        nearest: around the same image, on the same set; not used before.
        tolerance: of the gap between both sides; above the rounding of float64.
    """
    nearest.offer(problem.ball.image[None])
    tree = Tree(problem, neuron_bounds(problem), nearest, enough=nearest.least_margin - tolerance)

    def follow() -> bool:
        tree.enough = nearest.least_margin - tolerance
        return False

    own = deadline.child(until=follow)
    tree.limit(own)
    tree.grow(own)
    upper = nearest.least_margin
    return LeastMargin(min(upper - tolerance, tree.worst), upper)
