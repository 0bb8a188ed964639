"""Which ReLU to split: candidates by the BaBSR score, the best of them by trying both sides.

BaBSR (Bunel et al. 2020) ranks unstable neurons by what their upper line costs the bound; filtered smart branching
(De Palma et al. 2021) computes a cheap bound of both children for a few of the best and takes the neuron whose worse
child is best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.certify.complete.affine_maps import AffineMaps
from flowverify.certify.complete.balls import Polytope
from flowverify.certify.complete.nodes import Nodes, join
from flowverify.certify.complete.relaxation import linear_bound, lower_bound

CANDIDATES = 2  # of each layer
BETTER_CHILD = 0.1  # its weight beside the worse one
ROUGH = 1e-2


def branch(
    maps: AffineMaps, ball: Polytope, stage: int, specification: Tensor, nodes: Nodes, enough: float = 0.0
) -> tuple[Nodes, Tensor]:
    """Both children of every node (active ones first, then inactive), and the split neuron of each node.

    A bound beyond ``enough`` is worth no more than that. Every node must have an unstable ReLU below the stage. The
    children have their parents' multipliers, and the better of their parents' bound and their own cheap one.
    """
    rows = specification[nodes.row]
    coefficients = linear_bound(
        maps, stage, rows, nodes.lower, nodes.upper, nodes.multipliers, nodes.joint
    ).coefficients
    choices, valid, start = [], [], 0
    for index, unstable in enumerate(nodes.unstable()):
        if index >= stage:
            break
        score = _score(coefficients[index], nodes.lower[index], nodes.upper[index], unstable)
        best = score.topk(min(CANDIDATES, score.shape[1]), dim=1)
        choices.append(best.indices + start)
        valid.append(torch.isfinite(best.values))
        start += score.shape[1]
    candidates, usable = torch.cat(choices, 1), torch.cat(valid, 1)
    count, width = candidates.shape
    parents = nodes[torch.arange(count, device=candidates.device).repeat_interleave(width)]
    flat, able = candidates.flatten(), usable.flatten().nonzero().flatten()
    parents, tried = parents[able], flat[able]
    sides = []
    for active in (True, False):
        child = parents.decide(tried, active)
        bound = lower_bound(
            maps, ball, stage, specification[child.row], child.lower, child.upper, child.multipliers, child.joint,
            tolerance=ROUGH,
        ).value  # fmt: skip
        full = bound.new_full((count * width,), -torch.inf)
        full[able] = bound
        sides.append(full.reshape(count, width))
    gains = [side.clamp(max=enough) for side in sides]
    quality = torch.minimum(*gains) + BETTER_CHILD * torch.maximum(*gains)
    quality = torch.where(usable, quality, -torch.inf)
    pick = quality.argmax(1, keepdim=True)
    neuron = candidates.gather(1, pick).squeeze(1)
    children = []
    for active, side in zip((True, False), sides, strict=True):
        child = nodes.decide(neuron, active)
        child.bound = torch.maximum(child.bound, side.gather(1, pick).squeeze(1))
        children.append(child)
    return join(children), neuron


def most_relaxed(maps: AffineMaps, specification: Tensor, nodes: Nodes, count: int) -> list[Tensor | None]:
    """The neurons whose relaxation costs most, (N, ``count``) at most for each layer above the first."""
    coefficients = linear_bound(
        maps, len(maps.stages) - 1, specification[nodes.row], nodes.lower, nodes.upper, nodes.multipliers, nodes.joint
    ).coefficients
    chosen: list[Tensor | None] = [None]
    for layer, unstable in enumerate(nodes.unstable()):
        if layer > 0:
            score = _score(coefficients[layer], nodes.lower[layer], nodes.upper[layer], unstable)
            chosen.append(score.topk(min(count, score.shape[1]), dim=1).indices)
    return chosen


def _score(coefficient: Tensor, lower: Tensor, upper: Tensor, unstable: Tensor) -> Tensor:
    """What a neuron's relaxation can cost: the intercept of its upper line; a little for its lower lines."""
    triangle = -lower * upper / (upper - lower).clamp(min=1e-300)
    cost = coefficient.abs() * torch.where(coefficient < 0, triangle, 1e-3 * torch.minimum(upper, -lower))
    return torch.where(unstable, cost, -torch.inf)
