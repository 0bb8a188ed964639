"""Which ReLU to split: candidates by the BaBSR score, the best of them by trying both sides.

BaBSR (Bunel et al. 2020) ranks unstable neurons by what their upper line costs the bound; filtered smart branching
(De Palma et al. 2021) computes a cheap bound of both children for a few of the best and takes the neuron whose worse
child is best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.certifiers.complete.gradients import coefficients, values
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import Relaxation, lower_bound
from flowverify.certifiers.complete.tree_nodes import TreeNodes, join


def branch(problem: Problem, nodes: TreeNodes, enough: float = 0.0) -> tuple[TreeNodes, Tensor]:
    """Both children of every node (active ones first, then inactive), and the split neuron of each node.

    A bound beyond ``enough`` is worth no more than that. Every node must have an unstable ReLU below the stage. The
    children have their parents' multipliers and bounds, or better ones where they are easily done.
    """
    settings = problem.settings.branching
    relaxation, multipliers = nodes.relaxation(problem).reduced(), nodes.multipliers.to(torch.float32)
    many = settings.root_candidates if len(nodes) <= settings.few_nodes else settings.candidates
    choices, valid, start = [], [], 0
    for index, (own, unstable) in enumerate(
        zip(coefficients(relaxation, multipliers), nodes.unstable()[: problem.stage], strict=True)
    ):
        score = _score(own, relaxation.lower[index], relaxation.upper[index], unstable)
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
        bound = values(_split(relaxation, nodes, parents, tried, active), inherited, settings.tolerance)
        full = bound.new_full((count * width,), -torch.inf)
        full[able] = bound
        sides.append(full.reshape(count, width))
    gains = [side.clamp(max=enough) for side in sides]
    quality = torch.minimum(*gains) + settings.better_child * torch.maximum(*gains)
    quality = torch.where(usable, quality, -torch.inf)
    pick = quality.argmax(1, keepdim=True)
    neuron = candidates.gather(1, pick).squeeze(1)
    children = join([nodes.decide(neuron, active) for active in (True, False)])
    easy = (torch.cat([side.gather(1, pick) for side in sides]).squeeze(1) > enough).nonzero().flatten()
    if len(easy):
        done = children[easy]
        found = lower_bound(done.relaxation(problem), done.multipliers, tolerance=settings.tolerance).value
        children.bound[easy] = torch.maximum(done.bound, found)
    return children, neuron


def _split(relaxation: Relaxation, nodes: TreeNodes, parents: Tensor, neuron: Tensor, active: bool) -> Relaxation:
    """The problems of these ``parents`` (K,), with ``neuron`` (K,), counted through all layers, on one side."""
    result, start = relaxation[parents], 0
    for layer, lower in enumerate(result.lower):
        here = ((neuron >= start) & (neuron < start + lower.shape[1])).nonzero().flatten()
        own = neuron[here] - start
        (lower if active else result.upper[layer])[here, own] = 0.0
        if nodes.joint[layer].groups:
            limit = nodes.joint[layer].limit_after(parents[here], own, active)
            result.joint[layer].largest[here] = limit[..., None].float()
        start += lower.shape[1]
    return result


def most_relaxed(problem: Problem, nodes: TreeNodes, count: int) -> list[Tensor | None]:
    """The neurons whose relaxation costs most, (N, ``count``) at most for each layer above the first."""
    relaxation = nodes.relaxation(problem).reduced()
    weights = coefficients(relaxation, nodes.multipliers.to(torch.float32))
    chosen: list[Tensor | None] = [None]
    for layer, unstable in enumerate(nodes.unstable()):
        if layer > 0:
            score = _score(weights[layer], relaxation.lower[layer], relaxation.upper[layer], unstable)
            chosen.append(score.topk(min(count, score.shape[1]), dim=1).indices)
    return chosen


def _score(coefficient: Tensor, lower: Tensor, upper: Tensor, unstable: Tensor) -> Tensor:
    """What a neuron's relaxation can cost: the intercept of its upper line; a little for its lower lines."""
    triangle = -lower * upper / (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
    cost = coefficient.abs() * torch.where(coefficient < 0, triangle, 1e-3 * torch.minimum(upper, -lower))
    return torch.where(unstable, cost, -torch.inf)
