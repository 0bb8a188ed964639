"""TreeNodes of the search tree, many in one batch: what is split, the bounds of the neurons, the multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.joint_limits import JointLimits
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import Multipliers, Relaxation, initial_multipliers


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


def roots(rows: Tensor, lower: Sequence[Tensor], upper: Sequence[Tensor]) -> TreeNodes:
    """One node without splits for each specification, from bounds (n_k,) that all share."""
    count = len(rows)
    own_lower, own_upper = ([v.expand(count, -1).clone() for v in group] for group in (lower, upper))
    like = rows.new_zeros(count, dtype=torch.float64)
    multipliers = initial_multipliers(own_lower, own_upper, count)
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
