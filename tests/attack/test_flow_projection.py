"""Projections onto feasible flows, against quadratic and linear programs by cvxpy."""

import pytest
import torch

from flowverify.attack.flow_descent import L1Projection, limit_outflow, project_euclidean, project_onto_l1_ball
from flowverify.errors import InvalidInputError
from flowverify.grid import Grid

cvxpy = pytest.importorskip("cvxpy", reason="the oracle of these tests")


def problem(shape=(1, 4, 5), count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images = torch.where(torch.rand(images.shape, generator=generator) < 0.5, 0.0, images)
    images[:, :, 0, 0] = 0.3
    grid = Grid.of(images)
    flow = 0.5 * torch.randn(count, grid.edges, generator=generator, dtype=torch.float64)
    return grid, images, flow, 0.4 * images.flatten(1).sum(1)


def by_program(grid, image, flow, budget, norm):
    d = cvxpy.Variable(grid.edges)
    constraints = [cvxpy.norm1(d) <= float(budget)]
    constraints.append(image.numpy().ravel() + grid.incidence_scipy() @ d >= 0)
    objective = cvxpy.sum_squares(d - flow.numpy()) if norm == 2 else cvxpy.norm1(d - flow.numpy())
    cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(solver=cvxpy.CLARABEL)
    return torch.from_numpy(d.value)


def test_l1_ball():
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    budget = torch.linspace(0, 40, 20, dtype=torch.float64)
    found = project_onto_l1_ball(flow, budget)
    assert bool((found.abs().sum(1) <= budget * (1 + 1e-12) + 1e-15).all())
    inside = flow.abs().sum(1) <= budget
    assert bool(inside.any()) and not bool(inside.all())
    assert torch.equal(found[inside], flow[inside])
    # p is the projection of x onto a convex set iff (x - p) . (q - p) <= 0 for all its q; extreme points suffice.
    residual = flow - found
    extreme = budget * residual.abs().amax(1)
    assert bool((extreme - (residual * found).sum(1) <= 1e-9).all())


@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 3, 3), (1, 1, 6)])
def test_euclidean_converges_to_the_quadratic_program(shape):
    grid, images, flow, budget = problem(shape)
    found = project_euclidean(flow, images, budget, sweeps=20_000, settled=1e-13)
    for k in range(len(images)):
        torch.testing.assert_close(found[k], by_program(grid, images[k], flow[k], budget[k], 2), rtol=0, atol=2e-5)


def test_euclidean_is_feasible_when_it_stops_early():
    grid, images, flow, budget = problem((1, 8, 8), 6, seed=3)
    for sweeps in (1, 3, 10):
        found = project_euclidean(flow, images, budget, sweeps=sweeps)
        assert bool((found.abs().sum(1) <= budget * (1 + 1e-12)).all())
        lacking = (-(images + grid.divergence(found))).clamp(min=0).flatten(1).sum(1)
        assert bool((lacking <= 1e-3 * images.flatten(1).sum(1)).all())


def test_a_feasible_flow_stays():
    grid, images, _, budget = problem()
    flow = torch.zeros(4, grid.edges, dtype=torch.float64)
    flow[:, 0] = 0.1  # the first pixel has 0.3
    torch.testing.assert_close(project_euclidean(flow, images, budget), flow)
    assert torch.equal(limit_outflow(flow, images), flow)


def test_outflow_is_cut_to_what_there_is():
    images = torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=torch.float64)
    flow = torch.tensor([[2.0, 3.0]], dtype=torch.float64)  # the first pixel has 1, and passes on 2
    torch.testing.assert_close(limit_outflow(flow, images), torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    back = torch.tensor([[-1.0, 0.5]], dtype=torch.float64)  # the second has nothing, and sends both ways
    torch.testing.assert_close(limit_outflow(back, images), torch.zeros(1, 2, dtype=torch.float64))


def test_the_l1_program():
    grid, images, flow, budget = problem()
    found = L1Projection(grid)(flow, images, budget)
    assert bool((found.abs().sum(1) <= budget + 1e-7).all())
    assert float((images + grid.divergence(found)).min()) >= -1e-7
    for k in range(len(images)):
        best = (by_program(grid, images[k], flow[k], budget[k], 1) - flow[k]).abs().sum()
        torch.testing.assert_close((found[k] - flow[k]).abs().sum(), best, rtol=1e-5, atol=0)
    with pytest.raises(InvalidInputError, match="expected"):
        L1Projection(Grid(2, 2))(flow, images, budget)
