"""Certificates by mixed-integer programming: a second complete method, that shares no search with the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.certifier import CompleteOptions
from flowverify.certifiers.complete.dual_proof import DualProof
from flowverify.certifiers.complete.hunt import Hunt
from flowverify.certifiers.complete.program import NetworkProgram
from flowverify.errors import InvalidInputError, SolverError
from flowverify.results import Certificate, Verdict

INSIDE = 1 - 1e-6, 0.999, 0.99, 0.9  # of the least distance: what is tried to prove, one after the other
SOLVER_SHARE = 0.5  # of the time left: the rest is for the proof
MASS_ROUNDING = 1 + 1e-12  # a budget is a product with a sum over the pixels


class MilpCertifier(BaseCertifier):
    """The exact answer by HiGHS, on the flows that lead to images, with neurons' bounds from fine-tuned CROWN.

    For small networks, and as an oracle. HiGHS's word proves nothing: a certificate rests on

    - the neurons' bounds, which are CROWN's (:class:`flowverify.bounds.margins.MarginBounds`), widened by what
      rounding may change in them;
    - a bound for every other class, over a tree of phases, by weak duality in our own arithmetic, rounding included
      (:mod:`flowverify.certifiers.complete.dual_proof`). HiGHS only proposes the multipliers.

    What HiGHS takes for proven and this does not confirm is ``unknown``, or ``timeout`` where time ran out.
    Counterexamples are replayed. With branch and bound (``complete``) it shares the support function, by which the
    neurons of the first layer are bounded, and the replay.

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
        NetworkProgram(self.network, torch.ones(self.network.input_shape), 1.0, empty)
        self._bounds = MarginBounds(self.network, Threat(), "crown", dtype=torch.float64)

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
        """The program for one image (C, H, W), with bounds that hold up to this radius.

        Raises:
            SolverError: bounds that are not finite.
        """
        image = image.double()
        budget = self._budget(image, radius)
        bounds = self._bounds.neurons(Threat().ball(image, budget))
        return NetworkProgram(self.network, image, budget, bounds)

    def _each(self, images: Tensor, labels: Tensor, ball: WassersteinBall, *, searching: bool) -> list[Certificate]:
        if ball.ground != "l1" or ball.cap is not None:
            raise InvalidInputError(
                f"method milp with ground cost {ball.ground!r} and cap {ball.cap}: expected l1 and no cap"
            )
        one = self._search if searching else self._decide
        return self.one_by_one(
            images, labels, ball, searching, lambda image, label, prediction: one(image, label, prediction, ball.radius)
        )

    def _budget(self, image: Tensor, radius: float) -> float:
        return radius * float(image.sum()) * MASS_ROUNDING

    def _decide(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        begin = self.options.clock()
        hunt, left = Hunt(self, image, int(label), True), self._clock(begin)
        program, budget = self.program(image, radius), self._budget(image, radius)
        proof, least = DualProof(program, budget, left), math.inf
        for other in self._others(int(label)):
            if _over(left):
                least = -math.inf
                break
            found = program.least_margin(int(label), other, budget, _share(left))
            if found.infeasible:
                raise SolverError("mixed-integer program: HiGHS finds the ball empty, which has the image itself")
            if found.image is not None:
                hunt.offer(torch.from_numpy(found.image).to(image)[None])
            if hunt.radius <= radius:
                break
            if least > 0:
                least = min(least, proof.least(program.margin(int(label), other), 0.0))
        verdict = Verdict.TIMEOUT if _over(left) else Verdict.UNKNOWN
        if hunt.radius <= radius:
            verdict = Verdict.FALSIFIED
        elif least > 0:
            verdict = Verdict.CERTIFIED
        margin = least if math.isfinite(least) else None
        return self._certified(hunt, label, prediction, verdict, radius, margin, self.options.clock() - begin)

    def _search(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        begin = self.options.clock()
        hunt, left = Hunt(self, image, int(label), True), self._clock(begin)
        if self.options.adversary is not None:
            hunt.ask(self.options.adversary)
        hunt.descend()
        mass, limit = float(image.sum()), float(self.network.grid.diameter)
        upper = min(hunt.radius * (1 + 1e-6), limit)
        program = self.program(image, upper)
        least = upper
        for other in self._others(int(label)):
            if _over(left):
                least = 0.0
                break
            found = program.least_budget(int(label), other, self._budget(image, upper), _share(left))
            least = min(least, max(0.0, found.bound) / mass)
            if found.image is not None:
                # The optimum is a tie; a little farther the class changes.
                point, centre = torch.from_numpy(found.image).to(image), image.flatten()
                hunt.offer(torch.stack([point, centre + (1 + 1e-6) * (point - centre)]), descend=True)
        radius, margin = 0.0, None
        nearest, farthest = min(least, hunt.radius), min(hunt.radius, limit)
        for trial in _trials(nearest, limit) + (_trials(farthest, limit) if nearest < farthest else []):
            margin = self._proven(program, image, int(label), trial, left)
            if margin is not None:
                radius = trial
                break
        verdict = Verdict.TIMEOUT if _over(left) else Verdict.UNKNOWN
        if margin is not None and (radius > 0 or limit == 0):
            verdict = Verdict.CERTIFIED
        seconds, note = self.options.clock() - begin, ""
        if radius < limit and not hunt.radius <= radius * (1 + self.options.tolerance):
            why = f"the nearest image by HiGHS, at radius {nearest:.6g}, is a tie to within its tolerances"
            note = f"bracket not closed: {'out of budget' if _over(left) else why}"
        return self._certified(hunt, label, prediction, verdict, radius, margin, seconds, note)

    def _proven(
        self, program: NetworkProgram, image: Tensor, label: int, radius: float, left: Callable[[], float | None]
    ) -> float | None:
        """The least margin that is proven at this radius, if it is positive for all classes."""
        proof, least = DualProof(program, self._budget(image, radius), left), math.inf
        for other in self._others(label):
            least = min(least, proof.least(program.margin(label, other), 0.0))
            if not least > 0:
                return None
        return least

    def _clock(self, begin: float) -> Callable[[], float | None]:
        """The seconds left, from now on; None for no limit."""
        timeout = self.options.timeout
        return lambda: None if timeout is None else timeout - (self.options.clock() - begin)

    def _others(self, label: int) -> list[int]:
        return [t for t in range(self.network.num_classes) if t != label]

    def _certified(
        self,
        hunt: Hunt,
        label: Tensor,
        prediction: Tensor,
        verdict: Verdict,
        radius: float,
        margin: float | None,
        seconds: float,
        note: str = "",
    ) -> Certificate:
        upper = hunt.radius if math.isfinite(hunt.radius) else None
        found = self.certificate(
            label, prediction, verdict, "l1", radius, seconds, margin=margin, upper_radius=upper, note=note
        )  # fmt: skip
        return replace(found, witness=hunt.witness)


def _trials(radius: float, limit: float) -> list[float]:
    """Radii to prove, up to the distance of a nearest image; the limit itself, which nothing is beyond."""
    return ([limit] if radius >= limit else []) + [share * radius for share in INSIDE if radius > 0]


def _over(left: Callable[[], float | None]) -> bool:
    seconds = left()
    return seconds is not None and seconds <= 0


def _share(left: Callable[[], float | None]) -> float | None:
    seconds = left()
    return None if seconds is None else SOLVER_SHARE * seconds
