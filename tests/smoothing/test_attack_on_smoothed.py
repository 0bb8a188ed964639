"""The projected Sinkhorn attack on smoothed classifiers: what it finds is in the threat model and fools them."""

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.attack.base import Schedule
from flowverify.errors import InvalidInputError
from flowverify.smoothing import Noise, SmoothedClassifier
from flowverify.smoothing.attack import _gradient, attack_smoothed
from flowverify.transport.distance import wasserstein_distance

SCHEDULE = Schedule(0.05, 1.5, 1, 12)


@pytest.fixture(scope="module")
def found():
    data = fv.load_dataset("digits")[:6]
    classifier = SmoothedClassifier(fv.load_model("digits-fc3"), Noise(0.002))
    results = attack_smoothed(
        classifier, data.images, data.labels, n=200, gradient_samples=32, schedule=SCHEDULE, projection_iterations=100
    )
    return data, classifier, results


def test_found_images_are_valid_and_fool_the_smoothed_classifier(found):
    data, classifier, results = found
    hits = [row for row, one in enumerate(results) if one.scheduled]
    assert len(hits) >= 4
    for row in hits:
        one, clean = results[row], data.images[row].double()
        assert one.scheduled in [SCHEDULE.radius(k) for k in range(SCHEDULE.iterations)]
        assert float(one.image.min()) >= 0 and float(one.image.sum()) == pytest.approx(float(clean.sum()))
        exact = float(wasserstein_distance(clean[None], one.image[None], "l2"))
        assert one.distance == pytest.approx(exact)
        assert 0 < one.distance < 4 * one.scheduled  # Sinkhorn's projection is approximate
        again = classifier.predict(one.image[None], data.labels[row : row + 1], n=2000, positions=[10**6])[0]
        assert again.outcome != "correct" or again.counts[0] < 1400  # near the boundary at least


def test_certified_images_do_not_fall_within_their_radius(found):
    data, classifier, results = found
    certificates = classifier.certify(data.images, data.labels, n=1000, alpha=0.01, ground="l2")
    assert any(one.radius > 0 for one in certificates)
    for certificate, one in zip(certificates, results, strict=True):
        assert one.distance is None or one.scheduled == 0 or one.distance >= certificate.radius


def test_misclassified_images_count_as_radius_0():
    data = fv.load_dataset("digits")[:2]
    classifier = SmoothedClassifier(fv.load_model("digits-fc3"), Noise(0.002))
    results = attack_smoothed(classifier, data.images, (data.labels + 1) % 10, n=100, schedule=Schedule(0.1, 1, 1, 1))
    assert [(one.scheduled, one.distance) for one in results] == [(0.0, 0.0)] * 2


def test_gradient_is_that_of_the_soft_classifier():
    """By finite differences with the same noise; for a linear network the mean softmax has this gradient exactly."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    classifier = SmoothedClassifier(network, Noise(0.05), seed=3)
    image = torch.rand(1, 4, 4, dtype=torch.float64) + 0.1
    gradient = _gradient(classifier, image, 1, 64, 0, 0)

    from flowverify.smoothing.attack import GRADIENT
    from flowverify.smoothing.sampling import derive_key, noisy_images

    noise = noisy_images(image, Noise(0.05), derive_key(3, 0, GRADIENT), 0, 64) - image

    def loss(at):
        return -float(network(at + noise).softmax(1)[:, 1].mean().log().detach())

    for i, j in ((0, 0), (2, 3), (3, 1)):
        step = torch.zeros_like(image)
        step[0, i, j] = 1e-5
        assert float(gradient[0, i, j]) == pytest.approx((loss(image + step) - loss(image - step)) / 2e-5, rel=1e-4)


def test_bad_input():
    data = fv.load_dataset("digits")[:1]
    classifier = SmoothedClassifier(fv.load_model("digits-fc3"), Noise(0.002))
    with pytest.raises(InvalidInputError, match="gradient_samples: given 0"):
        attack_smoothed(classifier, data.images, data.labels, gradient_samples=0)
    with pytest.raises(InvalidInputError, match="alpha: given 2"):
        attack_smoothed(classifier, data.images, data.labels, alpha=2)
    with pytest.raises(InvalidInputError, match="images: given none"):
        attack_smoothed(classifier, data.images[:0], data.labels[:0])
