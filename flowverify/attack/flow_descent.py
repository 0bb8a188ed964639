"""Projected gradient descent in the flow domain (framework paper, Section 4, Algorithm 1).

The loss L(delta) = min over t of f_y - f_t at Delta(R, delta) is minimised over the flows delta with
||delta - delta_mu||_1 <= eps and A delta + R >= 0. Since Delta(R, delta) = mu + A (delta - delta_mu), neither the
iterates nor the result depend on the reference R: the descent runs on d = delta - delta_mu.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.batch import Batch
from flowverify.attack.flow_projection import L1Projection, project_euclidean
from flowverify.attack.schedule import Schedule
from flowverify.ball import Threat
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network.subject import surplus

PROJECTIONS = ("euclidean", "l1")


class FlowDescent(BaseAttack):
    """Algorithm 1, with the paper's projection ("l1", a linear program an image and step) or a fast one.

    The l1 norm of a flow bounds W1 with l1 ground cost, which bounds W1 with l2 ground cost. For another ground cost
    the descent runs in the flows of the l1 ball around its ball (sqrt(2) times the radius for l2); what lies outside
    of the ball is pulled back when it is checked, and does not pass where a window forbids it.

    Args:
        iterations: 30, as in the paper.
        step_size: of one gradient step, in the l2 norm of the flow, relative to eps. The paper gives none.
        projection: "euclidean" or "l1".
        schedule: search the smallest radius by a growing radius, as Wong et al. do; by default, bisection.

    Raises:
        InvalidInputError, UnknownNameError: a value out of range.
        DependencyError: "l1" without cvxpy or HiGHS.
    """

    name: ClassVar[str] = "flow-pgd"

    def __init__(
        self,
        model: nn.Module,
        *,
        iterations: int = 30,
        step_size: float = 0.05,
        projection: str = "euclidean",
        schedule: Schedule | None = None,
        shorten: bool = True,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed)
        if projection not in PROJECTIONS:
            raise UnknownNameError("projection", projection, PROJECTIONS)
        if iterations < 1 or not step_size > 0:
            raise InvalidInputError(f"iterations {iterations}, step size {step_size}: expected >= 1 and > 0")
        self.iterations, self.step_size, self.projection = iterations, step_size, projection
        self.schedule, self.shorten = schedule, shorten
        self._program: L1Projection | None = None

    def search_nearest(self, batch: Batch) -> Tensor:
        return super().search_nearest(batch) if self.schedule is None else self._descend(batch, self.schedule)

    def search(self, batch: Batch) -> Tensor:
        return self._descend(batch, None)

    def _descend(self, batch: Batch, schedule: Schedule | None) -> Tensor:
        grid, threat = batch.ball.grid, batch.ball.threat
        flow = torch.zeros(len(batch), grid.edges, dtype=torch.float64, device=batch.images.device)
        best = batch.images.clone()
        active = torch.arange(len(batch), device=flow.device)
        steps = self.iterations if schedule is None else schedule.iterations
        for iteration in range(steps):
            if not active.numel():
                break
            part = batch[active]
            if schedule is not None:
                part = part.with_budget(threat.budget(schedule.radius(iteration), part.images))
            budget = part.ball.within(Threat("l1", threat.cap)).budget
            labels = part.labels

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return -surplus(logits, labels)

            image = part.images + grid.divergence(flow[active])
            _, gradient = self.model.gradient_of(image.clamp(min=0), loss)
            slope = grid.differences(gradient)
            length = slope.norm(dim=1, keepdim=True)
            step = torch.where(length > 0, slope / length.clamp(min=1e-300), 0.0)
            stepped = flow[active] - self.step_size * budget[:, None] * step
            flow[active] = self._project(stepped, part.images, budget, grid)
            # The last of what pixels lack is put right by the repair; it is what would be checked.
            offered = threat.repair(part.images, part.images + grid.divergence(flow[active]))
            hit = self.model.crossed(offered, labels)
            best[active[hit]] = offered[hit]
            active = active[~hit]
        return best

    def _project(self, flow: Tensor, images: Tensor, budget: Tensor, grid: Grid) -> Tensor:
        if self.projection == "euclidean":
            return project_euclidean(flow, images, budget)
        outside = (flow.abs().sum(1) > budget) | ~grid.is_feasible(images, flow)
        if self._program is None or self._program.grid != grid:
            self._program = L1Projection(grid)
        result = flow.clone()
        if bool(outside.any()):
            result[outside] = self._program(flow[outside], images[outside], budget[outside])
        return result
