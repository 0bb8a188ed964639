"""Counterexamples: points that a search comes across, pulled towards the boundary, and replayed exactly.

Nothing is believed here: a point counts only after it was replayed (:mod:`flowverify.witness`).
"""

from __future__ import annotations

import math
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from flowverify.ball import Threat
from flowverify.certifiers.options import DEFAULTS, CounterexampleSettings
from flowverify.network.subject import Subject
from flowverify.transport.least_budget import least_budget
from flowverify.witness import replay

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
        radius: distance of the nearest counterexample, of normalised images; infinite while there is none.
        witness: that image (C, H, W), or None.
        least_margin: the least min over t of f_y - f_t at any point that was looked at.
        disputed: the least distance of an image that float64 puts into another class and the network's own precision
            does not; infinite where there is none.
        largest: the largest absolute value of the image's logits.
    """

    def __init__(
        self, subject: Subject, image: Tensor, label: int, threat: Threat, *, positive: bool = True,
        settings: CounterexampleSettings = DEFAULTS.counterexamples,
    ) -> None:  # fmt: skip
        self.image, self.label, self.threat, self.positive = image, label, threat, positive
        self._settings = settings
        self.radius = float("inf")
        self.witness: Tensor | None = None
        self.least_margin = float("inf")
        self.disputed = float("inf")
        self._lock = RLock()
        self._subject, self._precise = subject, subject.precise
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
        margins, before = self.margins(points), self.radius
        self.least_margin = min(self.least_margin, float(margins.min()))
        wrong = (margins < 0).nonzero().flatten()
        for index in wrong[margins[wrong].argsort()][: self._settings.nearest].tolist():
            self._take(points[index])
        if descend and self.positive:
            for point in points[margins.argsort()[: self._settings.nearest]]:
                self._descend(point)
        return self.radius < before

    def _repaired(self, points: Tensor) -> Tensor:
        """As images of the threat model."""
        points = points.reshape(-1, *self.image.shape)
        return self.threat.repair(self.image.expand_as(points), points)

    def _take(self, point: Tensor) -> None:
        """Pulls a misclassified point to the boundary along the segment from the image, and replays it."""
        away = self._distance(point)
        low, high = 0.0, 1.0
        for _ in range(self._settings.halvings):
            middle = (low + high) / 2
            if float(self.margins(self._between(point, middle)[None])) < 0:
                high = middle
            else:
                low = middle
            if high - low < 1e-12:
                break
        if away * high >= self.radius:
            return
        for nudge in self._settings.nudges:
            if self._keep(self._between(point, min(1.0, high * (1 + nudge)))):
                return
        # The network's own precision rounds the margins next to the boundary away: farther out, up to the point itself.
        shares = torch.linspace(high, 1.0, self._settings.retries, dtype=point.dtype, device=point.device)[1:].tolist()
        farther = torch.stack([self._between(point, share) for share in shares])
        labels = torch.full((len(farther),), self.label, device=point.device)
        for candidate in farther[self._subject.fooled(farther, labels)]:
            if self._keep(candidate):
                return
        self.disputed = min(self.disputed, away * high)

    def _keep(self, candidate: Tensor) -> bool:
        """Whether it is a counterexample; the nearest is kept."""
        reached = self._replayed(candidate)
        if reached < self.radius:
            self.radius, self.witness = reached, candidate
        return math.isfinite(reached)

    def _between(self, point: Tensor, share: float) -> Tensor:
        between = point if share >= 1 else self.image + share * (point - self.image)
        return between.clamp(min=0) if self.positive else between

    def _replayed(self, point: Tensor) -> float:
        """Its distance if it is a counterexample, a point of the set that is searched; infinite if not."""
        label = torch.tensor([self.label], device=point.device)
        if self.positive:
            return float(replay(self._subject, self.threat.unlimited(self.image[None]), label, point[None]))
        return self._distance(point) if bool(self._subject.fooled(point[None], label)) else math.inf

    def _distance(self, point: Tensor) -> float:
        """Of normalised images; off the images, between the positive and the negative part of the difference."""
        if self.positive:
            return float(self.threat.distance(self.image[None], point[None]))
        difference = (point - self.image)[None]
        # As what is lost and gained: next to the pixels themselves small differences would be rounded.
        lost, gained = (-difference).clamp(min=0), difference.clamp(min=0)
        if float(lost.sum()) == 0:
            return 0.0
        flows = Threat("l1", positive=False)
        price = flows.price(lost, gained, FLOW_MASS_TOLERANCE)
        return self.threat.cost.from_l1(float(flows.radius(price, self.image[None])))

    def _descend(self, point: Tensor, target: int | None = None) -> None:
        """DeepFool in W1: the nearest image to the boundary as linearised at the last one, again and again."""
        current = point
        for _ in range(self._settings.descent_steps):
            leaf = current[None].clone().requires_grad_(True)
            with torch.enable_grad():
                logits = self._precise(leaf)[0]
                if target is None:
                    others = logits.detach().clone()
                    others[self.label] = -torch.inf
                    target = int(others.argmax())
                gain = logits[target] - logits[self.label]
            gradient = torch.autograd.grad(gain, leaf)[0][0]
            wanted = self._settings.overshoot * (
                -float(gain.detach()) - float((gradient * (self.image - current)).sum())
            )
            if not bool(torch.isfinite(gradient).all()) or wanted <= 0:
                return
            found = least_budget(
                gradient[None, None],
                self.image[None],
                gradient.new_tensor([[wanted]]),
                maximiser=True,
                ground=self.threat.ground,
            )
            reach = float(self.threat.budget(self.radius * self._settings.farther, self.image[None]))
            if not float(found.budget) < reach:
                return
            assert found.maximiser is not None
            current = self._repaired(found.maximiser[0])[0]
            if float(self.margins(current[None])) < 0:
                self._take(current)
