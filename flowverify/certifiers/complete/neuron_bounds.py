"""Bounds of what the ReLUs read, over one ball: exact in the first layer, optimised CROWN above, refined by splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.branching import branch
from flowverify.certifiers.complete.joint_search import limit_jointly
from flowverify.certifiers.complete.nodes import Nodes, join, roots
from flowverify.certifiers.complete.relaxation import initial_multipliers, lower_bound
from flowverify.certifiers.complete.workers import each, parts

ITERATIONS = 20
CHILD_ITERATIONS = 6
CHUNK = 256
LIMITS = 4, 6  # joint limits of the first layer: groups, members


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
    maps: AffineMaps, ball: Polytope, *, iterations: int = ITERATIONS, stop: Callable[[], bool] = lambda: False
) -> NeuronBounds:
    """Bounds of every layer, from below: CROWN with slopes optimised for each side of each unstable neuron.

    Args:
        stop: asked between chunks; once it says so, bounds are those of CROWN's first slopes.
    """
    found = NeuronBounds([], [])
    for stage in range(maps.layers):
        width = len(maps.stages[stage].bias)
        device = maps.stages[stage].bias.device
        identity = torch.eye(width, dtype=torch.float64, device=device)
        both = torch.cat([identity, -identity])
        values = torch.cat(each(lambda part: _crown(maps, ball, stage, part, found, 1), parts(both, CHUNK)))  # noqa: B023
        if stage > 0 and iterations > 1:
            lower, upper = values[:width], -values[width:]
            open_rows = ((lower < 0) & (upper > 0)).repeat(2).nonzero().flatten()
            steps = iterations

            def tighter(rows: Tensor) -> Tensor:
                return values[rows] if stop() else _crown(maps, ball, stage, both[rows], found, steps)  # noqa: B023

            if len(open_rows):
                better = torch.cat(each(tighter, parts(open_rows, CHUNK)))
                values[open_rows] = torch.maximum(values[open_rows], better)
        lower, upper = _cut_off(maps, ball, stage, values[:width], -values[width:])
        found.lower.append(lower)
        found.upper.append(upper)
    return found


def refine(
    maps: AffineMaps, ball: Polytope, bounds: NeuronBounds, rounds: int, stop: Callable[[], bool]
) -> NeuronBounds:
    """Tightens the layers above the first by splitting the ReLUs below, ``rounds`` times for each unstable neuron.

    Each side of each unstable neuron has a search tree of its own, whose worst node is split in every round; the
    trees of a layer grow in one batch, from roots with joint limits. The bound is the worst over a tree's nodes.
    """
    result = NeuronBounds([v.clone() for v in bounds.lower], [v.clone() for v in bounds.upper])
    for stage in range(1, maps.layers):
        lower, upper = result.lower[stage], result.upper[stage]
        unstable = ((lower < 0) & (upper > 0)).nonzero().flatten()
        if not len(unstable) or stop():
            continue
        identity = torch.eye(len(lower), dtype=torch.float64, device=lower.device)[unstable]
        specification = torch.cat([identity, -identity])
        start = torch.cat([lower[unstable], -upper[unstable]])
        values = _grow(maps, ball, stage, specification, start, result, rounds, stop)
        lower[unstable], upper[unstable] = values[: len(unstable)], -values[len(unstable) :]
    return result


def tighten(maps: AffineMaps, ball: Polytope, nodes: Nodes, neurons: list[Tensor | None]) -> Nodes:
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
            ends.append(lower_bound(maps, ball, layer, rows, lower, upper, multipliers, tolerance=1e-2).value)
        nodes.lower[layer][at] = torch.maximum(nodes.lower[layer][at], ends[0])
        nodes.upper[layer][at] = torch.minimum(nodes.upper[layer][at], -ends[1])
        empty = (nodes.lower[layer] > nodes.upper[layer]).any(1)
        nodes.bound = torch.where(empty, torch.inf, nodes.bound)
    return nodes


def _crown(
    maps: AffineMaps, ball: Polytope, stage: int, specification: Tensor, known: NeuronBounds, iterations: int
) -> Tensor:
    lower, upper = known.lower[:stage], known.upper[:stage]
    multipliers = initial_multipliers(lower, upper, len(specification))
    multipliers.guess = multipliers.guess.to(specification.device)
    if iterations == 1:
        return lower_bound(maps, ball, stage, specification, lower, upper, multipliers, tolerance=1e-6).value
    own_lower, own_upper = ([v.expand(len(specification), -1) for v in group] for group in (lower, upper))
    signs = [torch.zeros_like(v, dtype=torch.int8) for v in own_lower]
    return ascend(maps, ball, stage, specification, own_lower, own_upper, signs, multipliers, iterations).value


def _grow(
    maps: AffineMaps,
    ball: Polytope,
    stage: int,
    specification: Tensor,
    start: Tensor,
    known: NeuronBounds,
    rounds: int,
    stop: Callable[[], bool],
) -> Tensor:
    """Lower bounds (R,) of the specifications of a stage, never below ``start``."""
    count = len(specification)
    everything = torch.arange(count, device=specification.device)
    tree = roots(everything, known.lower[:stage], known.upper[:stage])
    tree.bound = start.clone()
    tree = limit_jointly(maps, ball, 0, stage, specification, tree, *LIMITS, stop)
    tree = join(
        each(
            lambda part: improve(maps, ball, stage, specification, tree[part], ITERATIONS)[0], parts(everything, CHUNK)
        )
    )
    for _ in range(rounds):
        if stop():
            break
        worst = _worst(tree, count)
        can = (tree[worst].open_neurons() > 0) & (tree.bound[worst] < 0)
        worst = worst[can]
        if not len(worst):
            break
        kept = torch.ones(len(tree), dtype=torch.bool, device=worst.device)
        kept[worst] = False
        before = tree

        def divided(part: Tensor) -> Nodes:
            child, _ = branch(maps, ball, stage, specification, before[part])  # noqa: B023
            return improve(maps, ball, stage, specification, child, CHILD_ITERATIONS)[0]

        tree = join([tree[kept], *each(divided, parts(worst, CHUNK))])
    least = specification.new_full((count,), torch.inf)
    return torch.maximum(start, least.scatter_reduce(0, tree.row, tree.bound, "amin"))


def improve(
    maps: AffineMaps,
    ball: Polytope,
    stage: int,
    specification: Tensor,
    nodes: Nodes,
    iterations: int,
    enough: float = 0.0,
    pace: float = 1.0,
    precise: bool = False,
) -> tuple[Nodes, Tensor]:
    """Raises the bounds of nodes, in place, until they exceed ``enough``; and the points where bounds are attained.

    The bound a node has is kept where it is better.
    """
    found = ascend(
        maps, ball, stage, specification[nodes.row], nodes.lower, nodes.upper, nodes.signs, nodes.multipliers,
        iterations, nodes.joint, enough=enough, pace=pace, precise=precise,
    )  # fmt: skip
    nodes.multipliers = found.multipliers
    nodes.bound = torch.maximum(nodes.bound, found.value)
    return nodes, found.point


def _worst(tree: Nodes, count: int) -> Tensor:
    """The index of the node of least bound in each row's tree."""
    order = torch.argsort(tree.bound, stable=True)
    order = order[torch.argsort(tree.row[order], stable=True)]
    return order[torch.searchsorted(tree.row[order], torch.arange(count, device=order.device))]


def _cut_off(maps: AffineMaps, ball: Polytope, stage: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds, none beyond what values can be: bounds on rounding count on it."""
    if maps.rounding is None:
        return lower, upper
    largest = maps.rounding.largest(stage, ball.reach)
    return torch.maximum(lower, -largest), torch.minimum(upper, largest)
