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
from flowverify.network.curves import CURVES, Erf, Exp, Log, Power, Softplus
from flowverify.network.operations import (
    CANONICAL,
    Add,
    Concatenate,
    Index,
    MatrixProduct,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Softmax,
    Standardise,
    Subtract,
)

SHAPE = (2, 4, 4)
ONE_INPUT: list[nn.Module] = [
    nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.Sigmoid(), nn.Tanh(), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1),
    nn.AvgPool2d(2), nn.Flatten(), Reshape((8, 4)), Permute((2, 0, 1)), Index(0, 1), Index(1, slice(1, 3)),
    Index(2, [3, 0]), Pad((1, 0, 2, 1)), ScaleShift(-2.0, 0.3), ScaleShift(torch.randn(2, 1, 1), torch.randn(4, 4)),
    nn.ELU(1.7), nn.ELU(-0.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Softsign(),
    Softplus(), Erf(), Exp(), Power(2.0), Power(3.0), Softmax(0), Softmax(2), Standardise(0.1),
    Standardise(0.1, centred=False), Log(), Power(0.5), Power(-0.5), Power(-1.0), Power(-2.0), Power(1.5),
    nn.Linear(4, 3), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 4, 2, groups=2, dilation=2, bias=False),
]  # fmt: skip
TWO_INPUTS: list[nn.Module] = [Add(), Subtract(), Concatenate(0), Multiply(), MatrixProduct()]


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
    if isinstance(operation, Log) or (isinstance(operation, Power) and operation.exponent not in (2, 3)):
        inputs = [(low.abs() + 0.1, low.abs() + high - low + 0.1) for low, high in inputs]
    lower, upper = propagate(operation, inputs)
    least, largest = extremes(operation, inputs, 300)
    assert (lower <= least + 1e-12).all()
    assert (upper >= largest - 1e-12).all()
    if isinstance(operation, nn.Linear | nn.Conv2d | nn.AvgPool2d | Softmax | Standardise | MatrixProduct):
        return  # their corners are too many to meet at random; the oracles below are exact
    if type(operation) in CURVES:
        return  # nor are the places where they turn
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
    with pytest.raises(UnsupportedOperationError, match="no rule for Hardtanh"):
        propagate(nn.Hardtanh(), [interval(0)])


@pytest.mark.parametrize("kind", [kind for kind in ONE_INPUT if type(kind) in CURVES], ids=str)
def test_curves_attain_their_bounds(kind: nn.Module) -> None:
    """Against a fine grid: the least and the largest value are met where the function is flat, so it is near them."""
    low, high = interval(3)
    longer = torch.rand(high.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    low, high = low - 2, high + 2 * longer
    share = torch.linspace(0, 1, 4001, dtype=torch.float64).reshape(-1, *[1] * low.ndim)
    points = torch.cat([low + share * (high - low), torch.zeros_like(low)[None].clamp(low, high)])
    values = kind(points)
    lower, upper = propagate(kind, [(low, high)])
    few_units = 8 * torch.finfo(torch.float64).eps  # torch's vectors round ends and grids apart
    assert (lower <= values.amin(0) + few_units).all() and (upper >= values.amax(0) - few_units).all()
    torch.testing.assert_close(lower, values.amin(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(upper, values.amax(0), rtol=0, atol=1e-6)


def corners(low: Tensor, high: Tensor) -> Tensor:
    """All corners of a box of few dimensions, (2^n, n)."""
    choice = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(low))
    return low + choice * (high - low)


@pytest.mark.parametrize("seed", range(4))
def test_softmax_attains_its_bounds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(5, generator=generator, dtype=torch.float64)
    high = low + torch.rand(5, generator=generator, dtype=torch.float64)
    values = corners(low, high).softmax(1)
    lower, upper = propagate(Softmax(0), [(low[None], high[None])])
    torch.testing.assert_close(lower[0], values.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper[0], values.amax(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_standardisation_attains_its_bounds_over_centred_boxes(seed: int, centred: bool) -> None:
    """One entry is at an end, the others at either end or 0; what centring forgets is that entries sum to zero."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(4, generator=generator, dtype=torch.float64)
    high = low + torch.rand(4, generator=generator, dtype=torch.float64)
    lower, upper = propagate(Standardise(0.1, centred), [(low[None], high[None])])
    values = Standardise(0.1, centred)(corners(low, high))
    assert (lower[0] <= values.amin(0) + 1e-12).all() and (upper[0] >= values.amax(0) - 1e-12).all()
    if not centred:
        nearest = torch.where((low < 0) & (high > 0), 0.0, torch.where(low.abs() < high.abs(), low, high))
        some = torch.cat(
            [torch.stack([low, nearest, high])[torch.cartesian_prod(*[torch.arange(3)] * 4), torch.arange(4)]]
        )
        values = Standardise(0.1, centred)(some)
        torch.testing.assert_close(lower[0], values.amin(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(upper[0], values.amax(0), rtol=0, atol=1e-12)


def test_large_matrix_products_and_standardisations_are_bounded_without_large_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, single = [interval(0), interval(1)], [interval(2)]
    exact, exact_rows = propagate(MatrixProduct(), inputs), propagate(Standardise(0.1), single)
    monkeypatch.setattr("flowverify.bounds.intervals.LARGEST_PRODUCT", 0)
    monkeypatch.setattr("flowverify.bounds.intervals.LARGEST_MATRIX", 0)
    wider, rows = propagate(MatrixProduct(), inputs), propagate(Standardise(0.1), single)
    assert (wider[0] <= exact[0] + 1e-12).all() and (wider[1] >= exact[1] - 1e-12).all()
    for found, known in zip(rows, exact_rows, strict=True):
        torch.testing.assert_close(found, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("operation", [Log(), Power(0.5), Power(1.5), Power(-1.0), Power(-0.5), Power(-2.0)], ids=str)
def test_nothing_is_known_where_an_operation_has_no_value(operation: nn.Module) -> None:
    ends = torch.tensor([[-0.1]], dtype=torch.float64), torch.tensor([[0.2]], dtype=torch.float64)
    lower, upper = propagate(operation, [ends])
    assert lower.item() == -torch.inf and upper.item() == torch.inf


def test_intersection() -> None:
    first = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([2.0, 3.0, 1.0])
    second = torch.tensor([1.0, -1.0, 1.0 - 1e-7]), torch.tensor([5.0, 2.0, 1.0 - 1e-7])
    lower, upper = intersect(first, second)
    # The last two miss each other by rounding: the gap between them, the right way round.
    torch.testing.assert_close(lower, torch.tensor([1.0, 0.0, 1.0 - 1e-7]), rtol=0, atol=0)
    torch.testing.assert_close(upper, torch.tensor([2.0, 2.0, 1.0]), rtol=0, atol=0)
