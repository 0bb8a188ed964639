"""References: nonnegative, of the mass asked for, reproducible, and independent of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.references import REFERENCES, make_reference

GRID = Grid(3, 4, 2)
MASS = torch.tensor([[1.0, 2.0], [30.0, 0.5]])


@given(
    st.sampled_from(REFERENCES),
    st.builds(Grid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_mass_shape_and_sign(kind: str, grid: Grid, seed: int) -> None:
    mass = torch.rand(3, grid.channels, generator=torch.Generator().manual_seed(seed)) + 0.1
    images = torch.rand(3, *grid.image_shape, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    references = make_reference(kind, grid, mass, seed=seed, images=images)
    assert references.shape == (3, *grid.image_shape)
    assert references.dtype == torch.float64
    assert references.min() >= 0
    torch.testing.assert_close(references.sum((-2, -1)), mass.double(), rtol=1e-14, atol=0)
    by_image = make_reference(kind, grid, mass.sum(1), seed=seed, images=images)
    expected = (mass.sum(1) / grid.channels).double()[:, None].expand(-1, grid.channels)
    torch.testing.assert_close(by_image.sum((-2, -1)), expected, rtol=1e-6, atol=0)


def test_flat_is_constant_in_each_channel() -> None:
    references = make_reference("flat", GRID, MASS)
    assert torch.equal(references, (MASS.double() / 12)[..., None, None].expand(-1, -1, 3, 4))


def test_point_is_one_pixel() -> None:
    references = make_reference("point", GRID, MASS, pixel=(2, 1))
    assert torch.equal(references[..., 2, 1], MASS.double())
    assert (references > 0).sum() == 4
    drawn = torch.stack([make_reference("point", GRID, MASS, seed=seed) for seed in range(20)])
    assert ((drawn > 0).sum((-2, -1)) == 1).all()
    assert len({tuple(point.flatten().nonzero().flatten().tolist()) for point in drawn[:, 0]}) > 10


def test_uniform_random_is_uniform() -> None:
    reference = make_reference("uniform-random", Grid(100, 100), torch.tensor([1.0]))
    values = (reference / reference.max()).flatten()
    quantiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]).double(), rtol=0, atol=0.03)


def test_image_keeps_its_proportions() -> None:
    images = torch.arange(1.0, 49.0).reshape(2, 2, 3, 4)
    references = make_reference("image", GRID, MASS, images=images)
    ratio = references / images
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio), rtol=1e-12, atol=0)
    shared = make_reference("image", GRID, MASS, images=images[0])
    torch.testing.assert_close(shared[0], references[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(shared[1] / shared[0], (MASS[1] / MASS[0]).double()[:, None, None].expand(2, 3, 4))


@pytest.mark.parametrize("kind", ["uniform-random", "point"])
def test_seeded_and_independent_of_the_batch(kind: str) -> None:
    first = make_reference(kind, GRID, MASS, seed=3)
    torch.rand(5)
    assert torch.equal(first, make_reference(kind, GRID, MASS, seed=3))
    assert torch.equal(first[1:], make_reference(kind, GRID, MASS[1:], seed=3))
    assert not torch.equal(first, make_reference(kind, GRID, MASS, seed=4))


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_channel_may_be_empty_but_not_an_image(kind: str) -> None:
    images = torch.ones(1, *GRID.image_shape)
    references = make_reference(kind, GRID, torch.tensor([[0.0, 2.0]]), images=images)
    torch.testing.assert_close(references.sum((-2, -1)), torch.tensor([[0.0, 2.0]]).double())
    for mass in (torch.tensor([[0.0, 0.0]]), torch.tensor([1.0, 0.0])):
        with pytest.raises(InvalidInputError, match=r"mass of image \d: given .*0\.0\]?, expected .* a positive sum"):
            make_reference(kind, GRID, mass, images=images)


@pytest.mark.parametrize(
    ("mass", "message"),
    [
        (torch.tensor([-1.0]), r"mass of image 0: given -1\.0, expected finite values >= 0"),
        (torch.tensor([1.0, math.nan]), r"mass of image 1: given nan, expected finite values"),
        (torch.tensor([math.inf]), r"mass of image 0: given inf, expected finite values"),
        (torch.ones(2, 3), r"mass of shape \(2, 3\): expected \(B,\) or \(B, 2\)"),
        (torch.tensor(1.0), r"mass of shape \(\): expected a tensor"),
        (1.0, r"mass of shape float: expected a tensor \(B,\) or \(B, 2\)"),
    ],
)
def test_bad_mass(mass: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_reference("flat", GRID, mass)


def test_bad_arguments() -> None:
    with pytest.raises(UnknownNameError, match="unknown reference 'gaussian': expected one of flat, image, point"):
        make_reference("gaussian", GRID, MASS)
    for pixel in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(InvalidInputError, match=r"pixel .*: expected a row in 0\.\.2 and a column in 0\.\.3"):
            make_reference("point", GRID, MASS, pixel=pixel)
    with pytest.raises(InvalidInputError, match="given images=None"):
        make_reference("image", GRID, MASS)
    with pytest.raises(InvalidInputError, match="images: given 3, expected 1 or 2"):
        make_reference("image", GRID, MASS, images=torch.ones(3, 2, 3, 4))
    with pytest.raises(InvalidInputError, match=r"images of shape \(1, 2, 4, 3\): expected"):
        make_reference("image", GRID, MASS, images=torch.ones(1, 2, 4, 3))
    with pytest.raises(InvalidInputError, match=r"images: a channel has mass 0\.0"):
        make_reference("image", GRID, MASS, images=torch.stack([torch.zeros(3, 4), torch.ones(3, 4)]))
    with pytest.raises(InvalidInputError, match=r"images: value -1\.0"):
        make_reference("image", GRID, MASS, images=-torch.ones(1, 2, 3, 4))
