"""Joint limits for the nodes of a search: of the neurons whose relaxation costs each node's bound most."""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.deadline import Deadline
from flowverify.certifiers.complete.joint_limits import JointLimits
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import Relaxation, initial_multipliers, linear_bound
from flowverify.certifiers.complete.tree_nodes import TreeNodes

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
    multipliers = initial_multipliers(lower, upper, len(node))
    multipliers.theta = [limits.largest.new_zeros(len(node), limits.groups) for limits in joint]
    relaxation = Relaxation.of(problem.at(layer, rows), lower, upper, signs, joint)
    return -ascend(relaxation, multipliers, settings.iterations).value.reshape(kinds, patterns)


def _rounding(problem: Problem, terms: Tensor, members: Tensor) -> Tensor | float:
    """By how much sums of the first layer's values, and of its weights, may be off, (K, P)."""
    if problem.maps.rounding is None:
        return 0.0
    largest = problem.maps.rounding.largest(0, problem.ball.reach)[members]
    return problem.maps.rounding.gamma * (terms.abs() @ largest[..., None])[..., 0]
