"""Which ReLU to split: candidates by the BaBSR score, the best of them by trying both sides.

BaBSR (Bunel et al. 2020) ranks unstable neurons by what their upper line costs the bound; filtered smart branching
(De Palma et al. 2021) computes a cheap bound of both children for a few of the best and takes the neuron whose worse
child is best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.gradients import Problems
from flowverify.certifiers.complete.nodes import Nodes, join
from flowverify.certifiers.complete.relaxation import Multipliers, lower_bound

CANDIDATES = 3  # of each layer
MANY, FEW = 10, 32  # of so few nodes, near the roots of a tree
BETTER_CHILD = 1.0  # its weight beside the worse one
ROUGH = 1e-2


def branch(
    maps: AffineMaps, ball: Polytope, stage: int, specification: Tensor, nodes: Nodes, enough: float = 0.0
) -> tuple[Nodes, Tensor]:
    """Both children of every node (active ones first, then inactive), and the split neuron of each node.

    A bound beyond ``enough`` is worth no more than that. Every node must have an unstable ReLU below the stage. The
    children have their parents' multipliers and bounds, or better ones where they are easily done.
    """
    problems, multipliers = sketched(maps, ball, stage, specification, nodes)
    many = MANY if len(nodes) <= FEW else CANDIDATES
    choices, valid, start = [], [], 0
    for index, (own, unstable) in enumerate(
        zip(problems.coefficients(multipliers), nodes.unstable()[:stage], strict=True)
    ):
        score = _score(own, problems.lower[index], problems.upper[index], unstable)
        best = score.topk(min(many, score.shape[1]), dim=1)
        choices.append(best.indices + start)
        valid.append(torch.isfinite(best.values))
        start += score.shape[1]
    candidates, usable = torch.cat(choices, 1), torch.cat(valid, 1)
    count, width = candidates.shape
    able = usable.flatten().nonzero().flatten()
    parents, tried = able // width, candidates.flatten()[able]
    inherited = multipliers[parents]
    sides = []
    for active in (True, False):
        bound = _split(problems, nodes, parents, tried, active).values(inherited, ROUGH)
        full = bound.new_full((count * width,), -torch.inf)
        full[able] = bound
        sides.append(full.reshape(count, width))
    gains = [side.clamp(max=enough) for side in sides]
    quality = torch.minimum(*gains) + BETTER_CHILD * torch.maximum(*gains)
    quality = torch.where(usable, quality, -torch.inf)
    pick = quality.argmax(1, keepdim=True)
    neuron = candidates.gather(1, pick).squeeze(1)
    children = join([nodes.decide(neuron, active) for active in (True, False)])
    easy = (torch.cat([side.gather(1, pick) for side in sides]).squeeze(1) > enough).nonzero().flatten()
    if len(easy):
        done = children[easy]
        found = lower_bound(
            maps, ball, stage, specification[done.row], done.lower, done.upper, done.multipliers, done.joint,
            tolerance=ROUGH,
        ).value  # fmt: skip
        children.bound[easy] = torch.maximum(done.bound, found)
    return children, neuron


def sketched(
    maps: AffineMaps, ball: Polytope, stage: int, specification: Tensor, nodes: Nodes
) -> tuple[Problems, Multipliers]:
    """The bounds of nodes as problems on the sketch, with their multipliers."""
    rows = specification[nodes.row]
    problems = Problems.sketched(maps, ball, stage, rows, nodes.lower, nodes.upper, nodes.signs, nodes.joint)
    return problems, nodes.multipliers.to(torch.float32)


def _split(problems: Problems, nodes: Nodes, parents: Tensor, neuron: Tensor, active: bool) -> Problems:
    """The problems of these ``parents`` (K,), with ``neuron`` (K,), counted through all layers, on one side."""
    result, start = problems[parents], 0
    for layer, lower in enumerate(result.lower):
        here = ((neuron >= start) & (neuron < start + lower.shape[1])).nonzero().flatten()
        own = neuron[here] - start
        (lower if active else result.upper[layer])[here, own] = 0.0
        if nodes.joint[layer].groups:
            limit = nodes.joint[layer].limit_after(parents[here], own, active)
            result.joint[layer].largest[here] = limit[..., None].float()
        start += lower.shape[1]
    return result


def most_relaxed(
    maps: AffineMaps, ball: Polytope, specification: Tensor, nodes: Nodes, count: int
) -> list[Tensor | None]:
    """The neurons whose relaxation costs most, (N, ``count``) at most for each layer above the first."""
    problems, multipliers = sketched(maps, ball, len(maps.stages) - 1, specification, nodes)
    coefficients = problems.coefficients(multipliers)
    chosen: list[Tensor | None] = [None]
    for layer, unstable in enumerate(nodes.unstable()):
        if layer > 0:
            score = _score(coefficients[layer], problems.lower[layer], problems.upper[layer], unstable)
            chosen.append(score.topk(min(count, score.shape[1]), dim=1).indices)
    return chosen


def _score(coefficient: Tensor, lower: Tensor, upper: Tensor, unstable: Tensor) -> Tensor:
    """What a neuron's relaxation can cost: the intercept of its upper line; a little for its lower lines."""
    triangle = -lower * upper / (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
    cost = coefficient.abs() * torch.where(coefficient < 0, triangle, 1e-3 * torch.minimum(upper, -lower))
    return torch.where(unstable, cost, -torch.inf)
