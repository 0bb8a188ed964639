"""Interval propagation: every canonical operation against samples, corners and auto_LiRPA's own on boxes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowverify.bounds.crown.backend import BOUND_OPTIONS, BoundedModule, BoundedTensor, PerturbationLpNorm
from flowverify.bounds.intervals import intersect, propagate
from flowverify.errors import UnsupportedOperationError
from flowverify.network import ScaleShift
from flowverify.network.operations import CANONICAL, Add, Concatenate, Index, Pad, Permute, Reshape, Subtract

SHAPE = (2, 4, 4)
ONE_INPUT: list[nn.Module] = [
    nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.Sigmoid(), nn.Tanh(), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1),
    nn.AvgPool2d(2), nn.Flatten(), Reshape((8, 4)), Permute((2, 0, 1)), Index(0, 1), Index(1, slice(1, 3)),
    Index(2, [3, 0]), Pad((1, 0, 2, 1)), ScaleShift(-2.0, 0.3), ScaleShift(torch.randn(2, 1, 1), torch.randn(4, 4)),
    nn.Linear(4, 3), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 4, 2, groups=2, dilation=2, bias=False),
]  # fmt: skip
TWO_INPUTS: list[nn.Module] = [Add(), Subtract(), Concatenate(0)]


def interval(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    radius = torch.rand(2, *SHAPE, generator=generator, dtype=torch.float64)
    return centre - radius, centre + radius


def test_every_canonical_operation_is_here() -> None:
    assert {type(operation) for operation in [*ONE_INPUT, *TWO_INPUTS]} == set(CANONICAL)


def extremes(operation: nn.Module, inputs: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The least and largest values over points inside, corners, and zeros where they are inside."""
    values = []
    generator = torch.Generator().manual_seed(5)
    for number in range(count):
        points = []
        for low, high in inputs:
            share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
            point = low + (high - low) * (share if number % 3 == 0 else share.round())
            points.append(torch.where((low < 0) & (high > 0) & (share > 0.7), 0.0, point) if number % 3 == 1 else point)
        values.append(operation(*points))
    stacked = torch.stack(values)
    return stacked.amin(0), stacked.amax(0)


@pytest.mark.parametrize("operation", [*ONE_INPUT, *TWO_INPUTS], ids=str)
def test_holds_every_point_and_is_tight(operation: nn.Module) -> None:
    operation = operation.double().requires_grad_(False)
    inputs = [interval(seed) for seed in range(2 if operation in TWO_INPUTS else 1)]
    lower, upper = propagate(operation, inputs)
    least, largest = extremes(operation, inputs, 300)
    assert (lower <= least + 1e-12).all()
    assert (upper >= largest - 1e-12).all()
    if isinstance(operation, nn.Linear | nn.Conv2d | nn.AvgPool2d):
        return  # their corners are too many to meet at random; the oracle below is exact
    torch.testing.assert_close(lower, least, rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, largest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "operation", [op for op in ONE_INPUT if isinstance(op, nn.Linear | nn.Conv2d | nn.AvgPool2d)], ids=str
)
def test_affine_operations_attain_their_bounds(operation: nn.Module) -> None:
    # The largest value of an affine function of a box is at the corner that the signs of its coefficients choose.
    operation = operation.double().requires_grad_(False)
    low, high = interval(0)
    lower, upper = propagate(operation, [(low, high)])
    for index in range(0, lower[0].numel(), 3):
        point = low.clone().requires_grad_(True)
        gradient = torch.autograd.grad(operation(point).flatten(1)[:, index].sum(), point)[0]
        best = operation(torch.where(gradient > 0, high, low)).flatten(1)[:, index]
        worst = operation(torch.where(gradient > 0, low, high)).flatten(1)[:, index]
        torch.testing.assert_close(upper.flatten(1)[:, index], best, rtol=0, atol=1e-12)
        torch.testing.assert_close(lower.flatten(1)[:, index], worst, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "operation",
    [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(2, 3, 3, 2, 1)],
    ids=str,
)
def test_as_auto_lirpa_on_boxes(operation: nn.Module) -> None:
    network = nn.Sequential(operation, nn.Flatten()).float()
    low, high = (end.float() for end in interval(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounded = BoundedModule(network, low, bound_opts=dict(BOUND_OPTIONS))
        ball = PerturbationLpNorm(norm=np.inf, x_L=low, x_U=high)
        expected = bounded.compute_bounds(x=(BoundedTensor((low + high) / 2, ball),), method="IBP")
    found = propagate(operation.float(), [(low, high)])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.flatten(1), theirs)


def test_unknown_operation() -> None:
    with pytest.raises(UnsupportedOperationError, match="no rule for GELU"):
        propagate(nn.GELU(), [interval(0)])


def test_intersection() -> None:
    first = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([2.0, 3.0, 1.0])
    second = torch.tensor([1.0, -1.0, 1.0 - 1e-7]), torch.tensor([5.0, 2.0, 1.0 - 1e-7])
    lower, upper = intersect(first, second)
    # The last two miss each other by rounding: the gap between them, the right way round.
    torch.testing.assert_close(lower, torch.tensor([1.0, 0.0, 1.0 - 1e-7]), rtol=0, atol=0)
    torch.testing.assert_close(upper, torch.tensor([2.0, 2.0, 1.0]), rtol=0, atol=0)
