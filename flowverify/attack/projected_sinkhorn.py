"""Projected gradient ascent on a Wasserstein ball by Sinkhorn projections (Wong et al. 2019).

Equation (2): a step of steepest ascent of the cross-entropy, in the l-infinity or the l2 norm, then Algorithm 2.
Settings are the paper's (Section 5): 5 x 5 local plans, 2-norm cost, lambda = 1000 for MNIST and 3000 for CIFAR10,
and a radius that grows until the image is misclassified. The step size, 0.1 in pixel values, is that of the
authors' code; the paper gives none.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.batch import Batch
from flowverify.attack.local_plans import LocalCost
from flowverify.attack.schedule import MNIST, Schedule
from flowverify.attack.sinkhorn import project_sinkhorn
from flowverify.errors import InvalidInputError, UnknownNameError

NORMS = ("linf", "l2")


class ProjectedSinkhorn(BaseAttack):
    """Wong's attack. The smallest radius is searched as they do, by a growing radius.

    Args:
        regularisation: lambda.
        window: k, the size of the local plans.
        cost: of a plan; by default that of the threat model's ground cost, in a window of size ``window``.
        step_size: of a step, in pixel values: of each pixel for "linf", of the image's norm for "l2".
        norm: of the steepest ascent, "linf" or "l2".
        schedule: of the growing radius; at a given radius only its number of iterations counts.
        shorten: pull the adversarial image back to the decision boundary. The authors do not.
        projection_iterations: of Algorithm 2, at most.

    Attributes:
        scheduled: after a search of the smallest radius, the schedule's radius at which each image (by its position)
            fell: what the authors report. It is not the distance of the image that was found, which can be smaller
            or, as the projection is approximate, larger.

    Raises:
        InvalidInputError, UnknownNameError: a value out of range.
    """

    name: ClassVar[str] = "sinkhorn"

    def __init__(
        self,
        model: nn.Module,
        *,
        regularisation: float = 1000.0,
        window: int = 5,
        cost: LocalCost | None = None,
        step_size: float = 0.1,
        norm: str = "linf",
        schedule: Schedule = MNIST,
        shorten: bool = True,
        projection_iterations: int = 400,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed)
        if norm not in NORMS:
            raise UnknownNameError("norm", norm, NORMS)
        if not step_size > 0 or not 0 < regularisation < float("inf"):
            raise InvalidInputError(f"step size {step_size}, regularisation {regularisation}: expected numbers > 0")
        LocalCost(window)
        self.regularisation, self.window, self.cost, self.step_size = regularisation, window, cost, step_size
        self.norm, self.schedule, self.shorten = norm, schedule, shorten
        self.projection_iterations = projection_iterations
        self.scheduled: dict[int, float] = {}

    def search(self, batch: Batch) -> Tensor:
        return self._ascend(batch, None)

    def search_nearest(self, batch: Batch) -> Tensor:
        return self._ascend(batch, self.schedule)

    def _ascend(self, batch: Batch, schedule: Schedule | None) -> Tensor:
        ball, threat = batch.ball, batch.ball.threat
        cost = self.cost or LocalCost.of_ground(threat.ground, self.window)
        dtype, mass = self.model.dtype, ball.mass[:, None, None, None]
        clean = (batch.images / mass).to(dtype)
        current, best = batch.images.clone(), batch.images.clone()
        active = torch.arange(len(batch), device=batch.images.device)
        for iteration in range(self.schedule.iterations):
            if not active.numel():
                break
            labels = batch.labels[active]

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return nn.functional.cross_entropy(logits, labels, reduction="none")

            _, gradient = self.model.gradient_of(current[active], loss)
            stepped = (current[active] + self._step(gradient)) / mass[active]
            if schedule is not None:
                ball = ball.with_budget(threat.budget(schedule.radius(iteration), batch.images))
            limit = (ball.budget / ball.mass)[active]
            found = project_sinkhorn(
                clean[active], stepped.to(dtype), limit.to(dtype), cost, self.regularisation,
                iterations=self.projection_iterations,
            )  # fmt: skip
            moved = (found.image.double() * mass[active]).clamp(min=0, max=threat.cap)
            current[active] = torch.where(torch.isfinite(moved), moved, current[active])
            # The projection leaves mass and cap only nearly right: what counts is the repaired image.
            offered = threat.repair(batch.images[active], current[active])
            hit = self.model.crossed(offered, labels)
            best[active[hit]] = offered[hit]
            if schedule is not None:
                self.scheduled |= dict.fromkeys(batch.positions[active[hit]].tolist(), schedule.radius(iteration))
            active = active[~hit]
        return best

    def _step(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return self.step_size * gradient.sign()
        length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
        return torch.where(length > 0, self.step_size * gradient / length.clamp(min=1e-300), 0.0)
