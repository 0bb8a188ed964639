"""Certificates by branch and bound: exact on the polytope of images, or on the L1 ball of flows."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.bounds.margins import margin_specification
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.neuron_bounds import Roots
from flowverify.certifiers.complete.problem import affine_maps, relus_only
from flowverify.certifiers.complete.radius_search import RadiusSearch
from flowverify.certifiers.complete.tree import LeastMargin, least_margin
from flowverify.certifiers.options import CompleteOptions
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.results import Certificate, Interrupted, Verdict
from flowverify.witness import replay

BRANCH_AND_BOUND = ("complete", "vanilla-complete")
OUTSIDE = "what changes the class in the l1 ball of flows that covers the ball lies outside of the ball itself"
NO_IMAGE = "what changes the class in the L1 ball is no image: it has negative pixels"


class CompleteCertifier(BaseCertifier):
    """Branch and bound over the phases of a network's ReLUs (:mod:`flowverify.certifiers.complete`).

    The claim of ``certified`` is that of every other method. ``falsified`` has a witness that was replayed. With
    neither, ``timeout`` says that the budget ran out, ``unknown`` that what is left is a tie to within rounding, or
    that bounds over the ball are not exact (or, for "vanilla-complete", that the counterexample is no image). A radius
    search reports both ends of what it knows: ``radius`` is proven, ``upper_radius`` has a counterexample, and on the
    polytope with l1 ground cost they meet, unless images between them tie; then the note says from which radius on.

    Args:
        method: "complete" for the polytope of images, "vanilla-complete" for the L1 ball of flows.

    Raises:
        UnknownNameError: another method.
        UnsupportedOperationError: an activation that is not piecewise linear, named; a network that is too large.
    """

    batched = False

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "complete",
        *,
        options: CompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if method not in BRANCH_AND_BOUND:
            raise UnknownNameError("complete method", method, BRANCH_AND_BOUND)
        super().__init__(model, method, "branch-and-bound", input_shape)
        self.options = CompleteOptions() if options is None else options
        settings = self.options.settings
        searched = relus_only(self.precise)
        self.maps = affine_maps(searched, settings.maps)
        self.roots = Roots(searched, settings.bound, settings.neurons.tolerance, settings.row_entries)

    @classmethod
    def check_network(cls, network: Network) -> None:
        relus_only(network)

    def prepare(self, threat: Threat | None = None) -> None:
        super().prepare(threat)
        threat = Threat() if threat is None else threat
        image = torch.ones(1, *self.network.input_shape, dtype=torch.float64, device=self.device)
        if threat.cap is not None:
            image *= threat.cap
        specification = margin_specification(
            torch.zeros(1, dtype=torch.int64, device=self.device), self.network.num_classes, torch.float64
        )
        covered = threat if self.method == "complete" else Threat("l1", positive=False)
        self.roots.over(covered.ball(image, 1e-6), specification[0])

    def start(self, image: Tensor, label: int, ground: str = "l1", cap: float | None = None) -> RadiusSearch:
        """The search for one image (C, H, W), not yet run; ``run`` it with one deadline after the other.

        Raises:
            InvalidInputError: as :meth:`check`; or the image is misclassified.
        """
        images, labels = self.check(image, torch.as_tensor(label), Threat(ground, cap))
        if not bool(self.clean(images, labels)[1]):
            raise InvalidInputError(f"image of label {label}: misclassified, so there is no radius to search")
        return self._search_of(images[0].double(), int(label), Threat(ground, cap))

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Decides each image at the radius of ``ball``, one after the other.

        Raises:
            Interrupted: at Ctrl-C, with what is known until then.
        """
        return self._each(images, labels, ball.threat, ball.radius)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """Both ends of the radius of each image, one after the other; raises as :meth:`certify`."""
        return self._each(images, labels, threat or Threat(), None)

    def least_margin(self, image: Tensor, label: int, ball: WassersteinBall, tolerance: float = 1e-7) -> LeastMargin:
        """min over t of the least f_y - f_t over the ball around one image (C, H, W), from both sides.

        Args:
            tolerance: of the gap between the sides, as a share of the network's largest value at the image. The gap is
                larger where rounding is, where the budget runs out, or a cap makes bounds inexact.

        Raises:
            InvalidInputError: as :meth:`check`.
        """
        images, labels = self.check(image, torch.as_tensor(label), ball.threat)
        search = self._search_of(images[0].double(), int(labels[0]), ball.threat)
        with torch.no_grad():
            largest = max(
                float(value.abs().max()) for value in self.precise.values(search.nearest.image[None]).values()
            )
        problem = search.problem(search.budget(ball.radius))
        gap = max(tolerance * largest, 2 * float(self.allowance(search.nearest.image[None], problem.ball.budget)))
        return least_margin(problem, search.nearest, gap, self.options.deadline())

    def _each(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> list[Certificate]:
        return self.one_by_one(
            images,
            labels,
            threat,
            radius,
            lambda image, label, prediction: self._one(image, label, prediction, threat, radius),
        )

    def _one(
        self, image: Tensor, label: Tensor, prediction: Tensor, threat: Threat, asked: float | None
    ) -> Certificate:
        begin = self.options.clock()
        search = self._search_of(image, int(label), threat)

        def report(decided: bool | None) -> Certificate:
            verdict, radius, margin, note = _found(search) if asked is None else _decided(search, decided, asked)
            if asked is None and not search.limit > 0 and not decided:
                verdict, note = Verdict.UNKNOWN, "a tie to within rounding at the image itself"
            witness = search.nearest.witness
            if witness is not None and not bool((witness >= 0).all()):
                witness, note = None, "; ".join(filter(None, [note, NO_IMAGE]))
                verdict = Verdict.UNKNOWN if verdict is Verdict.FALSIFIED else verdict
            upper = search.radius(search.upper) if math.isfinite(search.upper) else None
            if upper is not None and verdict is Verdict.FALSIFIED:
                upper = min(upper, radius)  # its plan costs no more than the budget of that
            if not search.nearest.positive and (threat.ground != "l1" or threat.cap is not None):
                # What was searched is an l1 ball of flows around the ball: the witness may lie outside of that.
                upper = self._distance(search, witness, threat)
                witness = None if upper is None else witness
                if verdict is Verdict.FALSIFIED and not (upper is not None and upper <= radius):
                    verdict, note = Verdict.UNKNOWN, "; ".join(filter(None, [note, OUTSIDE]))
            notes = "; ".join(filter(None, [note, search.notes]))
            return self.certificate(
                label, prediction, verdict, threat, radius, self.options.clock() - begin, margin=margin,
                upper_radius=upper, note=notes, witness=witness,
            )  # fmt: skip

        decided: bool | None = None
        try:
            if asked is None and search.limit > 0:
                search.run(self.options.deadline())
            else:
                decided = search.decide(search.budget(asked or 0.0), self.options.deadline())
        except KeyboardInterrupt:
            raise Interrupted([report(None)]) from None
        return report(decided)

    def _distance(self, search: RadiusSearch, witness: Tensor | None, threat: Threat) -> float | None:
        """The radius at which a witness is a counterexample of the threat; None if it is none."""
        if witness is None:
            return None
        label = torch.tensor([search.nearest.label], device=witness.device)
        found = float(replay(self.subject, threat.unlimited(search.nearest.image[None]), label, witness[None]))
        return found if math.isfinite(found) else None

    def _search_of(self, centre: Tensor, label: int, threat: Threat) -> RadiusSearch:
        options = self.options
        specification = margin_specification(
            torch.tensor([label], device=centre.device), self.network.num_classes, torch.float64
        )[0]
        nearest = NearestCounterexample(
            self.subject, centre, label, threat, positive=self.method == "complete",
            settings=options.settings.counterexamples,
        )  # fmt: skip
        return RadiusSearch(
            self.maps, self.roots, nearest, specification, tolerance=options.tolerance, adversary=options.adversary,
            progress=options.progress, settings=options.settings,
        )  # fmt: skip


Finding = tuple[Verdict, float, float | None, str]  # verdict, radius, margin, note


def _found(search: RadiusSearch) -> Finding:
    """What a radius search says; nothing, should a replayed counterexample lie within what it takes for proven."""
    radius = search.radius(search.proven)
    if search.upper <= search.proven:
        return Verdict.UNKNOWN, 0.0, None, f"a counterexample within the radius {radius:g} that seemed proven"
    note, verdict = "", Verdict.CERTIFIED
    if not search.finished:
        note = f"bracket not closed: {_undecided(search) if search.exhausted else 'out of budget'}"
        if not search.proven > 0:
            verdict = Verdict.UNKNOWN if search.exhausted else Verdict.TIMEOUT
    return verdict, radius, search.margin, note


def _undecided(search: RadiusSearch) -> str:
    """Why a search has ended between what is proven and the nearest counterexample."""
    if not math.isfinite(search.undecided):
        return "a tie to within rounding at the image itself"
    undecided = search.radius(search.undecided)
    if search.tie:
        precision = f" of {search.nearest.dtype}" if search.nearest.disputed < search.upper else ""
        return f"from radius {undecided:.6g} on, a tie to within rounding{precision}"
    return f"at radius {undecided:.6g} neither bounds nor counterexamples decide what is left"


def _decided(search: RadiusSearch, decided: bool | None, radius: float) -> Finding:
    """What is known about a radius."""
    if decided:
        return Verdict.CERTIFIED, radius, search.margin, ""
    if decided is None:
        return Verdict.UNKNOWN if search.exhausted else Verdict.TIMEOUT, radius, search.worst, ""
    return Verdict.FALSIFIED, radius, None, ""
