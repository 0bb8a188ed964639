"""The functions of one call reach every method by name."""

import pytest
import torch

import flowverify as fv
from flowverify.errors import UnknownNameError
from flowverify.registry import METHODS


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
