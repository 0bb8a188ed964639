"""The gradient of a bound: both implementations, against differences of the bound itself; Adam; reduced problems."""

from __future__ import annotations

import pytest
import torch
from test_joint_limits import above, limited
from test_neuron_bounds import reached, single_ball

from flowverify.certifiers.complete.ascent import Adam, compiled_slope, slope, traced_slope, values
from flowverify.certifiers.complete.nodes import TreeNodes
from flowverify.certifiers.complete.relaxation import Multipliers, Relaxation, lower_bound
from flowverify.certifiers.options import AscentSettings

KINDS = ("mlp", "cnn", "colour", "residual")


def split_at_random(nodes: TreeNodes, inside: bool) -> TreeNodes:
    """Some unstable neurons split; multipliers inside their ranges, or at the ends where gradients are one-sided."""
    generator = torch.Generator().manual_seed(2)
    for layer, unstable in enumerate(nodes.unstable()):
        draw = torch.rand(unstable.shape, generator=generator, dtype=torch.float64)
        sign = torch.where(unstable & (draw < 0.3), torch.where(draw < 0.15, 1, -1), 0)
        nodes.lower[layer][sign > 0] = 0.0
        nodes.upper[layer][sign < 0] = 0.0
        nodes.signs[layer] = sign.to(torch.int8)
        if inside:
            nodes.multipliers.alpha[layer] = 0.1 + 0.8 * draw
            nodes.multipliers.gamma[layer] = -sign * (0.1 + draw)
            nodes.multipliers.theta[layer] = torch.full_like(nodes.multipliers.theta[layer], 0.7)
        else:
            nodes.multipliers.alpha[layer] = (draw < 0.5).double()
            nodes.multipliers.gamma[layer] = torch.zeros_like(draw)
        if nodes.multipliers.share[layer].shape[1]:
            nodes.multipliers.share[layer] = 0.9 - 0.8 * draw if inside else (draw > 0.3).double()
    return nodes


def relaxation_of(
    kind: str, feasible: bool = True, inside: bool = True, rows: bool = False
) -> tuple[Relaxation, Multipliers]:
    problem, nodes, _ = limited(kind, 0.4, feasible=feasible)
    if rows:
        problem, nodes = above(kind, problem, nodes)
    nodes = split_at_random(nodes, inside)
    nodes.joint = [limits.closed() for limits in nodes.joint]
    return nodes.relaxation(problem), nodes.multipliers


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_traced(kind: str, feasible: bool, inside: bool, rows: bool) -> None:
    relaxation, multipliers = relaxation_of(kind, feasible, inside, rows)
    compiled, traced = (way(relaxation, multipliers, 1e-9) for way in (compiled_slope, traced_slope))
    torch.testing.assert_close(compiled.value, traced.value)
    torch.testing.assert_close(compiled.point, traced.point)
    for own, other in zip(compiled.gradients, traced.gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(values(relaxation, multipliers, 1e-9), traced.value)
    assert any(float(own.abs().max()) > 0 for own in compiled.gradients if own.numel())
    shares = compiled.gradients[3 * relaxation.problem.stage :]
    assert any(own.numel() and float(own.abs().max()) > 0 for own in shares) == rows


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_change_of_the_bound(kind: str, rows: bool) -> None:
    relaxation, multipliers = relaxation_of(kind, rows=rows)
    found = slope(relaxation, multipliers, 1e-6)  # where flows tie exactly, there are several
    generator = torch.Generator().manual_seed(5)
    layers = relaxation.problem.stage
    moved = []
    for index, value in enumerate(multipliers.variables):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        # Gamma of neurons that are not split has no say in a search.
        moved.append(direction * (relaxation.signs[index - layers] != 0) if layers <= index < 2 * layers else direction)
    step, slopes = (
        1e-7,
        sum((gradient * direction).sum(1) for gradient, direction in zip(found.gradients, moved, strict=True)),
    )
    ends = []
    for sign in (1, -1):
        at = [v + sign * step * d for v, d in zip(multipliers.variables, moved, strict=True)]
        ends.append(values(relaxation, Multipliers.of(at, multipliers.guess), 1e-12))
    difference = (ends[0] - ends[1]) / (2 * step)
    close = torch.isclose(difference, torch.as_tensor(slopes), rtol=1e-3, atol=1e-4)
    assert float(close.double().mean()) >= 0.8  # the others have a kink within the step


def test_adam_is_that_of_torch_within_the_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    sign = torch.tensor([1, -1, 0, 1, -1], dtype=torch.int8).expand(3, 5).contiguous()
    nothing = torch.zeros(3, 5, dtype=torch.float64)
    multipliers = Multipliers([start[0]], [nothing], [start[2]], [start[1]], torch.zeros(3))
    settings = AscentSettings(decay=1.0)
    rates = settings.slope_step, settings.split_step, settings.limit_step, settings.share_step
    ways = [Adam(multipliers, settings) for _ in range(2)]
    free = [v.clone().requires_grad_(True) for v in multipliers.variables]
    torch_adam = torch.optim.Adam(
        [{"params": [v], "lr": rate} for v, rate in zip(free, rates, strict=True)], betas=(0.9, 0.99),
        maximize=True,
    )  # fmt: skip
    for _ in range(6):
        gradients = [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
        for compiled, own in zip((True, False), ways, strict=True):
            own.step(gradients, [sign], compiled)
        for value, gradient in zip(free, gradients, strict=True):
            value.grad = gradient.clone()
        torch_adam.step()
        with torch.no_grad():
            free[0].clamp_(0, 1)
            free[1].copy_(torch.where(sign > 0, free[1].clamp(max=0), torch.where(sign < 0, free[1].clamp(min=0), 0.0)))
            free[2].clamp_(min=0)
            free[3].clamp_(0, 1)
        for one, other, expected in zip(ways[0].values, ways[1].values, free, strict=True):
            torch.testing.assert_close(one, expected.detach())
            torch.testing.assert_close(other, expected.detach())
    assert (ways[0].values[1] != 0).any()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("feasible", [True, False])
def test_the_reduced_problem_is_near_the_whole(feasible: bool, rows: bool) -> None:
    problem, nodes, _ = limited("mlp", 0.3, feasible=feasible)
    if rows:
        problem, nodes = above("mlp", problem, nodes)
    small, relaxation = problem.reduced(), nodes.relaxation(problem)
    assert problem.rows(nodes.row).reduced().maps is small.maps, "reduced once"
    assert small.maps.pixels <= problem.maps.pixels
    found = values(relaxation.reduced(), nodes.multipliers.to(torch.float32), 1e-6)
    whole = lower_bound(relaxation, nodes.multipliers).value
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tolerance", [0.1, 1e-6])
@pytest.mark.parametrize("feasible", [True, False])
def test_maxima_in_single_precision_are_upper_bounds(feasible: bool, tolerance: float) -> None:
    image, budget, _ = reached("mlp", 0.3)
    ball = single_ball(image, budget, feasible)
    generator = torch.Generator().manual_seed(1)
    functions = torch.randn(300, image.numel(), generator=generator, dtype=torch.float64)
    functions += 1e4 * torch.rand(300, 1, generator=generator, dtype=torch.float64)  # much that cancels
    single = functions.float()
    error = (single.double() - functions).abs().amax(1)
    exact = -ball.minimum(-functions, tolerance=1e-12).value - functions @ image.flatten()
    found = ball.greatest_excess(single, error, tolerance)
    assert (found >= exact).all()
    assert (found <= exact * (1 + tolerance + 1e-6) + 1e4 * 1e-3 * (1 + budget)).all()


@pytest.mark.parametrize("end", ["lower", "upper"])
def test_a_neuron_without_bounds_proves_nothing(end: str) -> None:
    relaxation, multipliers = relaxation_of("mlp")
    getattr(relaxation, end)[0][2, 1] = torch.nan
    for value in (
        values(relaxation, multipliers, 1e-9),
        traced_slope(relaxation, multipliers, 1e-9).value,
        lower_bound(relaxation, multipliers).value,
    ):
        assert value.isnan().tolist() == [row == 2 for row in range(len(value))]


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_functions_that_are_not_finite_have_no_minimum(what: float, everywhere: bool) -> None:
    image, budget, _ = reached("mlp", 0.3)
    functions = torch.randn(3, image.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    functions[1, slice(None) if everywhere else 0] = what
    assert single_ball(image, budget).minimum(functions).value.isnan().tolist() == [False, True, False]
