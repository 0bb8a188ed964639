"""The grid against brute-force constructions from the theory (section 2) and from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid

GRIDS = [
    Grid(1, 1),
    Grid(1, 5),
    Grid(4, 1),
    Grid(3, 4),
    Grid(5, 2),
    Grid(2, 3, 3),
    Grid(1, 1, 2),
    Grid(28, 28),
]
SMALL = [grid for grid in GRIDS if grid.pixels < 100]

grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))


def grid_id(grid: Grid) -> str:
    return f"{grid.channels}x{grid.height}x{grid.width}"


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_by_formula(grid: Grid, image: Tensor, flow: Tensor) -> Tensor:
    """Delta(mu, delta)_ij = mu_ij + down_(i-1,j) + right_(i,j-1) - down_ij - right_ij, pixel by pixel."""
    height, width = grid.height, grid.width
    result = image.clone()
    per_channel = height * (width - 1) + (height - 1) * width
    for channel in range(grid.channels):
        here = flow[channel * per_channel : (channel + 1) * per_channel]

        def right(i: int, j: int, here: Tensor = here) -> Tensor | float:
            return here[i * (width - 1) + j] if 0 <= j < width - 1 else 0.0

        def down(i: int, j: int, here: Tensor = here) -> Tensor | float:
            return here[height * (width - 1) + i * width + j] if 0 <= i < height - 1 else 0.0

        for i in range(height):
            for j in range(width):
                result[channel, i, j] += down(i - 1, j) + right(i, j - 1) - down(i, j) - right(i, j)
    return result


@pytest.mark.parametrize("grid", SMALL, ids=grid_id)
def test_apply_is_the_formula(grid: Grid) -> None:
    image, flow = random_tensor(*grid.image_shape), random_tensor(grid.edges, seed=1)
    torch.testing.assert_close(grid.apply(image, flow), delta_by_formula(grid, image, flow), rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", SMALL, ids=grid_id)
def test_incidence_is_the_formula_on_unit_flows(grid: Grid) -> None:
    zero = torch.zeros(grid.image_shape, dtype=torch.float64)
    unit_flows = torch.eye(grid.edges, dtype=torch.float64)
    columns = [delta_by_formula(grid, zero, flow).flatten() for flow in unit_flows]
    expected = torch.stack(columns, 1) if columns else torch.zeros(grid.pixels, 0, dtype=torch.float64)
    assert torch.equal(grid.incidence().to_dense(), expected)
    assert np.array_equal(grid.incidence_scipy().toarray(), expected.numpy())


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (2, 2), (1, 3), (3, 1)])
def test_incidence_is_the_matrix_of_the_framework_paper(height: int, width: int) -> None:
    """Theorem 2, 1-based. A1: -1 at j = i - ceil(i/m) + 1, 1 at j = i - ceil(i/m). A2: -1 at i, 1 at i - m.

    The columns that the paper excludes (no flow across a row's end) are printed one too low: taken literally,
    they drop the last edge of a row. Here they are ceil(i/m)(m-1) + 1 and (ceil(i/m) - 1)(m-1).
    """
    first, second = (
        np.zeros((height * width, height * (width - 1))),
        np.zeros((height * width, (height - 1) * width)),
    )
    for i in range(1, height * width + 1):
        row = math.ceil(i / width)
        for j in range(1, first.shape[1] + 1):
            if j == i - row + 1 and j != row * (width - 1) + 1:
                first[i - 1, j - 1] = -1
            elif j == i - row and j != (row - 1) * (width - 1):
                first[i - 1, j - 1] = 1
        for j in range(1, second.shape[1] + 1):
            second[i - 1, j - 1] = -1 if j == i else 1 if j == i - width else 0
    assert np.array_equal(Grid(height, width).incidence_scipy().toarray(), np.hstack([first, second]))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_columns_of_the_incidence_have_one_tail_and_one_head(grid: Grid) -> None:
    matrix = grid.incidence_scipy().tocsc()
    assert matrix.shape == (grid.pixels, grid.edges)
    assert np.array_equal(np.asarray(matrix.sum(0)).ravel(), np.zeros(grid.edges))
    assert np.array_equal(np.asarray(abs(matrix).sum(0)).ravel(), np.full(grid.edges, 2.0))


def test_sizes_on_mnist() -> None:
    grid = Grid(28, 28)
    sizes = (grid.edges, grid.right_edges, grid.down_edges, grid.pixels, grid.diameter)
    assert sizes == (1512, 756, 756, 784, 54)
    assert Grid(32, 32, 3).edges == 3 * 2 * 32 * 31
    assert Grid.of(torch.zeros(7, 3, 2, 5)) == Grid(2, 5, 3)


@given(grids, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_divergence_and_differences_are_the_matrix_and_its_transpose(grid: Grid, seed: int) -> None:
    matrix = torch.from_numpy(grid.incidence_scipy().toarray())
    flow, image = (
        random_tensor(2, 3, grid.edges, seed=seed),
        random_tensor(2, 3, *grid.image_shape, seed=seed + 1),
    )
    divergence, differences = grid.divergence(flow), grid.differences(image)
    torch.testing.assert_close(divergence.flatten(-3), flow @ matrix.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(differences, image.flatten(-3) @ matrix, rtol=0, atol=1e-13)
    torch.testing.assert_close((divergence * image).sum((-3, -2, -1)), (flow * differences).sum(-1))


@given(grids, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_round_trips(grid: Grid, seed: int) -> None:
    flow = random_tensor(2, grid.edges, seed=seed)
    right, down = grid.split(flow)
    assert right.shape == (2, grid.channels, grid.height, grid.width - 1)
    assert down.shape == (2, grid.channels, grid.height - 1, grid.width)
    assert torch.equal(grid.join(right, down), flow)
    planes = grid.to_planes(flow)
    assert planes.shape == (2, 2 * grid.channels, grid.height, grid.width)
    assert torch.equal(grid.from_planes(planes), flow)
    mask = grid.planes_mask(torch.float64)
    assert mask.sum() == grid.edges
    assert torch.equal(planes * mask, planes)
    assert torch.equal(grid.from_planes(planes + 5 * (1 - mask)), flow)


@given(grids, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_potential_inverts_differences_up_to_a_constant_per_channel(grid: Grid, seed: int) -> None:
    image = random_tensor(2, *grid.image_shape, seed=seed)
    potential = grid.potential(grid.differences(image))
    torch.testing.assert_close(potential, image - image[..., :1, :1], rtol=0, atol=1e-13)


def test_channels_do_not_exchange_mass() -> None:
    grid = Grid(3, 3, 2)
    flow = random_tensor(grid.edges)
    flow[: grid.edges // 2] = 0
    moved = grid.divergence(flow)
    assert torch.equal(moved[0], torch.zeros(3, 3, dtype=torch.float64))
    assert moved[1].abs().min() > 0


def test_feasibility_is_a_sign_condition_on_the_image() -> None:
    grid = Grid(1, 2)
    reference = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    flows = torch.tensor([[1.0], [1.125], [0.0], [-0.125]], dtype=torch.float64)
    assert grid.is_feasible(reference, flows).tolist() == [True, False, True, False]
    assert grid.is_feasible(reference, flows, tolerance=0.125).tolist() == [True, True, True, True]


def test_apply_and_differences_are_differentiable() -> None:
    grid = Grid(2, 3, 2)
    flow, image = (
        random_tensor(grid.edges).requires_grad_(),
        random_tensor(*grid.image_shape).requires_grad_(),
    )
    assert torch.autograd.gradcheck(grid.apply, (image, flow))
    assert torch.autograd.gradcheck(grid.differences, (image,))
    assert torch.autograd.gradcheck(grid.potential, (flow,))


@pytest.mark.parametrize("sizes", [(0, 3), (3, -1), (2.0, 3), ("3", 3), (True, 3), (3, 3, 0)])
def test_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"grid (height|width|channels): given .*, expected an integer >= 1"):
        Grid(*sizes)


def test_bad_shapes() -> None:
    grid = Grid(3, 4, 2)
    with pytest.raises(InvalidInputError, match=r"flow of shape \(33,\): expected \(\.\.\., 34\) for a 2x3x4 grid"):
        grid.divergence(torch.zeros(33))
    with pytest.raises(InvalidInputError, match=r"coefficients of shape \(2, 4, 3\): expected \(\.\.\., 2, 3, 4\)"):
        grid.differences(torch.zeros(2, 4, 3))
    with pytest.raises(InvalidInputError, match=r"reference of shape \(3, 4\): expected \(\.\.\., 2, 3, 4\)"):
        grid.apply(torch.zeros(3, 4), torch.zeros(34))
    with pytest.raises(InvalidInputError, match=r"images of shape \(3, 4\): expected \(\.\.\., channels"):
        Grid.of(torch.zeros(3, 4))
