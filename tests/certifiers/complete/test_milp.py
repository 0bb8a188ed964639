"""Mixed-integer programs: HiGHS proposes, our own arithmetic proves; scales, lies, failures, sizes."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from contracts import exact_margins, random_network, sparse_images
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import flowverify as fv
from flowverify import Network, WassersteinBall
from flowverify.certifiers.complete import milp as program_module
from flowverify.certifiers.complete import milp as proof_module
from flowverify.certifiers.complete.milp import DualProof, MilpCertifier, NetworkProgram, Objective
from flowverify.deadline import Deadline
from flowverify.errors import BoundError


def case(seed: int) -> tuple[Network, Tensor, int]:
    """Two layers of ReLUs above a 3x3 image, and its class."""
    layers = [nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)]
    network = random_network((1, 3, 3), layers, seed)
    image = sparse_images((1, 3, 3), 1, seed)
    return network, image, int(network(image).argmax(1))


def ramp(scale: float, mass: float, last: float) -> tuple[Network, Tensor]:
    """A ReLU of a ramp over 24 pixels, all of ``mass`` / 24: moving all of it by 7.2 pixels reaches the threshold."""
    network = Network.sequential(
        (1, 1, 24), [nn.Flatten(), nn.Linear(24, 2), nn.ReLU(), nn.Linear(2, 2)]
    ).double()  # fmt: skip
    with torch.no_grad():
        first, second = network.nodes[1].operation, network.nodes[3].operation
        first.weight.zero_()
        first.weight[0] = scale * torch.arange(24, dtype=torch.float64)
        first.bias.zero_()
        threshold = mass * (float(first.weight[0].mean()) + 7.2 * scale)
        second.weight.copy_(last * torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
        second.bias.copy_(last * torch.tensor([threshold, 0.0]))
    return network, torch.full((1, 1, 1, 24), mass / 24, dtype=torch.float64)


@pytest.mark.parametrize(("scale", "mass", "last"), [(0.9e-7, 1.0, 1.0), (1e9, 1e-5, 1e-7), (1.0, 1e6, 1e6)])
def test_any_scale(scale: float, mass: float, last: float) -> None:
    network, image = ramp(scale, mass, last)
    certifier, label = MilpCertifier(network), torch.tensor([0])
    for radius, verdict in ((7.19, "certified"), (7.21, "falsified"), (8.0, "falsified")):
        assert certifier.certify(image, label, WassersteinBall(radius))[0].verdict == verdict, radius
    found = certifier.search(image, label)[0]
    assert found.upper_radius is not None
    assert found.radius < 7.2 <= found.upper_radius * (1 + 1e-6)
    assert found.upper_radius <= found.radius * (1 + 1e-4)


@cache
def posed(seed: int, radius: float) -> tuple[NetworkProgram, Objective, float]:
    """The program of a case, the margin over one other class, and its least value by enumeration."""
    network, image, label = case(seed)
    budget = radius * float(image.sum())
    exact = exact_margins(network, image[0], label, budget)[0]
    program = MilpCertifier(network).program(image[0], budget)
    return program, program.margin(label, 0 if label else 1), exact


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1), radius=st.sampled_from([0.02, 0.5]), draw=st.integers(0, 2**32 - 1))
def test_any_multipliers_give_a_bound(seed: int, radius: float, draw: int) -> None:
    program, objective, exact = posed(seed, radius)
    proof = DualProof(program, radius * float(case(seed)[1].sum()), Deadline())
    generator = np.random.default_rng(draw)
    prices = generator.exponential(size=len(program.right)) * (generator.random(len(program.right)) < 0.3)
    root = proof_module._Node(np.zeros(len(program.upper)), program.upper, prices)
    assert proof._bound(objective, prices, root) <= exact + 1e-7 * (1 + abs(exact))


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_comes_within_any_gap_of_the_optimum(seed: int) -> None:
    network, image, label = case(seed)
    budget = 0.5 * float(image.sum())
    program = MilpCertifier(network).program(image[0], budget)
    proof, others = DualProof(program, budget, Deadline()), [t for t in range(3) if t != label]
    for other, exact in zip(others, exact_margins(network, image[0], label, budget), strict=True):
        gap, objective = 1e-6 * (1 + abs(exact)), program.margin(label, other)
        assert exact - gap < proof.least(objective, exact - gap) <= exact + gap
        assert not proof.least(objective, exact + gap) > exact + gap
    assert proof.least(program.margin(label, others[0]), -1e9) > -1e9
    late = DualProof(program, budget, Deadline(seconds=0.0))
    assert late.least(program.margin(label, others[0]), 1e9) == -math.inf


def decided(certifier: MilpCertifier, image: Tensor, label: int, radius: float) -> fv.Certificate:
    return certifier.certify(image, torch.tensor([label]), WassersteinBall(radius))[0]


class TestHighsIsNotBelieved:
    """A radius beyond the true one, where the solver's answers are replaced by false ones."""

    network, image, label = case(1)

    def beyond(self) -> tuple[MilpCertifier, float]:
        certifier = MilpCertifier(self.network)
        found = certifier.search(self.image, torch.tensor([self.label]))[0]
        assert found.upper_radius is not None and found.upper_radius < found.radius * 1.001
        return certifier, 1.05 * found.upper_radius

    def test_a_margin_that_it_takes_for_proven(self, monkeypatch: pytest.MonkeyPatch) -> None:
        certifier, radius = self.beyond()

        def lie(cost: Any, **how: Any) -> OptimizeResult:
            return OptimizeResult(status=0, x=np.zeros(len(cost)), fun=1e9, mip_dual_bound=1e9, message="")

        monkeypatch.setattr(program_module, "milp", lie)
        assert decided(certifier, self.image, self.label, radius).verdict == "unknown"
        assert decided(certifier, self.image, self.label, radius / 1.1).verdict == "certified"
        assert certifier.search(self.image, torch.tensor([self.label]))[0].radius <= radius / 1.05

    def test_infeasible_is_no_proof(self, monkeypatch: pytest.MonkeyPatch) -> None:
        certifier, radius = self.beyond()
        monkeypatch.setattr(program_module, "milp", lambda *_, **__: OptimizeResult(status=2, x=None, message=""))
        found = decided(certifier, self.image, self.label, radius)
        assert found.verdict == "error"
        assert "finds the ball empty" in found.note
        assert certifier.search(self.image, torch.tensor([self.label]))[0].radius <= radius / 1.05

    @pytest.mark.parametrize("status", [0, 2])
    def test_multipliers_that_prove_nothing(self, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
        certifier, radius = self.beyond()

        def lie(cost: Any, *, A_ub: Any, **how: Any) -> OptimizeResult:  # noqa: N803
            prices = OptimizeResult(marginals=np.full(A_ub.shape[0], -1e3))
            return OptimizeResult(status=status, x=np.zeros(len(cost)), fun=1e9, ineqlin=prices)

        monkeypatch.setattr(proof_module, "linprog", lie)
        assert decided(certifier, self.image, self.label, radius / 1.06).verdict == "unknown"

    def test_a_failure_is_the_error_of_its_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        certifier, radius = self.beyond()
        genuine, calls = program_module.milp, []

        def fails_once(*given: Any, **how: Any) -> OptimizeResult:
            calls.append(given)
            return OptimizeResult(status=4, message="out of order") if len(calls) == 1 else genuine(*given, **how)

        monkeypatch.setattr(program_module, "milp", fails_once)
        images, labels = self.image.repeat(2, 1, 1, 1), torch.tensor([self.label] * 2)
        first, second = certifier.certify(images, labels, WassersteinBall(radius / 2))
        assert (first.verdict, second.verdict) == ("error", "certified")
        assert "out of order" in first.note

    def test_a_bound_that_breaks_down_is_the_error_of_its_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        certifier, radius = self.beyond()
        genuine, calls = certifier.program, []

        def fails_once(image: Tensor, trial: float) -> NetworkProgram:
            calls.append(trial)
            if len(calls) == 1:
                raise BoundError("bounds out of order")
            return genuine(image, trial)

        monkeypatch.setattr(certifier, "program", fails_once)
        images, labels = self.image.repeat(2, 1, 1, 1), torch.tensor([self.label] * 2)
        first, second = certifier.certify(images, labels, WassersteinBall(radius / 2))
        assert (first.verdict, second.verdict) == ("error", "certified")
        assert "bounds out of order" in first.note


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("hidden", [0, 1, 3])
def test_the_smallest_programs(shape: tuple[int, int, int], hidden: int) -> None:
    width = math.prod(shape)
    between = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
    network = random_network(shape, [nn.Flatten(), *between, nn.Linear(hidden or width, 2)], 3)
    image = torch.full((1, *shape), 0.5, dtype=torch.float64)
    certifier, label = MilpCertifier(network), int(network(image).argmax(1))
    for radius in (0.0, 0.3):
        exact = min(exact_margins(network, image[0], label, radius * float(image.sum()))) if width > shape[0] else 1.0
        assert decided(certifier, image, label, radius).verdict == ("certified" if exact > 0 else "falsified")
    found = certifier.search(image, torch.tensor([label]))[0]
    assert found.verdict == "certified"
    if width == shape[0]:
        assert found.radius == 0.0 and found.upper_radius is None


def exactly(network: Network, image: Tensor) -> list[Fraction]:
    """The logits of a chain of Linear and ReLU at an image, in rational arithmetic."""
    values = [Fraction(v) for v in image.flatten().tolist()]
    for node in network.nodes:
        operation = node.operation
        if isinstance(operation, nn.Linear):
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(operation.weight.tolist(), operation.bias.tolist(), strict=True)
            ]
        elif isinstance(operation, nn.ReLU):
            values = [max(v, Fraction(0)) for v in values]
    return values


def test_no_certificate_where_large_weights_cancel_to_a_negative_margin() -> None:
    wrong_by_rounding = certified = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        network = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)]).double()
        image = torch.rand(1, 1, 2, 2, generator=generator, dtype=torch.float64)
        first, second = network.nodes[1].operation, network.nodes[3].operation
        offset = 2.0 ** (10 + seed)
        with torch.no_grad():
            for parameter in (*first.parameters(), *second.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            first.weight.add_(offset)
            second.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
            # The exact margin is a few units of rounding on either side of zero.
            gap = exactly(network, image)[0] - exactly(network, image)[1]
            second.bias[0] -= float(gap) * (1 + 1e-13)
        exact = exactly(network, image)
        computed = network(image)[0]
        label = int(computed[0] < computed[1])
        wrong_by_rounding += exact[label] < exact[1 - label]
        verdict = decided(MilpCertifier(network), image, label, 0.0).verdict
        assert verdict != "certified" or exact[label] > exact[1 - label], (seed, exact)
        with torch.no_grad():
            second.bias[label] += offset * 1e-6
        certified += decided(MilpCertifier(network), image, label, 0.0).verdict == "certified"
    assert wrong_by_rounding > 5
    assert certified == 40


def test_a_dense_layer_along_the_rows_of_an_image() -> None:
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)]
    network = random_network((1, 3, 4), layers, 1)
    image = sparse_images((1, 3, 4), 1, 1)
    label = network(image).argmax(1)
    found = MilpCertifier(network).search(image, label)[0]
    exact = fv.make_certifier(network, "complete").search(image, label)[0]
    assert found.radius == pytest.approx(exact.radius, rel=0.01)
