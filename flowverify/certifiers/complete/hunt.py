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
from flowverify.certifiers.base import BaseCertifier
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.ground import parse_ground
from flowverify.transport.least_budget import least_budget
from flowverify.witness import replay

DESCENT_STEPS = 8
OVERSHOOT = 1.02
FARTHER = 1.2  # than the nearest counterexample: not worth a look
HALVINGS = 40
NEAREST = 3  # points of a batch that descent starts from


class Adversary(Protocol):
    """A search for near adversarial images, such as :class:`flowverify.attack.minimal.MinimalRadius`."""

    def minimise(self, images: Tensor, labels: Tensor, ground: str = ..., cap: float | None = ...) -> Any:
        """A result whose ``images`` (B, C, H, W) are candidates; they are replayed, not trusted."""


class Hunt:
    """The nearest counterexample known for one image.

    Args:
        certifier: gives the network in both precisions.
        image: (C, H, W), float64.
        label: its class.
        feasible: whether only images count; otherwise any image + A d, by ||d||_1.
        ground, cap: the threat model, which images must keep to.

    Attributes:
        radius: distance of the nearest counterexample, of normalised images; infinite while there is none.
        witness: that image (C, H, W), or None.
        least_margin: the least min over t of f_y - f_t at any point that was looked at.
        largest: the largest absolute value of the image's logits.
    """

    def __init__(
        self, certifier: BaseCertifier, image: Tensor, label: int, feasible: bool, ground: str = "l1",
        cap: float | None = None,
    ) -> None:  # fmt: skip
        self.image, self.label, self.feasible, self.ground, self.cap = image, label, feasible, ground, cap
        self._threat = Threat(ground, cap)
        self.mass = float(image.sum())
        self.radius = float("inf")
        self.witness: Tensor | None = None
        self.least_margin = float("inf")
        self._lock = RLock()
        self._precise, self._network, self._subject = certifier.precise, certifier.network, certifier.subject
        with torch.no_grad():
            self.largest = float(self._precise(image[None]).abs().max())

    def margins(self, points: Tensor) -> Tensor:
        """min over t of f_y - f_t, float64 (N,), for points (N, C, H, W)."""
        with torch.no_grad():
            logits: Tensor = self._precise(points)
        others = logits.clone()
        others[:, self.label] = -torch.inf
        return logits[:, self.label] - others.amax(1)

    def ask(self, adversary: Adversary) -> None:
        """Takes what an injected search finds."""
        found = adversary.minimise(self.image[None], torch.tensor([self.label]), self.ground, self.cap).images
        self.offer(found.to(self.image).reshape(-1, *self.image.shape))

    def descend(self) -> None:
        """A descent from the image towards each other class."""
        if self.feasible:
            for target in range(self._network.num_classes):
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
        if self.feasible:
            points = self._repaired(points)
        margins, before = self.margins(points), self.radius
        self.least_margin = min(self.least_margin, float(margins.min()))
        wrong = (margins < 0).nonzero().flatten()
        for index in wrong[margins[wrong].argsort()][:NEAREST].tolist():
            self._take(points[index])
        if descend and self.feasible:
            for point in points[margins.argsort()[:NEAREST]]:
                self._descend(point)
        return self.radius < before

    def _repaired(self, points: Tensor) -> Tensor:
        """As images of the threat model."""
        points = points.reshape(-1, *self.image.shape)
        return self._threat.repair(self.image.expand_as(points), points)

    def _take(self, point: Tensor) -> None:
        """Pulls a misclassified point to the boundary along the segment from the image, and replays it."""
        away = self._distance(point)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if float(self.margins(self._between(point, middle)[None])) < 0:
                high = middle
            else:
                low = middle
            if high - low < 1e-12:
                break
        if away * high >= self.radius:
            return
        for nudge in (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            candidate = self._between(point, min(1.0, high * (1 + nudge)))
            reached = self._replayed(candidate)
            if math.isfinite(reached):
                if reached < self.radius:
                    self.radius, self.witness = reached, candidate
                return

    def _between(self, point: Tensor, share: float) -> Tensor:
        between = point if share >= 1 else self.image + share * (point - self.image)
        return between.clamp(min=0) if self.feasible else between

    def _replayed(self, point: Tensor) -> float:
        """Its distance if it is a counterexample, a point of the set that is searched; infinite if not."""
        label = torch.tensor([self.label], device=point.device)
        if self.feasible:
            return float(replay(self._subject, self._threat.unlimited(self.image[None]), label, point[None]))
        return self._distance(point) if bool(self._subject.fooled(point[None], label)) else math.inf

    def _distance(self, point: Tensor) -> float:
        """Of normalised images; off the images, between the positive and the negative part of the difference."""
        if self.feasible:
            return float(self._threat.distance(self.image[None], point[None]))
        difference = point - self.image
        gained, lost = difference.clamp(min=0), (-difference).clamp(min=0)
        if float(lost.sum()) == 0:
            return 0.0
        moved = float(wasserstein_distance(lost[None], gained[None], normalised=False, mass_tolerance=1e-6))
        return parse_ground(self.ground).from_l1(moved / self.mass)

    def _descend(self, point: Tensor, target: int | None = None) -> None:
        """DeepFool in W1: the nearest image to the boundary as linearised at the last one, again and again."""
        current = point
        for _ in range(DESCENT_STEPS):
            leaf = current[None].clone().requires_grad_(True)
            with torch.enable_grad():
                logits = self._precise(leaf)[0]
                if target is None:
                    others = logits.detach().clone()
                    others[self.label] = -torch.inf
                    target = int(others.argmax())
                gain = logits[target] - logits[self.label]
            gradient = torch.autograd.grad(gain, leaf)[0][0]
            wanted = OVERSHOOT * (-float(gain.detach()) - float((gradient * (self.image - current)).sum()))
            if not bool(torch.isfinite(gradient).all()) or wanted <= 0:
                return
            found = least_budget(
                gradient[None, None],
                self.image[None],
                gradient.new_tensor([[wanted]]),
                maximiser=True,
                ground=self.ground,
            )
            reach = float(parse_ground(self.ground).budget(gradient.new_tensor(self.radius * FARTHER))) * self.mass
            if not float(found.budget) < reach:
                return
            assert found.maximiser is not None
            current = self._repaired(found.maximiser[0])[0]
            if float(self.margins(current[None])) < 0:
                self._take(current)
