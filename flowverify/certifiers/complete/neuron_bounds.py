"""Bounds of what the ReLUs read, over one ball: exact in the first layer, optimised CROWN above, refined by splits.

Joint limits are set on the neurons whose relaxation costs a node's bound most.

A search starts from bounds of neurons and margins over a ball by the engines of a bound (:class:`Roots`). The
relaxation of a search lets every unstable neuron spend the whole budget; engines such as ``lifted`` (theory,
section 21) do not, and are the tighter ones where many neurons are unstable. Their bounds hold on the whole ball, so
that they may replace those of the neurons of any node, and the bound of a root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.nodes import TreeNodes, branch, join, roots
from flowverify.certifiers.complete.problem import Problem, RowsAbove
from flowverify.certifiers.complete.relaxation import (
    JointLimits,
    Relaxation,
    initial_multipliers,
    linear_bound,
    lower_bound,
)
from flowverify.deadline import Deadline
from flowverify.network import Network

if TYPE_CHECKING:
    from flowverify.bounds.lifted.rows import ListedRows

WEIGHED = 1e-14  # relative: what dividing a weight by the neuron's bounds, and adding a few, may round


def limit_jointly(
    problem: Problem, layer: int, nodes: TreeNodes, shape: tuple[int, int], deadline: Deadline | None = None
) -> TreeNodes:
    """The nodes, in place, with new joint limits of one layer and multipliers of 1 for them.

    The neurons are ranked by what their relaxation costs the node's bound, and divided into groups in this order.

    Args:
        layer: counted from 0, below the problem's stage.
        shape: how many groups, and members of each.
        deadline: asked between chunks; once it is over, limits are what the neurons' own bounds make them.
    """
    lower, upper = nodes.lower[layer], nodes.upper[layer]
    groups, size = shape
    size = min(size, lower.shape[1])
    groups = min(groups, lower.shape[1] // size)
    weights, members = _costs(problem, layer, nodes).topk(groups * size, dim=1)
    ends = upper.gather(1, members), -lower.gather(1, members)
    up, down = (torch.where(weights > 0, weights / end.clamp(min=1e-300), 0.0) for end in ends)
    weights, members, up, down = (v.reshape(len(nodes), groups, size) for v in (weights, members, up, down))
    largest = _largest(problem, layer, nodes, weights, members, up, down, deadline or Deadline())
    nodes.joint[layer] = JointLimits(members, up, down, largest)
    nodes.multipliers.theta[layer] = torch.ones_like(largest[..., 0])
    return nodes


def spent(problem: Problem, layer: int, nodes: TreeNodes) -> Tensor:
    """Where the joint limits of a layer save little of what the relaxation of its neurons costs alone, (N,)."""
    alone = _costs(problem, layer, nodes).sum(1)
    together = (nodes.multipliers.theta[layer] * nodes.joint[layer].limit).sum(1)
    return together > problem.settings.joint.spent_share * alone


def _costs(problem: Problem, layer: int, nodes: TreeNodes) -> Tensor:
    """What the relaxation of each neuron of a layer costs the bound of each node, without limits, (N, n)."""
    lower, upper = nodes.lower[layer], nodes.upper[layer]
    coefficients = linear_bound(nodes.relaxation(problem), nodes.multipliers).coefficients[layer]
    gap = torch.where((lower < 0) & (upper > 0), -lower * upper / (upper - lower).clamp(min=1e-300), 0.0)
    return (-coefficients).clamp(min=0) * gap


def _largest(
    problem: Problem, layer: int, nodes: TreeNodes, weights: Tensor, members: Tensor, up: Tensor, down: Tensor,
    deadline: Deadline,
) -> Tensor:  # fmt: skip
    """The largest sums by pattern, (N, G, 2 ** m), from (N, G, m) each."""
    count, groups, size = weights.shape
    bits = (torch.arange(2**size, device=weights.device)[:, None] >> torch.arange(size, device=weights.device)) & 1
    weights, members, up, down = (v.flatten(0, 1) for v in (weights, members, up, down))
    # At its own ends every neuron reaches its weight, whatever the ball allows.
    largest = (1 + WEIGHED) * weights.sum(1, keepdim=True).repeat(1, 2**size)
    useful = (weights[:, 1:2] > 0).flatten().nonzero().flatten()

    def search(part: Tensor) -> None:
        if not deadline.stop():
            terms = torch.where(bits > 0, up[part, None], -down[part, None])  # (K, patterns, m)
            found = upper_bounds(problem, layer, nodes, part // groups, terms, members[part])
            largest[part] = torch.minimum(largest[part], found)

    workers = problem.workers
    workers.each(search, workers.parts(useful, max(1, problem.settings.joint.chunk // 2**size)))
    return largest.reshape(count, groups, -1)


def upper_bounds(
    problem: Problem, layer: int, nodes: TreeNodes, owner: Tensor, terms: Tensor, members: Tensor
) -> Tensor:
    """Upper bounds over the ball, (K, P), of sums of terms (K, P, m) times the members (K, m) of a layer.

    Args:
        owner: the node of each group (K,), whose splits and limits below the layer hold.
    """
    maps, ball, settings = problem.maps, problem.ball, problem.settings.joint
    kinds, patterns, _ = terms.shape
    if layer == 0:
        # Rounded after the product: torch may have been told to multiply in less than single precision.
        functions = (terms @ maps.stages[0].weights[0][members]).flatten(0, 1).float()
        error = torch.finfo(functions.dtype).eps * functions.abs().amax(1).double()
        centre = (maps.stages[0].weights[0] @ ball.flat + maps.stages[0].bias)[members][..., None]
        excess = ball.greatest_excess(functions, error, settings.tolerance).reshape(kinds, patterns)
        return excess + (terms @ centre)[..., 0] + _rounding(problem, terms, members)
    rows = terms.new_zeros(kinds, patterns, nodes.lower[layer].shape[1])
    rows = rows.scatter(2, members[:, None].expand_as(terms), -terms).flatten(0, 1)
    node = owner.repeat_interleave(patterns)
    lower, upper, signs = ([v[node] for v in group[:layer]] for group in (nodes.lower, nodes.upper, nodes.signs))
    joint = [limits[node] for limits in nodes.joint[:layer]]
    multipliers = initial_multipliers(lower, upper, len(node), problem.first_share)
    multipliers.theta = [limits.largest.new_zeros(len(node), limits.groups) for limits in joint]
    relaxation = Relaxation.of(problem.at(layer, rows), lower, upper, signs, joint)
    return -ascend(relaxation, multipliers, settings.iterations).value.reshape(kinds, patterns)


def _rounding(problem: Problem, terms: Tensor, members: Tensor) -> Tensor | float:
    """By how much sums of the first layer's values, and of its weights, may be off, (K, P)."""
    if problem.maps.rounding is None:
        return 0.0
    largest = problem.maps.rounding.largest(0, problem.ball.reach)[members]
    return problem.maps.rounding.gamma * (terms.abs() @ largest[..., None])[..., 0]


@dataclass
class NeuronBounds:
    """Lower and upper bounds (n_k,) of the input of each ReLU layer."""

    lower: list[Tensor]
    upper: list[Tensor]

    @property
    def unstable_above(self) -> int:
        """How many neurons above the first layer have both signs."""
        above = zip(self.lower[1:], self.upper[1:], strict=True)
        return sum(int(((low < 0) & (high > 0)).sum()) for low, high in above)


def neuron_bounds(
    problem: Problem,
    *,
    known: NeuronBounds | None = None,
    iterations: int | None = None,
    deadline: Deadline | None = None,
) -> NeuronBounds:
    """Bounds of every layer, from below: CROWN with slopes optimised for each side of each unstable neuron.

    Args:
        problem: whose maps and ball they are for.
        known: bounds over the ball from elsewhere; neurons that they settle are not looked at.
        iterations: fewer than the settings say; 1 for those of CROWN's first slopes, 0 for those known alone.
        deadline: asked between chunks; once it is over, bounds are those.
    """
    settings, maps, workers = problem.settings.neurons, problem.maps, problem.workers
    steps, deadline = settings.iterations if iterations is None else iterations, deadline or Deadline()
    found = NeuronBounds([], [])
    for stage in range(maps.layers):
        bias = maps.stages[stage].bias
        width = len(bias)
        identity = torch.eye(width, dtype=torch.float64, device=bias.device)
        both = problem.at(stage, torch.cat([identity, -identity]))
        if known is None:
            values = identity.new_full((2 * width,), -torch.inf)
            rows = torch.arange(2 * width, device=bias.device)
        else:
            lower, upper = known.lower[stage], known.upper[stage]
            values = torch.cat([lower, -upper])
            # The first layer's are exact.
            rows = ((lower < 0) & (upper > 0) & (stage > 0)).repeat(2).nonzero().flatten()
        if len(rows) and (steps > 0 or known is None):
            every = workers.parts(rows, settings.chunk)
            crown = torch.cat(workers.each(lambda part: _crown(both.rows(part), found, 1), every))  # noqa: B023
            values[rows] = torch.fmax(values[rows], crown) if known is not None else crown
        if stage > 0 and steps > 1:
            lower, upper = values[:width], -values[width:]
            open_rows = ((lower < 0) & (upper > 0)).repeat(2).nonzero().flatten()

            def tighter(rows: Tensor) -> Tensor:
                return values[rows] if deadline.stop() else _crown(both.rows(rows), found, steps)  # noqa: B023

            if len(open_rows):
                better = torch.cat(workers.each(tighter, workers.parts(open_rows, settings.chunk)))
                values[open_rows] = torch.maximum(values[open_rows], better)
        lower, upper = _cut_off(problem, stage, values[:width], -values[width:])
        found.lower.append(lower)
        found.upper.append(upper)
    return found


def refine(problem: Problem, bounds: NeuronBounds, deadline: Deadline | None = None) -> NeuronBounds:
    """Tightens the layers above the first by splitting the ReLUs below, so often as the settings say.

    Each side of each unstable neuron has a search tree of its own, whose worst node is split in every round; the
    trees of a layer grow in one batch, from roots with joint limits. The bound is the worst over a tree's nodes.
    """
    deadline = deadline or Deadline()
    result = NeuronBounds([v.clone() for v in bounds.lower], [v.clone() for v in bounds.upper])
    for stage in range(1, problem.maps.layers):
        lower, upper = result.lower[stage], result.upper[stage]
        unstable = ((lower < 0) & (upper > 0)).nonzero().flatten()
        if not len(unstable) or deadline.stop():
            continue
        identity = torch.eye(len(lower), dtype=torch.float64, device=lower.device)[unstable]
        sides = problem.at(stage, torch.cat([identity, -identity]))
        start = torch.cat([lower[unstable], -upper[unstable]])
        values = _grow(sides, start, result, deadline)
        lower[unstable], upper[unstable] = values[: len(unstable)], -values[len(unstable) :]
    return result


def tighten(problem: Problem, nodes: TreeNodes, neurons: list[Tensor | None]) -> TreeNodes:
    """New bounds of some neurons of each node, from the phases decided below them; never looser than before.

    Args:
        neurons: (N, K) for each layer, or None for none of it. The first layer has nothing below it.

    A node whose bounds contradict each other holds no image: its bound becomes infinite.
    """
    for layer, chosen in enumerate(neurons):
        if chosen is None or layer == 0:
            continue
        count, width = chosen.shape
        owner = torch.arange(count, device=chosen.device).repeat_interleave(width)
        at = owner, chosen.flatten()
        ends = []
        for sign in (1.0, -1.0):
            rows = torch.zeros(count * width, nodes.lower[layer].shape[1], dtype=torch.float64, device=chosen.device)
            rows[torch.arange(count * width, device=chosen.device), chosen.flatten()] = sign
            lower, upper = ([v[owner] for v in group[:layer]] for group in (nodes.lower, nodes.upper))
            multipliers = initial_multipliers(lower, upper, count * width)
            multipliers.guess = nodes.multipliers.guess.new_zeros(count * width)
            relaxation = Relaxation.of(problem.at(layer, rows), lower, upper)
            tolerance = problem.settings.neurons.tightening_tolerance
            ends.append(lower_bound(relaxation, multipliers, tolerance=tolerance).value)
        nodes.lower[layer][at] = torch.maximum(nodes.lower[layer][at], ends[0])
        nodes.upper[layer][at] = torch.minimum(nodes.upper[layer][at], -ends[1])
        empty = (nodes.lower[layer] > nodes.upper[layer]).any(1)
        nodes.bound = torch.where(empty, torch.inf, nodes.bound)
    return nodes


def improve(
    problem: Problem, nodes: TreeNodes, iterations: int, enough: float = 0.0, pace: float = 1.0, precise: bool = False
) -> tuple[TreeNodes, Tensor]:
    """Raises the bounds of nodes, in place, until they exceed ``enough``; and the points where bounds are attained.

    The bound a node has is kept where it is better.
    """
    found = ascend(nodes.relaxation(problem), nodes.multipliers, iterations, enough=enough, pace=pace, precise=precise)
    nodes.multipliers = found.multipliers
    nodes.bound = torch.maximum(nodes.bound, found.value)
    return nodes, found.point


def _crown(problem: Problem, known: NeuronBounds, iterations: int) -> Tensor:
    relaxation = Relaxation.of(problem, known.lower, known.upper)
    share = problem.first_share if iterations > 1 else None
    multipliers = initial_multipliers(relaxation.lower, relaxation.upper, len(relaxation), share)
    multipliers.guess = multipliers.guess.to(problem.specification.device)
    if iterations == 1:
        return lower_bound(relaxation, multipliers, tolerance=problem.settings.neurons.tolerance).value
    return ascend(relaxation, multipliers, iterations).value


def _grow(problem: Problem, start: Tensor, known: NeuronBounds, deadline: Deadline) -> Tensor:
    """Lower bounds (R,) of the specifications of a stage, never below ``start``."""
    settings, workers, stage = problem.settings.neurons, problem.workers, problem.stage
    count = len(problem.specification)
    everything = torch.arange(count, device=start.device)
    tree = roots(everything, known.lower[:stage], known.upper[:stage], problem.first_share)
    tree.bound = start.clone()
    tree = limit_jointly(problem, 0, tree, problem.settings.joint.neuron_bounds, deadline)
    tree = join(
        workers.each(
            lambda part: improve(problem, tree[part], settings.iterations)[0],
            workers.parts(everything, settings.chunk),
        )
    )
    for _ in range(settings.rounds):
        if deadline.stop():
            break
        worst = _worst(tree, count)
        can = (tree[worst].open_neurons() > 0) & (tree.bound[worst] < 0)
        worst = worst[can]
        if not len(worst):
            break
        kept = torch.ones(len(tree), dtype=torch.bool, device=worst.device)
        kept[worst] = False
        before = tree

        def divided(part: Tensor) -> TreeNodes:
            child, _ = branch(problem, before[part])  # noqa: B023
            return improve(problem, child, settings.child_iterations)[0]

        tree = join([tree[kept], *workers.each(divided, workers.parts(worst, settings.chunk))])
    least = start.new_full((count,), torch.inf)
    return torch.maximum(start, least.scatter_reduce(0, tree.row, tree.bound, "amin"))


def _worst(tree: TreeNodes, count: int) -> Tensor:
    """The index of the node of least bound in each row's tree."""
    order = torch.argsort(tree.bound, stable=True)
    order = order[torch.argsort(tree.row[order], stable=True)]
    return order[torch.searchsorted(tree.row[order], torch.arange(count, device=order.device))]


def _cut_off(problem: Problem, stage: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds, none beyond what values can be: bounds on rounding count on it."""
    if problem.maps.rounding is None:
        return lower, upper
    largest = problem.maps.rounding.largest(stage, problem.ball.reach)
    return torch.maximum(lower, -largest), torch.minimum(upper, largest)


@dataclass(frozen=True)
class RootBounds:
    """Over one ball, in exact arithmetic.

    Attributes:
        neurons: of what each ReLU reads.
        margins: lower bounds (R,) of the specification's rows.
        above: rows of moves above ReLUs; None for none.
    """

    neurons: NeuronBounds
    margins: Tensor
    above: RowsAbove | None = None


class Roots:
    """Bounds of one network over single balls of any threat.

    Args:
        network: in float64.
        bound: a name in :data:`flowverify.bounds.recipes.BOUNDS`, or MODULE:NAME.
        tolerance: of maxima over the ball; bounds are sound at any.
        entries: rows of moves above ReLUs are asked for where they have no more.
    """

    def __init__(self, network: Network, bound: str, tolerance: float, entries: int = 0) -> None:
        self._network, self._bound, self._tolerance, self._entries = network, bound, tolerance, entries
        self._engines: dict[Threat, MarginBounds] = {}

    def over(self, ball: Ball, specification: Tensor) -> RootBounds:
        """Bounds over one ball, and of linear functions (R, classes) of the output that are differences of two."""
        if ball.threat not in self._engines:
            options = EngineOptions(tolerance=self._tolerance)
            self._engines[ball.threat] = MarginBounds(
                self._network, ball.threat, self._bound, dtype=torch.float64, options=options
            )
        exact = ball.threat.ground == "l1" and ball.threat.cap is None
        everything = self._engines[ball.threat].everything(ball, specification[None], self._entries if exact else 0)
        found = NeuronBounds([], [])
        for low, high in everything.neurons:
            # What is not a number bounds nothing.
            found.lower.append(low[0].flatten().nan_to_num(nan=-torch.inf))
            found.upper.append(high[0].flatten().nan_to_num(nan=torch.inf))
        margins = everything.margins[0].nan_to_num(nan=-torch.inf)
        return RootBounds(found, margins, self._above(ball.images, everything.rows))

    def _above(self, image: Tensor, rows: Sequence[ListedRows | None]) -> RowsAbove | None:
        """Rows of all layers as one; those that are not numbers are left out."""
        if all(one is None for one in rows):
            return None
        index, values, gains = list[Tensor](), list[Tensor](), list[Tensor]()
        at_image = self._network.values(image.double())
        for node, one in zip(self._network.activations, rows, strict=True):
            value = at_image[node.name][0].flatten()
            chosen = value.new_zeros(0, dtype=torch.int64)
            if one is not None:
                usable = torch.isfinite(one.gains[0]).flatten(1).all(1)
                chosen = one.index[0][usable]
                gains.append(one.gains[0][usable])
            index.append(chosen)
            values.append(value[chosen])
        return RowsAbove(tuple(index), tuple(values), torch.cat(gains))
