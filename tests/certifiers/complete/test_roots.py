"""What searches start from: bounds of neurons and margins by the engines of a bound, less rounding."""

from __future__ import annotations

import pytest
import torch
from test_certify_contract import images_of, network_of
from test_neuron_bounds import KINDS, preactivations, reached, single_ball

from flowverify.ball import Threat
from flowverify.bounds.margins import margin_specification
from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.neuron_bounds import Roots, neuron_bounds
from flowverify.certifiers.complete.nodes import roots
from flowverify.certifiers.complete.problem import Problem, affine_maps
from flowverify.certifiers.complete.relaxation import lower_bound


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


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "colour", "residual"])
def test_rows_are_above_relus_on_the_whole_ball(kind: str, feasible: bool) -> None:
    network = network_of(kind).double()
    image, budget, _ = reached(kind, 0.3)
    ball = single_ball(image, budget, feasible)
    specification = torch.eye(network.num_classes, dtype=torch.float64)
    known = Roots(network, "lifted", 1e-6, 1 << 24).over(ball.ball, specification)
    above = known.above
    assert above is not None and len(above) == sum(len(index) for index in above.index) > 0
    generator = torch.Generator().manual_seed(0)
    functions = torch.randn(200, image.numel(), generator=generator, dtype=torch.float64)
    least = ball.minimum(functions, point=True, gains=functions.new_zeros(200, *above.gains.shape[1:]))
    assert least.point is not None and least.flow is not None
    amount = torch.rand(200, 1, generator=generator, dtype=torch.float64)
    points = (ball.flat + amount * (least.point - ball.flat)).reshape(-1, *image.shape)
    flows = amount * least.flow.flatten(1)
    heights = torch.split(flows @ above.gains.flatten(1).T + torch.cat(above.values), [len(i) for i in above.index], 1)
    for index, height, value in zip(above.index, heights, preactivations(network, points), strict=False):
        assert (value.relu()[:, index] <= height + 1e-9).all()
    alone = Roots(network, "lifted", 1e-6, len(above) - 1).over(ball.ball, specification)
    assert alone.above is None
    torch.testing.assert_close(alone.margins, known.margins)


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "colour", "residual"])
def test_bounds_with_rows_hold_for_any_shares_and_are_tighter(kind: str, feasible: bool) -> None:
    network = network_of(kind).double()
    image, budget, points = reached(kind, 0.3)
    ball, maps = single_ball(image, budget, feasible), affine_maps(network)
    specification = torch.randn(
        12, network.num_classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    known = Roots(network, "lifted", 1e-6, 1 << 24).over(ball.ball, specification)
    values = preactivations(network, points)
    least = (specification @ values[-1].T).amin(1)
    alone = Problem(maps, ball, maps.layers, specification)
    found = []
    for problem in (alone, alone.under(known.above)):
        nodes = roots(torch.arange(12), known.neurons.lower, known.neurons.upper, problem.first_share)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            multipliers = nodes[torch.arange(12)].multipliers
            for group in (multipliers.alpha, multipliers.share):
                for layer in group:
                    layer.copy_(torch.rand(layer.shape, generator=generator, dtype=torch.float64))
            for layer in multipliers.share:
                layer.mul_(3).sub_(1)  # beyond [0, 1] as well
            assert (lower_bound(nodes.relaxation(problem), multipliers).value <= least).all()
        found.append(ascend(nodes.relaxation(problem), nodes.multipliers, 60).value)
        assert (found[-1] <= least).all()
    assert (found[1] >= found[0] - 1e-2 * (1 + found[0].abs())).all()
    assert float((found[1] - found[0]).max()) > 0


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
