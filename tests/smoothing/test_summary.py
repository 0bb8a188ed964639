"""The table's statistics, by the rules of the paper's Section 6."""

import pytest

from flowverify.results import Verdict
from flowverify.smoothing import SmoothedCertificate, SmoothedPrediction
from flowverify.smoothing.classifier import accuracy_and_abstentions, base_accuracy, median_certified_robustness


def certificate(radius):
    """Of a selected class that is wrong if the radius is None."""
    verdict = Verdict.MISCLASSIFIED if radius is None else Verdict.CERTIFIED if radius else Verdict.UNKNOWN
    return SmoothedCertificate(
        verdict=verdict, label=1, prediction=0 if radius is None else 1, method="m", bound="tight", ground="l1",
        radius=radius or 0.0, seconds=0.0, probability=0.9, successes=9, samples=10, base_accuracy=0.5, alpha=0.05,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("radii", "median"),
    [
        ([0.1, 0.2, 0.3], 0.2),
        ([0.1, 0.2, 0.3, 0.4], 0.3),  # half of the images reach 0.3
        ([None, 0.2, 0.3], 0.2),
        ([None, None, 0.3, 0.1], 0.1),
        ([None, None, 0.3], None),  # more than half have another class
        ([None, 0.0, 0.0, 0.2], 0.0),
        ([], None),
    ],
)
def test_median_certified_robustness(radii, median):
    assert median_certified_robustness([certificate(radius) for radius in radii]) == median


def test_accuracies():
    def prediction(label, predicted, base):
        return SmoothedPrediction(label, predicted, (9, 1), 10, base, 0.01, "m", 0.0)

    found = [prediction(1, 1, 0.9), prediction(1, 2, 0.2), prediction(1, None, 0.4), prediction(3, 3, 0.7)]
    assert [one.outcome for one in found] == ["correct", "wrong", "abstained", "correct"]
    assert accuracy_and_abstentions(found) == (0.5, 0.25)
    assert base_accuracy(found) == pytest.approx(0.55)
