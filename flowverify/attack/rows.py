"""Pairs of an image and a target class: the rows that gradient attacks work on, batched together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.attack.batch import Batch
from flowverify.attack.model import AttackedModel
from flowverify.ball import Ball
from flowverify.transport.moves import Moves


@dataclass
class Rows:
    """One row for each pair; every row has its own iterate.

    Attributes:
        owner: the row's image in the batch, (R,).
        ball: that image's, R of them; label, target: (R,).
        iterate: a point of the threat model, (R, C, H, W).
        cost: an upper bound of W1(mu, iterate), in mass times pixels, (R,).
    """

    owner: Tensor
    ball: Ball
    label: Tensor
    target: Tensor
    iterate: Tensor
    cost: Tensor

    @classmethod
    def start(cls, batch: Batch, owner: Tensor, target: Tensor) -> Rows:
        ball = batch.ball[owner]
        return cls(owner, ball, batch.labels[owner], target, ball.images.clone(), torch.zeros_like(ball.budget))

    @property
    def clean(self) -> Tensor:
        """mu, (R, C, H, W)."""
        return self.ball.images

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, rows: Tensor) -> Rows:
        return Rows(*(value[rows] for value in vars(self).values()))

    def towards(self, goal: Tensor, goal_cost: Tensor, share: Tensor) -> None:
        """Moves each iterate the given share (R,) of the way; W1 is convex, so the cost bound mixes too."""
        part = share[:, None, None, None]
        self.iterate = (1 - part) * self.iterate + part * goal
        self.cost = (1 - share) * self.cost + share * goal_cost

    def pull_back(self, budget: Tensor) -> None:
        """Shortens what costs more than its budget, along the segment from the clean image."""
        share = torch.where(self.cost > budget, budget / self.cost.clamp(min=1e-300), 1.0)
        self.iterate = self.clean + share[:, None, None, None] * (self.iterate - self.clean)
        self.cost = share * self.cost

    def linearised_target(self, margin: Tensor, gradient: Tensor) -> Tensor:
        """What g . (nu - mu) has to reach for the linearised f_t - f_y to be 0: -margin + g . (iterate - mu)."""
        return -margin + (gradient * (self.iterate - self.clean)).flatten(1).sum(1)

    def nearest(self, gradient: Tensor, target: Tensor) -> Moves:
        """The nearest points of half-spaces g . (nu - mu) >= target, (R,), whatever the budget."""
        target = target.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return self.ball.threat.unlimited(self.clean).best_moves(gradient, target)


def target_margin(logits: Tensor, rows: Rows, chosen: Tensor) -> Tensor:
    """f_t - f_y of the chosen rows, whose logits are given."""
    target, label = rows.target[chosen, None], rows.label[chosen, None]
    return (logits.gather(1, target) - logits.gather(1, label)).squeeze(1)


def likeliest(model: AttackedModel, batch: Batch, among: int) -> tuple[Rows, Tensor, Tensor]:
    """Rows at the clean images for the ``among`` classes t != y with the largest logits, image after image.

    Returns:
        The rows, their f_t - f_y (R,), and its gradients (R, C, H, W).
    """
    others = batch.logits.scatter(1, batch.labels[:, None], -torch.inf)
    targets = others.topk(min(among, others.shape[1] - 1), dim=1).indices
    owner = torch.arange(len(batch), device=targets.device).repeat_interleave(targets.shape[1])
    rows = Rows.start(batch, owner, targets.flatten())
    return rows, *model.gradients(rows.clean, rows.label, rows.target)


def ranked_targets(model: AttackedModel, batch: Batch, count: int, among: int = 10) -> tuple[Tensor, Tensor]:
    """The ``count`` classes t != y whose linearised boundary is nearest, nearest first.

    Only the ``among`` classes with the largest logits are linearised.

    Returns:
        Classes (B, count) and the exact W1 to those boundaries, in mass times pixels; infinite out of reach.
    """
    rows, margin, gradient = likeliest(model, batch, among)
    found = rows.nearest(gradient, -margin)
    cost = torch.where(found.gain < -margin * (1 - 1e-9), torch.inf, found.cost).reshape(len(batch), -1)
    cost, order = cost.sort(dim=1, stable=True)
    return rows.target.reshape(len(batch), -1).gather(1, order)[:, :count], cost[:, :count]
