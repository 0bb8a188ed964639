"""Joint limits for the nodes of a search: of the neurons whose relaxation costs each node's bound most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.joint import JointLimits
from flowverify.certifiers.complete.nodes import Nodes
from flowverify.certifiers.complete.relaxation import initial_multipliers, linear_bound
from flowverify.certifiers.complete.workers import each, parts

ITERATIONS = 8  # above the first layer
CHUNK = 4096  # functions
WEIGHED = 1e-14  # relative: what dividing a weight by the neuron's bounds, and adding a few, may round
SPENT = 0.75
LOOSE = 0.1  # of the maxima over the ball; they are sound at any


def limit_jointly(
    maps: AffineMaps,
    ball: Polytope,
    layer: int,
    stage: int,
    specification: Tensor,
    nodes: Nodes,
    groups: int,
    size: int,
    stop: Callable[[], bool] = lambda: False,
) -> Nodes:
    """The nodes, in place, with new joint limits of one layer and multipliers of 1 for them.

    The neurons are ranked by what their relaxation costs the node's bound, and divided into ``groups`` of ``size`` in
    this order.

    Args:
        layer: counted from 0, below ``stage``, whose linear functions ``specification`` the nodes bound.
        stop: asked between chunks; once it says so, limits are what the neurons' own bounds make them.
    """
    lower, upper = nodes.lower[layer], nodes.upper[layer]
    size = min(size, lower.shape[1])
    groups = min(groups, lower.shape[1] // size)
    weights, members = _costs(maps, layer, stage, specification, nodes).topk(groups * size, dim=1)
    ends = upper.gather(1, members), -lower.gather(1, members)
    up, down = (torch.where(weights > 0, weights / end.clamp(min=1e-300), 0.0) for end in ends)
    weights, members, up, down = (v.reshape(len(nodes), groups, size) for v in (weights, members, up, down))
    largest = _largest(maps, ball, layer, nodes, weights, members, up, down, stop)
    nodes.joint[layer] = JointLimits(members, up, down, largest)
    nodes.multipliers.theta[layer] = torch.ones_like(largest[..., 0])
    return nodes


def spent(maps: AffineMaps, layer: int, stage: int, specification: Tensor, nodes: Nodes) -> Tensor:
    """Where the joint limits of a layer save little of what the relaxation of its neurons costs alone, (N,)."""
    alone = _costs(maps, layer, stage, specification, nodes).sum(1)
    together = (nodes.multipliers.theta[layer] * nodes.joint[layer].limit).sum(1)
    return together > SPENT * alone


def _costs(maps: AffineMaps, layer: int, stage: int, specification: Tensor, nodes: Nodes) -> Tensor:
    """What the relaxation of each neuron of a layer costs the bound of each node, without limits, (N, n)."""
    lower, upper = nodes.lower[layer], nodes.upper[layer]
    coefficients = linear_bound(
        maps, stage, specification[nodes.row], nodes.lower, nodes.upper, nodes.multipliers, nodes.joint
    ).coefficients[layer]
    gap = torch.where((lower < 0) & (upper > 0), -lower * upper / (upper - lower).clamp(min=1e-300), 0.0)
    return (-coefficients).clamp(min=0) * gap


def _largest(
    maps: AffineMaps, ball: Polytope, layer: int, nodes: Nodes, weights: Tensor, members: Tensor, up: Tensor,
    down: Tensor, stop: Callable[[], bool],
) -> Tensor:  # fmt: skip
    """The largest sums by pattern, (N, G, 2 ** m), from (N, G, m) each."""
    count, groups, size = weights.shape
    bits = (torch.arange(2**size, device=weights.device)[:, None] >> torch.arange(size, device=weights.device)) & 1
    weights, members, up, down = (v.flatten(0, 1) for v in (weights, members, up, down))
    # At its own ends every neuron reaches its weight, whatever the ball allows.
    largest = (1 + WEIGHED) * weights.sum(1, keepdim=True).repeat(1, 2**size)
    useful = (weights[:, 1:2] > 0).flatten().nonzero().flatten()

    def search(part: Tensor) -> None:
        if not stop():
            terms = torch.where(bits > 0, up[part, None], -down[part, None])  # (K, patterns, m)
            found = _maximum(maps, ball, layer, nodes, part // groups, terms, members[part])
            largest[part] = torch.minimum(largest[part], found)

    each(search, parts(useful, max(1, CHUNK // 2**size)))
    return largest.reshape(count, groups, -1)


def _rounding(maps: AffineMaps, ball: Polytope, terms: Tensor, members: Tensor) -> Tensor | float:
    """By how much sums of the first layer's values, and of its weights, may be off, (K, P)."""
    if maps.rounding is None:
        return 0.0
    largest = maps.rounding.largest(0, ball.reach)[members]
    return maps.rounding.gamma * (terms.abs() @ largest[..., None])[..., 0]


def _maximum(
    maps: AffineMaps, ball: Polytope, layer: int, nodes: Nodes, owner: Tensor, terms: Tensor, members: Tensor
) -> Tensor:
    """Upper bounds over the ball of sums of terms (K, P, m) times the members (K, m) of a layer, (K, P)."""
    kinds, patterns, _ = terms.shape
    if layer == 0:
        # Rounded after the product: torch may have been told to multiply in less than single precision.
        functions = (terms @ maps.stages[0].weights[0][members]).flatten(0, 1).float()
        error = torch.finfo(functions.dtype).eps * functions.abs().amax(1).double()
        centre = (maps.stages[0].weights[0] @ ball.flat + maps.stages[0].bias)[members][..., None]
        excess = ball.greatest_excess(functions, error, LOOSE).reshape(kinds, patterns)
        return excess + (terms @ centre)[..., 0] + _rounding(maps, ball, terms, members)
    rows = terms.new_zeros(kinds, patterns, nodes.lower[layer].shape[1])
    rows = rows.scatter(2, members[:, None].expand_as(terms), -terms).flatten(0, 1)
    node = owner.repeat_interleave(patterns)
    lower, upper, signs = ([v[node] for v in group[:layer]] for group in (nodes.lower, nodes.upper, nodes.signs))
    joint = [limits[node] for limits in nodes.joint[:layer]]
    multipliers = initial_multipliers(lower, upper, len(node))
    multipliers.theta = [limits.largest.new_zeros(len(node), limits.groups) for limits in joint]
    found = ascend(maps, ball, layer, rows, lower, upper, signs, multipliers, ITERATIONS, joint)
    return -found.value.reshape(kinds, patterns)
