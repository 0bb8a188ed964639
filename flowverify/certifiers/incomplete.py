"""Certificates by bounds: does any image of the ball change the class, and how large may the ball be?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat, WassersteinBall
from flowverify.bounds.engine import Effort, EngineOptions, WarmStart
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.options import IncompleteOptions
from flowverify.certifiers.radius import MarginFunction, RadiusSettings, bracket, of_rows, prove
from flowverify.network.subject import ascent_direction, surplus
from flowverify.registry import INCOMPLETE, METHODS
from flowverify.results import Certificate, Verdict

DUALITY_GAP = 1e-6  # relative; what it costs in radius is far below the tolerance of any search


class Certifier(BaseCertifier):
    """One network, one method, one bound.

    Float32 is for searching; only what holds in float64, rounding allowed for, is certified. The
    claim is about the network with its weights as they are and exact arithmetic. CROWN's choice of slopes does
    not always profit from tighter intervals. Where a bound does not decide, looser ones are tried, so that fine-tuned
    certification is never worse than vanilla, another ground cost than l1 never worse than the l1 ball around its
    ball, and a cap never worse than none; see :meth:`covers`.

    Args:
        model: a network, a ``torch.nn.Module`` or the path of an ONNX file.
        method: "vanilla" or "fine-tuned".
        bound, domain, tolerance, batch_size: see :class:`~flowverify.certifiers.options.IncompleteOptions`.
        input_shape: (C, H, W), where the model does not say.

    Raises:
        UnknownNameError, UnsupportedOperationError, FoldError, ModelFileError, DependencyError: as their
            names say.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "fine-tuned",
        bound: str = IncompleteOptions.bound,
        *,
        input_shape: tuple[int, int, int] | None = None,
        domain: str = IncompleteOptions.domain,
        tolerance: float = IncompleteOptions.tolerance,
        batch_size: int = IncompleteOptions.batch_size,
    ) -> None:
        METHODS.check_family(method, INCOMPLETE)
        self.options = IncompleteOptions(bound, domain, tolerance, batch_size)
        super().__init__(model, method, bound, input_shape)
        self.search_settings = RadiusSettings()
        self._engines: dict[tuple[Threat, torch.dtype], MarginBounds] = {}

    def prepare(self, threat: Threat | None = None) -> None:
        super().prepare(threat)
        first = self.covers(Threat() if threat is None else threat)[0]
        for dtype in (torch.float32, torch.float64):
            self.engine(first, dtype)

    def covers(self, threat: Threat) -> list[Threat]:
        """The threats to bound for a question about this one, the tightest first; see :meth:`Threat.covers`.

        Flows know l1 ground cost only: in that domain other balls are covered by l1 balls.
        """
        native = replace(threat, ground="l1") if self.options.domain == "flow" else threat
        if self.method == "fine-tuned":
            positive = [cover for cover in native.covers() if cover.positive]
            monotone = all(self.engine(cover).monotone for cover in positive)
            return positive if monotone else native.covers()
        return [Threat(ground, positive=False) for ground in dict.fromkeys((native.ground, "l1"))]

    def engine(self, threat: Threat, dtype: torch.dtype = torch.float64) -> MarginBounds:
        """The bounding engine of this threat and precision, built on first use."""
        if (threat, dtype) not in self._engines:
            domain: Any = self.options.domain
            options = EngineOptions(domain, DUALITY_GAP)
            self._engines[threat, dtype] = MarginBounds(self.network, threat, self.bound, dtype=dtype, options=options)
        return self._engines[threat, dtype]

    def margins(
        self,
        ball: Ball,
        labels: Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        warm_start: WarmStart | None = None,
        references: Tensor | None = None,
        effort: Effort | None = None,
    ) -> Tensor:
        """min over t of the lower bound of f_y - f_t over each ball, (B,) float64.

        Args:
            ball: of a threat of :meth:`covers`.
            references: R for each image, (B, C, H, W), of its mass; used in the flow domain only.
            effort: how tight the margins need to be.
        """
        engine = self.engine(ball.threat, dtype)
        bounds = engine.margins(ball, labels, references=references, warm_start=warm_start, effort=effort)
        worst = bounds.double().amin(1)
        # A NaN (overflowing weights) proves nothing.
        return torch.where(torch.isnan(worst), -torch.inf, worst)

    def best_margins(self, ball: Ball, labels: Tensor) -> Tensor:
        """As :meth:`margins` in float64, by the next of :meth:`covers` where one does not decide."""
        worst = torch.full((len(ball),), -torch.inf, dtype=torch.float64, device=ball.images.device)
        for cover in self.covers(ball.threat):
            undecided = (worst <= 0).nonzero().flatten()
            if undecided.numel():
                found = self.margins(ball[undecided].within(cover), labels[undecided])
                worst[undecided] = torch.maximum(worst[undecided], found)
        return worst

    def notes(self) -> str:
        """What the engines had to do to finish, such as smaller chunks."""
        return "; ".join(sorted({note for engine in self._engines.values() for note in engine.notes}))

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """A certificate for each image of a batch at the radius of ``ball``.

        The claim of ``certified``: every image of the ball (nonnegative, of equal mass, within the radius for its
        ground cost, below its cap) is classified as the label.

        Raises:
            InvalidInputError: as :meth:`check`.
        """
        start = time.perf_counter()
        images, labels = self.check(images, labels, ball.threat)
        if not len(images):
            return []
        predictions, correct = self.clean(images, labels)
        margins = torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)
        if bool(correct.any()):
            margins[correct] = self.best_margins(ball.around(images[correct]), labels[correct])
        radius = torch.full_like(margins, ball.radius)
        return self._certificates(labels, predictions, correct, ball.threat, radius, margins, start)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The largest certified radii; see :func:`search_radius`."""
        threat = Threat() if threat is None else threat
        return search_radius(self, images, labels, threat.ground, cap=threat.cap)

    def search_batch(
        self, images: Tensor, labels: Tensor, threat: Threat, tolerance: float, references: Tensor | None = None
    ) -> list[Certificate]:
        """The largest certified radius of each image of one batch that has been checked; see :func:`search_radius`."""
        start = time.perf_counter()
        predictions, correct = self.clean(images, labels)
        budgets = torch.zeros(len(images), dtype=torch.float64)
        margins = torch.full_like(budgets, torch.nan)
        if bool(correct.any()):
            chosen = correct.cpu()
            budgets[chosen], margins[chosen] = self._largest_budgets(
                threat.unlimited(images[correct]),
                labels[correct],
                threat.cost.budget(1 + tolerance) - 1,
                None if references is None else references[chosen.to(references.device)],
            )
        radius = threat.cost.radius(budgets)
        limit = threat.largest_radius(self.network.grid)
        return self._certificates(labels, predictions, correct, threat, radius, margins, start, still=limit == 0)

    def _largest_budgets(
        self, ball: Ball, labels: Tensor, tolerance: float, references: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For each unit of mass, (B,), with the margins at them, (B,): margins fall with the budget about linearly."""
        threat, count, search = ball.threat, len(ball), self.search_settings
        limit = threat.cost.budget(threat.largest_radius(ball.grid))

        def at(dtype: torch.dtype, cover: Threat, warm_start: WarmStart | None, effort: Effort) -> MarginFunction:
            def evaluate(rows: Tensor, budget: Tensor) -> Tensor:
                if warm_start is not None:
                    warm_start.at(None, rows)
                own = ball[rows]
                own = own.with_budget(budget.to(own.mass) * own.mass).within(cover)
                given = None if references is None else references[rows]
                return self.margins(
                    own, labels[rows], dtype=dtype, warm_start=warm_start, references=given, effort=effort
                ).cpu()

            return evaluate

        zero = torch.zeros(count, dtype=torch.float64)
        clean = (-surplus(self.subject.exact_logits(ball.images), labels) - self.allowance(ball.images)).cpu()
        # A cap takes many times as long as none: from the radius without one, few steps are left to search.
        first, *others = self.covers(threat)
        if first.cap is not None:
            first, others = others[0], [first, *others[1:]]
        warm, refines = WarmStart(count), self.engine(first, torch.float32).refines
        searched, rough = (at(torch.float32, first, warm, effort) for effort in (search.searching, search.rough))
        begin = search.first_share * self._linear_budgets(ball.within(first), labels, clean)
        brackets = bracket(
            searched, zero, clean, clean, limit, tolerance, search, rough=rough if refines else None, first=begin
        )
        found, margin = prove(at(torch.float64, first, None, search.confirming), brackets, clean, tolerance, search)
        for cover in others:
            floor = (found * (1 + tolerance)).clamp(min=search.smallest, max=limit)
            larger = ball.with_budget(floor.to(ball.mass) * ball.mass).within(cover)
            open_ = ((floor > found) & ~self._refuted(larger, labels).cpu()).nonzero().flatten()
            if not open_.numel():
                continue
            at_floor = torch.full_like(floor, -torch.inf)
            at_floor[open_] = at(torch.float32, cover, None, search.searching)(open_, floor[open_])
            better = (at_floor > 0).nonzero().flatten()
            if not better.numel():
                continue
            warm = WarmStart(count)
            searched = of_rows(at(torch.float32, cover, warm, search.searching), better)
            brackets = bracket(
                searched, floor[better], at_floor[better], clean[better], limit, tolerance, search, search.raised_growth
            )
            exact = of_rows(at(torch.float64, cover, None, search.confirming), better)
            raised, proven = prove(exact, brackets, clean[better], tolerance, search)
            kept = raised > found[better]
            found[better[kept]], margin[better[kept]] = raised[kept], proven[kept]
        return found, margin

    def _linear_budgets(self, ball: Ball, labels: Tensor, clean: Tensor) -> Tensor:
        """For each unit of mass, (B,): what it costs to end the margin to the runner-up as linearised at the image.

        To begin a search with, by fixed-point steps on the concave support function; the settings' first trial where
        that leads nowhere.
        """
        ball = ball.to(dtype=torch.float64)
        _, gradient = ascent_direction(self.precise, ball.images, labels)
        budget = torch.full_like(clean, self.search_settings.first)
        for _ in range(self.search_settings.linear_steps):
            own = ball.with_budget(budget.to(ball.mass) * ball.mass)
            gain = own.support(gradient[:, None]).excess[:, 0].double().cpu()
            budget = budget * clean / gain
            budget = torch.where(torch.isfinite(budget) & (budget > 0), budget, self.search_settings.first)
        return budget

    def _refuted(self, ball: Ball, labels: Tensor) -> Tensor:
        """Balls (B,) that hold an image of another class, so that no bound has a positive margin: a short search.

        By linear maximisation around one image after another. It spares bounds, and claims nothing.
        """
        refuted = torch.zeros(len(ball), dtype=torch.bool, device=ball.images.device)
        if ball.threat.cap is not None:
            return refuted  # what maximises a bound need not lie in the ball
        points = ball.images.double()
        for _ in range(self.search_settings.refuting_steps + 1):
            above, gradient = ascent_direction(self.precise, points, labels)
            refuted = refuted | (above > 0)
            if bool(refuted.all()):
                break
            found = ball.support(gradient[:, None], maximiser=True).maximiser
            assert found is not None
            points = found[:, 0].double()
        return refuted

    def _certificates(
        self,
        labels: Tensor,
        predictions: Tensor,
        correct: Tensor,
        threat: Threat,
        radii: Tensor,
        margins: Tensor,
        start: float,
        *,
        still: bool | None = None,
    ) -> list[Certificate]:
        """Of the images classified right, those are certified whose margin is positive.

        Args:
            still: for a search, whether nothing can move; then a radius of 0 is certified too.
        """
        seconds, notes = (time.perf_counter() - start) / len(labels), self.notes()
        result = []
        for k, (radius, margin) in enumerate(zip(radii.tolist(), margins.tolist(), strict=True)):
            proven = margin > 0 if still is None or still else radius > 0
            verdict = Verdict.CERTIFIED if proven else Verdict.UNKNOWN
            right = bool(correct[k])
            result.append(
                self.certificate(
                    labels[k],
                    predictions[k],
                    verdict if right else Verdict.MISCLASSIFIED,
                    threat,
                    radius,
                    seconds,
                    margin=margin if right else None,
                    note=notes,
                )
            )
        return result


def search_radius(
    certifier: Certifier,
    images: Tensor,
    labels: Tensor,
    ground: str = "l1",
    *,
    tolerance: float | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    references: Tensor | None = None,
    cap: float | None = None,
) -> list[Certificate]:
    """The largest certified radius of each image, to ``tolerance`` relative; by default the certifier's own.

    The search runs in float32, in the budget for each unit of mass, with multipliers carried from trial to trial; what
    it finds is then confirmed in float64, or lowered until it is. It is raised to that of a looser bound
    (:meth:`Certifier.covers`: vanilla, the l1 ball around the ball, no cap) where that one is larger by more than the
    tolerance. Certificates hold below and at the radius, because the balls are nested.

    Args:
        images: (B, C, H, W), in any number; they are taken ``batch_size`` at a time.
        progress: called with the number of images that each batch has finished.
        references: R for each image, (B, C, H, W), for a certifier with ``domain="flow"``; see
            :mod:`flowverify.certifiers.references`.
        cap: largest value of a pixel in the balls; None for no limit.

    Raises:
        InvalidInputError: as :meth:`Certifier.check`, a tolerance outside (0, 1), or a batch size < 1.
        UnknownNameError: an unknown ground cost.
    """
    threat = Threat(ground, cap)
    given: dict[str, Any] = {"tolerance": tolerance, "batch_size": batch_size}
    options = replace(certifier.options, **{name: value for name, value in given.items() if value is not None})
    images, labels = certifier.check(images, labels, threat)
    result: list[Certificate] = []
    for start in range(0, len(images), options.batch_size):
        part = slice(start, start + options.batch_size)
        own = None if references is None else references[part]
        found = certifier.search_batch(images[part], labels[part], threat, options.tolerance, own)
        result.extend(found)
        if progress is not None:
            progress(len(found))
    return result
