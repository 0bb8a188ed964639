"""Trainable bounds: never below what an image of the ball reaches, and near those of certification."""

import copy

import pytest
import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.margins import MarginBounds
from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import Network
from flowverify.training.bounds import LiftedTrainableBounds, TrainableBounds, ball_bounds
from flowverify.transport.support import support, support_value

SHAPE = (1, 7, 6)
MLP = (nn.Flatten(), nn.Linear(42, 13), nn.ReLU(), nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 4))
CNN = (
    nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(),
    nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 4),
)  # fmt: skip
POOLED = (nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(30, 11), nn.ReLU(), nn.Linear(11, 4), nn.ReLU())
SMOOTH = (nn.Flatten(), nn.Linear(42, 8), nn.Tanh(), nn.Linear(8, 4))
NETWORKS = {"mlp": MLP, "cnn": CNN, "pooled": POOLED, "smooth": SMOOTH}
KINDS = pytest.mark.parametrize(
    ("kind", "targets"),
    [(TrainableBounds, 0), (TrainableBounds, 2), (LiftedTrainableBounds, 2)],
    ids=["ibp", "crown-ibp", "lifted"],
)


def network(name: str) -> Network:
    torch.manual_seed(0)
    for layer in NETWORKS[name]:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return Network.sequential(SHAPE, NETWORKS[name]).double().requires_grad_(True)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, *SHAPE, generator=generator, dtype=torch.float64)
    return images * (torch.rand(images.shape, generator=generator) < 0.4), torch.tensor([0, 1, 2, 3, 0, 2])


def neighbours(images: Tensor, budget: Tensor, count: int) -> Tensor:
    """Images on the border of the balls: maximisers of random functions, (count, B, C, H, W)."""
    functions = torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(9), dtype=images.dtype)
    moved = support(functions, images, budget, maximiser=True).maximiser
    assert moved is not None
    return moved.transpose(0, 1)


@KINDS
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5])
def test_no_image_of_the_ball_exceeds_the_bound(name, radius, kind, targets, batch):
    images, labels = batch
    model = network(name)
    budget = radius * images.flatten(1).sum(1)
    bounds = kind(model, targets)
    for _ in range(3):  # the multipliers move, every time to something sound
        logits, worst = bounds.bound(images, labels, budget)
    torch.testing.assert_close(logits, model(images))
    for moved in neighbours(images, budget, 40):
        reached = model(moved)
        difference = reached - reached.gather(1, labels[:, None])
        bounded = torch.isfinite(worst)
        assert (difference <= worst + 1e-9)[bounded].all()
        assert bounded.sum() == len(images) * (1 + (targets or 3))


@pytest.mark.parametrize(("name", "targets", "bound"), [("mlp", 0, "ibp"), ("cnn", 0, "ibp"), ("mlp", 3, "crown-ibp")])
def test_is_never_tighter_than_certification_and_near_it(name, targets, bound, batch):
    images, labels = batch
    model = network(name)
    budget = 0.2 * images.flatten(1).sum(1)
    bounds = TrainableBounds(model, targets)
    for _ in range(60):
        _, worst = bounds.bound(images, labels, budget)
    frozen = copy.deepcopy(model).requires_grad_(False)
    exact = -MarginBounds(frozen, bound=bound, dtype=torch.float64).margins(Threat().ball(images, budget), labels)
    others = torch.arange(4) != labels[:, None]
    trained = worst.detach()[others].reshape(6, 3)
    if not targets:  # CROWN's relaxations may turn out better for looser intervals
        assert (trained >= exact - 1e-9).all()
    clean = model(images).detach()
    own = (clean - clean.gather(1, labels[:, None]))[others].reshape(6, 3)
    assert 0.95 < float(((trained - own) / (exact - own)).detach().mean()) < 1.25


def test_at_radius_0_intervals_are_points(batch):
    images, labels = batch
    model = network("mlp")
    logits, worst = TrainableBounds(model).bound(images, labels, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(worst, logits - logits.gather(1, labels[:, None]))


@KINDS
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_is_that_of_differences(name, kind, targets, batch, monkeypatch):
    images, labels = batch
    model = network(name)
    # In large balls rows of moves may run around cycles, whose gradient is taken from the steepest pair of moves.
    budget = (0.05 if kind is LiftedTrainableBounds else 0.2) * images.flatten(1).sum(1)

    # The kernel's few multipliers scale with Lip(c); the exact maximum has a gradient of its own.
    monkeypatch.setattr("flowverify.training.bounds.ball_bounds", support_value)
    monkeypatch.setattr("flowverify.training.bounds.TOLERANCE", 1e-13)
    first = kind(model, targets)
    first.bound(images, labels, budget)

    def loss() -> Tensor:
        bounds = kind(model, targets)
        bounds.multipliers = dict(first.multipliers)
        return nn.functional.cross_entropy(bounds.bound(images, labels, budget)[1], labels)

    loss().backward()
    step = 1e-6
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        at = len(flat) // 3
        ends = []
        for change in (step, -2 * step):
            flat[at] += change
            ends.append(float(loss().detach()))
        flat[at] += step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(parameter.grad.view(-1)[at]) == pytest.approx(slope, abs=1e-6, rel=1e-4)


class TestBallBounds:
    @pytest.fixture
    def functions(self) -> Tensor:
        return torch.randn(6, 3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def test_is_sound_and_near_the_maximum(self, functions, batch):
        images, _ = batch
        budget = 0.3 * images.flatten(1).sum(1)
        found = ball_bounds(functions, images, budget)
        excess = support(functions, images, budget).excess
        centre = (functions * images[:, None]).flatten(2).sum(2)
        over = found - centre - excess
        assert (over >= -1e-9).all() and float((over / excess).mean()) < 0.08

    def test_gradient_is_an_image_of_equal_mass(self, functions, batch):
        images, _ = batch
        budget = 0.3 * images.flatten(1).sum(1)
        functions.requires_grad_(True)
        ball_bounds(functions, images, budget).sum().backward()
        assert (functions.grad >= 0).all()
        torch.testing.assert_close(functions.grad.sum((2, 3, 4)), images.sum((1, 2, 3))[:, None].expand(6, 3))
        assert not torch.allclose(functions.grad, images[:, None].expand_as(functions))


def test_old_origins_are_used_until_it_is_time(batch):
    images, labels = batch
    model = network("mlp")
    budget = 0.3 * images.flatten(1).sum(1)
    stale, fresh = TrainableBounds(model, refresh=3), TrainableBounds(model)
    values = []
    for call in range(4):
        values.append((stale.bound(images, labels, budget)[1], fresh.bound(images, labels, budget)[1]))
        with torch.no_grad():
            model.operations[1].weight += 0.2 * torch.randn(13, 42, generator=torch.Generator().manual_seed(call))
    fresh.multipliers = dict(stale.multipliers)
    torch.testing.assert_close(values[0][0], values[0][1])
    assert not torch.allclose(values[1][0], values[1][1])
    stale.forget()
    torch.testing.assert_close(stale.bound(images, labels, budget)[1], fresh.bound(images, labels, budget)[1])


def test_affine_network_is_refused():
    with pytest.raises(InvalidInputError, match="affine in its input: expected one with an activation"):
        TrainableBounds(Network.sequential(SHAPE, [nn.Flatten(), nn.Linear(42, 3)]))


def test_crown_needs_lines_around_activations():
    model = Network.sequential(SHAPE, [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 3)])
    with pytest.raises(UnsupportedOperationError, match=r"ReLU, LeakyReLU, Sigmoid and Tanh, given MaxPool2d \(the"):
        TrainableBounds(model, targets=1)
