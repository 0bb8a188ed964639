"""What the radii of many images say together: the medians of both ends, and how many brackets are closed.

A certificate bounds an image's exact radius from below, a counterexample from above. A median of certified radii is
that of the exact ones only where the two meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flowverify.certifiers.complete.options import CompleteOptions
from flowverify.results import Verdict

TOLERANCE = CompleteOptions.tolerance  # what counts as closed
CLOSED = f"closed to {TOLERANCE:.0%}"


@dataclass(frozen=True)
class Ends:
    """An image's exact radius, in pixels, is at least ``certified`` and at most ``upper``; infinite if unknown."""

    certified: float
    upper: float = math.inf

    @property
    def closed(self) -> bool:
        """Whether the ends meet, to the tolerance to which complete methods search."""
        return self.upper <= self.certified * (1 + TOLERANCE)


def ends_of(record: Mapping[str, Any]) -> Ends:
    """The ends that a record of one image gives: of a certificate that was searched, or of an attack.

    Args:
        record: with the keys of :meth:`flowverify.results.Certificate.to_json`.
    """
    if record["verdict"] == Verdict.MISCLASSIFIED:
        return Ends(0.0, 0.0)
    upper = record.get("upper_radius")
    certified = record.get("radius") if record["verdict"] == Verdict.CERTIFIED else None
    return Ends(float(certified or 0.0), math.inf if upper is None else float(upper))


def bracketed(ends: Sequence[Ends]) -> bool:
    """Whether any image that is classified right has an upper end."""
    return any(0 < one.upper < math.inf for one in ends)


def count_closed(ends: Sequence[Ends]) -> str:
    """Such as "58 of 100": how many brackets are closed."""
    return f"{sum(one.closed for one in ends)} of {len(ends)}"


def median_certified(ends: Sequence[Ends]) -> float:
    """NaN for no images."""
    return median([one.certified for one in ends] or [math.nan])


def median_upper(ends: Sequence[Ends]) -> float:
    """Infinite where half of the images have no upper end; NaN for no images."""
    return median([one.upper for one in ends] or [math.nan])


def median_text(ends: Sequence[Ends], about: str) -> str:
    """The medians in words; with the upper one where there is any upper end.

    Args:
        about: of which distance, over which images.
    """
    certified = f"median radius {median_certified(ends):.4f} pixels"
    if not bracketed(ends):
        return f"{certified} ({about})"
    return f"{certified} certified, {upper_text(ends)} ({about})"


def upper_text(ends: Sequence[Ends]) -> str:
    """Such as "0.0655 at most"."""
    upper = median_upper(ends)
    return f"{upper:.4f} at most" if math.isfinite(upper) else "no upper end for half of them or more"
