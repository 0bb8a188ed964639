"""Moves at prices of their own: what they cost against dense plans, and bounds of other ground costs than l1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from contracts import margins_at, random_network, sparse_images
from plans import COSTS, cost_matrix, least_margins, plan_gain, plan_samples
from scipy.optimize import linprog
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_operations_contract import ALL, Case, check_contains, check_equals, first_of_each, network_of, slack, truth_of

import flowverify as fv
from flowverify.ball import Threat
from flowverify.bounds.lifted import priced_kernel
from flowverify.bounds.lifted.engine import LiftedBounds
from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves, moves_of
from flowverify.bounds.lifted.support import MoveRows, maximum, maximum_value, whole_grid
from flowverify.bounds.margins import margin_specification
from flowverify.network import Network
from flowverify.network.operations import STEEP

ORIGIN = torch.zeros(1, 2, dtype=torch.long)
CHAINS = moves_of("l2", 5, 5, single=0, chained=8)
WINDOW = moves_of("local:3", 5, 5)
SETS = pytest.mark.parametrize("moves", [CHAINS, WINDOW], ids=["chained", "single"])


def listed(moves: Moves, height: int, width: int) -> list[tuple[int, int, int, float]]:
    """The moves of one channel: from pixel to pixel, by which way, at what price."""
    return [
        (i * width + j, (i + di) * width + j + dj, way, price)
        for way, ((di, dj), price) in enumerate(zip(moves.offsets, moves.prices, strict=True))
        for i in range(height)
        for j in range(width)
        if 0 <= i + di < height and 0 <= j + dj < width
    ]


def largest(moves: Moves, gains: Tensor, image: Tensor, budget: float) -> float:
    """max G . m by HiGHS, for gains (ways, C, H, W)."""
    channels, height, width = image.shape
    plane = height * width
    every = [(c, *move) for c in range(channels) for move in listed(moves, height, width)]
    tails = np.array([c * plane + tail for c, tail, _, _, _ in every])
    heads = np.array([c * plane + head for c, _, head, _, _ in every])
    fees = np.array([price for *_, price in every])
    flat = gains.flatten(2).numpy()
    gain = np.array([flat[way, c, tail] for c, tail, _, way, _ in every])
    count = np.arange(len(every))
    back = -np.ones(len(every)) if moves.chained else np.zeros(len(every))
    leaving = scipy.sparse.coo_array(
        (np.r_[np.ones(len(every)), back], (np.r_[tails, heads], np.r_[count, count])),
        shape=(channels * plane, len(every)),
    )
    rows = scipy.sparse.vstack([leaving, scipy.sparse.coo_array(fees[None])])
    solution = linprog(-gain, A_ub=rows, b_ub=np.r_[image.flatten().numpy(), budget], method="highs")
    assert solution.status == 0
    return -float(solution.fun)


def rows_of(moves: Moves, kind: str, shape: tuple[int, int, int], count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    gains = moves.gains(torch.randn(1, 1, count, *shape, generator=generator, dtype=torch.float64))
    if kind == "bent":
        return torch.maximum(gains, 0.3 * gains)
    if kind == "any":
        return torch.randn(gains.shape, generator=generator, dtype=torch.float64) * moves.within(*shape[1:])
    return gains


# Which moves there are, and what they cost.


def dearer(ground: str, moves: Moves, height: int, width: int) -> bool:
    """Whether some pixel cannot be reached by moves at the ground cost."""
    graph = np.full((height * width, height * width), np.inf)
    for tail, head, _, price in listed(moves, height, width):
        graph[tail, head] = price
    reached = shortest_path(graph, method="D") if moves.chained else np.where(np.isfinite(graph), graph, np.inf)
    cost = cost_matrix(height, width, ground)
    apart = np.isfinite(cost) & ~np.eye(height * width, dtype=bool)
    return bool((reached[apart] > cost[apart]).any())


@pytest.mark.parametrize("ground", ["l1", *COSTS, "local:5:l1^2"])
@pytest.mark.parametrize("size", [(5, 5), (6, 9)])
@pytest.mark.parametrize("options", [{}, {"single": 0, "chained": 8}, {"single": 0}, {"single": 10**6}])
def test_no_move_of_the_ball_is_dearer_by_moves(ground: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    moves = moves_of(ground, *size, **options)
    assert not dearer(ground, moves, *size)
    assert dearer(ground, Moves(moves.offsets, tuple(1.001 * price for price in moves.prices), moves.chained), *size)
    for (row, column), (back_row, back_column) in zip(moves.offsets[::2], moves.offsets[1::2], strict=True):
        assert (row, column) == (-back_row, -back_column)


def test_chains_of_8_and_16_offsets_are_nearly_euclidean() -> None:
    for count, lost in ((8, 0.0824), (16, 0.0275)):
        moves = moves_of("l2", 28, 28, chained=count)
        assert len(moves) == count
        assert moves.chained
        assert moves.prices[0] >= 1 / (1 + lost)
    assert moves_of("l1", 28, 28) is NEIGHBOURS
    assert not moves_of("local:5", 28, 28).chained
    assert len(moves_of("local:5", 28, 28)) == 24


# The support function.


@SETS
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["of pixels", "bent", "any"])
@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 3, 3), (1, 1, 6)])
@pytest.mark.parametrize("share", [0.02, 0.2, 3.0])
def test_equals_the_linear_programme(
    moves: Moves, shape: tuple[int, int, int], kind: str, share: float, backend: Any
) -> None:
    image = sparse_images(shape, 1, 3)
    budget = share * image.sum().reshape(1)
    gains = rows_of(moves, kind, shape, 4)
    found = maximum(MoveRows(gains, ORIGIN), image, budget, moves=moves, tolerance=1e-9, flow=True, backend=backend)
    for row in range(4):
        expected = largest(moves, gains[0, 0, row], image[0], float(budget))
        value = float(found.value[0, row])
        assert value >= expected * (1 - 1e-9)
        assert value <= expected * (1 + (1e-7 if backend == "auto" else 2e-3)) + 1e-9


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("ground", ["l1", "l2", "local:5"])
def test_flows_keep_to_the_budget_where_paths_tie(ground: str, backend: Any) -> None:
    moves = moves_of(ground, 4, 5, **({"single": 0, "chained": 8} if ground == "l2" else {}))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        gains = torch.randint(-4, 5, (1, 1, 8, len(moves), 2, 4, 5), generator=generator).double()
        gains *= moves.within(4, 5)
        images = torch.randint(0, 3, (1, 2, 4, 5), generator=generator).double()
        budget = images.sum().reshape(1) * (0.05, 0.2, 0.5)[seed % 3]
        rows = MoveRows(gains, ORIGIN)
        flow = maximum(rows, images, budget, moves=moves, tolerance=1e-12, flow=True, backend=backend).flow
        assert flow is not None and (flow >= 0).all()
        assert ((flow * moves.priced(flow)).flatten(3).sum(3) <= budget * (1 + 1e-9)).all()


@SETS
@pytest.mark.parametrize("kind", ["of pixels", "bent"])
def test_the_flow_is_feasible_and_the_gradient(moves: Moves, kind: str) -> None:
    images = sparse_images((1, 4, 4), 2, 7, share=1.0)
    budget = 0.05 * images.flatten(1).sum(1)
    rows = MoveRows(rows_of(moves, kind, (1, 4, 4), 6), ORIGIN)
    found = maximum(rows, images, budget, moves=moves, tolerance=1e-9, flow=True)
    flow = found.flow
    assert flow is not None
    assert (flow >= 0).all()
    cost = (flow * moves.priced(flow)).flatten(3).sum(3)
    assert (cost <= budget[:, None, None] * (1 + 1e-9)).all()
    torch.testing.assert_close((flow * rows.gains).flatten(3).sum(3)[:, 0], found.value, rtol=1e-6, atol=0)
    gains = rows.gains.expand(2, -1, -1, -1, -1, -1, -1).clone().requires_grad_(True)
    options = {"tolerance": 1e-9, "moves": moves}
    value, _ = maximum_value(MoveRows(gains, ORIGIN), images, budget, options)
    value.sum().backward()
    torch.testing.assert_close(gains.grad, flow)


@SETS
@pytest.mark.parametrize("feasible", [True, False])
def test_windows_are_rows_that_are_zero_outside(moves: Moves, feasible: bool) -> None:
    shape = (2, 6, 7)
    images, budget = sparse_images(shape, 2, 1), torch.tensor([0.5, 30.0], dtype=torch.float64)
    origins = torch.tensor([[0, 0], [-1, 3], [4, 5], [2, -2]])
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(2, 4, 3, len(moves), 2, 3, 4, generator=generator, dtype=torch.float64)
    windows = MoveRows(gains, origins)
    whole = whole_grid(windows, shape[1:]) * moves.within(*shape[1:])
    found = maximum(windows, images, budget, moves=moves, feasible=feasible, tolerance=1e-9).value
    for image in range(2):
        for row in (0, 5, 11):
            if feasible:
                value = largest(moves, whole[image, row], images[image], float(budget[image]))
            else:
                value = float(budget[image] * (whole[image, row] / moves.priced(whole)).max())
            assert float(found[image, row]) == pytest.approx(value, rel=1e-7)


@SETS
def test_prices_that_did_not_settle_give_a_sound_bound(moves: Moves, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the moves are not looked at: the check raises the multiplier by what is violated."""
    shape = (1, 4, 5)
    image = sparse_images(shape, 1, 3)
    gains, budget = rows_of(moves, "any", shape, 8), 0.1 * image.sum().reshape(1)
    whole = np.array([largest(moves, gains[0, 0, row], image[0], float(budget)) for row in range(8)])
    solve = priced_kernel._solve.py_func
    halved = lambda *given: solve(*given[:8], given[8] // 2, *given[9:])  # noqa: E731

    def values_of() -> Any:
        values, multipliers = np.empty(8), np.empty(8)
        priced_kernel.solve_rows.py_func(
            gains[0, 0].flatten(1).numpy(), False, np.zeros((1, 2), np.int64), 8, shape[1:], shape,
            np.array(moves.offsets), np.array(moves.prices), moves.chained, image.flatten().numpy(), float(budget),
            np.full(8, -np.inf), np.zeros(8), 1e-6, 0, 8, values, multipliers, np.empty((0, gains[0, 0, 0].numel())),
        )  # fmt: skip
        return values

    monkeypatch.setattr(priced_kernel, "_solve", halved)
    assert (values_of() >= whole * (1 - 1e-12)).all()
    monkeypatch.setattr(priced_kernel, "_violation", lambda *given: 0.0)
    assert (values_of() < whole * (1 - 1e-6)).any()  # it is the check that makes it sound


# Networks.


@pytest.mark.parametrize("ground", [*COSTS, "l2^2"])
def test_equals_the_linear_programme_of_plans_for_affine_networks(ground: str) -> None:
    network = random_network((2, 3, 4), [nn.Conv2d(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(60, 3)], 0)
    images = sparse_images((2, 3, 4), 2, 0)
    budget, labels = 0.2 * images.flatten(1).sum(1), network(images).argmax(1)
    moves = moves_of(ground, 3, 4) if not ground.startswith("local:5") else moves_of("local:3" + ground[7:], 3, 4)
    ground = ground.replace("local:5", "local:3")
    assert not moves.chained
    found = LiftedBounds(network, moves=moves, tolerance=1e-8).lower_bounds(images, labels, budget)
    basis, zero = torch.eye(24, dtype=torch.float64).reshape(-1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    rises = -margin_specification(labels, 3, torch.float64)
    pixels = torch.einsum("bsk,pk->bsp", rises, network(basis) - network(zero)).reshape(2, 2, 2, 3, 4)
    clean = margins_at(network, images[:, None], labels)[:, 0]
    for image in range(2):
        for row in range(2):
            gain = plan_gain(pixels[image, row], images[image], float(budget[image]), ground)
            assert float(clean[image, row]) - gain == pytest.approx(float(found[image, row]), abs=1e-7)


def tiny(seed: int) -> tuple[Network, Tensor, Tensor, Tensor]:
    hidden = ([2 + seed % 3], [3, 2])[seed % 2]
    layers: list[nn.Module] = [nn.Flatten()]
    width = 9
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    network = random_network((1, 3, 3), [*layers, nn.Linear(width, 2)], seed)
    image = sparse_images((1, 3, 3), 1, seed)
    return network, image, network(image).argmax(1), (0.1, 0.4)[seed % 2] * image.flatten(1).sum(1)


def moves_for(ground: str, options: dict[str, int]) -> Moves:
    return moves_of(ground, 3, 3, **options)


@pytest.mark.parametrize("options", [{}, {"single": 0, "chained": 8}], ids=["single", "chained"])
@pytest.mark.parametrize("ground", [cost for cost in COSTS if "5" not in cost or "^1.5" in cost])
def test_never_above_the_exact_least_margin(ground: str, options: dict[str, int]) -> None:
    for seed in range(6):
        network, image, label, budget = tiny(seed)
        least = torch.tensor(least_margins(network, image[0], int(label), float(budget), ground), dtype=torch.float64)
        for steps in (0, 5):
            bounds = LiftedBounds(network, moves=moves_for(ground, options), steps=steps)
            assert (bounds.lower_bounds(image, label, budget)[0] <= least + 1e-9).all(), (seed, steps)


@pytest.mark.parametrize("options", [{}, {"single": 0, "chained": 8}], ids=["single", "chained"])
def test_prices_that_are_too_high_are_caught(options: dict[str, int]) -> None:
    right = moves_for("l2", options)
    wrong = Moves(right.offsets, tuple(1.5 * price for price in right.prices), right.chained)
    caught = False
    for seed in range(6):
        network, image, label, budget = tiny(seed)
        least = torch.tensor(least_margins(network, image[0], int(label), float(budget), "l2"), dtype=torch.float64)
        found = LiftedBounds(network, moves=wrong).lower_bounds(image, label, budget)[0]
        caught |= bool((found > least + 1e-6).any())
    assert caught


@pytest.mark.parametrize("case", first_of_each([case for case in ALL if type(case.operation) not in STEEP]))
def test_values_lie_within_the_bounds_of_other_costs(case: Case) -> None:
    """The contract of operations (theory, section 19), at points that plans of each cost lead to."""
    network, truth = network_of(case), truth_of(case)
    names = [node.inputs[0] for node in network.activations]
    for ground, options in (("l2", {"single": 0}), ("local:3", {})):
        moves = moves_of(ground, *network.input_shape[-2:], **options)
        points = plan_samples(truth.images, truth.budget, 60, ground)
        values = network.values(points.flatten(0, 1))
        reached = [values[name].unflatten(0, points.shape[:2]) for name in names]
        least = margins_at(network, points, truth.labels).amin(1)
        for feasible in (True, False):
            bounds = LiftedBounds(network, feasible=feasible, moves=moves)
            intervals = bounds.intervals(truth.images, truth.budget)
            found = [intervals[name] for name in names]
            check_contains(found, [(v.amin(1), v.amax(1)) for v in reached], f"lifted, {ground}")
            assert (bounds.lower_bounds(truth.images, truth.labels, truth.budget) <= least + slack(least)).all()
            still = bounds.intervals(truth.images, 0 * truth.budget)
            check_equals([still[name] for name in names], truth.read, f"lifted, {ground}")


def test_certificates_of_other_costs_are_not_below_those_of_covers() -> None:
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:4]
    for ground in ("l2", "local:3", "l2^2"):
        own = fv.certified_radius(network, data.images, data.labels, ground=ground, bound="lifted")
        l1 = fv.certified_radius(network, data.images, data.labels, bound="lifted")
        covered = torch.tensor([Threat(ground).cost.from_l1(radius) for radius in l1.tolist()], dtype=own.dtype)
        assert (own >= 0.98 * covered).all()
        if ground != "l2^2":
            assert own.mean() > 1.02 * covered.mean()
