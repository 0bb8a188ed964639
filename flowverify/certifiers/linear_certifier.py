"""Exact certificates of linear classifiers: a radius, and an image that shows it cannot be larger."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.linear import HalfSpaces, LinearRadius, capped_radius, exact_radius, half_spaces
from flowverify.certifiers.linear_program import LinearProgram, program_radius
from flowverify.certifiers.radius import confirm
from flowverify.errors import InvalidInputError, SolverError
from flowverify.registry import LINEAR, METHODS
from flowverify.results import Certificate, Verdict
from flowverify.witness import replay

INSIDE = 1 - 1e-9  # the exact radius itself is a tie: what is certified is below it, and confirmed there
STEPS = 4e-9  # relative, of the radii at which that is tried
BEYOND = 1 + 1e-6  # a witness this much farther is misclassified beyond doubt of rounding


class LinearCertifier(BaseCertifier):
    """Lemma 8 of the framework paper, without a solver ("linear") or by linear programs ("linear-lp").

    Certificates have both ends: ``radius`` is certified, and at ``upper_radius`` some image is on the boundary. What is
    certified rests on the support function, evaluated at the radius, and a bound on the rounding of it all; no
    solver's word counts.
    "linear" is exact for every ground cost; with a cap it certifies less than the exact radius, and there is no upper
    end. "linear-lp" knows l1: other balls are covered by l1 balls, without an upper end.

    Raises:
        UnknownNameError: another method.
        UnsupportedOperationError: the network is not affine; the message names the layer that is not.
        DependencyError: "linear-lp" without cvxpy or HiGHS.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "linear",
        *,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        METHODS.check_family(method, LINEAR)
        super().__init__(model, method, "exact", input_shape)
        sample = torch.ones(1, *self.network.input_shape)
        half_spaces(self.network, sample, torch.zeros(1, dtype=torch.int64))
        self._program = LinearProgram(self.network.grid) if method == "linear-lp" else None

    def prepare(self, threat: Threat | None = None) -> None:
        super().prepare(threat)
        if self._program is None:
            label = torch.zeros(1, dtype=torch.int64)
            image = torch.ones(1, *self.network.input_shape, device=self.device)
            self.radii(image, label, (threat or Threat()).ground)

    def radii(self, images: Tensor, labels: Tensor, ground: str = "l1") -> LinearRadius:
        """Exact radii with nearest images; see :class:`~flowverify.certifiers.linear.LinearRadius`.

        Raises:
            InvalidInputError: "linear-lp" with another ground cost than l1.
        """
        images, labels = self.check(images, labels, Threat(ground))
        spaces = half_spaces(self.network, images, labels)
        if self._program is None:
            return exact_radius(spaces, ground=ground)
        if ground != "l1":
            raise InvalidInputError(f"method linear-lp with ground cost {ground!r}: expected l1")
        return program_radius(spaces, self._program)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The exact radius of each image, just inside it; the whole simplex counts as the longest way on the grid."""
        return self._certificates(images, labels, threat or Threat(), None)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Certified below the exact radius; falsified beyond it, if the witness holds when it is replayed."""
        return self._certificates(images, labels, ball.threat, ball.radius)

    def witness(self, ball: Ball, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) of these balls, and whether each is misclassified.

        The witness is the image of the ball that goes farthest beyond the boundary of the nearest class (with a cap,
        nearly the farthest), and is replayed; see :mod:`flowverify.witness`.
        """
        images, labels = self.check(ball.images, labels, ball.threat)
        spaces = half_spaces(self.network, images, labels)
        nearest = exact_radius(spaces, ground=ball.threat.ground)
        position = nearest.by_class.argmin(1)
        normal = spaces.normals[torch.arange(len(position)), position]
        ball = ball.threat.ball(spaces.images, ball.budget.to(images.device))
        image = ball.pull_back(ball.threat.repair(spaces.images, ball.best_moves(normal).image))
        return image, torch.isfinite(replay(self.subject, ball, labels, image))

    def _certificates(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> list[Certificate]:
        """Of this radius, or for None of the largest."""
        start = time.perf_counter()
        images, labels = self.check(images, labels, threat)
        if not len(images):
            return []
        predictions, correct = self.clean(images, labels)
        spaces = half_spaces(self.network, images, labels)
        left = spaces.margins - self.allowance(images)[:, None]
        sure = replace(spaces, margins=torch.where(torch.isnan(left), -torch.inf, left))
        proven = (sure.margins > 0).all(1)
        failures: dict[int, str] = {}
        radii, lower = (self._solve(of, one, failures) for of, one in ((spaces, Threat(threat.ground)), (sure, threat)))
        limit = threat.largest_radius(self.network.grid)
        certified = self._confirmed(spaces, torch.tensor(lower, dtype=torch.float64) * INSIDE, limit, threat)
        native = self._program is None or threat.ground == "l1"
        falsified = torch.zeros(len(images), dtype=torch.bool)
        if radius is not None and native:
            beyond = [i for i, exact in enumerate(radii) if i not in failures and radius >= exact * BEYOND]
            beyond = [i for i in beyond if bool(correct[i])]
            if beyond:
                own = threat.ball(images[beyond], threat.budget(radius, images[beyond]))
                falsified[beyond] = self.witness(own, labels[beyond])[1].cpu()
        seconds = (time.perf_counter() - start) / len(images)
        result = []
        for index, exact in enumerate(radii):
            inside = certified[index]
            at = inside if radius is None else radius
            if not bool(correct[index]) or index in failures:
                verdict = Verdict.ERROR if bool(correct[index]) else Verdict.MISCLASSIFIED
                at = 0.0 if radius is None else radius
            elif bool(proven[index]) and at <= inside and (inside > 0 or radius is not None):
                verdict = Verdict.CERTIFIED
            else:
                verdict = Verdict.FALSIFIED if falsified[index] else Verdict.UNKNOWN
            known = native and threat.cap is None and index not in failures
            upper = exact if known and exact <= limit and bool(correct[index]) else None
            result.append(
                self.certificate(
                    labels[index],
                    predictions[index],
                    verdict,
                    threat,
                    at,
                    seconds,
                    upper_radius=upper,
                    note=failures.get(index, ""),
                )
            )
        return result

    def _confirmed(self, spaces: HalfSpaces, radius: Tensor, limit: float, threat: Threat) -> list[float]:
        """These radii (B,), lowered where need be until the support functions prove them."""

        def evaluate(index: Tensor, radii: Tensor) -> Tensor:
            index = index.to(spaces.images.device)
            ball = threat.ball(spaces.images[index], threat.budget(radii, spaces.images[index]))
            excess = ball.support(spaces.normals[index]).excess
            left = spaces.margins[index] - excess - self.allowance(ball.images, ball.budget)[:, None]
            return (left.amin(1) if left.shape[1] else torch.full_like(ball.budget, torch.inf)).cpu()

        radius = torch.nan_to_num(radius, nan=0.0, posinf=torch.inf).clamp(max=limit)
        return confirm(evaluate, radius, torch.zeros_like(radius), STEPS)[0].tolist()

    def _solve(self, spaces: HalfSpaces, threat: Threat, failures: dict[int, str]) -> list[float]:
        """Exact radii, or what a cap makes of them; a program that was not solved is a failure of its image."""
        if self._program is None:
            exact = exact_radius(spaces, ground=threat.ground).radius
            return [float(one) for one in (exact if threat.cap is None else capped_radius(spaces, exact, threat))]
        radii = [0.0] * len(spaces.images)
        for index in range(len(radii)):
            part = slice(index, index + 1)
            own = HalfSpaces(
                spaces.images[part], spaces.mass[part], spaces.normals[part], spaces.margins[part], spaces.classes[part]
            )
            try:
                radii[index] = threat.cost.from_l1(float(program_radius(own, self._program).radius))
            except SolverError as error:
                failures[index] = str(error)
        return radii
