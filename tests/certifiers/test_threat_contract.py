"""The contracts (theory, section 19) for every ground cost, with a cap and in colour; few networks, all costs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from contracts import margins_at, quick, random_network, sparse_images
from plans import COSTS, frank_wolfe, least_margins, plan_cost, plan_samples, power_of
from torch import Tensor, nn

from flowverify.api import certify_batch
from flowverify.ball import Threat, WassersteinBall
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.linear import LinearCertifier
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.registry import INCOMPLETE
from flowverify.registry import METHODS as NAMES
from flowverify.transport.distance import wasserstein_distance

DOUBLE = torch.float64
BOUNDS = ("ibp", "crown", "best")
RADII = (0.03, 0.3, 1.2)
NETWORKS: dict[str, tuple[tuple[int, int, int], list[nn.Module]]] = {
    "mlp": ((1, 5, 5), [nn.Flatten(), nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]),
    "colour cnn": ((3, 6, 6), [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]),
    "linear": ((2, 5, 5), [nn.Flatten(), nn.Linear(50, 3)]),
}

METHODS = NAMES.family(INCOMPLETE)


@cache
def network_of(kind: str) -> Network:
    return random_network(*NETWORKS[kind], 3)


@cache
def images_of(kind: str) -> tuple[Tensor, Tensor]:
    """Images with empty pixels and with some at the cap of 1, and their classes."""
    network = network_of(kind)
    images = (1.3 * sparse_images(network.input_shape, 3, 5)).clamp(max=1)
    return images, network(images).argmax(1)


@cache
def engine(kind: str, method: str, bound: str, ground: str, cap: float | None, dtype: torch.dtype) -> MarginBounds:
    return MarginBounds(network_of(kind), Threat(ground, cap, method == "fine-tuned"), bound, dtype=dtype)


def budget_of(images: Tensor, radius: float, ground: str) -> Tensor:
    return radius ** power_of(ground) * images.flatten(1).sum(1)


@cache
def bounds_of(
    kind: str,
    method: str,
    bound: str,
    ground: str,
    radius: float,
    cap: float | None = None,
    dtype: torch.dtype = DOUBLE,
) -> Tensor:
    images, labels = images_of(kind)
    budget = budget_of(images, radius, ground)
    bounds = engine(kind, method, bound, ground, cap, dtype)
    return bounds.margins(bounds.threat.ball(images, budget), labels).double()


@cache
def reached(kind: str, ground: str, radius: float, cap: float | None) -> Tensor:
    """The least margins at feasible points, (B, classes - 1)."""
    network, (images, labels) = network_of(kind), images_of(kind)
    budget = budget_of(images, radius, ground)
    points = frank_wolfe(network, images, labels, budget, ground, cap)
    for index, point in enumerate(points[0]):
        spent = wasserstein_distance(images[:1], point[None], ground, normalised=False)
        assert float(spent) <= float(budget[0]) * (1 + 1e-9) + 1e-12, index
    if cap is None:
        points = torch.cat([points, plan_samples(images, budget, 100, ground)], 1)
    return margins_at(network, points, labels).amin(1).detach()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("ground", COSTS)
class TestEveryCost:
    def test_below_every_feasible_point(self, ground: str, kind: str) -> None:
        for radius in RADII:
            for method in METHODS:
                for bound in BOUNDS:
                    found = bounds_of(kind, method, bound, ground, radius)
                    assert (found <= reached(kind, ground, radius, None) + 1e-9).all(), (method, bound, radius)

    def test_radius_zero_gives_the_clean_margin(self, ground: str, kind: str) -> None:
        images, labels = images_of(kind)
        clean = margins_at(network_of(kind), images[:, None], labels)[:, 0].detach()
        for method in METHODS:
            torch.testing.assert_close(bounds_of(kind, method, "best", ground, 0.0), clean, rtol=0, atol=1e-8)

    def test_intervals_fall_with_the_radius_and_are_tighter_when_fine_tuned(self, ground: str, kind: str) -> None:
        fine, vanilla = (
            torch.stack([bounds_of(kind, method, "ibp", ground, radius) for radius in (0.0, *RADII)])
            for method in ("fine-tuned", "vanilla")
        )
        assert (fine.diff(dim=0) <= 1e-9).all() and (vanilla.diff(dim=0) <= 1e-9).all()
        assert (fine >= vanilla - 1e-9).all()

    def test_intervals_are_no_looser_than_in_the_l1_ball_around(self, ground: str, kind: str) -> None:
        images, labels = images_of(kind)
        for radius in RADII:
            around = WassersteinBall(radius, ground).l1_radius
            l1_ball = Threat().ball(images, around * images.flatten(1).sum(1))
            converted = engine(kind, "fine-tuned", "ibp", "l1", None, DOUBLE).margins(l1_ball, labels)
            assert (bounds_of(kind, "fine-tuned", "ibp", ground, radius) >= converted - 1e-9).all()

    def test_single_precision_rounds_only(self, ground: str, kind: str) -> None:
        double = bounds_of(kind, "fine-tuned", "best", ground, 0.3)
        single = bounds_of(kind, "fine-tuned", "best", ground, 0.3, None, torch.float32)
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("ground", ["l1", "l2", "l2^2", "local:3"])
def test_a_cap_is_respected_and_never_loosens_intervals(ground: str, kind: str) -> None:
    for radius in RADII:
        for bound in BOUNDS:
            capped = bounds_of(kind, "fine-tuned", bound, ground, radius, 1.0)
            assert (capped <= reached(kind, ground, radius, 1.0) + 1e-9).all(), (bound, radius)
        free, capped = (bounds_of(kind, "fine-tuned", "ibp", ground, radius, cap) for cap in (None, 1.0))
        assert (capped >= free - 1e-9).all()
    assert (capped > free + 1e-6).any()


@pytest.mark.parametrize("ground", [*COSTS, "l1"])
def test_below_the_exact_optimum_of_a_tiny_network(ground: str) -> None:
    layers = [nn.Flatten(), nn.Linear(18, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)]
    small = ground.replace(":5", ":3")  # 3 x 3 pixels
    network = random_network((2, 3, 3), layers, 1)
    images = (1.3 * sparse_images((2, 3, 3), 1, 2)).clamp(max=1)
    labels = network(images).argmax(1)
    for radius, cap in ((0.05, None), (0.5, None), (0.5, 1.0)):
        budget = budget_of(images, radius, small)
        exact = torch.tensor([least_margins(network, images[0], int(labels[0]), float(budget), small, cap)])
        points = frank_wolfe(network, images, labels, budget, small, cap)
        assert (exact.double() <= margins_at(network, points, labels).amin(1) + 1e-6).all()
        for method in METHODS:
            for bound in BOUNDS:
                threat = Threat(small, cap if method == "fine-tuned" else None, method == "fine-tuned")
                found = MarginBounds(network, threat, bound, dtype=DOUBLE).margins(threat.ball(images, budget), labels)
                assert (found <= exact + 1e-6).all(), (method, bound)


@pytest.mark.parametrize("ground", COSTS)
def test_linear_networks_exactly(ground: str) -> None:
    network, (images, labels) = network_of("linear"), images_of("linear")
    certifier = LinearCertifier(network)
    weight = network.nodes[-1].operation.get_parameter("weight").detach()
    engines = Certifier(network)
    for index, found in enumerate(certifier.search(images, labels, Threat(ground))):
        label = int(labels[index])
        clean = margins_at(network, images[index : index + 1, None], labels[index : index + 1])[0, 0]
        others = [t for t in range(3) if t != label]
        costs = [
            plan_cost((weight[t] - weight[label]).reshape(2, 5, 5), images[index], float(margin), ground)
            for t, margin in zip(others, clean, strict=True)
        ]
        exact = (min(costs) / float(images[index].sum())) ** (1 / power_of(ground))
        limit = found.upper_radius if found.upper_radius is not None else found.radius
        assert found.ground == ground
        if exact == float("inf"):
            assert found.upper_radius is None and found.verdict == "certified"
            continue
        assert limit == pytest.approx(exact, rel=1e-6) and found.radius <= exact
        one, own = images[index : index + 1], labels[index : index + 1]
        inside, beyond = (WassersteinBall(exact * share, ground) for share in (0.999, 1.001))
        assert certifier.certify(one, own, inside)[0].verdict == "certified"
        assert certifier.certify(one, own, beyond)[0].verdict == "falsified"
        assert engines.certify(one, own, inside)[0].verdict == "certified"
        assert engines.certify(one, own, beyond)[0].verdict == "unknown"
        witness, wrong = certifier.witness(beyond.around(one), own)
        assert bool(wrong) and bool(beyond.contains(one, witness))


@pytest.mark.parametrize(
    ("method", "ground"),
    [row for method in METHODS for row in quick([(method, cost) for cost in (*COSTS, "l1")], 5)],
)
def test_search_certifies_what_it_says(method: str, ground: str) -> None:
    network, (images, labels) = network_of("mlp"), images_of("mlp")
    certifier = Certifier(network, method)
    for cap, count in ((None, 2), (1.0, 1)):
        for index, found in enumerate(search_radius(certifier, images[:count], labels[:count], ground, cap=cap)):
            assert (found.ground, found.cap) == (ground, cap)
            assert found.verdict == "certified" and found.radius > 0
            one, own = images[index : index + 1], labels[index : index + 1]
            ball = WassersteinBall(found.radius * (1 - 1e-9), ground, cap)
            assert certifier.certify(one, own, ball)[0].verdict == "certified"
            budget = budget_of(one, found.radius, ground)
            points = frank_wolfe(network, one, own, budget, ground, cap)
            assert (margins_at(network, points, own) > 0).all()


@pytest.mark.parametrize("ground", quick(["l2", "l2^2", "local:3"], 1))
def test_never_smaller_than_what_it_replaces(ground: str) -> None:
    for kind in ("mlp", "colour cnn"):
        network, (images, labels) = network_of(kind), images_of(kind)
        certifier = Certifier(network)
        native = torch.tensor([one.radius for one in certifier.search(images, labels, Threat(ground))])
        capped = torch.tensor([one.radius for one in certifier.search(images, labels, Threat(ground, 1.0))])
        flat = Certifier(network, domain="flow").search(images, labels, Threat(ground))  # flows know l1 only: converted
        converted = torch.tensor([one.radius for one in flat])
        vanilla = torch.tensor(
            [one.radius for one in Certifier(network, "vanilla").search(images, labels, Threat(ground))]
        )
        for other in (converted, vanilla):
            assert (native >= other * (1 - 0.011)).all()
        assert (capped >= native * (1 - 1e-9)).all()
        if ground != "l2^2":  # where l1 <= d^2, with equality for the short moves of small radii
            assert float((native / converted).median()) > 1.05


def test_certificates_carry_the_threat_model() -> None:
    network, (images, labels) = network_of("mlp"), images_of("mlp")
    for ball in (WassersteinBall(0.02, "local:3", 1.0), WassersteinBall(0.1, "l2^2.0")):
        for found in certify_batch(network, images, labels, ball):
            record = found.to_json()
            assert (record["ground"], record["cap"]) == (ball.ground, ball.cap)
    assert WassersteinBall(0.1, "l2^2.0").ground == "l2^2"


def test_bad_threat_models() -> None:
    network, (images, labels) = network_of("mlp"), images_of("mlp")
    certifier = Certifier(network)
    with pytest.raises(UnknownNameError, match="unknown ground cost 'l3'"):
        certifier.search(images, labels, Threat("l3"))
    with pytest.raises(InvalidInputError, match="given the power 0.5, expected a finite number p >= 1"):
        certifier.search(images, labels, Threat("l2^0.5"))
    with pytest.raises(InvalidInputError, match="given the window 4, expected an odd number >= 1"):
        certifier.search(images, labels, Threat("local:4"))
    for search in (certifier.search, LinearCertifier(network_of("linear")).search):
        own = images_of("mlp" if search == certifier.search else "linear")
        with pytest.raises(InvalidInputError, match="a window of 7 pixels on images of 5 x 5: expected at most 5"):
            search(*own, Threat("local:7"))
        with pytest.raises(InvalidInputError, match=r"cap: given -1, expected None or a finite number > 0"):
            search(*own, Threat(cap=-1))
        with pytest.raises(InvalidInputError, match=r"image 0 has a pixel of 1: expected at most the cap, 0\.9"):
            search(*own, Threat(cap=0.9))
    with pytest.raises(InvalidInputError, match=r"image 0 has a pixel of 1: expected at most the cap, 0\.9"):
        certifier.certify(images, labels, WassersteinBall(0.1, "l1", 0.9))
    with pytest.raises(InvalidInputError, match="domain flow with ground cost l2: expected l1, or the domain image"):
        MarginBounds(network, Threat("l2"), options=EngineOptions(domain="flow"))
