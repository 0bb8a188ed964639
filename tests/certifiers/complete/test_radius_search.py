"""Which radius comes next, by what trees have cost."""

from __future__ import annotations

import math

import pytest

from flowverify.certifiers.complete.radius_search import Schedule
from flowverify.certifiers.options import DEFAULTS

UPPER, LAST = 1.0, 0.99
OWN = DEFAULTS.schedule


def test_without_a_limit_the_bracket_is_closed_at_once() -> None:
    assert Schedule().target(0.1, UPPER, LAST, math.inf) == LAST


def test_begins_at_a_smaller_radius_unless_it_is_proven() -> None:
    assert Schedule(60.0).target(0.5, UPPER, LAST, 60.0) == 0.5 + OWN.first * 0.5
    assert Schedule(60.0).target(0.2, UPPER, LAST, 60.0) < Schedule(60.0).target(0.5, UPPER, LAST, 60.0)
    assert Schedule(60.0).target(0.95, UPPER, LAST, 60.0) == LAST


@pytest.mark.parametrize("cost", [1e-3, 0.1, 1.0, 5.0, 30.0])
def test_goes_as_far_as_the_forecast_allows(cost: float) -> None:
    schedule = Schedule(60.0)
    schedule.tell(0.85, cost, 1000)
    left = 60.0 - cost
    found = schedule.target(0.85, UPPER, LAST, left)
    forecast = cost * math.exp(OWN.growth * (found - 0.85))
    assert 0.85 < found <= LAST
    assert forecast <= OWN.middle * left * (1 + 1e-9) or found == pytest.approx((0.85 + OWN.near) / 2)
    if cost * math.exp(OWN.growth * (LAST - 0.85)) <= OWN.safe * left:
        assert found == LAST


def test_learns_how_trees_grow() -> None:
    slow, fast = Schedule(60.0), Schedule(60.0)
    for schedule, nodes in ((slow, 3000), (fast, 12000)):
        schedule.tell(0.85, 2.0, 2000)
        schedule.tell(0.9, 10.0, nodes)
    assert slow.target(0.9, UPPER, LAST, 54.0) > fast.target(0.9, UPPER, LAST, 54.0)


def test_a_bracket_of_five_percent_comes_first() -> None:
    schedule = Schedule(60.0)
    schedule.tell(0.85, 3.0, 3000)
    assert schedule.target(0.85, UPPER, LAST, 57.0) == OWN.near
    schedule.tell(OWN.near, 20.0, 30000)
    assert schedule.target(OWN.near, UPPER, LAST, 30.0) == LAST


def test_lowers_what_is_late() -> None:
    schedule = Schedule(100.0)
    radius, fell = 0.9, []
    for left in range(100, 0, -1):
        lowered = schedule.lowered(0.5, radius, left)
        if lowered is not None:
            assert 0.5 < lowered < radius
            radius = lowered
            fell.append(100 - left)
    assert fell == pytest.approx([100 * share for share in OWN.late], abs=1)
    assert Schedule().lowered(0.5, 0.9, math.inf) is None


def test_always_offers_a_radius_that_is_not_proven() -> None:
    for proven in (0.0, 0.3, 0.8, 0.9, 0.97, 0.985):
        for left in (1e-6, 0.5, 20.0, 60.0):
            schedule = Schedule(60.0)
            if proven:
                schedule.tell(proven, 3.0, 4000)
            assert proven < schedule.target(proven, UPPER, LAST, left) <= LAST
