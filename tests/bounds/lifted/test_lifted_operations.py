"""The contract of operations (theory, section 19) for lifted bounds: each one, with each choice of options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_operations_contract import ALL, Case, check_contains, check_equals, first_of_each, network_of, slack, truth_of

from flowverify.bounds.lifted.engine import LiftedBounds
from flowverify.errors import UnsupportedOperationError
from flowverify.network.operations import STEEP


@pytest.mark.parametrize("case", first_of_each(ALL))
def test_values_lie_within_the_bounds_and_meet_them_at_radius_0(case: Case) -> None:
    held(case, feasible=True)


@pytest.mark.parametrize("case", first_of_each(ALL))
def test_so_they_do_in_balls_of_flows(case: Case) -> None:
    held(case, feasible=False)


def held(case: Case, feasible: bool) -> None:
    network, truth = network_of(case), truth_of(case)
    names = [node.inputs[0] for node in network.activations]
    steep = {type(node.operation) for node in network.nodes} & set(STEEP)
    if steep:
        with pytest.raises(UnsupportedOperationError, match="|".join(kind.__name__ for kind in steep)):
            LiftedBounds(network, feasible=feasible)
        return
    engine = LiftedBounds(network, feasible=feasible)
    for budget in (torch.zeros_like(truth.budget), truth.budget):
        intervals = engine.intervals(truth.images, budget)
        margins = engine.lower_bounds(truth.images, truth.labels, budget)
        found = [intervals[name] for name in names]
        if not budget.any():
            check_equals(found, truth.read, "lifted")
            torch.testing.assert_close(margins, truth.clean, rtol=0, atol=1e3 * slack(truth.clean))
        else:
            check_contains(found, truth.reached, "lifted")
            assert (margins <= truth.least + slack(truth.least)).all()
