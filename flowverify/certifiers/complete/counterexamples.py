"""Counterexamples: points that a search comes across, pulled towards the boundary, and replayed exactly.

Nothing is believed here: a point counts only after it was replayed (:mod:`flowverify.witness`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from flowverify.attack.base import AttackedModel
from flowverify.ball import Threat
from flowverify.certifiers.options import DEFAULTS, CounterexampleSettings
from flowverify.network.subject import Subject
from flowverify.transport.support import least_budget
from flowverify.witness import replayed_price

FLOW_MASS_TOLERANCE = 1e-6  # of what is lost and gained


class Adversary(Protocol):
    """A search for near adversarial images, such as :class:`flowverify.attack.frank_wolfe.MinimalRadius`."""

    def minimise(self, images: Tensor, labels: Tensor, ground: str = ..., cap: float | None = ...) -> Any:
        """A result whose ``images`` (B, C, H, W) are candidates; they are replayed, not trusted."""


class NearestCounterexample:
    """The nearest counterexample known for one image.

    Args:
        subject: a network.
        image: (C, H, W), float64.
        label: its class.
        threat: which images must keep to.
        positive: whether only images count; otherwise any image + A d, by ||d||_1.

    Attributes:
        budget: what the cheapest plan to the nearest counterexample costs; infinite while there is none.
        witness: that image (C, H, W), or None.
        least_margin: the least min over t of f_y - f_t at any point that was looked at.
        disputed: the least cost of a plan to an image that float64 puts into another class and the network's own
            precision does not; infinite where there is none.
        largest: the largest absolute value of the image's logits.
    """

    def __init__(
        self, subject: Subject, image: Tensor, label: int, threat: Threat, *, positive: bool = True,
        settings: CounterexampleSettings = DEFAULTS.counterexamples,
    ) -> None:  # fmt: skip
        self.image, self.label, self.threat, self.positive = image, label, threat, positive
        self._settings = settings
        self.budget = float("inf")
        self.witness: Tensor | None = None
        self.least_margin = float("inf")
        self.disputed = float("inf")
        self._lock = RLock()
        self._subject, self._precise = subject, subject.precise
        self._attacked = AttackedModel(subject.precise)
        with torch.no_grad():
            logits: Tensor = self._precise(image[None])
        self._classes, self.largest = logits.shape[1], float(logits.abs().max())

    @property
    def dtype(self) -> torch.dtype:
        """The network's own precision."""
        return self._subject.dtype

    def margins(self, points: Tensor) -> Tensor:
        """min over t of f_y - f_t, float64 (N,), for points (N, C, H, W)."""
        with torch.no_grad():
            logits: Tensor = self._precise(points)
        others = logits.clone()
        others[:, self.label] = -torch.inf
        return logits[:, self.label] - others.amax(1)

    def ask(self, adversary: Adversary) -> None:
        """Takes what an injected search finds."""
        ground, cap = self.threat.ground, self.threat.cap
        found = adversary.minimise(self.image[None], torch.tensor([self.label]), ground, cap).images
        self.offer(found.to(self.image).reshape(-1, *self.image.shape))

    def descend(self) -> None:
        """A descent from the image towards each other class."""
        if self.positive:
            for target in range(self._classes):
                if target != self.label:
                    self._descend(self.image, target)

    def offer(self, points: Tensor, *, descend: bool = False) -> bool:
        """Looks at points (N, C, H, W) or (N, pixels), a thread at a time; whether a nearer counterexample came out."""
        with self._lock:
            return self._offer(points, descend)

    def _offer(self, points: Tensor, descend: bool) -> bool:
        points = points.reshape(-1, *self.image.shape)
        usable = torch.isfinite(points).flatten(1).all(1)
        points = points[usable]
        if not len(points):
            return False
        if self.positive:
            points = self._repaired(points)
        margins, before = self.margins(points), self.budget
        self.least_margin = min(self.least_margin, float(margins.min()))
        wrong = (margins < 0).nonzero().flatten()
        for index in wrong[margins[wrong].argsort()][: self._settings.nearest].tolist():
            self._take(points[index])
        if descend and self.positive:
            for point in points[margins.argsort()[: self._settings.nearest]]:
                self._descend(point)
        return self.budget < before

    def _repaired(self, points: Tensor) -> Tensor:
        """As images of the threat model."""
        points = points.reshape(-1, *self.image.shape)
        return self.threat.repair(self.image.expand_as(points), points)

    def _take(self, point: Tensor) -> None:
        """Pulls a misclassified point to the boundary along the segment from the image, and replays it."""
        away = self._price(point)
        low, high = 0.0, 1.0
        if away > self.budget:
            high = self.budget / away
            if not float(self.margins(self._between(point, [high]))) < 0:
                return  # farther than the nearest one known
        sections = self._settings.sections
        while high - low > 1e-12:
            shares = [low + (high - low) * k / sections for k in range(1, sections)]
            wrong = (self.margins(self._between(point, shares)) < 0).tolist()
            first = wrong.index(True) if any(wrong) else len(shares)
            low, high = [low, *shares, high][first : first + 2]
        if away * high >= self.budget:
            return
        for nudge in self._settings.nudges:
            if self._keep(self._between(point, [min(1.0, high * (1 + nudge))])[0]):
                return
        # The network's own precision rounds the margins next to the boundary away: farther out, up to the point itself.
        shares = torch.linspace(high, 1.0, self._settings.retries, dtype=point.dtype, device=point.device)[1:].tolist()
        farther = self._between(point, shares)
        labels = torch.full((len(farther),), self.label, device=point.device)
        for candidate in farther[self._subject.fooled(farther, labels)]:
            if self._keep(candidate):
                return
        self.disputed = min(self.disputed, away * high)

    def _keep(self, candidate: Tensor) -> bool:
        """Whether it is a counterexample; the nearest is kept."""
        reached = self._replayed(candidate)
        if reached < self.budget:
            self.budget, self.witness = reached, candidate
        return math.isfinite(reached)

    def _between(self, point: Tensor, shares: Sequence[float]) -> Tensor:
        """So far on the way from the image to a point, (N, C, H, W)."""
        share = point.new_tensor(shares).reshape(-1, *[1] * point.ndim)
        between = torch.where(share >= 1, point, self.image + share * (point - self.image))
        return between.clamp(min=0) if self.positive else between

    def _replayed(self, point: Tensor) -> float:
        """What it costs if it is a counterexample, a point of the set that is searched; infinite if not."""
        label = torch.tensor([self.label], device=point.device)
        if self.positive:
            return float(replayed_price(self._subject, self.threat.unlimited(self.image[None]), label, point[None]))
        return self._price(point) if bool(self._subject.fooled(point[None], label)) else math.inf

    def _price(self, point: Tensor) -> float:
        """Of the cheapest plan; off the images, between the positive and the negative part of the difference."""
        if self.positive:
            return float(self.threat.price(self.image[None], point[None]))
        difference = (point - self.image)[None]
        # As what is lost and gained: next to the pixels themselves small differences would be rounded.
        lost, gained = (-difference).clamp(min=0), difference.clamp(min=0)
        if float(lost.sum()) == 0:
            return 0.0
        flows = Threat("l1", positive=False)
        price = flows.price(lost, gained, FLOW_MASS_TOLERANCE)
        if self.threat.ground == "l1":
            return float(price)
        radius = self.threat.cost.from_l1(float(flows.radius(price, self.image[None])))
        return float(self.threat.budget(radius, self.image[None]))

    def _descend(self, point: Tensor, target: int | None = None) -> None:
        """DeepFool in W1: the nearest image to the boundary as linearised at the last one, again and again."""
        current = point
        for _ in range(self._settings.descent_steps):
            if target is None:
                with torch.no_grad():
                    others = self._precise(current[None])[0]
                others[self.label] = -torch.inf
                target = int(others.argmax())
            labels, targets = (torch.tensor([one], device=current.device) for one in (self.label, target))
            found = self._attacked.gradients(current[None], labels, targets)
            gain, gradient = float(found[0]), found[1][0]
            wanted = self._settings.overshoot * (-gain - float((gradient * (self.image - current)).sum()))
            if not bool(torch.isfinite(gradient).all()) or wanted <= 0:
                return
            nearest = least_budget(
                gradient[None, None],
                self.image[None],
                gradient.new_tensor([[wanted]]),
                maximiser=True,
                ground=self.threat.ground,
            )
            if not float(nearest.budget) < self.budget * self._settings.farther**self.threat.cost.power:
                return
            assert nearest.maximiser is not None
            current = self._repaired(nearest.maximiser[0])[0]
            if float(self.margins(current[None])) < 0:
                self._take(current)
