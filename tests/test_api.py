"""The functions of one call reach every method by name."""

import pytest
import torch

import flowverify as fv
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import METHODS
from flowverify.smoothing import Noise, Splitting


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    network = fv.Network.sequential((1, 4, 4), [torch.nn.Flatten(), torch.nn.Linear(16, 3)])
    images = torch.rand(2, 1, 4, 4)
    return network, images, network(images).argmax(1).detach()


def test_every_method_gives_radii_and_exact_ones_agree(problem):
    network, images, labels = problem
    radii = {method: fv.certified_radius(network, images, labels, method=method) for method in METHODS}
    assert set(radii) > {"vanilla", "fine-tuned", "linear", "complete", "milp"}
    for method in ("linear-lp", "complete", "milp", "fine-tuned"):
        torch.testing.assert_close(radii[method], radii["linear"], rtol=0.0101, atol=0)
    assert bool((radii["vanilla"] <= radii["linear"]).all())


@pytest.mark.parametrize("method", ["fine-tuned", "linear", "complete"])
def test_verdicts_on_both_sides_of_the_radius(problem, method):
    network, images, labels = problem
    radius = float(fv.certified_radius(network, images[:1], labels[:1], method="linear")[0])
    inside, outside = (
        fv.certify(network, images[0], labels[0], fv.WassersteinBall(radius * factor), method=method).verdict
        for factor in (0.98, 1.02)
    )
    assert inside == "certified"
    assert outside == ("unknown" if method == "fine-tuned" else "falsified")


def test_unknown_method(problem):
    network, images, labels = problem
    with pytest.raises(UnknownNameError, match="unknown method 'guess': expected one of MODULE:CLASS, complete"):
        fv.certified_radius(network, images, labels, method="guess")


def test_attacks_and_certificates_bracket_the_exact_radius(problem):
    network, images, labels = problem
    exact = fv.certified_radius(network, images, labels, method="linear")
    nearest = fv.find_adversarial(network, images, labels, effort="fast")
    assert bool((nearest.radius >= exact).all()) and nearest.attack == "minimal"
    inside = fv.find_adversarial(network, images, labels, fv.WassersteinBall(0.9 * float(exact.min())), "frank-wolfe")
    assert inside.outcome == ("not found",) * 2
    with pytest.raises(InvalidInputError, match="option 'steps' of attack minimal: unknown"):
        fv.find_adversarial(network, images, labels, steps=3)


def test_smooth(problem):
    network, images, labels = problem
    found = fv.smooth(network, images, labels, 0.01, "l2", n0=20, n=100, seed=1)
    assert [one.ground for one in found] == ["l2"] * 2 and found[0].method == "wasserstein-smoothing"
    again = fv.smooth(network, images, labels, Noise(0.01), "l2", n0=20, n=100, seed=1)
    assert [one.radius for one in found] == [one.radius for one in again]
    split = fv.smooth(network, images, labels, Splitting(0.5, 2))
    assert split[0].bound == "exact" and split[0].alpha == 0
    with pytest.raises(InvalidInputError, match="options n: given with splitting, which has none"):
        fv.smooth(network, images, labels, Splitting(0.5, 2), n=10)


def test_options_are_taken_by_every_function(problem):
    network, images, labels = problem
    radius = fv.certified_radius(network, images, labels, method="complete", timeout=5, tolerance=0.2, adversary=None)
    exact = fv.certified_radius(network, images, labels, method="linear")
    assert bool((radius <= exact).all()) and bool((radius * 1.21 >= exact).all())
    ball = fv.WassersteinBall(0.5 * float(exact[0]))
    assert fv.certify(network, images[0], labels[0], ball, method="complete", timeout=5).verdict == "certified"
    rough = fv.certified_radius(network, images, labels, tolerance=0.5)
    assert bool((rough * 1.5 >= fv.certified_radius(network, images, labels, options={"tolerance": 1e-4})).all())
