"""Ground costs against values by hand, and the factor between the grounds."""

from __future__ import annotations

import math

import pytest
import torch

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.ground import GROUNDS, check_ground, ground_cost, l1_over_ground

ROOT2 = math.sqrt(2)


def test_ground_costs() -> None:
    l1, l2 = ground_cost(Grid(2, 3, 3), "l1"), ground_cost((2, 3), "l2")
    assert l1.dtype == l2.dtype == torch.float64
    assert l1[0].tolist() == [0, 1, 2, 1, 2, 3]
    assert l2[4].tolist() == pytest.approx([ROOT2, 1, ROOT2, 1, 0, 1], rel=1e-15)
    assert ground_cost((2, 3), "l1") is l1
    assert (l1_over_ground("l1"), l1_over_ground("l2")) == (1.0, ROOT2)
    for ground in GROUNDS:
        cost = ground_cost((4, 5), ground)
        assert torch.equal(cost, cost.T)
        worst = (ground_cost((4, 5), "l1") / cost).nan_to_num(0.0).max().item()
        assert worst == pytest.approx(l1_over_ground(ground), rel=1e-15)


def test_bad_ground_costs() -> None:
    assert check_ground("l2") == "l2"
    for name in ("L1", "", None, 1, ["l1"]):
        with pytest.raises(UnknownNameError, match=r"unknown ground cost .*: expected one of l1, l2"):
            check_ground(name)
    with pytest.raises(UnknownNameError, match="unknown ground cost"):
        ground_cost((2, 2), "euclid")
    with pytest.raises(UnknownNameError, match="unknown ground cost"):
        l1_over_ground("euclid")
    with pytest.raises(InvalidInputError, match=r"expected a Grid or \(height, width\)"):
        ground_cost((2, 2, 2), "l1")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="grid height: given 0"):
        ground_cost((0, 2), "l1")
