"""The fuzzer of soundness: a fixed number of its cases, its oracles, and that it sees what is wrong."""

from dataclasses import replace
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from contracts import quick
from torch import nn

from benchmarks.soundness import checks
from benchmarks.soundness.balls import Moves, Threat, best_points, scattered, single_moves
from benchmarks.soundness.checks import Case, run_case
from benchmarks.soundness.exact import NotExact, exact_margins, least_radius, magnitudes
from benchmarks.soundness.networks import KINDS, Wired, draw_network
from benchmarks.soundness.question import draw_images
from benchmarks.soundness.tally import Tally, report
from benchmarks.soundness_fuzz import case_seed, run_cases
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.linear import LinearCertifier
from flowverify.errors import InvalidInputError

GROUNDS = ("l1", "l2", "l2^2", "l1^1.5", "local:3", "local:5:l1")
PARTS, CASES = 2, 10


@pytest.mark.parametrize("part", quick(range(PARTS), 1))
def test_nothing_that_is_certified_is_refuted(part):
    tally = Tally()
    run_cases(0, part * CASES, CASES, tally)
    assert tally.failures == []
    assert tally.networks == CASES and tally.points > 1_000 * CASES and sum(tally.certificates.values()) > 8 * CASES
    assert sum(count for key, count in tally.certificates.items() if key[2] == "certified") > 2 * CASES
    assert tally.bounds > CASES


def test_a_case_depends_on_its_seed_alone():
    once, again = Tally(), Tally()
    run_cases(3, 5, 1, once)
    torch.manual_seed(1)
    torch.rand(3)
    run_case(case_seed(3, 5), again)
    assert once == again


def failures(kind, limit=40):
    """What the fuzzer says of the first cases of a kind, until it says something."""
    for number in range(limit):
        tally = Tally()
        case = Case(case_seed(7, number), tally, kind=kind)
        case.run()
        if tally.failures:
            return [text for _, text in tally.failures]
    return []


def test_raised_margins_are_found(monkeypatch):
    honest = MarginBounds.margins

    def raised(self, *arguments, **keywords):
        bounds = honest(self, *arguments, **keywords)
        return bounds + 0.1 * bounds.abs()

    monkeypatch.setattr(MarginBounds, "margins", raised)
    assert any("lower bound exceeds a value" in text for text in failures("tiny"))


def test_intervals_that_are_too_narrow_are_found(monkeypatch):
    honest = MarginBounds.neurons

    def narrow(self, *arguments, **keywords):
        return [(low + 0.1 * (high - low), high) for low, high in honest(self, *arguments, **keywords)]

    monkeypatch.setattr(MarginBounds, "neurons", narrow)
    assert any("leaves its bounds" in text for text in failures("tiny"))


def test_radii_that_are_too_large_are_found(monkeypatch):
    honest = LinearCertifier.search
    monkeypatch.setattr(
        LinearCertifier, "search", lambda *a, **k: [replace(one, radius=1.1 * one.radius) for one in honest(*a, **k)]
    )
    assert any("certified, but within" in text for text in failures("affine"))


@pytest.mark.parametrize("share", [1.5, 0.2], ids=["outside of the ball", "classified right"])
def test_wrong_witnesses_are_found(monkeypatch, share):
    honest = CompleteCertifier.search

    def moved(self, images, *arguments, **keywords):
        found = honest(self, images, *arguments, **keywords)
        return [
            one if one.witness is None else replace(one, witness=image + share * (one.witness - image))
            for image, one in zip(images, found, strict=True)
        ]

    monkeypatch.setattr(CompleteCertifier, "search", moved)
    assert any("witness of" in text for text in failures("tiny"))


def test_radii_that_are_too_small_to_be_exact_are_found(monkeypatch):
    honest = CompleteCertifier.search
    monkeypatch.setattr(
        CompleteCertifier, "search", lambda *a, **k: [replace(o, upper_radius=0.9 * o.radius) for o in honest(*a, **k)]
    )
    assert any("upper_radius" in text for text in failures("tiny"))


@pytest.mark.parametrize(("error", "failing"), [(ValueError, True), (InvalidInputError, False)])
def test_only_errors_of_the_family_are_refusals(monkeypatch, error, failing):
    def broken(*arguments, **keywords):
        raise error("broken")

    monkeypatch.setattr(checks, "load_network", broken)
    tally = Tally()
    run_case(0, tally)
    assert bool(tally.failures) == failing and bool(tally.refusals) != failing
    assert ("failures 1 in 1 cases" in report(tally)) == failing


@pytest.mark.parametrize("kind", KINDS)
def test_exact_arithmetic_agrees_with_torch_to_the_rounding_that_is_allowed(kind):
    compared = 0
    for seed in range(25):
        torch.manual_seed(seed)
        dice = Random(seed)
        network = draw_network(dice, (2, 3, 4), kind).oracle
        image = draw_images(dice, (2, 3, 4), 1)[0]
        values = network(image[None])[0]
        if not bool(torch.isfinite(values).all()):
            continue
        try:
            exact = exact_margins(network, np.frompyfunc(Fraction, 1, 1)(image.numpy()), 0)
        except NotExact:
            continue
        slack = float(magnitudes(network, image).sum()) * 2**-42
        torch.testing.assert_close(
            torch.tensor([float(margin) for margin in exact], dtype=torch.float64), values[0] - values[1:],
            rtol=0, atol=slack,
        )  # fmt: skip
        compared += 1
    assert compared > 12


def test_exact_arithmetic_sees_what_float64_rounds():
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0**53, 1.0], [2.0**53, 0.0]]))
        layer.bias.zero_()
    network = Wired([nn.Flatten(), layer], [(0,), (1,)])
    image = torch.tensor([[[1.0, 1.0]]], dtype=torch.float64)
    values = network(image[None])[0].detach()
    assert float(values[0] - values[1]) != 1
    assert exact_margins(network, np.frompyfunc(Fraction, 1, 1)(image.numpy()), 0) == [1]


@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("ground", GROUNDS)
def test_points_are_in_the_ball_and_the_best_is_the_best(ground, cap):
    torch.manual_seed(0)
    threat = Threat((2, 3, 5), ground, cap)
    image = torch.rand(2, 15, dtype=torch.float64)
    image[0, 3:9] = 0
    for radius in (0.05, 0.6, 3.0):
        budget = threat.budget(image, radius)
        gain = torch.randn(3, 2, 15, dtype=torch.float64)
        best = best_points(threat, image, budget, gain)
        points = torch.cat([scattered(threat, image, budget, 60), single_moves(threat, image, budget, 40), best])
        assert float(points.min()) >= 0 and (cap is None or float(points.max()) <= cap)
        torch.testing.assert_close(points.sum(-1), image.sum(-1).expand(len(points), -1))
        for point in points[::9]:
            assert threat.distance(image, point) <= radius * (1 + 1e-9)
        reached = (gain[:, None] * points).sum((-1, -2))
        own = reached[torch.arange(3), len(points) - 3 + torch.arange(3)]
        assert bool((reached.amax(1) <= own + 1e-6).all())
        if cap is None:
            with_limit = replace(threat, cap=1e6)
            checked = best_points(with_limit, image, budget, gain)  # the same maximum, as a linear program
            torch.testing.assert_close((gain * checked).sum((-1, -2)), own, rtol=1e-6, atol=1e-6)


def test_the_radius_by_enumeration_is_that_of_a_network_worked_out_by_hand():
    """Mass 1 on the left of three pixels; relu(x_2) + relu(-x_0 + 1/2) reaches 1/4 when a quarter has moved by two."""
    first, last = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]))
        first.bias.copy_(torch.tensor([0.0, 0.5]))
        last.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        last.bias.copy_(torch.tensor([0.25, 0.0]))
    network = Wired([nn.Flatten(), first, nn.ReLU(), last], [(0,), (1,), (2,), (3,)])
    image = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert Moves(Threat((1, 1, 3), "l1", None), image).price.tolist() == [1.0, 2.0]
    found = {ground: least_radius(network, Threat((1, 1, 3), ground, None), image, 0) for ground in ("l1", "l2^2")}
    assert found == pytest.approx({"l1": 0.5, "l2^2": 0.75**0.5}, rel=1e-6)
    assert least_radius(network, Threat((1, 1, 3), "l1", 1.0), image, 0) == pytest.approx(0.5)
    assert least_radius(network, Threat((1, 1, 3), "l1", None), image, 1) == 0
