"""The least margin over one ball, from both sides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.budget import Budget
from flowverify.certifiers.complete.hunt import Hunt
from flowverify.certifiers.complete.neuron_bounds import neuron_bounds
from flowverify.certifiers.complete.tree import Tree


@dataclass(frozen=True)
class LeastMargin:
    """min over the ball and over t of f_y - f_t lies in [lower, upper]; ``upper`` is attained in the ball."""

    lower: float
    upper: float


def least_margin(
    maps: AffineMaps,
    ball: Polytope,
    specification: Tensor,
    hunt: Hunt,
    tolerance: float,
    budget: Budget,
) -> LeastMargin:
    """Branch and bound on the value itself: a node is done once it cannot be lower than what has been seen.

    Args:
        specification: e_y - e_t for each other class, (classes - 1, classes).
        hunt: around the same image, on the same set; not used before.
        tolerance: of the gap between both sides; above the rounding of float64.
    """
    hunt.offer(ball.image[None])
    begin = budget.clock()
    tree = Tree(maps, ball, neuron_bounds(maps, ball), specification, hunt, enough=hunt.least_margin - tolerance)

    def stop() -> bool:
        tree.enough = hunt.least_margin - tolerance
        late = budget.seconds is not None and budget.clock() - begin >= budget.seconds
        return late or (budget.nodes is not None and tree.counts.nodes >= budget.nodes)

    tree.limit(stop)
    tree.grow(stop)
    upper = hunt.least_margin
    return LeastMargin(min(upper - tolerance, tree.worst), upper)
