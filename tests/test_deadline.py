"""When a search stops: seconds, nodes, events, and shares of them, by a clock that the test turns."""

from __future__ import annotations

import math

import pytest

from flowverify.deadline import Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_limit_it_never_stops() -> None:
    deadline = Deadline()
    deadline.spend(10**9)
    assert not deadline.stop()
    assert deadline.left == deadline.seconds_left == deadline.nodes_left == math.inf


def test_seconds_run_by_the_clock_from_when_it_was_made() -> None:
    clock = Clock()
    deadline = Deadline(8.0, clock=clock)
    clock.now += 6.0
    assert (deadline.elapsed, deadline.seconds_left, deadline.left, deadline.stop()) == (6.0, 2.0, 2.0, False)
    clock.now += 2.0
    assert deadline.stop()


def test_nodes_are_the_unit_where_seconds_have_no_limit() -> None:
    both, nodes = Deadline(8.0, 4, Clock()), Deadline(nodes=4)
    for deadline in (both, nodes):
        deadline.spend(3)
        assert not deadline.stop()
    assert (both.left, nodes.left) == (8.0, 1)
    for deadline in (both, nodes):
        deadline.spend(1)
        assert deadline.stop()


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_child_has_its_share_and_ends_with_its_parent(share: float) -> None:
    clock = Clock()
    parent = Deadline(8.0, clock=clock)
    clock.now += 4.0
    child = parent.child(share=share)
    assert child.seconds_left == share * 4.0
    clock.now += share * 4.0
    assert child.stop() and not parent.stop()
    late = parent.child()
    assert not late.stop()
    clock.now += 4.0
    assert late.stop() and late.seconds_left <= 0


def test_a_child_spends_the_nodes_of_its_parent() -> None:
    parent = Deadline(nodes=10)
    half, few = parent.child(share=0.5), parent.child(nodes=2)
    few.spend(2)
    assert few.stop() and not half.stop() and parent.left == 8
    half.spend(5)
    assert half.stop() and not parent.stop()
    rest = parent.child()
    rest.spend(3)
    assert rest.stop() and parent.stop()


def test_an_event_ends_a_child_and_its_children_alone() -> None:
    happened = False
    parent = Deadline(nodes=3)
    child = parent.child(until=lambda: happened)
    grandchild = child.child()
    assert not grandchild.stop()
    happened = True
    assert grandchild.stop() and child.stop() and not parent.stop()
