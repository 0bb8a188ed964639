"""Nodes of the search tree, many in one batch: what is split, the bounds of the neurons, the multipliers.

The ReLU to split next is the best, by trying both sides, of a few candidates with the highest score.

BaBSR (Bunel et al. 2020) ranks unstable neurons by what their upper line costs the bound; filtered smart branching
(De Palma et al. 2021) computes a cheap bound of both children for a few of the best and takes the neuron whose worse
child is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.ascent import slope, values
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import (
    JointLimits,
    Multipliers,
    Relaxation,
    initial_multipliers,
    lower_bound,
)


@dataclass
class TreeNodes:
    """N nodes; lists have one entry a ReLU layer, tensors of bounds and signs are (N, n_k).

    Attributes:
        row: which specification each node belongs to, (N,).
        lower, upper: of the ReLUs' inputs; 0 on one side where a ReLU is split.
        signs: int8, +1 where split active, -1 inactive.
        joint: limits of several neurons at once.
        multipliers: of the best bound.
        bound: lower bound of the specification over the node, (N,).
        share: of the tree below the roots, 2 ** -depth, (N,).
    """

    row: Tensor
    lower: list[Tensor]
    upper: list[Tensor]
    signs: list[Tensor]
    joint: list[JointLimits]
    multipliers: Multipliers
    bound: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: Tensor | slice) -> TreeNodes:
        lower, upper, signs = ([v[chosen] for v in group] for group in (self.lower, self.upper, self.signs))
        joint = [limits[chosen] for limits in self.joint]
        return TreeNodes(
            self.row[chosen], lower, upper, signs, joint, self.multipliers[chosen], self.bound[chosen],
            self.share[chosen],
        )  # fmt: skip

    def relaxation(self, problem: Problem) -> Relaxation:
        """Of a problem, each node with the specification of its row."""
        return Relaxation.of(problem.rows(self.row), self.lower, self.upper, self.signs, self.joint)

    def decide(self, neuron: Tensor, active: bool) -> TreeNodes:
        """A copy in which neuron (N,), counted through all layers, is split to one side in each node."""
        result = self[torch.arange(len(self), device=self.row.device)]
        start, rows = 0, torch.arange(len(self), device=self.row.device)
        for lower, upper, signs, joint in zip(result.lower, result.upper, result.signs, result.joint, strict=True):
            here = (neuron >= start) & (neuron < start + lower.shape[1])
            at = rows[here], neuron[here] - start
            if active:
                lower[at] = 0.0
            else:
                upper[at] = 0.0
            signs[at] = 1 if active else -1
            joint.restrict(*at, active)
            start += lower.shape[1]
        result.share = result.share / 2
        return result

    def unlimited(self) -> TreeNodes:
        """A copy without joint limits."""
        result = self[torch.arange(len(self), device=self.row.device)]
        result.joint = [JointLimits.none(len(self), self.row.device) for _ in self.joint]
        result.multipliers.theta = [theta[:, :0] for theta in self.multipliers.theta]
        return result

    def unstable(self) -> list[Tensor]:
        """Where a ReLU is neither split nor settled by its bounds, (N, n_k) a layer."""
        return [(low < 0) & (high > 0) for low, high in zip(self.lower, self.upper, strict=True)]

    def open_neurons(self) -> Tensor:
        """How many neurons are unstable, (N,)."""
        count = torch.zeros(len(self), dtype=torch.int64, device=self.row.device)
        return sum((unstable.sum(1) for unstable in self.unstable()), count)


def roots(rows: Tensor, lower: Sequence[Tensor], upper: Sequence[Tensor], share: float | None = None) -> TreeNodes:
    """One node without splits for each specification, from bounds (n_k,) that all share; ``share`` of rows of moves."""
    count = len(rows)
    own_lower, own_upper = ([v.expand(count, -1).clone() for v in group] for group in (lower, upper))
    like = rows.new_zeros(count, dtype=torch.float64)
    multipliers = initial_multipliers(own_lower, own_upper, count, share)
    multipliers.guess = multipliers.guess.to(like.device)
    return TreeNodes(
        rows,
        own_lower,
        own_upper,
        [torch.zeros_like(v, dtype=torch.int8) for v in own_lower],
        [JointLimits.none(count, rows.device) for _ in own_lower],
        multipliers,
        torch.full_like(like, -torch.inf),
        torch.full_like(like, 1 / max(1, count)),
    )


def join(parts: Sequence[TreeNodes]) -> TreeNodes:
    """Batches of nodes as one, in order."""

    def joined(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.cat(layer) for layer in zip(*groups, strict=True)]

    return TreeNodes(
        torch.cat([p.row for p in parts]),
        joined([p.lower for p in parts]),
        joined([p.upper for p in parts]),
        joined([p.signs for p in parts]),
        [JointLimits.join(layer) for layer in zip(*(p.joint for p in parts), strict=True)],
        Multipliers.of(
            joined([p.multipliers.variables for p in parts]), torch.cat([p.multipliers.guess for p in parts])
        ),
        torch.cat([p.bound for p in parts]),
        torch.cat([p.share for p in parts]),
    )


def branch(problem: Problem, nodes: TreeNodes, enough: float = 0.0) -> tuple[TreeNodes, Tensor]:
    """Both children of every node (active ones first, then inactive), and the split neuron of each node.

    A bound beyond ``enough`` is worth no more than that. Every node must have an unstable ReLU below the stage. The
    children have their parents' multipliers and bounds, or better ones where they are easily done.
    """
    settings = problem.settings.branching
    relaxation, multipliers = nodes.relaxation(problem).reduced(), nodes.multipliers.to(torch.float32)
    many = settings.root_candidates if len(nodes) <= settings.few_nodes else settings.candidates
    choices, valid, start = [], [], 0
    costs = slope(relaxation, multipliers, settings.tolerance).costs
    for index, unstable in enumerate(nodes.unstable()[: problem.stage]):
        score = _score(costs[index], relaxation.lower[index], relaxation.upper[index], unstable)
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
    costs = slope(relaxation, nodes.multipliers.to(torch.float32), problem.settings.branching.tolerance).costs
    chosen: list[Tensor | None] = [None]
    for layer, unstable in enumerate(nodes.unstable()):
        if layer > 0:
            score = _score(costs[layer], relaxation.lower[layer], relaxation.upper[layer], unstable)
            chosen.append(score.topk(min(count, score.shape[1]), dim=1).indices)
    return chosen


def _score(cost: Tensor, lower: Tensor, upper: Tensor, unstable: Tensor) -> Tensor:
    """What a neuron's relaxation costs; of those that cost nothing, the neurons with the longest ends first."""
    return torch.where(unstable, cost.clamp(min=0) + 1e-6 * torch.minimum(upper, -lower), -torch.inf)
