"""What every method, bound and architecture must keep (theory, section 19), by one class that all of them inherit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from contracts import descend, exact_margins, largest_gain, margins_at, quick, random_network, samples, sparse_images
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import BOUNDS
from flowverify.errors import FoldError
from flowverify.network import Network, ScaleShift, from_torch
from flowverify.registry import INCOMPLETE
from flowverify.registry import METHODS as NAMES
from flowverify.transport.references import REFERENCES, make_reference

SHAPE = (1, 6, 6)
RADII = (0.02, 0.2, 1.0)

METHODS = NAMES.family(INCOMPLETE)


class ResidualNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.skip, self.last = nn.Conv2d(1, 3, 1), nn.Linear(108, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(images))) + self.skip(images)
        return self.last(torch.relu(hidden).flatten(1))


class RecurrentNetwork(nn.Module):
    """A tanh RNN that reads an image two rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.last = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        state = torch.tanh(self.read(images[:, 0, 0:2].flatten(1)))
        for row in (2, 4):
            state = torch.tanh(self.read(images[:, 0, row : row + 2].flatten(1)) + self.keep(state))
        return self.last(state)


@cache
def network_of(kind: str) -> Network:
    torch.manual_seed(3)
    if kind == "residual":
        return from_torch(ResidualNetwork().double(), SHAPE)
    if kind == "recurrent":
        return from_torch(RecurrentNetwork().double(), SHAPE)
    layers: dict[str, list[nn.Module]] = {
        "linear": [nn.Flatten(), nn.Linear(36, 3)],
        "mlp": [nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)],
        "cnn": [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)],
        "colour": [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)],
        "pooled": [nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(27, 3)],
        "normalised": [
            ScaleShift(torch.tensor(3.0), torch.tensor(-0.4)), nn.Conv2d(1, 3, 3), nn.ReLU(),
            ScaleShift(torch.rand(3, 1, 1) + 0.5, torch.rand(3, 1, 1)), nn.Flatten(), nn.Linear(48, 3),
        ],
        "logits after relu": [nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 3), nn.ReLU()],
    }  # fmt: skip
    return random_network((3, 6, 6) if kind == "colour" else SHAPE, layers[kind], 7)


@cache
def images_of(kind: str) -> tuple[Tensor, Tensor]:
    network = network_of(kind)
    images = sparse_images(network.input_shape, 3, 11)
    with torch.no_grad():
        return images, network(images).argmax(1)


@cache
def reached(kind: str, radius: float) -> Tensor:
    """The least margins of each image at many feasible points, (B, classes - 1)."""
    network, (images, labels) = network_of(kind), images_of(kind)
    budget = radius * images.flatten(1).sum(1)
    points = torch.cat([samples(images, budget, 200), descend(network, images, labels, budget)], 1)
    return margins_at(network, points, labels).amin(1).detach()


def threat_of(method: str) -> Threat:
    return Threat(positive=method == "fine-tuned")


@cache
def engine(kind: str, method: str, bound: str, dtype: torch.dtype, domain: str) -> MarginBounds:
    options = EngineOptions(domain=domain, alpha_iterations=3)  # type: ignore[arg-type]
    return MarginBounds(network_of(kind), threat_of(method), bound, dtype=dtype, options=options)


@cache
def lower_bounds(
    kind: str, method: str, bound: str, radius: float, dtype: torch.dtype = torch.float64, domain: str = "image"
) -> Tensor:
    images, labels = images_of(kind)
    budget = radius * images.flatten(1).sum(1)
    found = engine(kind, method, bound, dtype, domain).margins(threat_of(method).ball(images, budget), labels)
    assert found.dtype == dtype
    assert found.shape == (3, network_of(kind).num_classes - 1)
    return found.double()


def applies(test: str, kind: str, bound: str) -> bool:
    """Whether a test of the contract says something about this bound of this architecture."""
    if test == "test_single_precision_rounds_only":
        return bound not in ("alpha-crown", "lifted")  # their optimisers may take other paths in another precision
    if test == "test_flow_domain_gives_the_same":
        return bound != "alpha-crown" or kind in ("mlp", "cnn")  # the slowest bound: two are enough
    return True


class CertifierContract:
    """Subclasses name an architecture."""

    kind: str

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        bounds = [bound for bound in BOUNDS if applies(metafunc.function.__name__, self.kind, bound)]
        # The recurrent network is written out as many activations: what "best" is made of is repeated at length.
        slow = {"crown-ibp", "crown", "alpha-crown"} if self.kind == "recurrent" else set()
        rows = [(method, bound) for bound in bounds for method in METHODS]
        metafunc.parametrize(("method", "bound"), [one for row in rows for one in quick([row], row[1] not in slow)])

    def scale(self) -> float:
        images, labels = images_of(self.kind)
        return float(margins_at(network_of(self.kind), images[:, None], labels).abs().max())

    def test_below_every_feasible_point(self, method: str, bound: str) -> None:
        for radius in RADII:
            least = reached(self.kind, radius)
            assert (lower_bounds(self.kind, method, bound, radius) <= least + 1e-9).all()

    def test_radius_zero_gives_the_clean_margin(self, method: str, bound: str) -> None:
        images, labels = images_of(self.kind)
        clean = margins_at(network_of(self.kind), images[:, None], labels)[:, 0].detach()
        found = lower_bounds(self.kind, method, bound, 0.0)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-9 * self.scale())

    def test_single_precision_rounds_only(self, method: str, bound: str) -> None:
        double = lower_bounds(self.kind, method, bound, 0.2)
        single = lower_bounds(self.kind, method, bound, 0.2, torch.float32)
        # The gap at which lifted bounds end their search for a multiplier, which what moves are charged rests on.
        slack = EngineOptions().lifted_tolerance if bound in ("best", "lifted") else 1e-4
        torch.testing.assert_close(single, double, rtol=slack, atol=slack * self.scale())

    def test_flow_domain_gives_the_same(self, method: str, bound: str) -> None:
        if self.kind in ("residual", "recurrent"):
            with pytest.raises(FoldError, match="fold"):
                lower_bounds(self.kind, method, bound, 0.2, domain="flow")
            return
        found = lower_bounds(self.kind, method, bound, 0.2, domain="flow")
        expected = lower_bounds(self.kind, method, bound, 0.2)
        if bound == "alpha-crown":
            assert (found <= reached(self.kind, 0.2) + 1e-9).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class TestLinear(CertifierContract):
    kind = "linear"

    def test_equal_to_the_linear_program(self, method: str, bound: str) -> None:
        network, (images, labels) = network_of(self.kind), images_of(self.kind)
        weight = network.nodes[-1].operation.get_parameter("weight").detach()
        for radius in RADII:
            budget = radius * images.flatten(1).sum(1)
            found = lower_bounds(self.kind, method, bound, radius)
            clean = margins_at(network, images[:, None], labels)[:, 0].detach()
            for index, label in enumerate(labels.tolist()):
                others = [t for t in range(3) if t != label]
                for position, other in enumerate(others):
                    row = (weight[other] - weight[label]).reshape(SHAPE)
                    if method == "vanilla":  # c . mu + eps * the steepest step between neighbours
                        steps = torch.cat([row.diff(dim=-1).flatten(), row.diff(dim=-2).flatten()])
                        gain = float(budget[index] * steps.abs().max())
                    else:
                        gain = largest_gain(row, images[index], float(budget[index]))
                    expected = float(clean[index, position]) - gain
                    assert float(found[index, position]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


class TestPerceptron(CertifierContract):
    kind = "mlp"


class TestConvolutional(CertifierContract):
    kind = "cnn"


class TestColour(CertifierContract):
    kind = "colour"


class TestPooled(CertifierContract):
    kind = "pooled"
    test_single_precision_rounds_only = None  # the choice among equal pixels may be another one there


class TestNormalised(CertifierContract):
    kind = "normalised"


class TestLogitsAfterRelu(CertifierContract):
    kind = "logits after relu"


class TestResidual(CertifierContract):
    kind = "residual"


class TestRecurrent(CertifierContract):
    kind = "recurrent"


KINDS = ("linear", "mlp", "cnn", "colour", "pooled", "normalised", "logits after relu", "residual", "recurrent")


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_are_tighter_when_fine_tuned_and_fall_with_the_radius(kind: str) -> None:
    radii = (0.0, *RADII)
    fine, vanilla = (
        torch.stack([lower_bounds(kind, method, "ibp", radius) for radius in radii])
        for method in ("fine-tuned", "vanilla")
    )
    for values in (fine, vanilla):
        assert (values.diff(dim=0) <= 1e-9).all()
    assert (fine >= vanilla - 1e-9).all()
    assert (fine[-1] > vanilla[-1] + 1e-6).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_best_is_at_least_intervals(kind: str, method: str) -> None:
    for radius in RADII:
        best = lower_bounds(kind, method, "best", radius)
        assert (best >= lower_bounds(kind, method, "ibp", radius) - 1e-9).all()


@pytest.mark.parametrize("kind", ["mlp", "cnn", "colour"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_references_do_not_matter(kind: str, method: str, dtype: torch.dtype, tolerance: float) -> None:
    # Theory, section 7: R enters through R + A delta_mu = mu alone, and in what is kept back for rounding of the flow.
    network, (images, labels) = network_of(kind), images_of(kind)
    budget = 0.2 * images.flatten(1).sum(1)
    expected = lower_bounds(kind, method, "crown", 0.2, dtype, "flow")
    single = images.to(dtype).double()
    mass = single.sum((-1, -2))
    other = sparse_images(network.input_shape, 3, 99)
    for name in REFERENCES:
        reference = make_reference(name, network.grid, mass, seed=2, images=other)
        bounds = engine(kind, method, "crown", dtype, "flow")
        found = bounds.margins(bounds.threat.ball(single, budget), labels, references=reference).double()
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_below_the_exact_optimum_of_tiny_networks(seed: int) -> None:
    network = random_network(
        (1, 3, 3), [nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)], seed
    )
    images = sparse_images((1, 3, 3), 2, seed)
    labels = network(images).argmax(1)
    for radius in (0.05, 0.4):
        budget = radius * images.flatten(1).sum(1)
        exact = torch.tensor(
            [exact_margins(network, *case) for case in zip(images, labels.tolist(), budget.tolist(), strict=True)],
            dtype=torch.float64,
        )
        points = torch.cat([samples(images, budget, 500), descend(network, images, labels, budget, 8)], 1)
        least = margins_at(network, points, labels).amin(1)
        assert (exact <= least + 1e-7).all()
        for method in METHODS:
            for bound in BOUNDS:
                threat, options = threat_of(method), EngineOptions(alpha_iterations=3)
                bounds = MarginBounds(network, threat, bound, dtype=torch.float64, options=options)
                found = bounds.margins(threat.ball(images, budget), labels)
                assert (found <= exact + 1e-7).all(), (method, bound)
