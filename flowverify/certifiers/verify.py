"""Certificates at a given radius: does any image of the ball change the class?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat, WassersteinBall
from flowverify.bounds.engine import DomainName, EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import check_bound, check_method
from flowverify.bounds.warm_start import WarmStart
from flowverify.certifiers.base import BaseCertifier
from flowverify.results import Certificate, Verdict
from flowverify.transport.ground import parse_ground


@dataclass(frozen=True)
class Cover:
    """A bound that holds for a ball: by one method, over a ball that contains it.

    Attributes:
        method: "vanilla" or "fine-tuned".
        ground, cap: of the ball that is bounded.
        asked: the ground cost of the ball asked about; where it differs from ``ground``, that is l1, with the
            radius of :meth:`flowverify.transport.ground.GroundCost.to_l1`.
    """

    method: str
    ground: str
    cap: float | None
    asked: str

    def radius(self, radius: Tensor) -> Tensor:
        """The radii (B,) of the balls that are bounded."""
        if self.ground == self.asked:
            return radius
        ground = parse_ground(self.asked)
        return torch.tensor([ground.to_l1(one) for one in radius.tolist()], dtype=radius.dtype, device=radius.device)


DUALITY_GAP = 1e-6  # relative; what it costs in radius is far below the tolerance of any search


class Certifier(BaseCertifier):
    """One network, one method, one bound.

    Float32 is for searching; only what holds in float64, with an allowance for rounding, is certified. The
    claim is about the network with its weights as they are and exact arithmetic. CROWN's choice of slopes does
    not always profit from tighter intervals. Where a bound does not decide, looser ones are tried, so that fine-tuned
    certification is never worse than vanilla, another ground cost than l1 never worse than the l1 ball around its
    ball, and a cap never worse than none; see :meth:`covers`.

    Args:
        model: a network, a ``torch.nn.Module`` or the path of an ONNX file.
        method: "vanilla" or "fine-tuned".
        bound: a name in :data:`flowverify.certifiers.methods.BOUNDS`.
        input_shape: (C, H, W), where the model does not say.
        domain: where CROWN runs; see :func:`flowverify.bounds.crown.domain.make_domain`.

    Raises:
        UnknownNameError, UnsupportedOperationError, FoldError, ModelFileError, DependencyError: as their
            names say.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "fine-tuned",
        bound: str = "best",
        *,
        input_shape: tuple[int, int, int] | None = None,
        domain: DomainName = "auto",
    ) -> None:
        check_method(method)
        check_bound(bound)
        super().__init__(model, method, bound, input_shape)
        self._domain: DomainName = domain
        self._engines: dict[tuple[str, torch.dtype, str, float | None], MarginBounds] = {}

    def prepare(self, ground: str = "l1", cap: float | None = None) -> None:
        super().prepare(ground, cap)
        first = self.covers(ground, cap)[0]
        for dtype in (torch.float32, torch.float64):
            self.engine(dtype, first.method, first.ground, first.cap)

    def covers(self, ground: str, cap: float | None) -> list[Cover]:
        """The bounds to try for a ball, the tightest first.

        Flows know l1 ground cost only: in that domain other balls are covered by l1 balls.
        """
        native = "l1" if self._domain == "flow" else ground
        own = cap if self.method == "fine-tuned" else None  # vanilla has no use for a cap
        result = [Cover(self.method, native, own, ground)]
        if own is not None:
            result.append(Cover(self.method, native, None, ground))
        if self.method == "fine-tuned":
            result.append(Cover("vanilla", native, None, ground))
        if native != "l1":
            result.append(Cover(self.method, "l1", None, ground))
        return result

    def engine(
        self, dtype: torch.dtype, method: str | None = None, ground: str = "l1", cap: float | None = None
    ) -> MarginBounds:
        """The bounding engine of this precision and threat model, built on first use."""
        key = (method or self.method, dtype, ground, cap)
        if key not in self._engines:
            self._engines[key] = MarginBounds(
                self.network,
                Threat(ground, cap, key[0] == "fine-tuned"),
                self.bound,
                dtype=dtype,
                options=EngineOptions(self._domain, DUALITY_GAP),
            )
        return self._engines[key]

    def margins(
        self,
        images: Tensor,
        labels: Tensor,
        radius: Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        method: str | None = None,
        ground: str = "l1",
        cap: float | None = None,
        warm_start: WarmStart | None = None,
        references: Tensor | None = None,
    ) -> Tensor:
        """min over t of the lower bound of f_y - f_t over balls of these radii (B,); (B,) float64.

        ``references`` (B, C, H, W), of the masses of the images, are used in the flow domain only.
        """
        mass = images.flatten(1).double().sum(1)
        budget = parse_ground(ground).budget(radius.double().to(images.device)) * mass
        engine = self.engine(dtype, method, ground, cap)
        ball = Ball(engine.threat, images, budget)
        bounds = engine.margins(ball, labels, references=references, warm_start=warm_start)
        worst = bounds.double().amin(1)
        if dtype == torch.float64:
            displaced = 0.0 * mass
            if references is not None:
                # The flow from a reference, along a spanning tree, moves the mass at most once over every edge. It
                # leads to an image of the reference's mass.
                budget = budget + mass * images[0].numel()
                displaced = (references.to(images.device).double() - images.double()).sum((2, 3)).abs().sum(1)
            worst = worst - self.allowance(images, budget, displaced)
        # A NaN (overflowing weights) proves nothing.
        return torch.where(torch.isnan(worst), -torch.inf, worst)

    def best_margins(
        self, images: Tensor, labels: Tensor, radius: Tensor, ground: str = "l1", cap: float | None = None
    ) -> Tensor:
        """As :meth:`margins` in float64, by the next of :meth:`covers` where one does not decide."""
        worst = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        for cover in self.covers(ground, cap):
            undecided = (worst <= 0).nonzero().flatten()
            if undecided.numel():
                found = self.margins(
                    images[undecided],
                    labels[undecided],
                    cover.radius(radius[undecided.to(radius.device)]),
                    method=cover.method,
                    ground=cover.ground,
                    cap=cover.cap,
                )
                worst[undecided] = torch.maximum(worst[undecided], found)
        return worst

    def search(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> list[Certificate]:
        """The largest certified radii; see :func:`flowverify.certifiers.radius.search_radius`."""
        from flowverify.certifiers.radius import search_radius

        return search_radius(self, images, labels, ground, cap=cap)

    def notes(self) -> str:
        """What the engines had to do to finish, such as smaller chunks."""
        return "; ".join(sorted({note for engine in self._engines.values() for note in engine.notes}))

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """A certificate for each image of a batch at the radius of ``ball``.

        The claim of ``certified``: every image of the ball (nonnegative, of equal mass, within the radius for its
        ground cost, below its cap) is classified as the label.

        Raises:
            InvalidInputError: as :meth:`check`, or an image above the cap.
        """
        start = time.perf_counter()
        images, labels = self.check(images, labels, ball.threat)
        if not len(images):
            return []
        predictions, correct = self.clean(images, labels)
        margins = torch.full((images.shape[0],), -torch.inf, dtype=torch.float64)
        chosen = correct.nonzero().flatten()
        if chosen.numel():
            radius = torch.full((chosen.numel(),), ball.radius, dtype=torch.float64)
            found = self.best_margins(images[chosen], labels[chosen], radius, ball.ground, ball.cap)
            margins[chosen.cpu()] = found.cpu()
        seconds = (time.perf_counter() - start) / images.shape[0]
        result = []
        for index in range(images.shape[0]):
            right = bool(correct[index])
            verdict = Verdict.CERTIFIED if margins[index] > 0 else Verdict.UNKNOWN
            result.append(
                self.certificate(
                    labels[index],
                    predictions[index],
                    verdict if right else Verdict.MISCLASSIFIED,
                    ball.ground,
                    ball.radius,
                    seconds,
                    cap=ball.cap,
                    margin=float(margins[index]) if right else None,
                    note=self.notes(),
                )
            )
        return result
