"""Joint limits hold on the ball and in the nodes of a search, are as small as can be, and raise bounds."""

from __future__ import annotations

import pytest
import torch
from test_certify_contract import network_of
from test_neuron_bounds import preactivations, reached, single_ball
from torch import Tensor

from flowverify.certifiers.complete.neuron_bounds import Roots, improve, limit_jointly, neuron_bounds, spent
from flowverify.certifiers.complete.nodes import TreeNodes, roots
from flowverify.certifiers.complete.problem import Problem, affine_maps
from flowverify.certifiers.complete.relaxation import JointLimits, lower_bound
from flowverify.deadline import Deadline

KINDS = ("mlp", "cnn", "colour", "residual")


def limited(kind: str, radius: float, size: int = 4, feasible: bool = True) -> tuple[Problem, TreeNodes, list[Tensor]]:
    """Six functions of the outputs, roots with limits on all layers, and preactivations at points of the ball."""
    network = network_of(kind)
    maps = affine_maps(network)
    image, budget, points = reached(kind, radius, 1000)
    ball = single_ball(image, budget, feasible)
    generator = torch.Generator().manual_seed(3)
    specification = torch.randn(6, len(maps.stages[-1].bias), generator=generator, dtype=torch.float64)
    problem = Problem(maps, ball, maps.layers, specification)
    bounds = neuron_bounds(problem, iterations=3)
    nodes = roots(torch.arange(6), bounds.lower, bounds.upper)
    nodes, _ = improve(problem, nodes, 3, torch.inf)
    functions = torch.randn(200, maps.pixels, generator=generator, dtype=torch.float64)
    extremes = ball.minimum(functions, point=True).point
    assert extremes is not None
    if feasible:
        points = torch.cat([points, extremes.reshape(-1, *image.shape)])
    for layer in range(maps.layers):
        limit_jointly(problem, layer, nodes, (2, size))
    return problem, nodes, preactivations(network, points)


def above(kind: str, problem: Problem, nodes: TreeNodes) -> tuple[Problem, TreeNodes]:
    """The same with rows of moves above ReLUs, half of every negative coefficient being theirs."""
    known = Roots(network_of(kind).double(), "lifted", 1e-6, 1 << 24).over(problem.ball.ball, problem.specification)
    assert known.above is not None
    nodes.multipliers.share = [torch.full_like(a, 0.5) for a in nodes.multipliers.alpha]
    return problem.under(known.above), nodes


def sums(limits: JointLimits, values: Tensor) -> Tensor:
    """The left side of each limit (N, G) at values (P, n) of its layer: (P, N, G)."""
    own = values[:, limits.members]
    return torch.maximum(limits.up * own, -limits.down * own).sum(-1)


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_limits_hold_on_the_ball(kind: str, feasible: bool) -> None:
    problem, nodes, values = limited(kind, 0.4, feasible=feasible)
    for layer, limits in enumerate(nodes.joint):
        assert limits.groups
        assert (sums(limits, values[layer]) <= limits.limit + 1e-9).all()
    assert problem.maps.layers == len(nodes.joint)


@pytest.mark.parametrize("kind", ["mlp", "colour"])
def test_limits_of_the_first_layer_are_attained_to_the_tolerance(kind: str) -> None:
    problem, nodes, _ = limited(kind, 0.4)
    maps, ball = problem.maps, problem.ball
    limits = nodes.joint[0]
    best = limits.largest.argmax(-1)
    size = limits.members.shape[-1]
    bits = (best[..., None] >> torch.arange(size)) & 1
    terms = torch.where(bits > 0, limits.up, -limits.down)
    function = torch.zeros(*terms.shape[:2], maps.widths[0], dtype=torch.float64).scatter(2, limits.members, terms)
    stage = maps.stages[0]
    points = ball.minimum(-(function @ stage.weights[0]).flatten(0, 1), point=True).point
    assert points is not None
    attained = sums(limits, points @ stage.weights[0].T + stage.bias)
    attained = attained.reshape(*best.shape, *best.shape).flatten(2).flatten(0, 1).diagonal().reshape(best.shape)
    wanted = (limits.up > 0).sum(-1) > 1
    assert wanted.any()
    assert (attained[wanted] >= 0.9 * limits.limit[wanted]).all()
    whole = torch.maximum(
        limits.up * nodes.upper[0].gather(1, limits.members.flatten(1)).reshape(limits.up.shape),
        -limits.down * nodes.lower[0].gather(1, limits.members.flatten(1)).reshape(limits.up.shape),
    ).sum(-1)
    assert (limits.limit[wanted] < 0.95 * whole[wanted]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_splits_lower_limits_and_they_still_hold(kind: str) -> None:
    _, nodes, values = limited(kind, 0.4)
    fell = 0
    for layer, limits in enumerate(nodes.joint):
        for active in (True, False):
            neuron = limits.members[:, 0, 0]
            child = nodes.decide(neuron + sum(v.shape[1] for v in nodes.lower[:layer]), active)
            for row in range(len(nodes)):
                inside = values[layer][:, neuron[row]] >= 0 if active else values[layer][:, neuron[row]] <= 0
                held = sums(child.joint[layer][row : row + 1], values[layer][inside])
                assert (held <= child.joint[layer].limit[row] + 1e-9).all()
            assert (child.joint[layer].limit <= limits.limit).all()
            fell += int((child.joint[layer].limit < limits.limit - 1e-9).sum())
    assert fell


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_for_any_multipliers_of_limits(kind: str, feasible: bool) -> None:
    problem, nodes, values = limited(kind, 0.4, feasible=feasible)
    generator = torch.Generator().manual_seed(4)
    least = (problem.specification @ values[-1].T).amin(1)
    for scale in (0.1, 1.0, 10.0):
        multipliers = nodes.multipliers
        multipliers.theta = [
            scale * torch.rand(t.shape, generator=generator, dtype=torch.float64) for t in multipliers.theta
        ]
        multipliers.alpha = [torch.rand(a.shape, generator=generator, dtype=torch.float64) for a in multipliers.alpha]
        multipliers.gamma = [
            0.1 * scale * torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in multipliers.gamma
        ]
        found = lower_bound(nodes.relaxation(problem), multipliers)
        assert (found.value <= least + 1e-9).all()


def test_limits_raise_bounds_that_single_neurons_cannot() -> None:
    problem, nodes, values = limited("mlp", 0.4, size=6)
    alone = roots(nodes.row, [v[0] for v in nodes.lower], [v[0] for v in nodes.upper])
    alone, _ = improve(problem, alone, 200, torch.inf)
    together, _ = improve(problem, nodes, 200, torch.inf)
    least = (problem.specification @ values[-1].T).amin(1)
    saved = (together.bound - alone.bound) / (least - alone.bound).clamp(min=1e-12)
    assert (together.bound >= alone.bound - 1e-3).all()
    assert float(saved.max()) > 0.1
    assert (together.bound <= least + 1e-9).all()


def test_limits_are_spent_when_their_members_are_split() -> None:
    problem, nodes, _ = limited("mlp", 0.4)
    fresh = spent(problem, 0, nodes)
    assert not fresh.all()
    for member in range(nodes.joint[0].members.shape[-1]):
        nodes = nodes.decide(nodes.joint[0].members[:, 0, member], True)
    assert int(spent(problem, 0, nodes).sum()) > int(fresh.sum())


def test_a_search_that_is_out_of_time_keeps_what_bounds_alone_say() -> None:
    problem, nodes, values = limited("mlp", 0.4)
    limit_jointly(problem, 0, nodes, (2, 4), Deadline(nodes=0))
    limits = nodes.joint[0]
    own = limits.up * nodes.upper[0].gather(1, limits.members.flatten(1)).reshape(limits.up.shape)
    torch.testing.assert_close(limits.limit, own.sum(-1), atol=1e-8, rtol=1e-8)
    assert (sums(limits, values[0]) <= limits.limit + 1e-9).all()
