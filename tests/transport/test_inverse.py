"""Flows between images: they arrive (R + A delta = mu), and Algorithm 2's are the shortest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport.distance import TransportPlan, transport_plan, wasserstein_distance
from flowverify.transport.references import (
    REFERENCES,
    flow_by_transport,
    flow_by_tree,
    flow_from_plan,
    make_reference,
    minimal_flow,
)

MAPPERS = [flow_by_transport, flow_by_tree]
grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
seeds = st.integers(0, 10**6)


def mnist_like(count: int = 3) -> Tensor:
    """float32 images (count, 1, 28, 28), a fifth of the pixels lit, masses near 100."""
    images = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return (images - 0.8).clamp(min=0) * 5


def random_pair(grid: Grid, seed: int, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, count, *grid.image_shape, generator=generator, dtype=torch.float64)
    images = images * (torch.rand(images.shape, generator=generator, dtype=torch.float64) < 0.6)
    images[..., 0, 0] += 0.1
    references, targets = images / images.sum((-2, -1), keepdim=True)
    return references, targets


def algorithm_2(plan: TransportPlan, grid: Grid) -> Tensor:
    """Algorithm 2 of the framework paper (Appendix B) as printed: loops over pairs of pixels and steps."""
    right = torch.zeros(grid.channels, grid.height, grid.width - 1, dtype=torch.float64)
    down = torch.zeros(grid.channels, grid.height - 1, grid.width, dtype=torch.float64)
    for channel, matrix in enumerate(plan.dense()):
        for source, target in matrix.nonzero().tolist():
            mass = matrix[source, target]
            (i, j), (k, m) = divmod(source, grid.width), divmod(target, grid.width)
            for step in range(j, m):
                right[channel, i, step] += mass
            for step in range(m, j):
                right[channel, i, step] -= mass
            for step in range(i, k):
                down[channel, step, m] += mass
            for step in range(k, i):
                down[channel, step, m] -= mass
    return grid.join(right, down)


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("kind", REFERENCES)
def test_flows_arrive_at_28x28(kind: str, mapper: Callable[..., Tensor]) -> None:
    images, grid = mnist_like(), Grid(28, 28)
    images = images.double() / images.double().sum((1, 2, 3), keepdim=True)
    masses = images.sum((1, 2, 3))
    references = make_reference(kind, grid, masses, seed=5, images=images.flip(-1))
    flows = mapper(references, images)
    assert flows.shape == (3, 1512)
    assert flows.dtype == torch.float64
    torch.testing.assert_close(grid.apply(references, flows), images, rtol=0, atol=1e-12)
    least = wasserstein_distance(references, images, "l1", normalised=False)
    norms = flows.abs().sum(1)
    if mapper is flow_by_transport:
        torch.testing.assert_close(norms, least, rtol=1e-12, atol=0)
    else:
        assert (norms >= least * (1 - 1e-12)).all()


@pytest.mark.parametrize("mapper", MAPPERS)
def test_flows_arrive_on_images_of_the_mass_a_network_sees(mapper: Callable[..., Tensor]) -> None:
    images, grid = mnist_like(), Grid(28, 28)
    references = make_reference("uniform-random", grid, images.double().sum((1, 2, 3)))
    arrived = grid.apply(references, mapper(references, images, grid))
    torch.testing.assert_close(arrived, images.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mapper", MAPPERS)
@given(grids, seeds)
@settings(max_examples=40, deadline=None)
def test_flows_arrive_on_any_grid_and_channels(mapper: Callable[..., Tensor], grid: Grid, seed: int) -> None:
    references, images = random_pair(grid, seed)
    flows = mapper(references, images)
    torch.testing.assert_close(grid.apply(references, flows), images, rtol=0, atol=1e-13)
    least = wasserstein_distance(references, images, "l1", normalised=False)
    assert (flows.abs().sum(-1) >= least - 1e-13).all()
    if mapper is flow_by_transport:
        torch.testing.assert_close(flows.abs().sum(-1), least, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ground", ["l1", "l2"])
@given(grids, seeds)
@settings(max_examples=25, deadline=None)
def test_flow_from_plan_is_algorithm_2(ground: str, grid: Grid, seed: int) -> None:
    references, images = random_pair(grid, seed, 1)
    plan = transport_plan(references[0], images[0], ground)
    torch.testing.assert_close(flow_from_plan(plan, grid), algorithm_2(plan, grid), rtol=0, atol=1e-14)


def test_mass_goes_along_its_row_then_along_the_column_of_its_target() -> None:
    grid = Grid(2, 3)
    corner = torch.zeros(1, 2, 3, dtype=torch.float64)
    corner[0, 1, 2] = 4.0
    plan = transport_plan(corner, corner.flip(-1, -2))
    right, down = grid.split(flow_from_plan(plan, grid))
    assert right.tolist() == [[[0.0, 0.0], [-4.0, -4.0]]]
    assert down.tolist() == [[[-4.0, 0.0, 0.0]]]


def test_tree_by_hand() -> None:
    grid = Grid(2, 2)
    reference = torch.tensor([[[[0.0, 3.0], [1.0, 0.0]]]])
    target = torch.tensor([[[[1.0, 0.0], [0.0, 3.0]]]])
    right, down = grid.split(flow_by_tree(reference, target))
    assert right.tolist() == [[[[-3.0], [3.0]]]]
    assert down.tolist() == [[[[2.0, 0.0]]]]


def test_the_reference_itself_needs_no_flow() -> None:
    images = mnist_like()
    for mapper in MAPPERS:
        assert torch.equal(mapper(images, images), torch.zeros(3, 1512, dtype=torch.float64))


def test_minimal_flow_is_the_flow_by_transport() -> None:
    assert minimal_flow is flow_by_transport


def test_tree_is_differentiable_also_with_an_empty_channel() -> None:
    grid = Grid(3, 2, 2)
    references, images = random_pair(grid, 1)
    references[:, 1], images[:, 1] = 0.0, 0.0
    images.requires_grad_()
    flow_by_tree(references, images).square().sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize("mapper", MAPPERS)
def test_batches_of_no_and_of_one_image(mapper: Callable[..., Tensor]) -> None:
    empty = torch.zeros(0, 1, 3, 4)
    assert mapper(empty, empty).shape == (0, 17)
    references, images = random_pair(Grid(3, 4), 0, 1)
    assert torch.equal(mapper(references[0], images[0]), mapper(references, images))


@pytest.mark.parametrize("mapper", MAPPERS)
def test_bad_inputs(mapper: Callable[..., Tensor]) -> None:
    references, images = random_pair(Grid(3, 4, 2), 0)
    unequal = images.clone()
    unequal[1, 1] *= 1 + 1e-6
    with pytest.raises(
        InvalidInputError, match=r"image 1, channel 1: reference mass \S+, image mass \S+: expected equal"
    ):
        mapper(references, unequal)
    arrived = Grid(3, 4, 2).apply(references, mapper(references, unequal, mass_tolerance=1e-5))
    torch.testing.assert_close(arrived, images, rtol=0, atol=1e-12)
    shared = torch.cat([images[:, :1] * 0.5, images[:, 1:] * 1.5], 1)
    with pytest.raises(InvalidInputError, match=r"image 0, channel 0: .* expected equal masses"):
        mapper(references, shared)
    with pytest.raises(InvalidInputError, match=r"references of shape \(2, 2, 3, 4\): expected \(\.\.\., 1, 4, 3\)"):
        mapper(references, images, Grid(4, 3))
    with pytest.raises(InvalidInputError, match="expected equal shapes"):
        mapper(references[:1], images)
    with pytest.raises(InvalidInputError, match=r"images: value -1\.0 at \(0, 0, 0, 0\)"):
        mapper(references, -torch.ones(2, 2, 3, 4))
    with pytest.raises(InvalidInputError, match=r"references: image 0 has mass 0\.0"):
        mapper(torch.zeros(2, 2, 3, 4), images)


def test_plan_of_another_grid() -> None:
    references, images = random_pair(Grid(3, 4), 0)
    with pytest.raises(InvalidInputError, match=r"plan of image shape \(1, 3, 4\): expected \(1, 4, 3\)"):
        flow_from_plan(transport_plan(references[0], images[0]), Grid(4, 3))
