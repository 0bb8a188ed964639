"""The maximum over references: an exact certifier cannot gain by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowverify.api import make_certifier
from flowverify.ball import WassersteinBall
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.references import Reference, check_references, maximum_over_references, sample_references
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.results import Verdict
from flowverify.transport.distance import channel_masses


@pytest.fixture(scope="module")
def problem() -> tuple[Network, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = Network.sequential(
        (1, 6, 6), [nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)]
    )
    images = torch.rand(4, 1, 6, 6) * (torch.rand(4, 1, 6, 6) < 0.5) + 0.01
    return network, images, network(images).argmax(1)


def test_kinds_in_equal_shares_and_masses(problem: tuple[Network, torch.Tensor, torch.Tensor]) -> None:
    images = problem[1]
    references = sample_references(6, images, pool=torch.rand(9, 1, 6, 6))
    assert [one.name.split()[1] for one in references] == ["uniform-random"] * 2 + ["point"] * 2 + ["image"] * 2
    check_references(references, images)
    for one in references:
        torch.testing.assert_close(channel_masses(one.images), channel_masses(images))
    first, second = references[2].images, references[3].images
    assert not torch.equal(first, second)
    assert bool(((first > 0).flatten(1).sum(1) == 1).all())
    again = sample_references(6, images, pool=torch.rand(9, 1, 6, 6))
    assert torch.equal(again[0].images, references[0].images)
    assert {one.name.split()[1] for one in sample_references(4, images)} == {"uniform-random", "point"}


@pytest.mark.parametrize("method", ["vanilla", "fine-tuned"])
def test_every_reference_gives_the_same_radius(
    method: str, problem: tuple[Network, torch.Tensor, torch.Tensor]
) -> None:
    network, images, labels = problem
    certifier = Certifier(network, method, "crown", domain="flow")
    references = sample_references(6, images, pool=torch.rand(3, 1, 6, 6))
    found = maximum_over_references(certifier, images, labels, references, tolerance=1e-4)
    assert found.radii.shape == (6, 4)
    assert float(found.radii.min()) > 0
    assert float((found.radii.amax(0) / found.radii.amin(0)).max()) < 1 + 3e-4
    for index, certificate in enumerate(found.best):
        assert certificate.radius == float(found.radii[:, index].max())
        assert certificate.note.startswith("reference R")


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp", "crown", "best"])
def test_margins_do_not_depend_on_the_reference(
    bound: str, problem: tuple[Network, torch.Tensor, torch.Tensor]
) -> None:
    network, images, labels = problem
    certifier = Certifier(network, "fine-tuned", bound, domain="flow")
    ball = WassersteinBall(0.05).around(images)
    expected = certifier.margins(ball, labels)
    for one in sample_references(6, images, pool=torch.rand(3, 1, 6, 6)):
        margins = certifier.margins(ball, labels, references=one.images)
        torch.testing.assert_close(margins, expected, rtol=1e-5, atol=1e-7)


def test_the_certifier_takes_the_maximum(problem: tuple[Network, torch.Tensor, torch.Tensor]) -> None:
    network, images, labels = problem
    certifier = make_certifier(network, "fine-tuned", "crown", references=3, pool=torch.rand(5, 1, 6, 6))
    single = make_certifier(network, "fine-tuned", "crown")
    for found, expected in zip(certifier.search(images, labels), single.search(images, labels), strict=True):
        assert found.radius == pytest.approx(expected.radius, rel=0.02)
        inside = WassersteinBall(0.98 * found.radius)
        assert all(one.verdict is Verdict.CERTIFIED for one in certifier.certify(images[:0], labels[:0], inside))
    radius = min(one.radius for one in certifier.search(images, labels))
    verdicts = [one.verdict for one in certifier.certify(images, labels, WassersteinBall(0.98 * radius))]
    assert verdicts == [Verdict.CERTIFIED] * 4
    assert certifier.certify(images, labels, WassersteinBall(50 * radius))[0].verdict is Verdict.UNKNOWN


def test_the_certifier_refuses_what_has_no_meaning(problem: tuple[Network, torch.Tensor, torch.Tensor]) -> None:
    linear = Network.sequential((1, 6, 6), [nn.Flatten(), nn.Linear(36, 3)])
    with pytest.raises(InvalidInputError, match="references with method linear: it is exact"):
        make_certifier(linear, "linear", references=2)
    with pytest.raises(UnknownNameError, match="unknown method 'exact': expected one of MODULE:CLASS, complete"):
        make_certifier(linear, "exact")


def test_bad_references(problem: tuple[Network, torch.Tensor, torch.Tensor]) -> None:
    images = problem[1]
    with pytest.raises(InvalidInputError, match="references: given 0"):
        sample_references(0, images)
    with pytest.raises(InvalidInputError, match=r"pool of references of shape \(2, 1, 5, 5\)"):
        sample_references(3, images, pool=torch.rand(2, 1, 5, 5))
    with pytest.raises(InvalidInputError, match="expected that of the images"):
        check_references([Reference("short", images[:, :, :5].double())], images)
    heavy = images.double().clone()
    heavy[2] *= 1.01
    with pytest.raises(InvalidInputError, match=r"mass .* of image 2"):
        check_references([Reference("heavy", heavy)], images)
