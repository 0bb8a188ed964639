"""What branch and bound rests on: affine maps, bounds for any multipliers, bounds of neurons, leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts import random_network, samples, sparse_images
from test_certify_contract import images_of, network_of
from torch import Tensor, nn

from flowverify import Network
from flowverify.ball import Threat
from flowverify.certifiers.complete.ascent import ascend
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds, neuron_bounds, refine, tighten
from flowverify.certifiers.complete.nodes import branch, roots
from flowverify.certifiers.complete.problem import Problem, SingleBall, affine_maps
from flowverify.certifiers.complete.relaxation import Relaxation, initial_multipliers, lower_bound
from flowverify.certifiers.complete.tree import LeafProgram
from flowverify.certifiers.options import NeuronBoundSettings, SearchSettings
from flowverify.errors import UnsupportedOperationError

KINDS = ("linear", "mlp", "cnn", "colour", "normalised", "logits after relu", "residual")


def preactivations(network: Network, points: Tensor) -> list[Tensor]:
    """What each ReLU reads, and the output, at points (N, C, H, W); (N, n_k) each."""
    values = network.double().values(points)
    names = [node.inputs[0] for node in network.nodes if isinstance(node.operation, nn.ReLU)]
    return [values[name].flatten(1) for name in [*names, network.output]]


def single_ball(image: Tensor, budget: float, positive: bool = True) -> SingleBall:
    """The ball of a budget around one image (C, H, W), or the L1 ball of flows."""
    return SingleBall(Threat("l1", positive=positive).ball(image, budget))


def reached(kind: str, radius: float, count: int = 400) -> tuple[Tensor, float, Tensor]:
    """An image, its budget, and points of its ball."""
    image = images_of(kind)[0][:1]
    budget = radius * image.sum().reshape(1)
    return image[0], float(budget), samples(image, budget, count)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_compute_the_network(kind: str) -> None:
    network = network_of(kind)
    maps = affine_maps(network)
    image, _, points = reached(kind, 0.5, 20)
    expected = preactivations(network, points)
    outputs = [points.flatten(1)]
    for stage, value in zip(maps.stages, expected, strict=True):
        found = stage.bias + sum(outputs[source] @ weight.T for source, weight in stage.weights.items())
        torch.testing.assert_close(found, value)
        outputs.append(value.relu())
    assert image.numel() == maps.pixels


@pytest.mark.parametrize("kind", ["pooled", "recurrent"])
def test_other_activations_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"MaxPool2d|Tanh"):
        affine_maps(network_of(kind))


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_for_any_multipliers_and_any_splits(kind: str, feasible: bool) -> None:
    network = network_of(kind)
    maps = affine_maps(network)
    image, budget, points = reached(kind, 0.4)
    ball = single_ball(image, budget, feasible)
    values = preactivations(network, points)
    bounds = neuron_bounds(Problem.outputs(maps, ball), iterations=3)
    for low, high, value in zip(bounds.lower, bounds.upper, values, strict=False):
        assert (low <= value).all()
        assert (value <= high).all()
    generator = torch.Generator().manual_seed(1)
    stage, count = maps.layers, 64
    specification = torch.randn(count, values[-1].shape[1], generator=generator, dtype=torch.float64)
    nodes = roots(torch.arange(count), bounds.lower, bounds.upper)
    inside = torch.ones(count, len(points), dtype=torch.bool)
    chosen = torch.randint(len(points), (count,), generator=generator)  # each node holds at least this point
    for layer, value in enumerate(values[:-1]):
        draw = torch.where(value[chosen] >= 0, 1, -1)
        unstable = nodes.unstable()[layer]
        sign = torch.where(unstable & (torch.rand(draw.shape, generator=generator) < 0.2), draw, 0)
        nodes.lower[layer][sign > 0] = 0.0
        nodes.upper[layer][sign < 0] = 0.0
        nodes.signs[layer] = sign.to(torch.int8)
        inside &= ((sign[:, None] * value[None]) >= 0).all(2)
        nodes.multipliers.alpha[layer] = torch.rand(draw.shape, generator=generator, dtype=torch.float64)
        gamma = torch.randn(draw.shape, generator=generator, dtype=torch.float64)
        nodes.multipliers.gamma[layer] = gamma * 10.0 ** torch.randint(-2, 2, (count, 1), generator=generator)
    least = (specification @ values[-1].T).masked_fill(~inside, torch.inf).amin(1)
    relaxation = nodes.relaxation(Problem(maps, ball, stage, specification))
    found = lower_bound(relaxation, nodes.multipliers)
    assert (found.value <= least + 1e-9).all()
    better = ascend(relaxation, nodes.multipliers, 10)
    assert (better.value <= least + 1e-9).all()
    assert (better.value >= found.value - 1e-5 * (1 + found.value.abs())).all()
    assert kind == "linear" or float((better.value - found.value).median()) > 0
    assert inside.any(1).all()


def with_extremes(kind: str, radius: float) -> tuple[Problem, NeuronBounds, list[Tensor]]:
    """The outputs over a ball, first bounds; and preactivations at samples and on the way to the extremes of CROWN."""
    network = network_of(kind)
    maps = affine_maps(network)
    image, budget, points = reached(kind, radius, 2000)
    problem = Problem.outputs(maps, single_ball(image, budget))
    bounds = neuron_bounds(problem)
    width = maps.widths[1]
    rows = torch.cat([torch.eye(width), -torch.eye(width)]).double()
    lower, upper = bounds.lower[:1], bounds.upper[:1]
    start = initial_multipliers(lower, upper, 2 * width)
    extreme = lower_bound(Relaxation.of(problem.at(1, rows), lower, upper), start, point=True).point
    assert extreme is not None
    way = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None, None]
    extremes = (image.flatten() + way * (extreme - image.flatten())).reshape(-1, *image.shape)
    return problem, bounds, preactivations(network, torch.cat([points, extremes]))


@pytest.mark.parametrize(("radius", "share"), [(0.1, 1.0), (1.0, 0.97)])
def test_refined_bounds_hold_and_are_tighter(radius: float, share: float) -> None:
    problem, first, values = with_extremes("mlp", radius)
    second = refine(replace(problem, settings=SearchSettings(neurons=NeuronBoundSettings(rounds=10))), first)
    for low, high, value in zip(second.lower, second.upper, values, strict=False):
        assert (low <= value).all()
        assert (value <= high).all()
    width, before = (float((b.upper[1] - b.lower[1]).sum()) for b in (second, first))
    assert width <= share * before


@pytest.mark.parametrize("radius", [0.05, 0.3])
def test_bounds_after_a_split_hold(radius: float) -> None:
    problem, first, values = with_extremes("mlp", radius)
    nodes = roots(torch.arange(3), first.lower, first.upper)
    assert bool(torch.cat(nodes.unstable(), 1).any())
    children, neuron = branch(problem, nodes)
    children = tighten(problem, children, [None, torch.arange(8).expand(6, -1)])
    for child, place in enumerate(neuron.repeat(2).tolist()):
        layer, own = (0, place) if place < 12 else (1, place - 12)
        inside = (values[layer][:, own] >= 0) == (child < 3)
        assert (children.lower[1][child] <= values[1][inside]).all()
        assert (values[1][inside] <= children.upper[1][child]).all()
        assert (children.lower[1][child] >= first.lower[1] - 1e-12).all()


@pytest.mark.parametrize("seed", range(6))
def test_leaf_is_exact_without_trusting_the_solver(seed: int) -> None:
    network = random_network((1, 4, 4), [nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)], seed)
    image = sparse_images((1, 4, 4), 1, seed)[0]
    maps, budget = affine_maps(network), 0.8 * float(image.sum())
    ball = single_ball(image, budget)
    specification = torch.tensor([1.0, -1.0], dtype=torch.float64)
    problem = Problem(maps, ball, 1, specification[None])
    bounds = neuron_bounds(problem)
    points = samples(image[None], torch.tensor([budget]), 3000, seed)[0]
    hidden, output = preactivations(network, points)
    seen = 0
    for code in range(32):
        node = roots(torch.zeros(1, dtype=torch.int64), bounds.lower, bounds.upper)
        sign = torch.tensor([1 if code >> bit & 1 else -1 for bit in range(5)])
        sign = torch.where(node.unstable()[0][0], sign, 0)
        node.lower[0][0, sign > 0] = 0.0
        node.upper[0][0, sign < 0] = 0.0
        node.signs[0][0] = sign.to(torch.int8)
        bound, point = LeafProgram(problem).bound(node)
        own = ((sign * hidden) >= 0).all(1)
        if point is None:
            assert bound == torch.inf or not own.any()
            assert not own.any()
            continue
        if own.any():
            seen += 1
            assert bound <= float((output[own] @ specification).min()) + 1e-9
        attained = float(preactivations(network, point.clamp(min=0).reshape(1, 1, 4, 4))[1][0] @ specification)
        assert bound == pytest.approx(attained, abs=1e-6)
    assert seen
