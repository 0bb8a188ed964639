"""Projections onto {delta : ||delta - delta_mu||_1 <= eps, A delta + R >= 0} (framework paper, Section 4).

Both take the displacement d = delta - delta_mu, for which the set is {||d||_1 <= eps, mu + A d >= 0} whatever the
reference R is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import DependencyError, InvalidInputError, SolverError
from flowverify.grid import Grid
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
