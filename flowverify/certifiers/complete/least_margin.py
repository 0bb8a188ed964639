"""The least margin over one ball, from both sides."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.deadline import Deadline
from flowverify.certifiers.complete.neuron_bounds import neuron_bounds
from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.tree import Tree


@dataclass(frozen=True)
class LeastMargin:
    """min over the ball and over t of f_y - f_t lies in [lower, upper]; ``upper`` is attained in the ball."""

    lower: float
    upper: float


def least_margin(problem: Problem, nearest: NearestCounterexample, tolerance: float, deadline: Deadline) -> LeastMargin:
    """Branch and bound on the value itself: a node is done once it cannot be lower than what has been seen.

    Args:
        problem: e_y - e_t for each other class.
        nearest: around the same image, on the same set; not used before.
        tolerance: of the gap between both sides; above the rounding of float64.
    """
    nearest.offer(problem.ball.image[None])
    tree = Tree(problem, neuron_bounds(problem), nearest, enough=nearest.least_margin - tolerance)

    def follow() -> bool:
        tree.enough = nearest.least_margin - tolerance
        return False

    own = deadline.child(until=follow)
    tree.limit(own)
    tree.grow(own)
    upper = nearest.least_margin
    return LeastMargin(min(upper - tolerance, tree.worst), upper)
