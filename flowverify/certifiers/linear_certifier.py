"""Exact certificates of linear classifiers: a radius, and an image that shows it cannot be larger."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.linear import HalfSpaces, LinearRadius, capped_radius, exact_radius, half_spaces
from flowverify.certifiers.linear_program import LinearProgram, program_radius
from flowverify.certifiers.methods import LINEAR_METHODS
from flowverify.certifiers.radius import confirm
from flowverify.errors import InvalidInputError, SolverError, UnknownNameError
from flowverify.results import Certificate, Verdict
from flowverify.transport.ground import parse_ground
from flowverify.transport.moves import best_moves
from flowverify.transport.support import support
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
        if method not in LINEAR_METHODS:
            raise UnknownNameError("linear method", method, tuple(LINEAR_METHODS))
        super().__init__(model, method, "exact", input_shape)
        sample = torch.ones(1, *self.network.input_shape)
        half_spaces(self.network, sample, torch.zeros(1, dtype=torch.int64))
        self._program = LinearProgram(self.network.grid) if method == "linear-lp" else None

    def prepare(self, ground: str = "l1", cap: float | None = None) -> None:
        super().prepare(ground, cap)
        if self._program is None:
            label = torch.zeros(1, dtype=torch.int64)
            self.radii(torch.ones(1, *self.network.input_shape, device=self.device), label, ground)

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

    def search(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> list[Certificate]:
        """The exact radius of each image, just inside it; the whole simplex counts as the longest way on the grid."""
        return self._certificates(images, labels, WassersteinBall(0.0, ground, cap), searching=True)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Certified below the exact radius; falsified beyond it, if the witness holds when it is replayed."""
        return self._certificates(images, labels, ball, searching=False)

    def witness(
        self, images: Tensor, labels: Tensor, radius: Tensor, ground: str = "l1", cap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) of the balls of these radii (B,), and whether each is misclassified.

        The witness is the image of the ball that goes farthest beyond the boundary of the nearest class (with a cap,
        nearly the farthest), and is replayed; see :mod:`flowverify.witness`.
        """
        threat = Threat(ground, cap)
        images, labels = self.check(images, labels, threat)
        spaces = half_spaces(self.network, images, labels)
        nearest = exact_radius(spaces, ground=ground)
        position = nearest.by_class.argmin(1)
        normal = spaces.normals[torch.arange(len(position)), position]
        ball = threat.ball(spaces.images, threat.budget(radius.double(), spaces.images))
        farthest = best_moves(normal, spaces.images, budget=ball.budget, ground=ground, cap=cap).image
        image = ball.pull_back(threat.repair(spaces.images, farthest))
        return image, torch.isfinite(replay(self.subject, ball, labels, image))

    def _certificates(
        self, images: Tensor, labels: Tensor, ball: WassersteinBall, *, searching: bool
    ) -> list[Certificate]:
        start = time.perf_counter()
        ground, cap = ball.ground, ball.cap
        images, labels = self.check(images, labels, ball.threat)
        if not len(images):
            return []
        predictions, correct = self.clean(images, labels)
        spaces = half_spaces(self.network, images, labels)
        left = spaces.margins - self.allowance(images)[:, None]
        sure = replace(spaces, margins=torch.where(torch.isnan(left), -torch.inf, left))
        proven = (sure.margins > 0).all(1)
        failures: dict[int, str] = {}
        radii, lower = self._solve(spaces, ground, None, failures), self._solve(sure, ground, cap, failures)
        limit = parse_ground(ground).largest_distance(*images.shape[-2:])
        certified = self._confirmed(spaces, torch.tensor(lower, dtype=torch.float64) * INSIDE, limit, ground, cap)
        native = self._program is None or ground == "l1"
        falsified = torch.zeros(len(images), dtype=torch.bool)
        if not searching and native:
            beyond = [i for i, radius in enumerate(radii) if i not in failures and ball.radius >= radius * BEYOND]
            beyond = [i for i in beyond if bool(correct[i])]
            if beyond:
                at = torch.full((len(beyond),), ball.radius, dtype=torch.float64, device=images.device)
                falsified[beyond] = self.witness(images[beyond], labels[beyond], at, ground, cap)[1].cpu()
        seconds = (time.perf_counter() - start) / len(images)
        result = []
        for index, exact in enumerate(radii):
            inside = certified[index]
            radius = inside if searching else ball.radius
            if not bool(correct[index]):
                verdict, radius = Verdict.MISCLASSIFIED, 0.0 if searching else radius
            elif index in failures:
                verdict, radius = Verdict.ERROR, 0.0 if searching else radius
            elif bool(proven[index]) and radius <= inside and (inside > 0 or not searching):
                verdict = Verdict.CERTIFIED
            else:
                verdict = Verdict.FALSIFIED if falsified[index] else Verdict.UNKNOWN
            known = native and cap is None and index not in failures
            upper = exact if known and exact <= limit and bool(correct[index]) else None
            result.append(
                self.certificate(
                    labels[index],
                    predictions[index],
                    verdict,
                    ground,
                    radius,
                    seconds,
                    cap=cap,
                    upper_radius=upper,
                    note=failures.get(index, ""),
                )
            )
        return result

    def _confirmed(
        self, spaces: HalfSpaces, radius: Tensor, limit: float, ground: str, cap: float | None
    ) -> list[float]:
        """These radii (B,), lowered where need be until the support functions prove them."""
        cost = parse_ground(ground)

        def evaluate(index: Tensor, radii: Tensor) -> Tensor:
            index = index.to(spaces.images.device)
            images, budget = spaces.images[index], cost.budget(radii).to(spaces.mass) * spaces.mass[index]
            excess = support(spaces.normals[index], images, budget, ground=ground, cap=cap).excess
            left = spaces.margins[index] - excess - self.allowance(images, budget)[:, None]
            return (left.amin(1) if left.shape[1] else torch.full_like(budget, torch.inf)).cpu()

        radius = torch.nan_to_num(radius, nan=0.0, posinf=torch.inf).clamp(max=limit)
        return confirm(evaluate, radius, torch.zeros_like(radius), STEPS)[0].tolist()

    def _solve(self, spaces: HalfSpaces, ground: str, cap: float | None, failures: dict[int, str]) -> list[float]:
        """Exact radii, or what a cap makes of them; a program that was not solved is a failure of its image."""
        if self._program is None:
            exact = exact_radius(spaces, ground=ground).radius
            return [float(one) for one in (exact if cap is None else capped_radius(spaces, exact, cap, ground))]
        radii = [0.0] * len(spaces.images)
        for index in range(len(radii)):
            part = slice(index, index + 1)
            own = HalfSpaces(
                spaces.images[part], spaces.mass[part], spaces.normals[part], spaces.margins[part], spaces.classes[part]
            )
            try:
                radii[index] = parse_ground(ground).from_l1(float(program_radius(own, self._program).radius))
            except SolverError as error:
                failures[index] = str(error)
        return radii
