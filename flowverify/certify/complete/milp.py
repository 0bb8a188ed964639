"""Certificates by mixed-integer programming: a second complete method, that shares no bound with the first."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.certify.base import BaseCertifier
from flowverify.certify.certificate import Certificate, Verdict
from flowverify.certify.complete.certifier import CompleteOptions
from flowverify.certify.complete.hunt import Hunt
from flowverify.certify.complete.program import NetworkProgram
from flowverify.certify.margins import MarginBounds
from flowverify.errors import InvalidInputError
from flowverify.threat import WassersteinBall

TRUST = 1e-6  # HiGHS's feasibility tolerance: margins are to exceed this share of the largest logit
INSIDE = 1 - 1e-6  # a least distance is certified up to this share of it


class MilpCertifier(BaseCertifier):
    """The exact answer by HiGHS, on the flows that lead to images, with neurons' bounds from fine-tuned CROWN.

    For small networks, and as an oracle. A certificate rests on HiGHS, whose arithmetic is floating-point with
    tolerances; a margin or distance within them is ``unknown``. Counterexamples are replayed.

    Raises:
        UnsupportedOperationError: an activation other than ReLU, named.
        DependencyError: auto_LiRPA cannot be used.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        options: CompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(model, "milp", "highs", input_shape)
        self.options = CompleteOptions() if options is None else options
        # Built once without bounds, so that what is unsupported comes out first.
        empty = [(torch.zeros(1, *n.shape), torch.zeros(1, *n.shape)) for n in self.network.activations]
        NetworkProgram(self.network, torch.ones(self.network.input_shape), empty)
        self._bounds = MarginBounds(self.network, "fine-tuned", "crown", dtype=torch.float64)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Decides each image at the radius of ``ball``: one program for each other class.

        Raises:
            InvalidInputError: another ground cost than l1, or a cap.
            Interrupted: at Ctrl-C, with what is known until then.
        """
        return self._each(images, labels, ball, searching=False)

    def search(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> list[Certificate]:
        """The least distance to a counterexample of each image; raises as :meth:`certify`."""
        return self._each(images, labels, WassersteinBall(0.0, ground, cap), searching=True)

    def program(self, image: Tensor, radius: float) -> NetworkProgram:
        """The program for one image (C, H, W), with bounds that hold up to this radius."""
        image = image.double()
        bounds = self._bounds.preactivation_bounds(image[None], radius * image.sum().reshape(1))
        widened = []
        for lower, upper in bounds:
            slack = 1e-9 * (1 + torch.maximum(lower.abs(), upper.abs()))
            widened.append((lower - slack, upper + slack))
        return NetworkProgram(self.network, image, widened)

    def _each(self, images: Tensor, labels: Tensor, ball: WassersteinBall, *, searching: bool) -> list[Certificate]:
        if ball.ground != "l1" or ball.cap is not None:
            raise InvalidInputError(
                f"method milp with ground cost {ball.ground!r} and cap {ball.cap}: expected l1 and no cap"
            )
        one = self._search if searching else self._decide
        return self.one_by_one(
            images, labels, ball, searching, lambda image, label, prediction: one(image, label, prediction, ball.radius)
        )

    def _left(self, begin: float) -> float | None:
        return None if self.options.timeout is None else self.options.timeout - (self.options.clock() - begin)

    def _decide(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        begin = self.options.clock()
        hunt = Hunt(self, image, int(label), True)
        program, mass = self.program(image, radius), float(image.sum())
        least, late = math.inf, False
        trust = TRUST * self._largest(image)
        for other in self._others(int(label)):
            left = self._left(begin)
            if left is not None and left <= 0:
                least, late = -math.inf, True
                break
            found = program.least_margin(int(label), other, radius * mass, left)
            least, late = min(least, found.bound), late or found.timeout
            if found.image is not None and found.value < trust:
                hunt.offer(torch.from_numpy(found.image).to(image)[None])
            if hunt.radius <= radius:
                break
        verdict = Verdict.TIMEOUT if late else Verdict.UNKNOWN
        if hunt.radius <= radius:
            verdict = Verdict.FALSIFIED
        elif least > trust:
            verdict = Verdict.CERTIFIED
        return self._certified(hunt, label, prediction, verdict, radius, least, self.options.clock() - begin)

    def _search(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        begin = self.options.clock()
        hunt, mass = Hunt(self, image, int(label), True), float(image.sum())
        if self.options.adversary is not None:
            hunt.ask(self.options.adversary)
        hunt.descend()
        limit = float(self.network.grid.diameter)
        upper = min(hunt.radius * (1 + 1e-6), limit)
        program = self.program(image, upper)
        least, late = upper, False
        for other in self._others(int(label)):
            left = self._left(begin)
            if left is not None and left <= 0:
                least, late = 0.0, True
                break
            found = program.least_budget(int(label), other, upper * mass, left)
            late = late or found.timeout
            least = min(least, max(0.0, found.bound) / mass)
            if found.image is not None:
                # The optimum is a tie; a little farther the class changes.
                point, centre = torch.from_numpy(found.image).to(image), image.flatten()
                hunt.offer(torch.stack([point, centre + (1 + 1e-6) * (point - centre)]), descend=True)
        radius = min(least, hunt.radius) * INSIDE if least < limit else limit
        verdict = Verdict.CERTIFIED if radius > 0 else Verdict.TIMEOUT if late else Verdict.UNKNOWN
        return self._certified(hunt, label, prediction, verdict, radius, None, self.options.clock() - begin)

    def _others(self, label: int) -> list[int]:
        return [t for t in range(self.network.num_classes) if t != label]

    def _largest(self, image: Tensor) -> float:
        with torch.no_grad():
            return max(float(v.abs().max()) for v in self.precise.values(image[None]).values())

    def _certified(
        self,
        hunt: Hunt,
        label: Tensor,
        prediction: Tensor,
        verdict: Verdict,
        radius: float,
        margin: float | None,
        seconds: float,
    ) -> Certificate:
        upper = hunt.radius if math.isfinite(hunt.radius) else None
        found = self.certificate(label, prediction, verdict, "l1", radius, seconds, margin=margin, upper_radius=upper)
        return replace(found, witness=hunt.witness)
