"""What a smoothed classifier says about one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowverify.results import Certificate


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


@dataclass(frozen=True, kw_only=True)
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
