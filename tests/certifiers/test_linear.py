"""Linear classifiers: closed form, exact radius and linear program against each other and against hand work."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contracts import random_network, sparse_images
from torch import nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.linear import (
    LinearCertifier,
    LinearProgram,
    exact_radius,
    half_spaces,
    l2_radius,
    program_radius,
    vanilla_radius,
)
from flowverify.errors import InvalidInputError, SolverError, UnknownNameError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.results import Verdict
from flowverify.transport.distance import wasserstein_distance


def linear_network(weights: torch.Tensor, bias: torch.Tensor, shape: tuple[int, int, int]) -> Network:
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    layer.load_state_dict({"weight": weights, "bias": bias})
    return Network.sequential(shape, [nn.Flatten(), layer])


def random_problem(seed: int, size: int = 6, channels: int = 1) -> tuple[Network, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (channels, size, size)
    pixels = channels * size * size
    network = linear_network(torch.randn(4, pixels, generator=generator), torch.randn(4, generator=generator), shape)
    images = torch.rand(5, *shape, generator=generator) * (torch.rand(5, *shape, generator=generator) < 0.5)
    images[:, :, 0, 0] += 0.1
    return network, images, network(images).argmax(1)


def test_the_printed_choice_of_edge_is_wrong() -> None:
    # Two pixels. f_0 - f_1 = 1 - 4 x_1 + ... written out: w_1 = W_1 - W_0 = (0, -4) as an image, and x = (1/4, 3/4)
    # has margin m = f_0 - f_1 = 1. The only edge leads from pixel 0 to pixel 1, with coefficient -4: moving 1/4 of
    # mass from pixel 1 to pixel 0 reaches the boundary, so the radius is 1/4. The proof of Lemma 7 picks the edge
    # with the largest SIGNED coefficient; add a third pixel that makes it +1, and it finds the radius 1.
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, -4.0, -3.0]])
    network = linear_network(weights, torch.tensor([0.0, 2.0]), (1, 1, 3))
    image = torch.tensor([[[[0.25, 0.75, 0.0]]]])
    labels = torch.tensor([0])
    spaces = half_spaces(network, image, labels)
    assert spaces.margins.tolist() == [[1.0]]
    signed = Grid(1, 3).differences(spaces.normals[0]).max()
    assert float(spaces.margins / signed) == 1.0
    assert float(vanilla_radius(spaces).radius) == 0.25
    # And an image at distance 1/4 is on the boundary, so 1 is wrong, not merely different.
    attacked = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    assert float(wasserstein_distance(image, attacked)) == pytest.approx(0.25)
    logits = network(attacked)
    assert float(logits[0, 0] - logits[0, 1]) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_methods_and_the_points_that_attain_them(seed: int, channels: int) -> None:
    network, images, labels = random_problem(seed, channels=channels)
    spaces = half_spaces(network, images, labels)
    vanilla, squared, exact = vanilla_radius(spaces), l2_radius(spaces), exact_radius(spaces)
    assert bool((squared.radius <= vanilla.radius + 1e-12).all())
    assert bool((vanilla.radius <= exact.radius + 1e-12).all())
    precise = LinearCertifier(network).precise
    for found in (vanilla, squared, exact):
        assert found.nearest is not None
        logits = precise(found.nearest)
        rows = torch.arange(len(labels))
        torch.testing.assert_close(logits[rows, labels], logits[rows, found.target], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.nearest.flatten(1).sum(1), spaces.mass, rtol=1e-12, atol=0)
    assert exact.nearest is not None
    assert bool((exact.nearest >= 0).all())
    torch.testing.assert_close(wasserstein_distance(spaces.images, exact.nearest), exact.radius, rtol=1e-9, atol=1e-12)


def test_vanilla_and_l2_against_a_minimum_over_flows() -> None:
    # ||delta|| subject to (A^T w) . delta = m: m / ||A^T w||_dual, here with A^T as an explicit matrix.
    network, images, labels = random_problem(7)
    spaces = half_spaces(network, images, labels)
    incidence = torch.from_numpy(Grid(6, 6).incidence_scipy().toarray())
    coefficients = spaces.normals.flatten(2) @ incidence
    for found, order in ((vanilla_radius(spaces), torch.inf), (l2_radius(spaces), 2)):
        expected = spaces.margins / torch.linalg.vector_norm(coefficients, order, dim=-1) / spaces.mass[:, None]
        torch.testing.assert_close(found.by_class, expected)


def test_exact_radius_equals_the_program() -> None:
    program = LinearProgram(Grid(6, 6))
    for seed in range(10):
        network, images, labels = random_problem(seed)
        spaces = half_spaces(network, images, labels)
        by_program, exact = program_radius(spaces, program), exact_radius(spaces)
        torch.testing.assert_close(exact.by_class, by_program.by_class, rtol=1e-6, atol=1e-9)
        assert by_program.nearest is not None
        gap = wasserstein_distance(spaces.images, by_program.nearest) - by_program.radius
        assert float(gap.abs().max()) < 1e-6


def test_a_class_that_no_image_reaches_is_infinitely_far() -> None:
    network = linear_network(torch.zeros(2, 4), torch.tensor([1.0, 0.0]), (1, 2, 2))
    images = torch.ones(1, 1, 2, 2)
    spaces = half_spaces(network, images, torch.tensor([0]))
    for found in (vanilla_radius(spaces), l2_radius(spaces), exact_radius(spaces), program_radius(spaces)):
        assert float(found.radius) == torch.inf
    certificate = LinearCertifier(network).search(images, torch.tensor([0]))[0]
    assert certificate.radius == 2.0  # the diameter: the ball holds every image
    assert certificate.upper_radius is None


def test_an_infeasible_program_is_an_error_with_the_status() -> None:
    program = LinearProgram(Grid(2, 2))
    image = torch.full((4,), 0.25, dtype=torch.float64).numpy()
    with pytest.raises(SolverError, match="status 'infeasible"):
        program.solve(image, image * 0, 1.0)


@pytest.mark.parametrize("method", ["linear", "linear-lp"])
def test_a_solver_that_fails_gives_an_error_and_no_radius(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, labels = random_problem(1)
    certifier = LinearCertifier(network, method)

    def fail(*_: object) -> None:
        raise SolverError("linear program: HiGHS ended with status 'unbounded', expected 'optimal'")

    monkeypatch.setattr(LinearProgram, "solve", fail)
    for certificate in certifier.search(images, labels):
        if method == "linear-lp":
            assert certificate.verdict is Verdict.ERROR
            assert certificate.radius == 0
            assert certificate.upper_radius is None
            assert "unbounded" in certificate.note
        else:
            assert certificate.verdict is Verdict.CERTIFIED


@pytest.mark.parametrize("method", ["linear", "linear-lp"])
def test_certified_inside_and_falsified_outside_of_the_exact_radius(method: str) -> None:
    network, images, labels = random_problem(2)
    certifier = LinearCertifier(network, method)
    for index, found in enumerate(certifier.search(images, labels)):
        assert found.verdict is Verdict.CERTIFIED
        assert found.upper_radius == pytest.approx(found.radius, rel=1e-8)
        one, label = images[index : index + 1], labels[index : index + 1]
        inside = certifier.certify(one, label, WassersteinBall(0.999 * found.radius))[0]
        outside = certifier.certify(one, label, WassersteinBall(1.001 * found.radius))[0]
        assert (inside.verdict, outside.verdict) == (Verdict.CERTIFIED, Verdict.FALSIFIED)
        witness, wrong = certifier.witness(WassersteinBall(1.001 * found.radius).around(one), label)
        assert bool(wrong)
        assert int(certifier.precise(witness).argmax()) != int(label)
        assert float(wasserstein_distance(one, witness)) <= 1.001 * found.radius * (1 + 1e-8)


def test_crown_finds_the_exact_radius() -> None:
    network, images, labels = random_problem(3)
    exact = exact_radius(half_spaces(network, images, labels)).radius
    for bound in ("crown", "ibp", "best"):
        found = search_radius(Certifier(network, "fine-tuned", bound), images, labels, tolerance=1e-5)
        radii = torch.tensor([one.radius for one in found], dtype=torch.float64)
        assert bool((radii <= exact).all())
        torch.testing.assert_close(radii, exact, rtol=1e-4, atol=0)
    vanilla = vanilla_radius(half_spaces(network, images, labels)).radius
    found = search_radius(Certifier(network, "vanilla", "crown"), images, labels, tolerance=1e-5)
    torch.testing.assert_close(
        torch.tensor([one.radius for one in found], dtype=torch.float64), vanilla, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("method", ["linear", "linear-lp"])
def test_margins_within_rounding_are_not_proven(method: str) -> None:
    # Logits of 1e9 with a margin of 2e-5: 176 roundings of 1.1e-16 of each logit may make a margin of 3.9e-5.
    images, labels = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for offset, verdict in ((0.0, Verdict.CERTIFIED), (1e9, Verdict.UNKNOWN)):
        network = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 2)]).double()
        weight, bias = network.parameters()
        weight.copy_(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
        bias.copy_(torch.tensor([offset + 2e-5, offset], dtype=torch.float64))
        certifier = LinearCertifier(network, method)
        (found,) = certifier.search(images, labels)
        (at_zero,) = certifier.certify(images, labels, WassersteinBall(0.0))
        assert (found.verdict, at_zero.verdict) == (verdict, verdict)
        assert (found.radius > 0) == (verdict is Verdict.CERTIFIED)
        assert found.upper_radius == pytest.approx(2e-5 / 4 / 4, rel=1e-2)


def test_l2_ground_lies_between_the_converted_radius_and_the_l1_radius() -> None:
    network, images, labels = random_problem(3)
    certifier, by_program = LinearCertifier(network), LinearCertifier(network, "linear-lp")
    for l1, l2 in zip(certifier.search(images, labels), certifier.search(images, labels, Threat("l2")), strict=True):
        assert l1.radius / 2**0.5 * (1 - 1e-9) <= l2.radius <= l1.radius * (1 + 1e-12)
    for l1, l2 in zip(by_program.search(images, labels), by_program.search(images, labels, Threat("l2")), strict=True):
        assert l2.radius == pytest.approx(l1.radius / 2**0.5)
        assert l2.upper_radius is None
    with pytest.raises(InvalidInputError, match="method linear-lp with ground cost 'l2': expected l1"):
        by_program.radii(images, labels, "l2")


def test_a_cap_raises_linear_radii() -> None:
    network, images, labels = random_problem(3)
    images = images.clamp(max=1)
    labels = network(images).argmax(1)
    certifier = LinearCertifier(network)
    free, capped = certifier.search(images, labels), certifier.search(images, labels, Threat(cap=1.0))
    for index, (without, within) in enumerate(zip(free, capped, strict=True)):
        assert within.radius >= without.radius and within.cap == 1.0 and within.upper_radius is None
        one, own = images[index : index + 1], labels[index : index + 1]
        ball = WassersteinBall(within.radius * 0.999, "l1", 1.0)
        assert certifier.certify(one, own, ball)[0].verdict is Verdict.CERTIFIED
        far = certifier.certify(one, own, WassersteinBall(within.radius * 2, "l1", 1.0))[0]
        assert far.verdict is not Verdict.CERTIFIED
    assert any(within.radius > 1.01 * without.radius for without, within in zip(free, capped, strict=True))


def test_misclassified_images_have_radius_zero() -> None:
    network, images, labels = random_problem(4)
    wrong = (labels + 1) % 4
    for certificate in LinearCertifier(network).search(images, wrong):
        assert certificate.verdict is Verdict.MISCLASSIFIED
        assert certificate.radius == 0


def test_refusals() -> None:
    deep = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)])
    with pytest.raises(UnsupportedOperationError, match=r"layer '2_ReLU' \(ReLU\) is not affine"):
        LinearCertifier(deep)
    network, images, labels = random_problem(5)
    with pytest.raises(UnknownNameError, match="unknown method 'crown': expected one of linear, linear-lp"):
        LinearCertifier(network, "crown")
    with pytest.raises(InvalidInputError, match="label 9"):
        LinearCertifier(network).search(images, labels * 0 + 9)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_programs_know_no_units(scale: float) -> None:
    """Mass and weights far below and above the solver's absolute tolerances."""
    network = random_network((1, 3, 3), [nn.Flatten(), nn.Linear(9, 3)], 5)
    image = sparse_images((1, 3, 3), 1, 5)
    for parameter in network.parameters():
        parameter.mul_(scale)
    network.nodes[1].operation.get_parameter("bias").mul_(1e-4)
    label = network(1e-4 * image).argmax(1)
    exact, program = (
        LinearCertifier(network, method).search(1e-4 * image, label)[0] for method in ("linear", "linear-lp")
    )
    assert exact.radius > 0
    assert program.radius == pytest.approx(exact.radius, rel=1e-6)


def test_a_flow_that_misses_the_margin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    program, image, normal = LinearProgram(Grid(1, 3)), np.full(3, 1 / 3), np.arange(3.0)
    assert program.solve(image, normal, 0.1)[0] == pytest.approx(0.1)
    monkeypatch.setattr(program, "_flow", SimpleNamespace(value=np.zeros(2)))
    with pytest.raises(SolverError, match="HiGHS's flow gains 0, expected the margin, 0.1"):
        program.solve(image, normal, 0.1)
