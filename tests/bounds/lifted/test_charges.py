"""Rows less charges: what no flow of the ball pays more than 1 of, by linear programmes; and rows at vertices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts import exact_margins, margins_at, random_network, sparse_images
from test_ground_moves import CHAINS, ORIGIN, WINDOW, largest, rows_of, tiny
from torch import Tensor, nn

from flowverify.bounds.lifted import engine, relaxations
from flowverify.bounds.lifted.engine import LiftedBounds, Relaxation
from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves, moves_of
from flowverify.bounds.lifted.rows import ListedRows
from flowverify.bounds.lifted.support import MoveRows, maximum, whole_grid
from flowverify.network import Network

SETS = pytest.mark.parametrize("moves", [NEIGHBOURS, CHAINS, WINDOW], ids=["l1", "chained", "single"])


@SETS
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", ["of pixels", "bent", "any"])
@pytest.mark.parametrize("settled", [True, False])
def test_no_flow_is_charged_more_than_one(
    moves: Moves, kind: str, feasible: bool, compiled: bool, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at multipliers at which prices do not settle; and at the best one V is the largest gain.

    The compiled kernel returns rows only: 0 below a line that is far below gives their charges back.
    """
    shape = (2, 4, 3)
    images, share = sparse_images(shape, 2, 5), (0.05, 1.0)
    budget = torch.tensor(share, dtype=torch.float64) * images.flatten(1).sum(1)
    rows = MoveRows(rows_of(moves, kind, shape, 4), ORIGIN)
    monkeypatch.setattr(relaxations, "use_compiled", lambda backend, gains: compiled)
    found = maximum(rows, images, budget, moves=moves, feasible=feasible, tolerance=1e-9)
    multipliers = found.multiplier * (1 if settled else 0.3)
    unit = relaxations.unit_charges(rows, moves, images, budget, multipliers, feasible)
    if compiled:
        both = torch.cat([torch.full_like(rows.gains, -10.0), rows.gains], 2)
        whole = MoveRows(both, ORIGIN, torch.cat([0 * multipliers, multipliers], 1))
        one = torch.ones(2, 1, 4, dtype=torch.float64)
        bend = relaxations.Bend(one > 0, 1e-6 * one, torch.inf * one, one, one, 0.0)
        unit = replace(unit, gains=-1e6 * relaxations.bent_rows(whole, moves, images, budget, feasible, bend, 0.9))
    far = 10 * budget.sum() + images.sum()  # what pixels would have to hold to forget that they are nonnegative
    for image in range(2):
        ball = images[image] if feasible else images[image] + far
        for row in range(4):
            own = unit.gains[image, 0, row] * moves.within(*shape[1:])
            if settled:
                assert largest(moves, own, ball, float(budget[image])) <= 1 + 1e-9
                assert float(unit.values[image, 0, row]) == pytest.approx(float(found.value[image, row]), rel=1e-7)
            elif feasible:  # without positivity charges at a multiplier are sound as they are
                assert largest(moves, own, ball, float(budget[image])) <= 1 + 1e-9
                gains = rows.gains[0, 0, row] * moves.within(*shape[1:])
                assert compiled or (unit.values[image, 0, row] * own >= gains - 1e-9).all()


def test_windows_are_charged_as_the_whole_grid() -> None:
    shape, origins = (2, 6, 7), torch.tensor([[0, 0], [-1, 3], [4, 5], [2, -2]])
    images, budget = sparse_images(shape, 2, 1), torch.tensor([0.5, 3.0], dtype=torch.float64)
    for moves in (NEIGHBOURS, CHAINS):
        generator = torch.Generator().manual_seed(0)
        gains = torch.randn(2, 4, 3, len(moves), 2, 3, 4, generator=generator, dtype=torch.float64)
        inside = whole_grid(MoveRows(torch.ones_like(gains), origins), shape[1:]) * moves.within(*shape[1:])
        rows = MoveRows(gains, origins)
        whole = MoveRows((whole_grid(rows, shape[1:]) * inside)[:, None], ORIGIN)
        multipliers = maximum(rows, images, budget, moves=moves).multiplier
        part = relaxations.unit_charges(rows, moves, images, budget, multipliers, True)
        full = relaxations.unit_charges(whole, moves, images, budget, multipliers, True)
        torch.testing.assert_close(part.values.flatten(1), full.values.flatten(1))
        placed = whole_grid(replace(rows, gains=part.gains), shape[1:]) * inside
        torch.testing.assert_close(placed, full.gains[:, 0] * inside)
        assert (full.gains[:, 0] * ~inside.bool() * moves.within(*shape[1:]) >= -1e-12).all()


@SETS
@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("grown", [True, False])
def test_compiled_rows_are_those_of_torch(
    moves: Moves, feasible: bool, grown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At several places, or on the whole grid for all of them; by charges, by secants, and where nothing is wanted."""
    shape, origins = (2, 6, 7), torch.tensor([[0, 0], [-1, 3], [4, 5]])
    images, budget = sparse_images(shape, 2, 1), torch.tensor([0.5, 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    gains = 2 * random(2, 3, 4, len(moves), 2, 3, 4) - 1
    rows = MoveRows(gains, origins)
    if grown:
        rows = MoveRows(whole_grid(rows, shape[1:])[:, None], ORIGIN)
    multipliers = maximum(rows, images, budget, moves=moves, feasible=feasible, tolerance=1e-9).multiplier
    rows = replace(rows, multipliers=torch.where(random(2, 12) < 0.2, 0.0, multipliers))
    right, left = random(2, 3, 2), random(2, 3, 2)
    bend = relaxations.Bend(random(2, 3, 2) < 0.8, random(2, 3, 2) - 0.5, 4 * random(2, 3, 2), right, left, 0.1)
    found = {}
    for compiled in (True, False):
        monkeypatch.setattr(relaxations, "use_compiled", lambda backend, gains, compiled=compiled: compiled)
        made = relaxations.bent_rows(rows, moves, images, budget, feasible, bend, 0.9)
        assert made.shape[:3] == (2, 3, 2)
        placed = MoveRows(made.flatten(1, 2)[:, None] if grown else made, rows.origins)
        found[compiled] = whole_grid(placed, shape[1:]) * moves.within(*shape[1:])
    torch.testing.assert_close(found[True], found[False], rtol=1e-7, atol=1e-9)
    assert (found[True] != 0).any()


def first_rows(network: Network, image: Tensor, budget: Tensor, **options: Any) -> tuple[Tensor, Relaxation, Tensor]:
    """The rows above the first activation, with gains (K, moves), its relaxation, and the rows of what it reads."""
    ball = engine._Batch(LiftedBounds(network, tolerance=1e-9, **options), image, budget, {})
    with torch.no_grad():
        ball.analyse()
    node = network.activations[0]
    relaxation = ball.relaxations[node.name]
    assert isinstance(relaxation, Relaxation)
    stored = relaxation.rows_above
    assert isinstance(stored, ListedRows)
    weight = network.nodes[1].operation.get_parameter("weight")[stored.index[0]].reshape(-1, *network.input_shape)
    used = stored.gains[0].flatten(1).abs().sum(1) > 0
    z0 = ball.values[node.inputs[0]][0, stored.index[0]][used]
    moves = options.get("moves", NEIGHBOURS)
    return stored.gains[0].flatten(1)[used], z0, moves.gains(weight).flatten(1)[used]


@pytest.mark.parametrize("moves", [NEIGHBOURS, moves_of("l2", 3, 3)], ids=["l1", "l2"])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_for_vanilla_balls_rows_interpolate_between_the_vertices(moves: Moves, slope: float) -> None:
    """Behl et al.: the gain of a move is the activation's rise where all of the budget makes it, by the mass."""
    layers = [nn.Flatten(), nn.Linear(9, 12), nn.LeakyReLU(slope), nn.Linear(12, 2)]
    network = random_network((1, 3, 3), layers, 1)
    image = sparse_images((1, 3, 3), 1, 1)
    budget = 0.3 * image.flatten(1).sum(1)
    found, z0, gains = first_rows(network, image, budget, feasible=False, moves=moves)
    assert len(found) > 3
    amount = (budget / moves.priced(gains).expand(len(moves), 1, 3, 3).flatten())[None]
    activation = nn.LeakyReLU(slope)
    expected = (activation(z0[:, None] + amount * gains) - activation(z0)[:, None]) / amount
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_margin_that_is_concave_is_exact_for_vanilla_balls() -> None:
    """Its least value is at a vertex: where all of the budget makes one move."""
    network = random_network((1, 3, 3), [nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2)], 4)
    weight = network.nodes[-1].operation.get_parameter("weight")
    weight[0], weight[1] = 0.0, weight[1].abs()
    image, label = sparse_images((1, 3, 3), 1, 4), torch.zeros(1, dtype=torch.long)
    budget = 0.4 * image.flatten(1).sum(1)
    vertices = [image[0]]
    for tail, head in ((i, j) for i in range(9) for j in range(9) if abs(i // 3 - j // 3) + abs(i % 3 - j % 3) == 1):
        moved = image[0].clone()
        moved.view(-1)[tail] -= budget[0]
        moved.view(-1)[head] += budget[0]
        vertices.append(moved)
    least = margins_at(network, torch.stack(vertices)[None], label).amin(1)
    found = LiftedBounds(network, feasible=False, tolerance=1e-9).lower_bounds(image, label, budget)
    torch.testing.assert_close(found, least, rtol=1e-7, atol=1e-9)
    by_secants = LiftedBounds(network, feasible=False, tolerance=1e-9, trust=torch.inf)
    assert (by_secants.lower_bounds(image, label, budget) < least - 1e-3).all()


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("moves", [NEIGHBOURS, moves_of("l2", 3, 3)], ids=["l1", "l2"])
def test_rows_less_charges_are_nowhere_above_secants(moves: Moves, feasible: bool) -> None:
    gained = 0.0
    for seed in range(4):
        layers = [nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 2)]
        network, image = random_network((1, 3, 3), layers, seed), sparse_images((1, 3, 3), 1, seed)
        budget = 0.2 * image.flatten(1).sum(1)
        less, _, _ = first_rows(network, image, budget, feasible=feasible, moves=moves)
        secants, _, _ = first_rows(network, image, budget, feasible=feasible, moves=moves, trust=torch.inf)
        assert (less <= secants + 1e-7 * secants.abs().max()).all()
        gained = max(gained, float((secants - less).max()))
    assert gained > 0.01


def test_charges_that_are_too_high_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = relaxations.unit_charges

    def doubled(*given: Any) -> relaxations.Charges:
        right = real(*given)
        return replace(right, gains=2 * right.gains)

    def caught() -> bool:
        for seed in range(12):
            network, image, label, _ = tiny(seed)
            budget = 0.5 * image.flatten(1).sum(1)
            least = torch.tensor([exact_margins(network, image[0], int(label), float(budget))], dtype=torch.float64)
            if (LiftedBounds(network).lower_bounds(image, label, budget) > least + 1e-6).any():
                return True
        return False

    assert not caught()
    monkeypatch.setattr(relaxations, "use_compiled", lambda backend, gains: False)
    assert not caught()
    monkeypatch.setattr(relaxations, "unit_charges", doubled)
    assert caught()
