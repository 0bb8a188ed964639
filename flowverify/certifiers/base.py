"""What every certifier has: a network, valid inputs, clean predictions, and two questions that it answers.

A certificate bounds an image's exact radius from below, a counterexample from above. A median of certified radii is
that of the exact ones only where the two meet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.options import CompleteOptions
from flowverify.errors import BoundError, SolverError
from flowverify.network import Network, RoundingBound, load_network
from flowverify.network.rounding import SumsOfTerms, is_steep
from flowverify.network.subject import Subject
from flowverify.results import Certificate, Interrupted, Verdict


class BaseCertifier(ABC):
    """A method of certification applied to one network.

    A subclass answers ``certify`` and ``search``. Its options are keyword-only parameters of its constructor, or the
    fields of a dataclass that it names as ``Options`` and takes as ``options``; see :mod:`flowverify.registry`.

    Args:
        model: a network, a ``torch.nn.Module`` or the path of an ONNX file.
        method, bound: names, as they appear in the certificates.
        input_shape: (C, H, W), where the model does not say.

    Attributes:
        network: in its canonical form.
        subject: the network in both precisions: what it takes, what it answers, what counts as misclassified.
    """

    batched: ClassVar[bool] = True  # False: images are taken one by one, and each may take long

    def __init__(
        self, model: str | Path | nn.Module, method: str, bound: str, input_shape: tuple[int, int, int] | None = None
    ) -> None:
        self.network: Network = load_network(model, input_shape)
        self.method, self.bound = method, bound
        self.subject = Subject(self.network)

    @abstractmethod
    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Decides the radius of ``ball`` for each image of a batch (B, C, H, W)."""

    @abstractmethod
    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The largest certified radius of each image of a batch (B, C, H, W); by default for l1, without a cap."""

    @classmethod  # noqa: B027 # most methods take all
    def check_network(cls, network: Network) -> None:
        """Refuses a network by its layers alone, before anything is built for it; by default none.

        Raises:
            UnsupportedOperationError: a layer that the method does not know, named.
        """

    def prepare(self, threat: Threat | None = None) -> None:
        """Builds what the first batch would build, so that it is not timed, and what is wrong comes out first."""
        image = torch.ones(1, 1, 2, 2, device=self.device)
        threat = Threat() if threat is None else threat
        # A window would not fit on so small an image.
        small = Threat(threat.cost.distance.name, None if threat.cap is None else 1.0)
        for dtype in (torch.float32, torch.float64):
            for one in dict.fromkeys((Threat(), small)):
                one.ball(image.to(dtype), 1.0).support(image[None].to(dtype), maximiser=True)

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def precise(self) -> Network:
        """The network in float64."""
        network = self.subject.precise
        assert isinstance(network, Network)
        return network

    def check(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch, and labels; see :meth:`flowverify.network.subject.Subject.check`."""
        return self.subject.check(images, labels, threat)

    def clean(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions, and whether each image is classified right; see :mod:`flowverify.network.subject`."""
        return self.subject.clean(images, labels)

    @cached_property
    def _terms(self) -> SumsOfTerms | None:
        return None if is_steep(self.precise) else SumsOfTerms(self.precise)

    @cached_property
    def _rounding(self) -> RoundingBound:
        return RoundingBound(self.precise)

    def allowance(self, images: Tensor, budget: Tensor | float | None = None) -> Tensor:
        """What margins are lowered by before they count as proven, for rounding in float64.

        Args:
            images: (B, C, H, W).
            budget: of the balls around them, (B,); None at the images.

        Returns:
            (B,), by :class:`~flowverify.network.rounding.RoundingBound`, or at the images by what they make of the
            network (:mod:`flowverify.network.rounding`); infinite or NaN where nothing can be proven.
        """
        if self._terms is not None and budget is None:
            return self._terms.at(images)
        return self._rounding.margins(images.flatten(1).double().sum(1), 0.0 if budget is None else budget)

    def one_by_one(
        self,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        radius: float | None,
        one: Callable[[Tensor, Tensor, Tensor], Certificate],
    ) -> list[Certificate]:
        """What ``one`` says of each image (C, H, W), float64, with its label and prediction, if it is classified right.

        An image for which a solver or a bound fails has the verdict ``error``, and the message in its note.

        Args:
            radius: that is asked about; None for a search.

        Raises:
            Interrupted: at Ctrl-C, with what is known until then.
            InvalidInputError, UnknownNameError: see :meth:`check`.
        """
        images, labels = self.check(images, labels, threat)
        result: list[Certificate] = []
        if not len(images):
            return result

        def nothing(label: Tensor, prediction: Tensor, verdict: Verdict, note: str = "") -> Certificate:
            return self.certificate(label, prediction, verdict, threat, radius or 0.0, 0.0, note=note)

        for image, label, prediction, correct in zip(images, labels, *self.clean(images, labels), strict=True):
            if not bool(correct):
                result.append(nothing(label, prediction, Verdict.MISCLASSIFIED))
                continue
            try:
                result.append(one(image.double(), label, prediction))
            except (SolverError, BoundError) as error:
                result.append(nothing(label, prediction, Verdict.ERROR, str(error)))
            except Interrupted as stopped:
                raise Interrupted([*result, *stopped.certificates]) from None
            except KeyboardInterrupt:
                raise Interrupted(result) from None
        return result

    def certificate(
        self,
        label: Tensor | int,
        prediction: Tensor | int,
        verdict: Verdict,
        threat: Threat,
        radius: float,
        seconds: float,
        *,
        margin: float | None = None,
        upper_radius: float | None = None,
        note: str = "",
        witness: Tensor | None = None,
    ) -> Certificate:
        """The certificate of one image, by this method and bound."""
        return Certificate(
            verdict, int(label), int(prediction), self.method, self.bound, threat.ground, radius, margin, seconds,
            upper_radius, note, threat.cap, witness,
        )  # fmt: skip


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
