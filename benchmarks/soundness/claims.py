"""What certificates of one case are held to: points of their balls, each other, and exact radii of tiny networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.soundness.exact import least_radius
from benchmarks.soundness.question import Question
from flowverify.results import Certificate, Verdict

LIMIT = 1e-5  # relative: what linear programs of the oracle may be off
BEYOND_TIE = 0.05  # of the radius: so far inside of a region that ties, descent finds an image that does
BRACKET = 0.015  # what a bracket that is closed to 1% may measure, with the tolerances of its last steps


@dataclass(frozen=True)
class Claim:
    """A certificate of one image of the case."""

    certificate: Certificate
    image: int
    how: str

    @property
    def certified(self) -> bool:
        return self.certificate.verdict is Verdict.CERTIFIED


def failures(given: Question, every: Sequence[Claim]) -> Iterator[str]:
    """All that is wrong with the certificates of a case."""
    yield from refuted(given, every)
    yield from compared(given, every)
    if given.drawn.kind == "tiny":
        yield from enumerated(given, every)


def refuted(given: Question, every: Sequence[Claim]) -> Iterator[str]:
    """No point of a certified ball may have a margin that is not positive."""
    for image in range(len(given.images)):
        claims = [one for one in every if one.image == image and one.certified]
        radii = sorted({one.certificate.radius for one in claims}, reverse=True)
        if len(radii) > 4:
            radii = [radii[0], radii[1], *given.dice.sample(radii[2:], 2)]
        for radius in radii:
            points, margins = given.attacked(image, radius)
            if radius == radii[0]:
                given.check_points(image, radius, points)
            worst = margins.amin(1)
            if not bool(torch.isfinite(worst).all()):
                given.tally.undecided_points += 1
                continue
            at = int(worst.argmin())
            reason = given.contradiction(image, radius, points[at], float(worst[at]))
            if reason:
                wrong = [one for one in claims if one.certificate.radius >= radius]
                for how in dict.fromkeys(f"{one.how} at {one.certificate.radius!r}" for one in wrong):
                    yield f"{how}: image {image} certified, but within {radius!r} {reason}"
                break


def compared(given: Question, every: Sequence[Claim]) -> Iterator[str]:
    """What certificates of the same balls say of each other."""
    for image in range(len(given.images)):
        own = [one for one in every if one.image == image]
        proven = max((one for one in own if one.certified), key=lambda one: one.certificate.radius, default=None)
        for one in own:
            shown = one.certificate
            limit = shown.radius if shown.verdict is Verdict.FALSIFIED else shown.upper_radius
            if proven is None or limit is None or shown.method == "vanilla-complete":
                continue  # its counterexamples need not be images
            if proven.certificate.radius > limit * (1 + 1e-6) + 1e-9:
                found = f"{proven.how} certified {proven.certificate.radius!r}, {one.how} has {limit!r} above"
                yield f"image {image}: {found}"
        searched = {one.certificate.method: one.certificate for one in own if "(search)" in one.how}
        first, second = (searched.get(name) for name in ("linear", "linear-lp"))
        if first is None or second is None or not given.exact_ball:
            continue
        wrong = Verdict.ERROR in (first.verdict, second.verdict)
        if not wrong and abs(first.radius - second.radius) > 1e-4 * max(first.radius, second.radius) + 1e-7:
            yield f"image {image}: linear says {first.radius!r}, linear-lp {second.radius!r}"


def enumerated(given: Question, every: Sequence[Claim]) -> Iterator[str]:
    """Every radius against the exact one of a tiny network, by enumeration of its patterns."""
    for image in range(len(given.images)):
        own = [one for one in every if one.image == image]
        if given.centres[image].numel() > 12 or not any(one.certified for one in own):
            continue
        if any(one.certificate.verdict is Verdict.MISCLASSIFIED for one in own):
            continue
        exact = least_radius(given.drawn.oracle, given.threat, given.centres[image], int(given.labels[image]))
        if math.isnan(exact):
            continue
        given.tally.enumerations += 1
        for one in own:
            shown = one.certificate
            if one.certified and shown.radius > exact * (1 + LIMIT) + 1e-9:
                yield f"{one.how}: image {image} certified {shown.radius!r}, the exact radius is {exact!r}"
            upper = shown.upper_radius
            inside = shown.method in ("complete", "milp", "linear")
            if inside and upper is not None and upper < exact * (1 - LIMIT) - 1e-9:
                yield f"{one.how}: image {image} upper_radius {upper!r}, the exact radius is {exact!r}"
            closed = one.certified and "(search)" in one.how and not shown.note and given.exact_ball
            closed = closed and shown.method in ("complete", "milp") and math.isfinite(exact)
            if closed and shown.radius < exact * (1 - BRACKET):
                yield f"{one.how}: image {image} radius {shown.radius!r}, the exact radius is {exact!r}"
