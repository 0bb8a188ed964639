"""Ground costs against values by hand, and the factor between the grounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plans import COSTS, cost_matrix

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.ground import (
    check_ground,
    ground_cost,
    offsets_by_cost,
    parse_ground,
    steepest_offsets,
)

ROOT2 = math.sqrt(2)
DISTANCES = ("l1", "l2")


def test_ground_costs() -> None:
    l1, l2 = ground_cost(Grid(2, 3, 3), "l1"), ground_cost((2, 3), "l2")
    assert l1.dtype == l2.dtype == torch.float64
    assert l1[0].tolist() == [0, 1, 2, 1, 2, 3]
    assert l2[4].tolist() == pytest.approx([ROOT2, 1, ROOT2, 1, 0, 1], rel=1e-15)
    assert ground_cost((2, 3), "l1") is l1
    assert (parse_ground("l1").l1_factor, parse_ground("l2").l1_factor) == (1.0, ROOT2)
    for ground in DISTANCES:
        cost = ground_cost((4, 5), ground)
        assert torch.equal(cost, cost.T)
        worst = (ground_cost((4, 5), "l1") / cost).nan_to_num(0.0).max().item()
        assert worst == pytest.approx(parse_ground(ground).l1_factor, rel=1e-15)


def test_bad_ground_costs() -> None:
    assert check_ground("l2") == "l2"
    for name in ("L1", "", None, 1, ["l1"]):
        with pytest.raises(UnknownNameError, match=r"unknown ground cost .*: expected one of l1, l2"):
            check_ground(name)
    with pytest.raises(UnknownNameError, match="unknown ground cost"):
        ground_cost((2, 2), "euclid")
    with pytest.raises(UnknownNameError, match="unknown ground cost"):
        parse_ground("euclid")
    with pytest.raises(InvalidInputError, match=r"expected a Grid or \(height, width\)"):
        ground_cost((2, 2, 2), "l1")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="grid height: given 0"):
        ground_cost((0, 2), "l1")


@pytest.mark.parametrize("ground", COSTS)
def test_costs_by_their_definition(ground: str) -> None:
    np.testing.assert_allclose(ground_cost((6, 5), ground).numpy(), cost_matrix(6, 5, ground), rtol=1e-14)
    offsets, costs = offsets_by_cost(6, 5, ground)
    assert np.isfinite(costs).all() and (np.diff(costs) >= 0).all() and list(offsets[0]) == [0, 0]
    window = parse_ground(ground).window
    assert len(offsets) == (window**2 if window else 11 * 9)


def test_names() -> None:
    names = {
        "l2^1": "l2", "l2^2.0": "l2^2", "l1^1e0": "l1", "local:5:l2": "local:5", "local:3:l1^2.50": "local:3:l1^2.5",
    }  # fmt: skip
    for given, shortest in names.items():
        assert check_ground(given) == shortest == check_ground(shortest)
    for name in (*DISTANCES, *COSTS):
        assert check_ground(name) == name
        cost = parse_ground(name)
        assert cost.is_metric == (name in DISTANCES)
    assert (parse_ground("l2^3").power, parse_ground("local:7").window) == (3.0, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("l2^0.5", r"ground cost 'l2\^0\.5': given the power 0\.5, expected a finite number p >= 1"),
        ("l1^-2", "given the power -2, expected"),
        ("local:5^0", "given the power 0, expected"),
        ("l2^inf", "given the power inf, expected"),
        ("l2^two", "given the power two, expected"),
        ("local:4", "ground cost 'local:4': given the window 4, expected an odd number >= 1"),
        ("local:0", "given the window 0, expected an odd number"),
        ("local:-3", "given the window -3, expected an odd number"),
    ],
)
def test_powers_and_windows_that_are_none(name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_ground(name)


@pytest.mark.parametrize("name", ["local", "local:", "local:x", "local:5:l3", "l2^", "l2 ^2", "^2", "l2^2^"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises((UnknownNameError, InvalidInputError)):
        check_ground(name)


def test_windows_that_are_too_large() -> None:
    assert check_ground("local:5", Grid(3, 5)) == "local:5"
    for find in (lambda: check_ground("local:7", Grid(3, 5)), lambda: offsets_by_cost(3, 5, "local:7"),
                 lambda: ground_cost((3, 5), "local:7")):  # fmt: skip
        with pytest.raises(InvalidInputError, match="a window of 7 pixels on images of 3 x 5: expected at most 5"):
            find()


@pytest.mark.parametrize("ground", [*DISTANCES, *COSTS])
def test_the_l1_ball_around_a_ball(ground: str) -> None:
    """Over two-point measures: share w of the mass moves by an offset, W_p = (w d^p)^(1/p), W1_l1 = w l1."""
    cost = parse_ground(ground)
    l1, own = cost_matrix(7, 7, "l1")[0], cost_matrix(7, 7, ground)[0]
    reachable = np.isfinite(own) & (own > 0)
    tightest = 0.0
    for radius in (0.01, 0.2, 0.9, 1.0, 1.7):
        around = cost.to_l1(radius)
        share = np.minimum(1.0, radius**cost.power / own[reachable])
        assert (share * l1[reachable]).max() <= around * (1 + 1e-12)
        tightest = max(tightest, float((share * l1[reachable]).max()) / around)
        assert cost.from_l1(around) == pytest.approx(radius, rel=1e-12)
        assert cost.to_l1(cost.from_l1(radius)) <= radius * (1 + 1e-12)
    assert tightest > 0.99


def test_steepest_offsets_are_few_and_enough() -> None:
    """l1 and what is no cheaper need neighbours only, l2 needs no multiples; each pair of opposites counts once."""
    for ground in ("l1", "l2^2", "l1^3"):
        offsets, costs = steepest_offsets(9, 8, ground)
        assert sorted(map(tuple, offsets.tolist())) == [(0, 1), (1, 0)] and costs.tolist() == [1.0, 1.0]
    offsets, _ = steepest_offsets(9, 8, "l2")
    assert {(1, 1), (1, -1), (2, 1), (1, -2)} <= set(map(tuple, offsets.tolist()))
    assert (0, 2) not in set(map(tuple, offsets.tolist())) and (-1, 1) not in set(map(tuple, offsets.tolist()))
