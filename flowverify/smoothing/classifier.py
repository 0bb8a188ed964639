"""The smoothed classifier: prediction with abstention, and certified radii.

Source: Cohen et al. 2019, Section 3.2 (PREDICT and CERTIFY), as Levine & Feizi 2020, Section 5, use them.
Over many images, accuracies and the median certified robustness are those of Levine & Feizi 2020, Section 6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.errors import InvalidInputError
from flowverify.results import Certificate, Verdict
from flowverify.smoothing.noise import (
    Noise,
    check_alpha,
    check_certificate,
    check_samples,
    top_two_p_values,
    upper_bound_of_failure,
    wasserstein_radius,
)
from flowverify.smoothing.sampling import MEMORY, Sampler


@dataclass(frozen=True)
class SmoothedPrediction:
    """The class of the smoothed classifier.

    Attributes:
        prediction: None where it abstains: the two most frequent classes cannot be told apart.
        counts: of the most and of the second most frequent class.
        base_accuracy: share of the samples on which the base classifier answers the label.
        p_value: of the test that the top two are equally likely; it abstains above alpha.
    """

    label: int
    prediction: int | None
    counts: tuple[int, int]
    samples: int
    base_accuracy: float
    p_value: float
    method: str
    seconds: float

    @property
    def outcome(self) -> str:
        """``correct``, ``wrong`` or ``abstained``."""
        if self.prediction is None:
            return "abstained"
        return "correct" if self.prediction == self.label else "wrong"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "label": self.label,
            "prediction": self.prediction,
            "outcome": self.outcome,
            "method": self.method,
            "counts": list(self.counts),
            "samples": self.samples,
            "base_accuracy": self.base_accuracy,
            "p_value": self.p_value,
            "seconds": round(self.seconds, 6),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class SmoothedCertificate(Certificate):
    """A radius within which the smoothed classifier answers ``prediction``, at a confidence of 1 - alpha.

    Attributes:
        verdict: ``certified`` if ``prediction`` is the label and ``radius`` > 0, ``misclassified`` if it is not the
            label, otherwise ``unknown``.
        prediction: the class selected by the first n0 samples; None where the logits of all of them tie.
        radius: W1 on normalised images, in pixels, with ground cost ``ground``; 0 unless ``certified``.
        probability: the lower confidence bound of the probability of ``prediction``; exact for splitting.
        successes: how many of the ``samples`` gave ``prediction``; None for splitting, which counts none.
        samples: n, or how many evaluations the exact probabilities took.
        bound: the certificate: ``tight``, ``paper`` or ``exact``.
        base_accuracy: share of the samples on which the base classifier answers the label.
        alpha: 0 for splitting, whose certificates are certain.
    """

    margin: float | None = None  # probabilities are what is bounded here
    probability: float
    successes: int | None
    samples: int
    base_accuracy: float
    alpha: float


def median_certified_robustness(certificates: Sequence[SmoothedCertificate]) -> float | None:
    """The largest radius to which at least half of all images are certified for their label; None for "N/A".

    An image whose selected class is the label counts as certified to its radius, be it 0; where more than half of
    the images have another class, there is no such radius.
    """
    count = len(certificates)
    right = sorted((one.radius for one in certificates if one.verdict is not Verdict.MISCLASSIFIED), reverse=True)
    needed = (count + 1) // 2
    return right[needed - 1] if 0 < needed <= len(right) else None


def accuracy_and_abstentions(predictions: Sequence[SmoothedPrediction]) -> tuple[float, float]:
    """Shares in [0, 1] of the images that are classified right, and on which the classifier abstains."""
    count = max(len(predictions), 1)
    outcomes = [one.outcome for one in predictions]
    return outcomes.count("correct") / count, outcomes.count("abstained") / count


def base_accuracy(results: Sequence[SmoothedPrediction] | Sequence[SmoothedCertificate]) -> float:
    """The base classifier's accuracy on noisy images, in [0, 1]: the mean over images and all their samples."""
    return sum(one.base_accuracy for one in results) / max(len(results), 1)


SELECT, BOUND, PREDICT = 0, 1, 2  # stages: what samples are for; each draws its own


def check_predictable(n: int, alpha: float) -> None:
    """Predictions take samples whose agreement the test believes: 2 * 0.5^n <= alpha.

    Raises:
        InvalidInputError: a count below 1, alpha outside (0, 1), or fewer samples than that; it says how many it takes.
    """
    check_samples("n", n)
    check_alpha(alpha)
    least = math.ceil(1 - math.log2(alpha))
    if n < least:
        raise InvalidInputError(
            f"n {n}: even if all samples agree, no class is settled with alpha {alpha:g}, expected at least {least}"
        )


class SmoothedClassifier:
    """g(x) = the class that the base classifier most likely gives to x + mass * noise.

    Args:
        network: the base classifier, any torch module from (N, C, H, W) to logits; it is copied.
        noise: see :class:`Noise`; the radii are those of W1 on normalised images.
        seed, memory: see :class:`Sampler`.

    Raises:
        InvalidInputError: see :class:`Sampler`.
    """

    def __init__(self, network: nn.Module, noise: Noise, *, seed: int = 0, memory: int = MEMORY) -> None:
        self.sampler = Sampler(network, noise, seed=seed, memory=memory)
        self.noise = noise

    def predict(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        n: int = 10_000,
        alpha: float = 0.05,
        positions: Sequence[int] | None = None,
        on_samples: Callable[[int], None] | None = None,
    ) -> list[SmoothedPrediction]:
        """The class of each image, or an abstention.

        With probability at least 1 - alpha over the samples, a class that is returned is g(x): the top two counts
        pass a two-sided binomial test (Hung and Fithian 2019).

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; not normalised.
            labels: (B,), for the outcome and the base accuracy only.
            n: samples of each image.
            positions: of the images in their data set, which seed their noise; 0, 1, ... by default.
            on_samples: called with how many samples were done since the last call.

        Raises:
            InvalidInputError: bad images or labels, n < 1 or so small that no counts settle a class, alpha outside
                (0, 1), or a model that returns NaN.
        """
        check_predictable(n, alpha)
        images, targets = self.sampler.voter.check(images, labels)
        places = _places(positions, len(images))
        begin = time.perf_counter()
        counts = self.sampler.counts(images, n, PREDICT, places, on_samples)
        top, classes = counts.topk(2, dim=1)
        p_values = top_two_p_values(top[:, 0].numpy(), top[:, 1].numpy())
        share = (time.perf_counter() - begin) / max(len(targets), 1)
        return [
            SmoothedPrediction(
                label=label,
                prediction=int(classes[row, 0]) if p_values[row] <= alpha else None,
                counts=(int(top[row, 0]), int(top[row, 1])),
                samples=n,
                base_accuracy=int(counts[row, label]) / n,
                p_value=float(p_values[row]),
                method=self.noise.method,
                seconds=share,
            )
            for row, label in enumerate(targets.tolist())
        ]

    def certify(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        n0: int = 1_000,
        n: int = 10_000,
        alpha: float = 0.05,
        certificate: str = "tight",
        ground: str = "l1",
        positions: Sequence[int] | None = None,
        on_samples: Callable[[int], None] | None = None,
    ) -> list[SmoothedCertificate]:
        """The certified radius of each image.

        n0 samples select a class, n further ones bound its probability from below (Clopper-Pearson). With
        probability at least 1 - alpha over the samples of an image, g answers that class for every image y >= 0 with
        the same mass in every channel and W1(x, y) < radius. An image on which all n samples agree gets the bound
        p >= alpha^(1/n), so every radius is finite.

        Args:
            images, labels, positions, on_samples: see :meth:`predict`.
            certificate: ``tight``, or ``paper`` (Laplace noise only); from the same samples.
            ground: the ground cost of the radius.

        Raises:
            UnknownNameError: an unknown certificate or ground cost.
            InvalidInputError: bad images or labels, n0 < 1 or n < 1, alpha outside (0, 1), a certificate that the
                noise does not have, or a model that returns NaN.
        """
        check_samples("n0", n0)
        check_samples("n", n)
        check_alpha(alpha)
        check_certificate(certificate, self.noise)
        threat = Threat(ground)
        images, targets = self.sampler.voter.check(images, labels, threat)
        places = _places(positions, len(images))
        begin = time.perf_counter()
        votes, selected = self.sampler.counts(images, n0, SELECT, places, on_samples).max(1)
        counts = self.sampler.counts(images, n, BOUND, places, on_samples)
        successes = counts.gather(1, selected[:, None]).squeeze(1)
        failure = upper_bound_of_failure(successes.numpy(), n, alpha)
        radii = wasserstein_radius(self.noise, failure, certificate, ground)
        share = (time.perf_counter() - begin) / max(len(targets), 1)
        results = []
        for row, label in enumerate(targets.tolist()):
            prediction, radius = int(selected[row]) if votes[row] else None, float(radii[row])
            results.append(
                SmoothedCertificate(
                    verdict=verdict_of(prediction, label, radius),
                    label=label,
                    prediction=prediction,
                    method=self.noise.method,
                    bound=certificate,
                    ground=ground,
                    radius=radius if prediction == label else 0.0,
                    probability=1.0 - float(failure[row]),
                    successes=int(successes[row]),
                    samples=n,
                    base_accuracy=int(counts[row, label]) / n,
                    alpha=alpha,
                    seconds=share,
                )
            )
        return results


def verdict_of(prediction: int | None, label: int, radius: float) -> Verdict:
    """``certified``, ``misclassified`` or ``unknown``, as :class:`SmoothedCertificate` has it."""
    if prediction != label:
        return Verdict.MISCLASSIFIED
    return Verdict.CERTIFIED if radius > 0 else Verdict.UNKNOWN


def _places(positions: Sequence[int] | None, count: int) -> Sequence[int]:
    places = range(count) if positions is None else positions
    if len(places) != count or any(place < 0 for place in places):
        raise InvalidInputError(f"positions: given {len(places)}, expected {count} integers >= 0")
    return places
