"""Projected gradient descent in the flow domain (framework paper, Section 4, Algorithm 1).

The loss L(delta) = min over t of f_y - f_t at Delta(R, delta) is minimised over the flows delta with
||delta - delta_mu||_1 <= eps and A delta + R >= 0. Since Delta(R, delta) = mu + A (delta - delta_mu), neither the
iterates nor the result depend on the reference R: the descent runs on d = delta - delta_mu.
Both projections of the paper are onto {||d||_1 <= eps, mu + A d >= 0}.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.attack.base import BaseAttack, Batch, Schedule
from flowverify.ball import Threat
from flowverify.errors import DependencyError, InvalidInputError, SolverError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network.subject import surplus
from flowverify.quiet import quiet

SWEEPS = 10
SETTLED = 1e-4  # relative to the budget: a row that moves less from sweep to sweep is done


def project_onto_l1_ball(flow: Tensor, budget: Tensor) -> Tensor:
    """The nearest d (Euclidean) with ||d||_1 <= eps: soft thresholding; (B, edges), (B,) (Duchi et al. 2008)."""
    size = flow.abs()
    ordered = size.sort(dim=1, descending=True).values
    rank = torch.arange(1, flow.shape[1] + 1, device=flow.device, dtype=flow.dtype)
    threshold = (ordered.cumsum(1) - budget[:, None]) / rank
    last = (ordered > threshold).sum(1, keepdim=True).clamp(min=1) - 1
    cut = threshold.gather(1, last).clamp(min=0)
    return flow.sign() * (size - cut).clamp(min=0)


def project_euclidean(
    flow: Tensor,  # d, (B, edges)
    images: Tensor,  # mu, (B, C, H, W)
    budget: Tensor,  # eps, (B,)
    *,
    sweeps: int = SWEEPS,
    settled: float = SETTLED,
) -> Tensor:
    """The nearest feasible d (Euclidean), by Dykstra's algorithm; no solver.

    The pixels are coloured like a chessboard. No edge joins two pixels of one colour, so the constraints
    mu_i + (A d)_i >= 0 of one colour touch different edges each, and the projection onto all of them is one closed
    form: what pixel i lacks is shared equally by its edges. Dykstra's algorithm over the L1 ball and the two
    colours converges to the projection onto their intersection. After ``sweeps`` the L1 constraint holds exactly,
    and pixels may still lack what the algorithm has not settled yet.
    """
    grid = Grid.of(images)
    degree = _degrees(grid).to(images)
    rows, columns = torch.arange(grid.height)[:, None], torch.arange(grid.width)
    black = ((rows + columns) % 2 == 0).to(images)
    result, active = flow.clone(), torch.arange(len(flow), device=flow.device)
    corrections = flow.new_zeros(3, *flow.shape)
    current, original = flow, images
    for _ in range(sweeps):
        before = current
        for which, colour in enumerate((black, 1 - black)):
            offered = current + corrections[which]
            lacking = (-(images + grid.divergence(offered))).clamp(min=0) * colour / degree
            current = offered + grid.differences(lacking)
            corrections[which] = offered - current
        offered = current + corrections[2]
        current = project_onto_l1_ball(offered, budget)
        corrections[2] = offered - current
        result[active] = current
        moving = (current - before).abs().amax(1) > settled * budget
        if not bool(moving.any()):
            break
        active, current, images, budget = active[moving], current[moving], images[moving], budget[moving]
        corrections = corrections[:, moving]
    return limit_outflow(result, original)


def limit_outflow(flow: Tensor, images: Tensor, *, passes: int = 20) -> Tensor:
    """Cuts what pixels pass on down to what they have, pixel by pixel: no pixel of mu + A d ends below 0.

    Every pass scales the flows that leave a pixel by (mu_i + inflow) / outflow where that is below 1. Flows only
    shrink, so the L1 norm does too, and they settle at a feasible flow; (B, edges), (B, C, H, W) -> (B, edges).
    """
    grid = Grid.of(images)
    forth, back = flow.clamp(min=0), (-flow).clamp(min=0)
    for _ in range(passes):
        # A pixel passes on what goes forth along the edges it is the tail of, and back along those it heads.
        net = grid.divergence(forth - back)
        leaving = _sum_at(grid, forth, heads=False) + _sum_at(grid, back, heads=True)
        share = torch.where(images + net < 0, (images + net + leaving).clamp(min=0) / leaving.clamp(min=1e-300), 1.0)
        if bool((share >= 1).all()):
            break
        tails = grid.join(share[..., :, :-1], share[..., :-1, :])
        heads = grid.join(share[..., :, 1:], share[..., 1:, :])
        forth, back = forth * tails, back * heads
    return forth - back


def _sum_at(grid: Grid, flow: Tensor, *, heads: bool) -> Tensor:
    """The sum of the flows at the edges that a pixel is the head, or the tail, of; (B, C, H, W)."""
    right, down = grid.split(flow)
    total = flow.new_zeros(*flow.shape[:-1], *grid.image_shape)
    if heads:
        total[..., :, 1:] += right
        total[..., 1:, :] += down
    else:
        total[..., :, :-1] += right
        total[..., :-1, :] += down
    return total


def _degrees(grid: Grid) -> Tensor:
    """Number of edges at each pixel, (C, H, W), at least 1."""
    ones = torch.ones(grid.edges, dtype=torch.float64)
    return (_sum_at(grid, ones, heads=True) + _sum_at(grid, ones, heads=False)).clamp(min=1)


class L1Projection:
    """The paper's projection: arg min ||d_hat - d||_1 over the feasible d, a linear program by cvxpy and HiGHS.

    One program a grid, with the image, the point and the budget as parameters.

    Raises:
        DependencyError: cvxpy or HiGHS is missing.
    """

    def __init__(self, grid: Grid) -> None:
        try:
            import cvxpy
        except ImportError as error:
            raise DependencyError(
                "the L1 projection needs cvxpy and highspy: pip install 'flowverify[solvers]'"
            ) from error
        if "HIGHS" not in cvxpy.installed_solvers():
            raise DependencyError("the L1 projection needs HiGHS: pip install 'flowverify[solvers]'")
        self.grid = grid
        self._flow = cvxpy.Variable(grid.edges)
        self._point, self._image = cvxpy.Parameter(grid.edges), cvxpy.Parameter(grid.pixels)
        self._budget = cvxpy.Parameter(nonneg=True)
        self._problem: Any = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.norm1(self._point - self._flow)),
            [self._image + grid.incidence_scipy() @ self._flow >= 0, cvxpy.norm1(self._flow) <= self._budget],
        )

    def __call__(self, flow: Tensor, images: Tensor, budget: Tensor) -> Tensor:
        """A nearest feasible d for each row, (B, edges) float64.

        Raises:
            SolverError: HiGHS did not reach an optimum.
            InvalidInputError: images of another grid.
        """
        if Grid.of(images) != self.grid:
            raise InvalidInputError(f"images of shape {tuple(images.shape[1:])}: expected {self.grid.image_shape}")
        import cvxpy

        results = []
        for row, image, limit in zip(
            flow.double().cpu().numpy(), images.double().cpu().numpy(), budget.tolist(), strict=True
        ):
            self._point.value, self._image.value, self._budget.value = row, image.ravel(), limit
            try:
                with quiet():
                    self._problem.solve(solver=cvxpy.HIGHS)
            except cvxpy.SolverError as error:
                raise SolverError(f"L1 projection: {error}") from error
            if self._problem.status != cvxpy.OPTIMAL:
                raise SolverError(f"L1 projection: status {self._problem.status!r}, expected an optimum")
            results.append(np.array(self._flow.value))
        return torch.from_numpy(np.stack(results)).to(flow.device)


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
        timeout: float | None = None,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed, timeout=timeout)
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
            if not active.numel() or self.deadline.stop():
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
