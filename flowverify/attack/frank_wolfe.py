"""Frank-Wolfe over the Wasserstein ball, with the exact linear-minimisation oracle.

At an iterate x the linearised f_t - f_y is maximised over the whole ball around mu, exactly
(:func:`flowverify.transport.support.best_moves`), and the iterate moves towards that maximiser: a mix of two points
of a convex set, so no projection is needed, and with a cap the oracle keeps to the cap. Wu, Wang & Yu 2020,
"Stronger and Faster Wasserstein Adversarial Attacks", use the method with an approximate, regularised oracle.

The nearest adversarial image is found directly, by exact distances to linearised boundaries, then in shrinking balls.
As in DeepFool and FAB (Moosavi-Dezfooli et al. 2016; Croce & Hein 2020), but in W1: the distance from mu to the
half-space in which the linearised f_t - f_y is positive is one exact solve
(:func:`flowverify.transport.support.best_moves` with a target), around the clean image whatever the iterate. Once an
adversarial image is known, at radius r, Frank-Wolfe steps run in a ball of a slightly smaller radius; whenever
they succeed the new image is pulled back along the segment to the boundary and r shrinks again.

The rows that both work on are pairs of an image and a target class, batched together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowverify.attack.base import AttackedModel, BaseAttack, Batch, first_crossing
from flowverify.ball import Ball, between
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network.subject import surplus
from flowverify.transport.support import Moves


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


STEPS = (1.0, 0.5, 0.25, 0.1)  # of the line search


class FrankWolfe(BaseAttack):
    """Maximises f_t - f_y over the ball for the ``targets`` classes whose linearised boundary is nearest.

    An image is done when any of its targets is reached. The smallest radius is found by bisection.

    Args:
        iterations: for each image and target.
        targets: classes tried for each image.
    """

    name: ClassVar[str] = "frank-wolfe"

    def __init__(
        self,
        model: nn.Module,
        *,
        iterations: int = 20,
        targets: int = 3,
        batch_size: int = 100,
        seed: int = 0,
        timeout: float | None = None,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed, timeout=timeout)
        if iterations < 1 or targets < 1:
            raise InvalidInputError(f"iterations {iterations}, targets {targets}: expected at least 1 of each")
        self.iterations, self.targets = iterations, targets

    def search(self, batch: Batch) -> Tensor:
        targets, _ = ranked_targets(self.model, batch, self.targets)
        owner = torch.arange(len(batch), device=targets.device).repeat_interleave(targets.shape[1])
        rows = Rows.start(batch, owner, targets.flatten())
        best = batch.images.clone()
        done = batch.ball.budget <= 0
        for _ in range(self.iterations):
            rows = rows[~done[rows.owner]]
            if not len(rows) or self.deadline.stop():
                break
            _, gradient = self.model.gradients(rows.iterate, rows.label, rows.target)
            goal = rows.ball.best_moves(gradient)
            step_along(self.model, rows, goal.image, goal.cost, STEPS, torch.full_like(goal.cost, torch.inf))
            hit = self.model.crossed(rows.iterate.clamp(min=0), rows.label)
            best[rows.owner[hit]] = rows.iterate[hit]
            done = done.index_fill(0, rows.owner[hit], True)
        return best


def step_along(
    model: AttackedModel, rows: Rows, goal: Tensor, cost: Tensor, steps: Sequence[float], enough: Tensor
) -> Tensor:
    """Moves each row towards its goal by the step of ``steps`` with the largest f_t - f_y.

    A row whose max f_t - f_y exceeds ``enough`` (R,) at one step is not tried at the next ones.

    Returns:
        max over all t of f_t - f_y there, (R,): positive where the row's iterate is misclassified.
    """
    values = torch.full_like(cost, -torch.inf)
    reached, chosen = values.clone(), torch.full_like(cost, steps[0])
    todo = torch.arange(len(rows), device=cost.device)
    for step in steps:
        start = rows.iterate[todo]
        logits = model.logits((start + step * (goal[todo] - start)).clamp(min=0))
        value = target_margin(logits, rows, todo).nan_to_num(nan=-torch.inf)
        better = value > values[todo]
        own = todo[better]
        values[own], chosen[own] = value[better], step
        reached[own] = surplus(logits, rows.label[todo])[better]
        todo = todo[~(reached[todo] > enough[todo])]
        if not todo.numel():
            break
    rows.towards(goal, cost, chosen)
    return reached


class Round(NamedTuple):
    """``iterations`` for the ``targets`` most promising classes of each image, or only of those not yet fooled.

    With ``leaky`` it begins anew at the clean image, and follows gradients in which ReLUs that are off take part: those
    of the ReLUs that are on may lead nowhere.
    """

    targets: int
    iterations: int
    growth: float = 1.25
    only_unfooled: bool = False
    leaky: bool = False


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


UNFOOLED = Round(1, 6, 2.0, only_unfooled=True), Round(1, 6, 2.0, only_unfooled=True, leaky=True)
EFFORTS: dict[str, Effort] = {
    "fast": Effort(2, (Round(1, 3, 1.3), *UNFOOLED), overshoot=1.3, steps=(1.0, 0.4)),
    "normal": Effort(9, (Round(9, 2), Round(3, 10), Round(1, 20), *UNFOOLED)),
    "thorough": Effort(20, (Round(9, 59), Round(3, 60), *UNFOOLED)),
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

    def __init__(
        self,
        model: nn.Module,
        *,
        effort: str = "normal",
        batch_size: int = 100,
        seed: int = 0,
        timeout: float | None = None,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed, timeout=timeout)
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
            if one.leaky:
                unfooled = torch.isinf(state.cost[rows.owner])
                rows, promise = Rows.start(batch, rows.owner[unfooled], rows.target[unfooled]), promise[unfooled]
                overshoot = self.effort.overshoot
            for iteration in range(one.iterations):
                cost = state.cost[rows.owner]
                alive = torch.isinf(cost) if one.only_unfooled else cost > enough[rows.owner]
                if not bool(alive.all()):
                    rows, promise = rows[alive], promise[alive]
                if not len(rows) or self.deadline.stop():
                    break
                overshoot *= one.growth
                goal = self._goal(rows, state, overshoot, one.leaky)
                last = one.only_unfooled or (one.targets == 1 and iteration == one.iterations - 1)
                promise = self._advance(rows, promise, state, goal, self.effort.steps, pull_back=not last)
        return state.image

    def _goal(self, rows: Rows, state: _Best, overshoot: float, leaky: bool) -> Moves:
        """Where the f_t - f_y that is linearised at each row's iterate leads: to the best point of the next ball around
        the clean image, or, while nothing has been found, to the nearest one beyond the linearised boundary.
        """
        margin, gradient = self.model.gradients(rows.iterate, rows.label, rows.target, leaky=leaky)
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
