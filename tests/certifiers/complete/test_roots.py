"""What searches start from: bounds of neurons and margins by the engines of a bound, less rounding."""

from __future__ import annotations

import pytest
import torch
from test_certify_contract import images_of, network_of
from test_neuron_bounds import KINDS, preactivations, reached, single_ball

from flowverify.ball import Threat
from flowverify.bounds.margins import margin_specification
from flowverify.certifiers.complete.neuron_bounds import Roots, neuron_bounds
from flowverify.certifiers.complete.problem import Problem, affine_maps


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("bound", ["lifted", "ibp"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_hold_and_are_made_use_of(kind: str, bound: str, feasible: bool) -> None:
    network = network_of(kind).double()
    image, budget, points = reached(kind, 0.2)
    ball, label = single_ball(image, budget, feasible), int(images_of(kind)[1][0])
    specification = margin_specification(torch.tensor([label]), network.num_classes, torch.float64)[0]
    known = Roots(network, bound, 1e-6).over(ball.ball, specification)
    values = preactivations(network, points)
    for low, high, value in zip(known.neurons.lower, known.neurons.upper, values, strict=False):
        assert (low <= value).all() and (value <= high).all()
    assert (known.margins <= values[-1] @ specification.T).all()
    problem = Problem(affine_maps(network), ball, len(values) - 1, specification)
    alone, both = neuron_bounds(problem, iterations=1), neuron_bounds(problem, known=known.neurons, iterations=1)
    for stage, value in enumerate(values[:-1]):
        low, high = both.lower[stage], both.upper[stage]
        assert (low <= value).all() and (value <= high).all()
        unstable = (low < 0) & (high > 0)
        for ends in (alone, known.neurons):
            assert (low >= ends.lower[stage] - 1e-6)[unstable].all()
            assert (high <= ends.upper[stage] + 1e-6)[unstable].all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_budget_they_are_the_values(kind: str) -> None:
    network = network_of(kind).double()
    image, _, _ = reached(kind, 0.2)
    specification = torch.eye(network.num_classes, dtype=torch.float64)
    known = Roots(network, "lifted", 1e-6).over(Threat().ball(image, 0.0), specification)
    values = preactivations(network, image[None])
    for low, high, value in zip(known.neurons.lower, known.neurons.upper, values, strict=False):
        torch.testing.assert_close(low, value[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(high, value[0], rtol=1e-8, atol=1e-8)
        assert ((low < value[0]) & (value[0] < high)).all()
    torch.testing.assert_close(known.margins, values[-1][0], rtol=1e-8, atol=1e-8)
    assert (known.margins < values[-1][0]).all()
