"""The dilation against its definition by brute force, and its algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowverify.transport.dilation import dilate, lipschitz_constant

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
SEEDS = st.integers(0, 10_000)


def coefficients_of(shape: tuple[int, int, int], seed: int, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, (2, *shape), generator=generator).double()
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def distances(height: int, width: int) -> Tensor:
    """|row - row'| + |column - column'|, pixel by pixel."""
    pixels = [(row, column) for row in range(height) for column in range(width)]
    return torch.tensor([[abs(r - s) + abs(c - d) for s, d in pixels] for r, c in pixels], dtype=torch.float64)


@given(SHAPES, SEEDS, st.booleans(), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
@settings(max_examples=80, deadline=None)
def test_maximum_over_all_pixels(shape: tuple[int, int, int], seed: int, ties: bool, multiplier: float) -> None:
    values = coefficients_of(shape, seed, ties)
    slopes = torch.tensor([multiplier, multiplier / 2], dtype=torch.float64)
    far = distances(*shape[1:])
    flat = values.flatten(-2)
    candidates = flat[..., None, :] - slopes[:, None, None, None] * far
    found = dilate(values, slopes)
    torch.testing.assert_close(found.value.flatten(-2), candidates.amax(-1), rtol=0, atol=1e-12)
    # The origin attains the maximum, the distance is the origin's, and what need not move stays.
    origin = found.origin.flatten(-2)
    torch.testing.assert_close(
        candidates.gather(-1, origin[..., None]).squeeze(-1), candidates.amax(-1), rtol=0, atol=1e-12
    )
    steps = far.expand(2, shape[0], *far.shape).gather(-1, origin[..., None]).squeeze(-1)
    assert torch.equal(found.distance.flatten(-2), steps)
    stays = found.value == values
    assert (found.distance[stays] == 0).all()


@given(SHAPES, SEEDS)
@settings(max_examples=50, deadline=None)
def test_lipschitz_constant_is_the_steepest_pair(shape: tuple[int, int, int], seed: int) -> None:
    values = coefficients_of(shape, seed)
    flat = values.flatten(-2)
    slope = (flat[..., None] - flat[..., None, :]).abs() / distances(*shape[1:]).clamp(min=1)
    torch.testing.assert_close(lipschitz_constant(values), slope.amax((-1, -2, -3)), rtol=1e-14, atol=0)


@given(SHAPES, SEEDS)
@settings(max_examples=50, deadline=None)
def test_nothing_moves_from_the_lipschitz_constant_on(shape: tuple[int, int, int], seed: int) -> None:
    values = coefficients_of(shape, seed)
    constant = lipschitz_constant(values)
    for multiplier in (constant * (1 + 1e-12), 3 * constant + 1):
        found = dilate(values, multiplier)
        torch.testing.assert_close(found.value, values, rtol=0, atol=1e-12)
    if constant.min() > 0:  # and something does below it
        assert (dilate(values, 0.99 * constant).value > values).flatten(1).any(1).all()


@given(SHAPES, SEEDS, st.floats(0, 2), st.floats(0, 1), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_monotone_idempotent_and_equivariant(
    shape: tuple[int, int, int], seed: int, multiplier: float, more: float, shift: float
) -> None:
    values = coefficients_of(shape, seed)
    slope = torch.full((2,), multiplier, dtype=torch.float64)
    once = dilate(values, slope).value
    close = {"rtol": 0, "atol": 1e-12}
    assert (once >= values).all()
    assert (dilate(values, slope + more).value <= once + 1e-12).all()  # a steeper cone reaches less
    assert (dilate(values + values.abs(), slope).value >= once - 1e-12).all()
    torch.testing.assert_close(dilate(once, slope).value, once, **close)  # the cone is a norm's
    torch.testing.assert_close(dilate(values + shift, slope).value, once + shift, **close)
    torch.testing.assert_close(dilate(values.flip(-1), slope).value, once.flip(-1), **close)
    torch.testing.assert_close(dilate(values.transpose(-1, -2), slope).value, once.transpose(-1, -2), **close)


def test_channels_are_apart() -> None:
    values = torch.zeros(2, 2, 3, dtype=torch.float64)
    values[0, 0, 0] = 5.0
    found = dilate(values, torch.tensor(1.0, dtype=torch.float64))
    # 5 - distance in the first channel; the second sees nothing of it.
    expected = torch.tensor([[5.0, 4.0, 3.0], [4.0, 3.0, 2.0]], dtype=torch.float64)
    assert torch.equal(found.value[0], expected)
    assert torch.equal(found.origin[0], torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(found.value[1], torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_leading_dimensions(dtype: torch.dtype) -> None:
    values = coefficients_of((2, 3, 4), 0).to(dtype).expand(5, 2, 2, 3, 4)
    found = dilate(values, torch.full((5, 2), 0.5, dtype=dtype))
    assert found.value.shape == found.distance.shape == found.origin.shape == values.shape
    assert found.value.dtype == found.distance.dtype == dtype
    assert found.origin.dtype == torch.int64
    assert torch.equal(found.value[0], found.value[4])
    one = dilate(torch.ones(1, 1, 1, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert float(one.value) == 1.0
    assert float(lipschitz_constant(torch.ones(1, 1, 1, dtype=dtype))) == 0.0
