"""The nearest adversarial image, directly: exact distances to linearised boundaries, then shrinking balls.

As in DeepFool and FAB (Moosavi-Dezfooli et al. 2016; Croce & Hein 2020), but in W1: the distance from mu to the
half-space in which the linearised f_t - f_y is positive is one exact solve
(:func:`flowverify.transport.moves.best_moves` with a target), around the clean image whatever the iterate. Once an
adversarial image is known, at radius r, Frank-Wolfe steps run in a ball of a slightly smaller radius; whenever
they succeed the new image is pulled back along the segment to the boundary and r shrinks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.batch import Batch
from flowverify.attack.frank_wolfe import step_along
from flowverify.attack.rows import Rows, likeliest
from flowverify.attack.segment import first_crossing
from flowverify.ball import between
from flowverify.errors import UnknownNameError
from flowverify.network.subject import surplus
from flowverify.transport.moves import Moves


class Round(NamedTuple):
    """``iterations`` for the ``targets`` most promising classes of each image, or only of those not yet fooled."""

    targets: int
    iterations: int
    growth: float = 1.25
    only_unfooled: bool = False


@dataclass(frozen=True)
class Effort:
    """``among`` classes of the largest logits are linearised first; then the rounds, one after the other.

    While nothing has been found, ``overshoot`` times the way to the linearised boundary is gone, the round's ``growth``
    times that from iteration to iteration: the margin may be flatter than its linearisation. ``steps`` are tried on
    the way to the best point of a ball.
    """

    among: int
    rounds: tuple[Round, ...]
    overshoot: float = 1.05
    steps: tuple[float, ...] = (1.0, 0.4, 0.12)


UNFOOLED = Round(1, 6, 2.0, only_unfooled=True)
EFFORTS: dict[str, Effort] = {
    "fast": Effort(2, (Round(1, 3, 1.3), UNFOOLED), overshoot=1.3, steps=(1.0, 0.4)),
    "normal": Effort(9, (Round(9, 2), Round(3, 10), Round(1, 20), UNFOOLED)),
    "thorough": Effort(20, (Round(9, 59), Round(3, 60), UNFOOLED)),
}
BEYOND = 0.02  # past the boundary, so that the final search on the segment has both sides of it
NEAR = 0.005  # of the clean margin: so near the boundary a point is near enough while the search goes on
CLEAR = 2e-4  # how far beyond the boundary counts, relative to the clean margin: less may be rounding
FIRST_GAP = 0.04  # the next ball is this much smaller than the best radius so far;
NARROWER = 0.5  # a gap that was too much is tried at this share of it,
LEAST_GAP = 2e-4  # down to this one


class MinimalRadius(BaseAttack):
    """Minimises W1 to an adversarial image; the strongest of the attacks here.

    Args:
        effort: "fast", "normal" or "thorough"; see ``EFFORTS``.
    """

    name: ClassVar[str] = "minimal"

    def __init__(self, model: nn.Module, *, effort: str = "normal", batch_size: int = 100, seed: int = 0) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed)
        if effort not in EFFORTS:
            raise UnknownNameError("effort", effort, tuple(EFFORTS))
        self.effort = EFFORTS[effort]

    def search(self, batch: Batch) -> Tensor:
        return self._search(batch, batch.ball.budget)

    def search_nearest(self, batch: Batch) -> Tensor:
        return self._search(batch, torch.zeros_like(batch.ball.budget))

    def _search(self, batch: Batch, enough: Tensor) -> Tensor:
        """The nearest images found; an image whose cost is at most ``enough`` (B,) is searched no further."""
        state = _Best(batch.images, surplus(batch.logits, batch.labels), self.model.rounding(batch.logits, 4))
        rows, margin, gradient = likeliest(self.model, batch, self.effort.among)
        overshoot = self.effort.overshoot
        goal = rows.nearest(gradient, -overshoot * margin)
        promise = torch.where(goal.gain < -overshoot * margin * (1 - 1e-9), torch.inf, goal.cost)
        promise = self._advance(rows, promise, state, goal, (1.0,))
        for one in self.effort.rounds:
            kept = _most_promising(rows.owner, promise, len(batch), one.targets)
            rows, promise = rows[kept], promise[kept]
            for iteration in range(one.iterations):
                cost = state.cost[rows.owner]
                alive = torch.isinf(cost) if one.only_unfooled else cost > enough[rows.owner]
                if not bool(alive.all()):
                    rows, promise = rows[alive], promise[alive]
                if not len(rows):
                    break
                overshoot *= one.growth
                goal = self._goal(rows, state, overshoot)
                last = one.only_unfooled or (one.targets == 1 and iteration == one.iterations - 1)
                promise = self._advance(rows, promise, state, goal, self.effort.steps, pull_back=not last)
        return state.image

    def _goal(self, rows: Rows, state: _Best, overshoot: float) -> Moves:
        """Where the f_t - f_y that is linearised at each row's iterate leads: to the best point of the next ball around
        the clean image, or, while nothing has been found, to the nearest one beyond the linearised boundary.
        """
        margin, gradient = self.model.gradients(rows.iterate, rows.label, rows.target)
        bound = (state.cost * (1 - state.gap))[rows.owner]
        rows.pull_back(bound)
        known = torch.isfinite(bound)
        target = None
        if not bool(known.all()):
            target = (overshoot * rows.linearised_target(margin, gradient)).nan_to_num(nan=0.0).clamp(min=0)
            target = torch.where(known, torch.inf, target)
        return rows.ball.with_budget(bound).best_moves(gradient, target)

    def _advance(
        self,
        rows: Rows,
        promise: Tensor,
        state: _Best,
        goal: Moves,
        steps: Sequence[float],
        pull_back: bool = True,
    ) -> Tensor:
        """Moves the rows towards their goals, and pulls back to the boundary what is misclassified.

        The check pulls back too, so that it can be left to it where only one row of an image is to come of it.
        """
        clear = state.clear[rows.owner]
        reached = step_along(self.model, rows, goal.image, goal.cost, steps, clear)
        hit = (reached > clear).nonzero().flatten()
        state.narrow(rows.owner, rows.owner[hit])
        if hit.numel():
            own = rows[hit]
            margins = state.margin[own.owner], reached[hit]
            share = first_crossing(
                self.model, own.clean, own.iterate, own.label, margins, steps=2 if pull_back else 0, settled=NEAR
            )
            beyond = between(own.clean, own.iterate, (share * (1 + BEYOND)).clamp(max=1))
            state.offer(own.owner, beyond, share * own.cost)
            promise = promise.index_copy(0, hit, share * own.cost)
        return promise


class _Best:
    """What is known of every image of a batch.

    Attributes:
        image: the nearest adversarial image so far; cost: the bound of its W1, infinite where there is none.
        gap: between that and the radius of the next ball, relative.
        margin: max over t of f_t - f_y at the clean image; clear: what it has to exceed elsewhere.
    """

    def __init__(self, images: Tensor, margin: Tensor, rounding: Tensor) -> None:
        self.image, self.margin = images.clone(), margin
        self.clear = torch.maximum(-CLEAR * margin, rounding)
        self.cost = torch.full_like(margin, torch.inf)
        self.gap = torch.full_like(margin, FIRST_GAP)

    def narrow(self, tried: Tensor, succeeded: Tensor) -> None:
        """Narrows the gap of images that were tried in a ball and did not succeed for any target."""
        failed = torch.zeros_like(self.cost, dtype=torch.bool).index_fill(0, tried, True)
        failed = failed.index_fill(0, succeeded, False) & torch.isfinite(self.cost)
        self.gap = torch.where(failed, (self.gap * NARROWER).clamp(min=LEAST_GAP), self.gap)

    def offer(self, owner: Tensor, images: Tensor, cost: Tensor) -> None:
        least = self.cost.scatter_reduce(0, owner, cost, "amin")
        better = (cost <= least[owner]) & (cost < self.cost[owner])
        self.image[owner[better]] = images[better]
        self.cost = least


def _most_promising(owner: Tensor, promise: Tensor, count: int, targets: int) -> Tensor:
    """Indices of the ``targets`` rows of each image with the least promised cost, in order of rows."""
    order = torch.argsort(promise, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    sorted_owner = owner[order]
    first = torch.searchsorted(sorted_owner, torch.arange(count, device=owner.device))
    place = torch.arange(len(order), device=owner.device) - first[sorted_owner]
    return order[place < targets].sort().values
