"""What every certifier has: a network, valid inputs, clean predictions, and two questions that it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.errors import BoundError, SolverError
from flowverify.network import Network, RoundingBound, load_network
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
    def _rounding(self) -> RoundingBound:
        return RoundingBound(self.precise)

    def allowance(self, images: Tensor, budget: Tensor | float = 0.0, displaced: Tensor | float = 0.0) -> Tensor:
        """What margins are lowered by before they count as proven, for rounding in float64.

        Args:
            images: (B, C, H, W).
            budget: of the balls around them, (B,); 0 at the images.
            displaced: mass by which the centres of the balls are off, (B,).

        Returns:
            (B,), by :class:`~flowverify.network.rounding.RoundingBound`; infinite or NaN where nothing can be proven.
        """
        return self._rounding.margins(images.flatten(1).double().sum(1), budget, displaced)

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
