"""A counterexample: pulled back into the ball, replayed, measured. Once, for everybody.

A network is asked twice: in its own precision, as it is used, and in float64, which is near to what a certificate is
about. The rule, for an image of label y:

* It is *classified right* if f_y is strictly above every other f_t, in both precisions. Otherwise it is misclassified:
  there is nothing to certify, and nothing to attack.
* It is a *counterexample* (to a claim about the ball that it lies in) if some f_t is strictly above f_y in float64, and
  in its own precision the network answers a class other than y.

An image whose two best logits tie, or on which the precisions disagree, is neither: not classified right, and no
counterexample. The same goes for NaN. Both questions have the same answer whatever batch an image comes in (theory,
section 18).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowverify.network import Network
from flowverify.transport.distance import EXACT_MASS_TOLERANCE, channel_masses, masses_agree, wasserstein_distance
from flowverify.transport.ground import parse_ground

CLOSE = 64  # units in the last place of the largest logit: so near a tie, the rest of the batch could decide
REFILLS = 50
INSIDE = 1 - 1e-9  # of a radius: what is pulled back lies within it, whatever the exact solver rounds


class Subject(Protocol):
    """A classifier in two precisions.

    With ``alone`` an image is asked about in a batch of one, as by users who look at it; otherwise a subject may
    arrange batches as it likes.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Its own precision."""

    def logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, classes) in its own precision, without gradients."""

    def exact_logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, classes) in float64, without gradients."""


@dataclass(frozen=True)
class TwoPrecisions:
    """A network, and the same one in float64, as a :class:`Subject`; images may be on another device."""

    own: Network
    precise: Network

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    def logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        return self._ask(self.own, images)

    def exact_logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        return self._ask(self.precise, images)

    def _ask(self, network: Network, images: Tensor) -> Tensor:
        place = next(network.parameters(), images).device
        with torch.no_grad():
            found: Tensor = network(images.to(place, network.dtype))
        return found.to(images.device)


def surplus(logits: Tensor, labels: Tensor) -> Tensor:
    """max over t != y of f_t - f_y, (B, classes) -> (B,); NaN where a logit is."""
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


def clean(subject: Subject, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (B,), and whether each image (B, C, H, W) is classified right (B,).

    The prediction of an image that is misclassified is another class than its label: the one that float64 or the
    network's own precision answers, and the strongest other one where both answer the label.
    """
    exact, own = _both(subject, images, labels)
    right = (surplus(exact, labels) < 0) & (surplus(own, labels) < 0)
    prediction = exact.scatter(1, labels[:, None], -torch.inf).argmax(1)
    for logits in (own, exact):
        answer = logits.argmax(1)
        prediction = torch.where(answer != labels, answer, prediction)
    return torch.where(right, labels, prediction), right


def fooled(subject: Subject, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the network gives each image (B, C, H, W) another class, as it does a counterexample; bool (B,)."""
    exact, own = _both(subject, images, labels)
    return (surplus(exact, labels) > 0) & (surplus(own, labels) >= 0) & (own.argmax(1) != labels)


def close_to(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of logits (B, classes), computed in ``dtype``, in which f_y and the best other one may tie; int64 (N,)."""
    limit = CLOSE * torch.finfo(dtype).eps * logits.abs().amax(1)
    return (~(surplus(logits, labels).abs() > limit)).nonzero().flatten()


def _both(subject: Subject, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64 and in the subject's own precision; an image so near a tie that it matters is asked alone."""
    found = []
    for ask, dtype in ((subject.exact_logits, torch.float64), (subject.logits, subject.dtype)):
        logits = ask(images)
        for row in close_to(logits, labels, dtype).tolist():
            logits[row] = ask(images[row : row + 1], alone=True)[0]
        found.append(logits)
    return found[0], found[1]


def repair(
    images: Tensor,  # (B, C, H, W), float64
    candidates: Tensor,  # (B, C, H, W)
    cap: float | None,
) -> Tensor:
    """The candidates as images of the threat model, float64: 0 <= nu <= cap, with each channel's mass.

    Values are clipped, and each channel is scaled to its mass; with a cap, what it cuts off is filled in by
    scaling the pixels below it, and what is then left by raising all pixels towards the cap. A candidate with NaN
    or infinite pixels, or with an empty channel that should not be, becomes the clean image.
    """
    wanted = channel_masses(images)[..., None, None]
    usable = torch.isfinite(candidates).flatten(1).all(1)
    result = torch.where(usable[:, None, None, None], candidates.double(), images).clamp(min=0, max=cap)
    for _ in range(REFILLS if cap is not None else 1):
        mass = result.sum((-2, -1), keepdim=True)
        ratio = torch.where(mass > 0, wanted / mass, 0.0)
        result = (result * ratio).clamp(max=cap) if cap is not None else result * ratio
        if cap is None or bool(((result.sum((-2, -1), keepdim=True) - wanted).abs() <= 1e-12 * wanted).all()):
            break
    if cap is not None:
        room = cap - result
        missing = (wanted - result.sum((-2, -1), keepdim=True)).clamp(min=0)
        result = (result + room * missing / room.sum((-2, -1), keepdim=True).clamp(min=1e-300)).clamp(max=cap)
    whole = masses_agree(images, result, EXACT_MASS_TOLERANCE)
    return torch.where(whole[:, None, None, None], result, images)


def between(clean: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """(1 - t) clean + t far for t of shape (B,); far itself for t = 1."""
    share = share[:, None, None, None]
    return torch.where(share >= 1, far, clean + share * (far - clean)).clamp(min=0)


def pull_back(
    images: Tensor,  # (B, C, H, W), float64
    others: Tensor,  # (B, C, H, W), float64, images of the threat model
    ground: str,
    radius: Tensor,  # (B,)
) -> Tensor:
    """The others, those beyond their radius moved to just within it, along the segment from the image.

    The cost of the cheapest plan, W_p^p times the mass, is convex and 0 at the image, so that (radius / distance)^p of
    the way costs no more than the radius allows. Mass, positivity and a cap hold on all of the segment. Where no plan
    of a ground cost with windows leads to the other image, it may lead to no point of the segment either: that one
    becomes the image itself.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    reach = distance(images, others, ground)
    share = torch.where(reach > radius, radius * INSIDE / reach.clamp(min=1e-300), 1.0)
    return between(images, others, share ** parse_ground(ground).power)


def distance(images: Tensor, others: Tensor, ground: str) -> Tensor:
    """The exact distance (B,) of float64 images of equal mass, in pixels; infinite where no plan is finite.

    Raises:
        InvalidInputError: the masses of a channel differ by more than rounding.
        SolverError: it could not be computed.
    """
    return wasserstein_distance(images, others, ground, mass_tolerance=EXACT_MASS_TOLERANCE).to(images.device)


def in_threat_model(images: Tensor, others: Tensor, cap: float | None) -> Tensor:
    """Whether the others are >= 0, at most the cap, and of each channel's mass; bool (B,)."""
    valid = torch.isfinite(others) & (others >= 0)
    if cap is not None:
        valid &= others <= cap
    return valid.flatten(1).all(1) & masses_agree(images, others, EXACT_MASS_TOLERANCE)


def replay(
    subject: Subject,
    images: Tensor,  # (B, C, H, W), float64
    labels: Tensor,  # (B,)
    others: Tensor,  # (B, C, H, W), float64
    ground: str,
    cap: float | None,
    radius: Tensor | None = None,  # (B,)
) -> Tensor:
    """The distances (B,) of the counterexamples among the others; infinite where one is none, or beyond its radius.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    found = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    rows = in_threat_model(images, others, cap).nonzero().flatten()
    rows = rows[fooled(subject, others[rows], labels[rows])] if rows.numel() else rows
    if rows.numel():
        found[rows] = distance(images[rows], others[rows], ground)
    return found if radius is None else torch.where(found <= radius, found, torch.inf)
