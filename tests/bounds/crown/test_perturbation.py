"""The perturbation classes as a user of auto_LiRPA meets them: in plain ``BoundedModule`` calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from contracts import largest_gain, random_network, samples, sparse_images
from plans import COSTS, frank_wolfe, plan_gain, plan_samples, power_of
from torch import Tensor, nn

from flowverify.bounds.crown.backend import (
    BOUND_OPTIONS,
    VERSION,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    l1_ball,
)
from flowverify.errors import InvalidInputError, UnknownNameError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.lirpa import PerturbationFlowPolytope, PerturbationWasserstein
from flowverify.network import Network, ScaleShift, fold
from flowverify.transport.references import REFERENCES, flow_by_tree, make_reference

METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")
MLP = [nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)]
CNN = [
    nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
]  # fmt: skip
RADII = torch.tensor([0.02, 0.2, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double_and_quiet() -> Iterator[None]:
    """auto_LiRPA makes some tensors in the default precision, warns much and prints."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


def network_of(layers: list[nn.Module], seed: int = 0) -> Network:
    return random_network((1, 5, 5), layers, seed)


def bounds(
    module: nn.Module, inputs: tuple[Tensor, ...], ball: Any, method: str, options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    bounded = BoundedModule(module, inputs, bound_opts=dict(options or {}))
    bounded.set_bound_opts({"optimize_bound_args": {**bounded.bound_opts["optimize_bound_args"], "iteration": 3}})
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(inputs[0], ball), *inputs[1:]), method=method)
    return lower.detach(), upper.detach()


def balls(images: Tensor, radius: Tensor = RADII) -> Tensor:
    return radius * images.flatten(1).sum(1)


# auto_LiRPA 0.3 fails in this method with its default sparse options, for every perturbation.
FAILING = {("CROWN-Optimized", False)} if VERSION.startswith("0.3") else set()
WAYS = [(method, own) for own in (True, False) for method in METHODS if (method, own) not in FAILING]


@pytest.mark.parametrize("layers", [MLP, CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize(
    ("method", "own_options"), WAYS, ids=[f"{method}-{'ours' if own else 'default options'}" for method, own in WAYS]
)
@pytest.mark.parametrize("feasible", [True, False])
def test_bounds_hold_at_samples(layers: list[nn.Module], method: str, own_options: bool, feasible: bool) -> None:
    network = network_of(layers)
    images = sparse_images((1, 5, 5), 3, 1)
    ball = PerturbationWasserstein(RADII, feasible=feasible)
    lower, upper = bounds(network, (images,), ball, method, BOUND_OPTIONS if own_options else None)
    points = samples(images, balls(images), 300)
    values = network(points.flatten(0, 1)).reshape(3, 300, 3)
    assert (values >= lower[:, None] - 1e-9).all()
    assert (values <= upper[:, None] + 1e-9).all()
    assert (upper > lower).all()


@pytest.mark.parametrize("layers", [MLP, CNN], ids=["mlp", "cnn"])
def test_default_and_own_options_agree(layers: list[nn.Module]) -> None:
    # The default keeps convolutions as patches, ours makes matrices: the same linear functions.
    network = network_of(layers)
    images = sparse_images((1, 5, 5), 3, 1)
    for method in ("CROWN-IBP", "IBP"):
        own = bounds(network, (images,), PerturbationWasserstein(RADII), method, BOUND_OPTIONS)
        default = bounds(network, (images,), PerturbationWasserstein(RADII), method)
        torch.testing.assert_close(own, default)


@pytest.mark.parametrize("layers", [MLP, CNN], ids=["mlp", "cnn"])
def test_first_layer_is_exact(layers: list[nn.Module]) -> None:
    network = network_of(layers[:2] if layers is MLP else [layers[0], nn.Flatten()])
    images = sparse_images((1, 5, 5), 2, 2)
    radius = RADII[:2]
    lower, upper = bounds(network, (images,), PerturbationWasserstein(radius), "CROWN", BOUND_OPTIONS)
    basis = torch.eye(25).reshape(25, 1, 5, 5)
    rows = (network(basis) - network(torch.zeros(1, 1, 5, 5))).T.reshape(-1, 1, 5, 5)
    values = network(images)
    for image in range(2):
        budget = float(balls(images, radius)[image])
        for unit in range(0, rows.shape[0], 5):
            above = largest_gain(rows[unit], images[image], budget)
            below = largest_gain(-rows[unit], images[image], budget)
            assert float(upper[image, unit] - values[image, unit]) == pytest.approx(above, rel=1e-6)
            assert float(values[image, unit] - lower[image, unit]) == pytest.approx(below, rel=1e-6)


@pytest.mark.parametrize("structure", ["dense", "convolution"])
@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [("CROWN", torch.float64, 1e-9), ("CROWN", torch.float32, 1e-4), ("CROWN-Optimized", torch.float64, 1e-9)],
)
def test_flows_and_references_give_what_images_give(
    structure: Any, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    # The network starts with a layer right on the image, which auto_LiRPA would bound by intervals: by the box.
    torch.set_default_dtype(dtype)
    network = network_of(CNN).to(dtype)
    images = sparse_images((1, 5, 5), 3, 3).to(dtype)
    expected = bounds(network, (images,), PerturbationWasserstein(RADII), method, BOUND_OPTIONS)
    folded = fold(network, structure)
    assert folded.structure == structure
    other = sparse_images((1, 5, 5), 3, 9)
    kinds: dict[str, Tensor] = {"own": images}
    for kind in REFERENCES:
        kinds[kind] = make_reference(kind, network.grid, images.double().sum((-1, -2)), seed=1, images=other)
    scale = float(torch.stack(expected).abs().max())
    for kind, reference in kinds.items():
        flow = flow_by_tree(reference, images).to(dtype)
        ball = PerturbationFlowPolytope(RADII, reference.to(dtype))
        inputs = (folded.encode(flow), folded.offset(reference.to(dtype)))
        found = bounds(folded, inputs, ball, method, BOUND_OPTIONS)
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).abs().max()) <= tolerance * scale, kind


def test_a_reference_for_the_whole_batch() -> None:
    network = network_of(MLP)
    images = sparse_images((1, 5, 5), 3, 3)
    images = images / images.flatten(1).sum(1)[:, None, None, None]
    reference = make_reference("flat", network.grid, torch.ones(1))
    folded = fold(network)
    flow = flow_by_tree(reference.expand(3, -1, -1, -1), images)
    inputs = (flow, folded.offset(reference).expand(3, -1))
    found = bounds(folded, inputs, PerturbationFlowPolytope(RADII, reference), "CROWN", BOUND_OPTIONS)
    expected = bounds(network, (images,), PerturbationWasserstein(RADII), "CROWN", BOUND_OPTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_flow_coefficients_that_no_image_gives_are_charged() -> None:
    # Flows on the four edges of a 2x2 square; a = 1 on one edge only is no A^T c (it circulates). Over
    # ||d||_1 <= 0.5 around 0 with R large, a . d reaches 0.5, whatever is feasible; a tree misses that edge or not.
    grid = Grid(2, 2)
    reference = torch.full((1, 1, 2, 2), 10.0)
    ball = PerturbationFlowPolytope(0.5 / 40, reference)
    flow = torch.zeros(1, grid.edges)
    ball.init(flow)
    for coefficients in torch.eye(grid.edges):
        for sign in (1, -1):
            bound = ball.concretize(flow, coefficients[None, None], sign)
            assert bound is not None
            assert float(bound) * sign >= 0.5 - 1e-12


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN"])
def test_infeasible_flows_are_the_librarys_l1_ball(method: str) -> None:
    network = network_of(MLP)
    images = sparse_images((1, 5, 5), 3, 4)
    folded = fold(network)
    flow = torch.zeros(3, network.grid.edges)
    inputs = (flow, folded.offset(images))
    theirs = bounds(folded, inputs, l1_ball(balls(images)), method, BOUND_OPTIONS)
    ours = bounds(network, (images,), PerturbationWasserstein(RADII, feasible=False), method, BOUND_OPTIONS)
    polytope = PerturbationFlowPolytope(RADII, images, feasible=False)
    flows = bounds(folded, inputs, polytope, method, BOUND_OPTIONS)
    if method == "CROWN":
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flows, theirs, rtol=1e-9, atol=1e-9)
    else:  # its intervals start from the L1 ball's own first layer, ours from the box around the ball
        assert (ours[0] <= theirs[0] + 1e-9).all()
        assert (flows[0] <= theirs[0] + 1e-9).all()


def test_one_image_one_radius_and_one_radius_an_image() -> None:
    network = network_of(CNN)
    images = sparse_images((1, 5, 5), 3, 5)
    together = bounds(network, (images,), PerturbationWasserstein(RADII), "CROWN", BOUND_OPTIONS)
    for index, radius in enumerate(RADII.tolist()):
        alone = images[index : index + 1]
        for given in (radius, torch.tensor([radius])):
            found = bounds(network, (alone,), PerturbationWasserstein(given), "CROWN", BOUND_OPTIONS)
            torch.testing.assert_close(found[0][0], together[0][index])
            torch.testing.assert_close(found[1][0], together[1][index])
    common = bounds(network, (images,), PerturbationWasserstein(0.2), "CROWN", BOUND_OPTIONS)
    torch.testing.assert_close(common[0][1], together[0][1])


def test_radius_zero_is_the_value() -> None:
    network = network_of(CNN)
    images = sparse_images((1, 5, 5), 3, 5)
    lower, upper = bounds(network, (images,), PerturbationWasserstein(0.0), "CROWN", BOUND_OPTIONS)
    torch.testing.assert_close(lower, network(images))
    torch.testing.assert_close(upper, network(images))


class NaiveWasserstein(PerturbationLpNorm):  # type: ignore[misc]
    """What one would write first: an L1 ball of images by name, with the exact maximum of linear functions."""

    def __init__(self, radius: float) -> None:
        super().__init__(eps=radius, norm=1)
        self.exact = PerturbationWasserstein(radius)

    def concretize(self, x: Tensor, A: Any, sign: int = -1, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        return self.exact.concretize(x, A, sign)


def two_pixels(weight: float, bias: float, scale: nn.Module) -> Network:
    """0.1 - relu(weight * (x_1 - x_0) + bias) on scaled images of two pixels, for each of two classes."""
    network = Network.sequential((1, 1, 2), [scale, nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)]).double()
    network.nodes[2].operation.load_state_dict(
        {"weight": torch.tensor([[-weight, weight]]), "bias": torch.tensor([bias])}
    )
    network.nodes[4].operation.load_state_dict({"weight": torch.tensor([[-1.0]] * 2), "bias": torch.tensor([0.1] * 2)})
    return network


BEFORE = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
AFTER = torch.tensor([0.5, 0.5], dtype=torch.float64).reshape(1, 1, 1, 2)  # half of the mass, one pixel: W1 = 0.5


@pytest.mark.parametrize("method", METHODS)
def test_stable_neurons_are_not_decided_by_an_image_l1_ball(method: str) -> None:
    # The neuron x_1 - x_0 + 0.25 is -0.75 at (1, 0) and 0.25 at (0.5, 0.5), where the output is 0.1 - 0.25. The
    # image L1 ball of radius 0.5 reaches -0.25 only: there the neuron is off, and the output a constant 0.1.
    network = two_pixels(1.0, 0.25, nn.Flatten())
    reached = float(network(AFTER)[0, 0])
    assert reached == pytest.approx(-0.15)
    naive, _ = bounds(network, (BEFORE,), NaiveWasserstein(0.5), method)
    assert float(naive[0, 0]) == pytest.approx(0.1)  # unsound: the trap is there
    lower, _ = bounds(network, (BEFORE,), PerturbationWasserstein(0.5), method)
    assert reached - 1e-5 <= float(lower[0, 0]) <= reached + 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_normalisation_loses_the_l1_ball_and_not_ours(method: str) -> None:
    # W1 <= 0.5 is within the image L1 ball of radius 1, which is a sound way to call auto_LiRPA; yet with
    # (x - 0.1) / 0.5 in front, z = x_1 - x_0 + 0.5 after scaling is -1.5 at the image and 0.5 at (0.5, 0.5).
    network = two_pixels(1.0, 0.5, ScaleShift(torch.tensor(2.0), torch.tensor(-0.2)))
    reached = float(network(AFTER)[0, 0])
    assert reached == pytest.approx(-0.4)
    alone, _ = bounds(network, (BEFORE,), PerturbationLpNorm(norm=1, eps=1.0), method)
    assert float(alone[0, 0]) == pytest.approx(0.1)  # unsound: bound above a value in the set
    lower, _ = bounds(network, (BEFORE,), PerturbationWasserstein(0.5), method)
    assert reached - 1e-5 <= float(lower[0, 0]) <= reached + 1e-12
    folded = fold(network, "dense")
    inputs = (torch.zeros(1, 1), folded.offset(BEFORE))
    for ball in (PerturbationFlowPolytope(0.5, BEFORE), l1_ball(torch.tensor([0.5]))):
        lower, _ = bounds(folded, inputs, ball, method, BOUND_OPTIONS)
        assert reached - 1e-5 <= float(lower[0, 0]) <= reached + 1e-9


def test_box_holds_the_ball_and_touches_it() -> None:
    images = sparse_images((2, 3, 3), 3, 0, 0.5)
    budget = balls(images)
    ball = PerturbationWasserstein(RADII)
    lower, upper = ball.box(images)
    # Straight from the definition: each pixel's largest and least value is one LP.
    for index in range(3):
        for unit in torch.eye(18).reshape(18, 2, 3, 3)[::5]:
            centre = float((unit * images[index]).sum())
            high = centre + largest_gain(unit, images[index], float(budget[index]))
            low = centre - largest_gain(-unit, images[index], float(budget[index]))
            assert float((unit * upper[index]).sum()) >= high - 1e-9
            assert float((unit * lower[index]).sum()) <= low + 1e-9
    alone = torch.tensor([2.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
    lower, upper = PerturbationWasserstein(0.25).box(alone)
    torch.testing.assert_close(lower.flatten(), torch.tensor([1.5, 0.0, 0.0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper.flatten(), torch.tensor([2.0, 0.5, 0.5]), rtol=0, atol=1e-5)
    free = PerturbationWasserstein(0.25, feasible=False).box(alone)
    torch.testing.assert_close(torch.stack(free).flatten(1), alone.flatten() + torch.tensor([[-0.5], [0.5]]))
    assert np.isinf(ball.norm)


@pytest.mark.parametrize("radius", [-1e-9, float("nan"), float("inf"), torch.tensor([0.1, -0.1]), torch.ones(2, 2)])
def test_bad_radius(radius: Any) -> None:
    with pytest.raises(InvalidInputError, match="expected a finite number >= 0, or one for each image"):
        PerturbationWasserstein(radius)
    with pytest.raises(InvalidInputError, match="expected a finite number >= 0, or one for each image"):
        PerturbationFlowPolytope(radius, torch.ones(1, 1, 2, 2))


def test_bad_images_and_flows() -> None:
    images = torch.ones(1, 1, 2, 2)
    for pixel in (-1e-9, float("nan")):
        bad = images.clone()
        bad[0, 0, 1, 1] = pixel
        with pytest.raises(InvalidInputError, match=f"images with a pixel of {pixel}"):
            PerturbationWasserstein(0.1).init(bad)
        with pytest.raises(InvalidInputError, match=f"images with a pixel of {pixel}"):
            PerturbationFlowPolytope(0.1, bad)
    with pytest.raises(InvalidInputError, match=r"images of shape \(1, 4\): expected \(B, C, H, W\)"):
        PerturbationWasserstein(0.1).init(images.flatten(1))
    with pytest.raises(InvalidInputError, match=r"flow of shape \(1, 5\): expected \(..., 4\)"):
        PerturbationFlowPolytope(0.1, images).init(torch.zeros(1, 5))


def test_forward_mode_is_refused() -> None:
    network = network_of(MLP)
    images = sparse_images((1, 5, 5), 1, 0)
    with pytest.raises(UnsupportedOperationError, match="PerturbationWasserstein: forward-mode bounds"):
        bounds(network, (images,), PerturbationWasserstein(0.1), "forward")


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("ground", COSTS)
def test_bounds_hold_for_every_ground_cost(ground: str, method: str) -> None:
    """Interval propagation too, which never asks the class: a ball of budget eps reaches 2 eps in image L1."""
    images = (1.3 * sparse_images((1, 5, 5), 3, 1)).clamp(max=1)
    network = network_of(MLP)
    budget = RADII ** power_of(ground) * images.flatten(1).sum(1)
    for feasible, cap in ((True, None), (False, None), (True, 1.0)):
        ball = PerturbationWasserstein(RADII, ground=ground, cap=cap, feasible=feasible)
        lower, upper = bounds(network, (images,), ball, method, BOUND_OPTIONS)
        points = [frank_wolfe(network, images, torch.full((3,), t), budget, ground, cap) for t in range(3)]
        if cap is None:
            points.append(plan_samples(images, budget, 100, ground))
        reached = torch.cat(points, 1)
        low, high = ball.box(images)
        assert (reached >= low[:, None] - 1e-9).all() and (reached <= high[:, None] + 1e-9).all()
        values = network(reached.flatten(0, 1)).reshape(3, -1, 3)
        assert (values >= lower[:, None] - 1e-9).all() and (values <= upper[:, None] + 1e-9).all()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("ground", ["l2", "l2^2", "local:3"])
def test_one_affine_layer_is_exact_for_other_costs(ground: str, gradients: bool) -> None:
    network = network_of(MLP[:2])
    images = sparse_images((1, 5, 5), 2, 2)
    weight, values = network.nodes[-1].operation.get_parameter("weight"), network(images)
    radii = torch.tensor([0.3, 1.5], dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        ball = PerturbationWasserstein(radii, ground=ground)
        lower, upper = bounds(network, (images,), ball, "CROWN", BOUND_OPTIONS)
    budget = radii ** power_of(ground) * images.flatten(1).sum(1)
    for image in range(2):
        for unit in range(0, 12, 4):
            row = weight[unit].detach().reshape(1, 5, 5)
            above, below = (plan_gain(sign * row, images[image], float(budget[image]), ground) for sign in (1, -1))
            assert float(upper[image, unit] - values[image, unit]) == pytest.approx(above, rel=1e-7, abs=1e-9)
            assert float(values[image, unit] - lower[image, unit]) == pytest.approx(below, rel=1e-7, abs=1e-9)


def test_bad_ground_costs_and_caps() -> None:
    with pytest.raises(UnknownNameError, match="unknown ground cost 'l3'"):
        PerturbationWasserstein(0.1, ground="l3")
    with pytest.raises(InvalidInputError, match=r"image 0 has a pixel of 1: expected at most the cap, 0\.5"):
        PerturbationWasserstein(0.1, cap=0.5).init(torch.ones(1, 1, 2, 2))
