"""Smoothed classifiers: right by a known one, reproducible, and clear about bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.results import Verdict
from flowverify.smoothing import Noise, SmoothedClassifier, noisy_images, wasserstein_radius
from flowverify.smoothing.classifier import BOUND, PREDICT, SELECT, check_predictable
from flowverify.smoothing.noise import top_two_p_values, upper_bound_of_failure
from flowverify.smoothing.sampling import derive_key

MASS, SIGMA = 3.0, 0.1


def threshold_network(level):
    """Two pixels: class 0 where the first one holds more than ``level`` of the mass of 3."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([-level * MASS, 0.0]))
    return nn.Sequential(nn.Flatten(), layer)


def two_pixels(first):
    return MASS * torch.tensor([first, 1 - first]).reshape(1, 1, 1, 2)


def random_network(shape=(1, 6, 6), classes=4, seed=0):
    torch.manual_seed(seed)
    size = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, classes)).eval()


def random_images(count, shape=(1, 6, 6), seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


class TestMonteCarloSoundness:
    """The classifier of ``threshold_network``: P(class 0) = cdf(first - level), and its true radius is known.

    Moving r of the mass off the first pixel is a flow of length r, and the class changes at r = first - level.
    """

    RUNS, SAMPLES, ALPHA = 1000, 300, 0.1

    @pytest.mark.parametrize("gap", [0.01, 0.05, 0.2])
    @pytest.mark.parametrize("distribution", ["laplace", "uniform"])
    def test_at_most_alpha_of_the_radii_exceed_the_true_one(self, gap, distribution):
        noise = Noise(SIGMA, "flow", distribution)
        gap = min(gap, 0.9 * noise.scale)
        classifier = SmoothedClassifier(threshold_network(0.4), noise, seed=5)
        images = two_pixels(0.4 + gap).expand(self.RUNS, -1, -1, -1)
        labels = torch.zeros(self.RUNS, dtype=torch.int64)
        found = classifier.certify(images, labels, n0=50, n=self.SAMPLES, alpha=self.ALPHA)
        exceeding = np.mean([one.radius > gap * (1 + 1e-6) for one in found])
        error = math.sqrt(self.ALPHA * (1 - self.ALPHA) / self.RUNS)
        assert exceeding <= self.ALPHA + 3 * error
        # The bound is tight here: not much less than alpha of them do, and far from the boundary radii come close.
        assert exceeding >= 0.3 * self.ALPHA
        assert gap < 0.04 or np.median([one.radius for one in found]) > 0.5 * gap

    def test_the_paper_certificate_exceeds_it_no_more_often(self):
        images = two_pixels(0.5).expand(self.RUNS, -1, -1, -1)
        labels = torch.zeros(self.RUNS, dtype=torch.int64)
        classifier = SmoothedClassifier(threshold_network(0.4), Noise(SIGMA), seed=6)
        options = {"n0": 50, "n": self.SAMPLES, "alpha": self.ALPHA}
        paper = classifier.certify(images, labels, certificate="paper", **options)
        tight = classifier.certify(images, labels, **options)
        assert [one.successes for one in paper] == [one.successes for one in tight]
        assert all(p.radius <= t.radius for p, t in zip(paper, tight, strict=True))
        assert np.mean([one.radius > 0.1 for one in paper]) <= self.ALPHA

    def test_predictions_are_rarely_wrong_and_abstain_at_the_boundary(self):
        labels = torch.zeros(self.RUNS, dtype=torch.int64)
        classifier = SmoothedClassifier(threshold_network(0.4), Noise(SIGMA), seed=7)
        near = classifier.predict(
            two_pixels(0.403).expand(self.RUNS, -1, -1, -1), labels, n=self.SAMPLES, alpha=self.ALPHA
        )
        error = math.sqrt(self.ALPHA * (1 - self.ALPHA) / self.RUNS)
        assert np.mean([one.outcome == "wrong" for one in near]) <= self.ALPHA + 3 * error
        assert np.mean([one.outcome == "abstained" for one in near]) > 0.5
        far = classifier.predict(two_pixels(0.7).expand(50, -1, -1, -1), labels[:50], n=self.SAMPLES)
        assert all(one.outcome == "correct" for one in far)


@pytest.mark.parametrize("domain", ["flow", "pixels"])
def test_counts_are_those_of_a_plain_loop(domain):
    network, noise = random_network(), Noise(0.05, domain)
    images, positions = random_images(3), [4, 0, 17]
    counts = SmoothedClassifier(network, noise, seed=2).sampler.counts(images, 70, BOUND, positions)
    for image, position, found in zip(images, positions, counts, strict=True):
        expected = torch.zeros(4, dtype=torch.int64)
        for sample in range(70):
            noisy = noisy_images(image, noise, derive_key(2, position, BOUND), sample, 1)
            expected[network(noisy).argmax()] += 1
        assert torch.equal(found, expected)


class TestReproducibility:
    NETWORK, IMAGES, LABELS = random_network(), random_images(7), torch.arange(7) % 4

    def run(self, rows=slice(None), seed=0, memory=2**28, positions=None):
        classifier = SmoothedClassifier(self.NETWORK, Noise(0.05), seed=seed, memory=memory)
        images, labels = self.IMAGES[rows], self.LABELS[rows]
        found = classifier.certify(images, labels, n0=30, n=101, positions=positions)
        found += classifier.predict(images, labels, n=101, positions=positions)
        return [{key: value for key, value in one.to_json().items() if key != "seconds"} for one in found]

    def test_same_seed_same_results(self):
        assert self.run() == self.run()
        assert self.run() != self.run(seed=1)

    @pytest.mark.parametrize("memory", [1, 30_000, 50_000])
    def test_memory_does_not_matter(self, memory):
        assert self.run(memory=memory) == self.run()

    def test_selection_of_images_does_not_matter(self):
        whole = self.run()
        assert self.run(slice(2, 5), positions=[2, 3, 4]) == whole[2:5] + whole[9:12]

    def test_memory_limits_the_rows(self):
        rows = [
            SmoothedClassifier(self.NETWORK, Noise(0.05), memory=memory).sampler.voter.plan((1, 6, 6))[0]
            for memory in (1, 100_000, 2**28)
        ]
        assert rows[0] == 16 and 16 < rows[1] < 128 and rows[2] == 128

    def test_stages_draw_their_own_samples(self):
        sampler = SmoothedClassifier(self.NETWORK, Noise(0.5)).sampler
        counts = [sampler.counts(self.IMAGES, 200, stage, range(7)) for stage in (SELECT, BOUND, PREDICT)]
        assert not torch.equal(counts[0], counts[1]) and not torch.equal(counts[1], counts[2])

    def test_progress_adds_up(self):
        seen = []
        SmoothedClassifier(self.NETWORK, Noise(0.05), memory=1).certify(
            self.IMAGES, self.LABELS, n0=30, n=101, on_samples=seen.append
        )
        assert sum(seen) == 7 * 131 and len(seen) > 5


def test_certain_images_get_the_clopper_pearson_bound():
    noise = Noise(1e-6)
    found = SmoothedClassifier(threshold_network(0.4), noise).certify(two_pixels(0.9), torch.tensor([0]), n=1000)[0]
    assert found.successes == 1000 and found.probability == pytest.approx(0.05 ** (1 / 1000))
    assert found.radius == pytest.approx(-noise.scale * math.log(2 * (1 - 0.05 ** (1 / 1000))))
    assert math.isfinite(found.radius) and found.verdict is Verdict.CERTIFIED


def test_verdicts():
    classifier = SmoothedClassifier(threshold_network(0.4), Noise(SIGMA))
    images = torch.cat([two_pixels(0.9), two_pixels(0.1), two_pixels(0.402)])
    found = classifier.certify(images, torch.tensor([0, 0, 0]), n0=20_001, n=50)
    assert [one.verdict for one in found] == [Verdict.CERTIFIED, Verdict.MISCLASSIFIED, Verdict.UNKNOWN]
    assert [one.radius > 0 for one in found] == [True, False, False]


def test_no_transport_within_the_radius_changes_the_class():
    """On a linear network the probabilities around any image are known; the nearest boundary is farther away."""
    noise, seeds = Noise(0.2), 40
    network = threshold_network(0.4)
    for first in (0.45, 0.6):
        found = SmoothedClassifier(network, noise).certify(
            two_pixels(first).expand(seeds, -1, -1, -1), torch.zeros(seeds, dtype=torch.int64), alpha=0.001, n=2000
        )
        largest = max(one.radius for one in found)
        moved = SmoothedClassifier(network, noise).predict(two_pixels(first - largest), torch.tensor([0]), n=20_000)
        assert moved[0].outcome == "correct"


def test_colour_and_double_precision():
    network = random_network((3, 4, 4)).double()
    images = random_images(2, (3, 4, 4)).double()
    found = SmoothedClassifier(network, Noise(0.01)).certify(images, torch.tensor([0, 1]), n0=20, n=100, ground="l2")
    failure = upper_bound_of_failure([one.successes for one in found], 100, 0.05)
    radii = wasserstein_radius(Noise(0.01), failure, "tight", "l2")
    for one, radius in zip(found, radii, strict=True):
        assert one.radius == (pytest.approx(radius) if one.prediction == one.label else 0.0)


class NotANumber(nn.Module):
    def forward(self, images):
        return torch.full((len(images), 3), torch.nan)


def bad(images=None, labels=(0,), network=None, **options):
    images = two_pixels(0.9) if images is None else images
    network = threshold_network(0.4) if network is None else network
    return SmoothedClassifier(network, Noise(SIGMA)).certify(images, torch.tensor(labels), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, InvalidInputError, "n: given 0 samples, expected an integer >= 1"),
        ({"n0": -1}, InvalidInputError, "n0: given -1 samples, expected an integer >= 1"),
        ({"alpha": 0.0}, InvalidInputError, "alpha: given 0.0, expected a number between 0 and 1"),
        ({"alpha": 1}, InvalidInputError, "alpha: given 1, expected a number between 0 and 1"),
        ({"certificate": "best"}, UnknownNameError, "unknown certificate 'best'"),
        ({"ground": "l3"}, UnknownNameError, "ground"),
        ({"network": NotANumber()}, InvalidInputError, "image 0: the model returns NaN on .* of .* noisy images"),
        ({"labels": (2,)}, InvalidInputError, "label 2 .* expected a class of the model, 0 to 1"),
        ({"labels": (0, 1)}, InvalidInputError, "labels of .* length 2: expected 1 integers"),
        ({"images": -two_pixels(0.9)}, InvalidInputError, "negative|nonnegative|>= 0"),
        ({"images": torch.rand(1, 1, 3, 3)}, InvalidInputError, "on images of shape"),
        ({"positions": [1, 2]}, InvalidInputError, "positions: given 2, expected 1 integers >= 0"),
        ({"positions": [-1]}, InvalidInputError, "positions: given 1, expected 1 integers >= 0"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(2, 1))}, InvalidInputError, "expected logits of shape"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        bad(**options)


def test_bad_classifiers():
    with pytest.raises(InvalidInputError, match="model of type function: expected a torch.nn.Module"):
        SmoothedClassifier(bad, Noise(1.0))
    with pytest.raises(InvalidInputError, match="seed: given -1, expected an integer >= 0"):
        SmoothedClassifier(random_network(), Noise(1.0), seed=-1)
    with pytest.raises(InvalidInputError, match="memory: given 0, expected a number of bytes >= 1"):
        SmoothedClassifier(random_network(), Noise(1.0), memory=0)


def test_the_network_is_copied_and_evaluated():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(2, 2)).train()
    classifier = SmoothedClassifier(network, Noise(1e-9))
    counts = classifier.sampler.counts(two_pixels(0.5), 100, SELECT, [0])
    assert counts.max() == 100 and network.training


@pytest.mark.parametrize(("alpha", "least"), [(0.05, 6), (0.001, 11), (0.5, 2), (0.25, 3)])
def test_predictions_take_as_many_samples_as_can_settle_a_class(alpha, least):
    assert float(top_two_p_values(least, 0)) <= alpha < float(top_two_p_values(least - 1, 0))
    check_predictable(least, alpha)
    with pytest.raises(InvalidInputError, match=f"n {least - 1}: .* alpha {alpha:g}, expected at least {least}"):
        check_predictable(least - 1, alpha)
