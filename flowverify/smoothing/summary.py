"""What is said about many images: accuracies and the median certified robustness of Levine & Feizi 2020, Section 6."""

from __future__ import annotations

from collections.abc import Sequence

from flowverify.results import Verdict
from flowverify.smoothing.results import SmoothedCertificate, SmoothedPrediction


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
