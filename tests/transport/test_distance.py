"""W1 and plans against linear programs (HiGHS), values derived by hand, and the axioms of a metric."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import COSTS, distance_by_plans, plan_samples, power_of
from scipy.optimize import linprog
from torch import Tensor

from flowverify.errors import InvalidInputError, SolverError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.distance import EXACT_MASS_TOLERANCE, transport_plan, wasserstein_distance
from flowverify.transport.ground import ground_cost

ROOT2 = math.sqrt(2)
grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
seeds = st.integers(0, 10**6)


def random_measures(grid: Grid, seed: int, count: int = 1, sparse: bool = False) -> Tensor:
    """Images (count, C, H, W) with mass 2 in the first channel, 3 in the second."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *grid.image_shape, generator=generator, dtype=torch.float64)
    if sparse:
        keep = torch.rand(images.shape, generator=generator, dtype=torch.float64) < 0.5
        keep[..., 0, 0] = True
        images = images * keep
    masses = torch.arange(2.0, 2.0 + grid.channels, dtype=torch.float64)
    return images / images.sum((-2, -1), keepdim=True) * masses[:, None, None]


def image(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


def least_flow(source: Tensor, target: Tensor) -> float:
    """min ||delta||_1 over source + A delta = target, by HiGHS on delta = p - q, p, q >= 0."""
    matrix = Grid.of(source).incidence_scipy().toarray()
    if matrix.shape[1] == 0:
        return 0.0
    demand = (target - source).flatten().numpy()
    result = linprog(np.ones(2 * matrix.shape[1]), A_eq=np.hstack([matrix, -matrix]), b_eq=demand, method="highs")
    assert result.status == 0
    return float(result.fun)


def least_coupling(source: Tensor, target: Tensor, ground: str) -> float:
    """The coupling program of each channel, by HiGHS; ground distances from math, pair by pair."""
    height, width = source.shape[1:]
    cells = [(i, j) for i in range(height) for j in range(width)]
    count = len(cells)
    length = {"l1": lambda di, dj: abs(di) + abs(dj), "l2": lambda di, dj: math.sqrt(di * di + dj * dj)}[ground]
    costs = [length(i - k, j - m) for i, j in cells for k, m in cells]
    sums = np.vstack([np.kron(np.eye(count), np.ones(count)), np.kron(np.ones(count), np.eye(count))])
    total = 0.0
    for mu, nu in zip(source, target, strict=True):
        marginals = np.concatenate([mu.flatten().numpy(), nu.flatten().numpy()])
        result = linprog(costs, A_eq=sums, b_eq=marginals, method="highs")
        assert result.status == 0
        total += float(result.fun)
    return total


@given(grids, seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_l1_distance_is_the_least_flow(grid: Grid, seed: int, sparse: bool) -> None:
    source, target = random_measures(grid, seed, 2, sparse)
    distance = wasserstein_distance(source, target, "l1", normalised=False)
    assert distance.item() == pytest.approx(least_flow(source, target), abs=1e-9)


@pytest.mark.parametrize("ground", ["l1", "l2"])
@given(grids, seeds)
@settings(max_examples=20, deadline=None)
def test_distance_is_the_least_coupling(ground: str, grid: Grid, seed: int) -> None:
    source, target = random_measures(grid, seed, 2, sparse=True)
    distance = wasserstein_distance(source, target, ground, normalised=False)
    assert distance.item() == pytest.approx(least_coupling(source, target, ground), abs=1e-9)


HAND_DERIVED = [
    # the whole mass 2 moves by (2, 1)
    (image((2, 0), (0, 0), (0, 0)), image((0, 0), (0, 0), (0, 2)), 3.0, math.sqrt(5)),
    # a quarter of the mass moves diagonally by one, the rest stays
    (image((3, 1), (0, 0)), image((3, 0), (1, 0)), 0.5, ROOT2 / 4),
    # a chain: each pixel's unit may move by one, or the first's by three; on a line both cost 3 of mass 3
    (image((1, 1, 1, 0)), image((0, 1, 1, 1)), 1.0, 1.0),
    # two units cross: the cheaper matching is vertical (1 each), not diagonal
    (image((1, 1), (0, 0)), image((0, 0), (1, 1)), 1.0, 1.0),
    # one unit of the centre spreads to four corners of a 3 x 3 image
    (image((0, 0, 0), (0, 4, 0), (0, 0, 0)), image((1, 0, 1), (0, 0, 0), (1, 0, 1)), 2.0, ROOT2),
    (image((0.25, 0.75)), image((0.25, 0.75)), 0.0, 0.0),
]


@pytest.mark.parametrize(("source", "target", "l1", "l2"), HAND_DERIVED)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-6])
def test_hand_derived_values(source: Tensor, target: Tensor, l1: float, l2: float, scale: float) -> None:
    mass = float(source.sum()) * scale
    for ground, expected in (("l1", l1), ("l2", l2)):
        radius = wasserstein_distance(source * scale, target * scale, ground)
        cost = wasserstein_distance(source * scale, target * scale, ground, normalised=False)
        assert radius.dtype == torch.float64
        assert radius.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert cost.item() == pytest.approx(expected * mass, rel=1e-12, abs=1e-15)


@given(grids, seeds)
@settings(max_examples=30, deadline=None)
def test_metric_axioms_and_order_of_the_ground_costs(grid: Grid, seed: int) -> None:
    a, b, c = random_measures(grid, seed, 3, sparse=True)
    for ground in ("l1", "l2"):
        ab, ba, bc, ac, aa = wasserstein_distance(
            torch.stack([a, b, b, a, a]), torch.stack([b, a, c, c, a]), ground
        ).tolist()
        assert ab == pytest.approx(ba, abs=1e-12)
        assert ac <= ab + bc + 1e-12
        assert aa == 0.0
        assert (ab > 0.0) == (not torch.equal(a, b))
    l1, l2 = (wasserstein_distance(a, b, ground).item() for ground in ("l1", "l2"))
    assert l2 <= l1 + 1e-12
    assert l1 <= ROOT2 * l2 + 1e-12


def test_channels_are_separate_problems_that_share_the_budget() -> None:
    grid = Grid(4, 5, 2)
    source, target = random_measures(grid, 3, 2)
    per_channel = sum(
        wasserstein_distance(source[[c]], target[[c]], normalised=False).item() for c in range(grid.channels)
    )
    assert wasserstein_distance(source, target, normalised=False).item() == pytest.approx(per_channel, rel=1e-12)
    assert wasserstein_distance(source, target).item() == pytest.approx(per_channel / 5, rel=1e-12)
    with pytest.raises(InvalidInputError, match=r"image 0, channel 0: source mass 2\.0\d*, target mass 3\.0\d*"):
        wasserstein_distance(source, source.flip(0))


def test_a_channel_without_mass_is_allowed() -> None:
    source = torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]).double()
    assert wasserstein_distance(source, source.flip(-1, -2)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("ground", ["l1", "l2"])
@given(grids, seeds, st.booleans())
@settings(max_examples=20, deadline=None)
def test_plan_has_the_marginals_and_the_cost(ground: str, grid: Grid, seed: int, sparse: bool) -> None:
    source, target = random_measures(grid, seed, 2, sparse)
    plan = transport_plan(source, target, ground)
    dense = plan.dense()
    assert dense.shape == (grid.channels, grid.height * grid.width, grid.height * grid.width)
    assert plan.mass.min() > 0
    assert torch.equal(plan.row // (grid.height * grid.width), plan.column // (grid.height * grid.width))
    for sums, expected in ((dense.sum(2), source), (dense.sum(1), target)):
        torch.testing.assert_close(sums, expected.flatten(1), rtol=0, atol=1e-13)
    for sums, expected in zip(plan.marginals(), (source, target), strict=True):
        torch.testing.assert_close(sums, expected, rtol=0, atol=1e-13)
    assert plan.cost == pytest.approx(float((dense * ground_cost(grid, ground)).sum()), abs=1e-12)
    common = torch.minimum(source, target).flatten(1)
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2), common, rtol=0, atol=1e-13)


@pytest.mark.parametrize("share", [1e-9, 1e-13])
def test_tiny_changes_of_large_images_are_resolved(share: float) -> None:
    """A tiny share of the mass moves by one pixel: an absolute tolerance in the solver would miss it."""
    source = torch.rand(1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = source.clone()
    moved = share * float(source.sum())
    target[0, 3, 3] -= moved
    target[0, 3, 4] += moved
    distance = wasserstein_distance(source, target, mass_tolerance=EXACT_MASS_TOLERANCE)
    assert distance.item() == pytest.approx(share, rel=1e-2, abs=0)


def test_float32_images_and_imbalances() -> None:
    source = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    source[:, :, :, 14:] = 0
    target = source.roll(1, -1)
    expected = wasserstein_distance(source.double(), target.double())
    torch.testing.assert_close(wasserstein_distance(source, target), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    slightly_more = (target * (1 + 3e-6)).float()
    torch.testing.assert_close(wasserstein_distance(source, slightly_more), expected, rtol=0, atol=1e-5)
    with pytest.raises(InvalidInputError, match=r"expected equal masses \(relative tolerance 1e-09\)"):
        wasserstein_distance(source, slightly_more, mass_tolerance=EXACT_MASS_TOLERANCE)
    with pytest.raises(InvalidInputError, match="image 0, channel 0: source mass"):
        wasserstein_distance(source, target * (1 + 3e-5))
    with pytest.raises(InvalidInputError, match="expected equal masses"):
        transport_plan(source[0], slightly_more[0])
    plan = transport_plan(source[0], slightly_more[0], mass_tolerance=1e-5)
    torch.testing.assert_close(plan.marginals()[1].sum(), source[0].double().sum(), rtol=1e-14, atol=0)


def test_gradients_are_ignored() -> None:
    source = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    distance = wasserstein_distance(source, source.flip(-1))
    assert distance.item() == 1.0
    assert not distance.requires_grad


def test_empty_batch() -> None:
    assert wasserstein_distance(torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2)).shape == (0,)


BAD = [
    (torch.tensor([[[[1.0, -0.5]]]]), r"value -0\.5 at \(0, 0, 0, 1\), expected finite and >= 0"),
    (torch.tensor([[[[1.0, math.nan]]]]), r"value nan at \(0, 0, 0, 1\)"),
    (torch.tensor([[[[math.inf, 1.0]]]]), r"value inf at \(0, 0, 0, 0\)"),
    (torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]]), r"image 1 has mass 0\.0, expected a positive mass"),
    (torch.tensor([[[[1, 0]]]]), r"of dtype torch\.int64: expected a floating-point dtype"),
    (torch.ones(2, 2), r"of shape \(2, 2\): expected \(B, C, H, W\) or \(C, H, W\)"),
    (torch.ones(1, 1, 0, 2), r"of shape \(1, 1, 0, 2\): expected"),
    (np.ones((1, 1, 2)).tolist(), r"given list, expected a torch\.Tensor"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_images(bad: Any, message: str) -> None:
    good = torch.ones(np.shape(bad)) if np.ndim(bad) > 2 and 0 not in np.shape(bad) else torch.ones(1, 1, 2)
    with pytest.raises(InvalidInputError, match="sources.*" + message):
        wasserstein_distance(bad, good)
    with pytest.raises(InvalidInputError, match="targets.*" + message):
        wasserstein_distance(good, bad)


def test_bad_arguments() -> None:
    one, two = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 2, 2)
    with pytest.raises(InvalidInputError, match=r"source of shape \(2, 1, 2, 2\), .* expected equal shapes"):
        wasserstein_distance(two, one)
    with pytest.raises(InvalidInputError, match=r"source of shape \(2, 1, 2, 2\): expected one image"):
        transport_plan(two, two)
    for tolerance in (-1e-9, 1.0, math.nan):
        with pytest.raises(InvalidInputError, match=r"mass_tolerance: given .*, expected a number in \[0, 1\)"):
            wasserstein_distance(one, one, mass_tolerance=tolerance)
    with pytest.raises(UnknownNameError, match="unknown ground cost 'l3': expected one of l1, l2"):
        wasserstein_distance(one, one, "l3")
    with pytest.raises(UnknownNameError, match="unknown ground cost 'l3': expected one of l1, l2"):
        transport_plan(one[0], one[0], "l3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result_code": 3}, "status 3"),
        ({"warning": "numItermax reached"}, "message 'numItermax reached'"),
        ({"plan": 1.01}, "marginals off by"),
        ({"plan": math.nan}, "marginals off by nan"),
        ({"u": -1.0}, "duality gap"),
        ({"u": math.nan}, "duality gap nan"),
    ],
)
def test_a_solver_that_fails_is_an_error(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = ot.emd

    def broken(*args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        plan, log = solve(*args, **options)
        warnings.warn("the solver's own warning", stacklevel=1)
        log |= {key: value for key, value in changes.items() if key in ("result_code", "warning")}
        return plan * changes.get("plan", 1.0), log | {"u": log["u"] + changes.get("u", 0.0) * (log["u"] + 1)}

    source, target = random_measures(Grid(3, 3), 0, 2)
    monkeypatch.setattr(ot, "emd", broken)
    with pytest.raises(SolverError, match=message):
        transport_plan(source, target)


def test_a_plan_that_is_not_optimal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product coupling has the right marginals and costs too much."""
    solve = ot.emd

    def product(mu: Any, nu: Any, costs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        return np.outer(mu, nu), solve(mu, nu, costs, **options)[1]

    source, target = random_measures(Grid(3, 3), 0, 2)
    monkeypatch.setattr(ot, "emd", product)
    with pytest.raises(SolverError, match="duality gap"):
        transport_plan(source, target)


@pytest.mark.parametrize("ground", COSTS)
def test_other_costs_are_the_linear_program(ground: str) -> None:
    """Common mass may have to move: the plan is that of the whole images."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 5, 5), (2, 5, 6)):
        sources = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        sources = sources * (torch.rand(1, *shape, generator=generator) < 0.6) + 1e-3
        budget = 0.6 * sources.flatten(1).sum(1)
        for target in plan_samples(sources, budget, 6, ground)[0]:
            exact = distance_by_plans(sources[0], target, ground)
            found = wasserstein_distance(sources, target[None], ground, normalised=False)
            assert float(found) == pytest.approx(exact, rel=1e-6, abs=1e-9)
            assert exact <= float(budget) * (1 + 1e-9)
            radius = wasserstein_distance(sources, target[None], ground)
            assert float(radius) == pytest.approx((exact / float(sources.sum())) ** (1 / power_of(ground)), rel=1e-6)


def test_out_of_reach_of_every_window() -> None:
    source, target = torch.zeros(1, 5, 5, dtype=torch.float64), torch.zeros(1, 5, 5, dtype=torch.float64)
    source[0, 0, 0] = target[0, 4, 4] = 1.0
    assert wasserstein_distance(source, target, "local:5").item() == math.inf
    with pytest.raises(InvalidInputError, match="no plan of finite cost for ground cost 'local:5'"):
        transport_plan(source, target, "local:5")
    # What differs by rounding only does not count.
    nearly = source.clone()
    nearly[0, 0, 0] -= 1e-12
    nearly[0, 4, 4] = 1e-12
    assert wasserstein_distance(source, nearly, "local:5").item() < 1e-9
    nearly[0, 0, 0], nearly[0, 4, 4] = 1 - 1e-3, 1e-3
    assert wasserstein_distance(source, nearly, "local:5").item() == math.inf
