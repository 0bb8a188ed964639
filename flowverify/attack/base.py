"""What every attack has: a model, valid inputs, a search, and a check that it cannot avoid."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.batch import Batch
from flowverify.attack.check import confirm
from flowverify.attack.model import AttackedModel
from flowverify.attack.result import FOUND, MISCLASSIFIED, NOT_FOUND, AttackResult, join
from flowverify.ball import Ball, Threat, WassersteinBall
from flowverify.errors import InvalidInputError

FIRST_RADIUS = 0.05  # pixels; the order of radii on plainly trained networks
GROWTH = 2.0
BISECTION = 1.02  # the search for the smallest radius ends when the bracket is this narrow
TRIALS = 60  # or after so many radii


class BaseAttack(ABC):
    """A search for adversarial images, and the check of what it finds (:mod:`flowverify.attack.check`).

    A subclass says how to search; it is not trusted. Every image that an attack returns has been repaired and
    re-checked against the threat model on the model itself, or is reported as not found.

    Args:
        model: a :class:`~flowverify.network.Network` or any torch module from (B, C, H, W) to logits; it is copied.
        batch_size: images searched together; results do not depend on it.
        seed: of what is random.

    Raises:
        InvalidInputError: not such a model, a batch size below 1.
    """

    name: ClassVar[str]
    shorten: bool = True  # whether an adversarial image is pulled back to the decision boundary

    def __init__(self, model: nn.Module, *, batch_size: int = 100, seed: int = 0) -> None:
        if batch_size < 1:
            raise InvalidInputError(f"batch_size {batch_size}: expected at least 1")
        self.model = AttackedModel(model)
        self.batch_size, self.seed = batch_size, seed

    @abstractmethod
    def search(self, batch: Batch) -> Tensor:
        """Candidates (B, C, H, W) within the balls of the batch; the clean image where there is none."""

    def search_nearest(self, batch: Batch) -> Tensor:
        """Candidates (B, C, H, W) as near as possible: by default, bisection of the radius."""
        threat, images = batch.ball.threat, batch.images
        limit = float(batch.ball.grid.diameter)
        best = images.clone()
        low = torch.zeros(len(batch), dtype=torch.float64, device=images.device)
        high = torch.full_like(low, torch.inf)
        radius = torch.full_like(low, FIRST_RADIUS)
        active = torch.arange(len(batch), device=low.device)
        for _ in range(TRIALS):
            if not active.numel():
                break
            part = batch[active].with_budget(threat.budget(radius[active], images[active]))
            found, distance = confirm(self.model, part, self.search(part))
            hit = torch.isfinite(distance)
            better = active[hit & (distance < high[active])]
            best[better] = found[hit & (distance < high[active])]
            low[active[~hit]] = radius[active[~hit]]
            high[active[hit]] = torch.minimum(distance[hit], high[active[hit]])
            radius = torch.where(torch.isinf(high), radius * GROWTH, (low * high).sqrt().clamp(min=0.5 * high))
            done = torch.where(torch.isinf(high), low >= limit, high <= low * BISECTION) | (high < 1e-6)
            radius = radius.clamp(max=limit)
            active = active[~done[active]]
        return best

    def run(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> AttackResult:
        """Looks for an adversarial image within the radius of ``ball`` of each image.

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; not normalised.
            labels: (B,).
            ball: radius in pixels on normalised images, ground cost, cap.

        Raises:
            InvalidInputError: as :meth:`check`, or no image.
        """
        return self._run(images, labels, ball.threat, ball.radius)

    def minimise(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> AttackResult:
        """Looks for the nearest adversarial image of each image; the radius found is an upper bound.

        Raises:
            InvalidInputError: as :meth:`check`, or no image.
            UnknownNameError: an unknown ground cost.
        """
        return self._run(images, labels, Threat(ground, cap), None)

    def check(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch in float64, and labels; see :meth:`flowverify.network.subject.Subject.check`."""
        images, labels = self.model.check(images, labels, threat)
        return images.double(), labels

    def _run(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> AttackResult:
        images, labels = self.check(images, labels, threat)
        if not len(images):
            raise InvalidInputError("images: given none, expected at least one")
        ball = threat.unlimited(images) if radius is None else Ball(threat, images, threat.budget(radius, images))
        positions = torch.arange(len(images), device=images.device)
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = positions[start : start + self.batch_size]
            batch = Batch(ball[rows], labels[rows], self.model.logits(images[rows]), positions[rows])
            parts.append(self._run_batch(batch, radius is None))
        return join(parts)

    def _run_batch(self, whole: Batch, nearest: bool) -> AttackResult:
        begin = time.perf_counter()
        images, labels = whole.images, whole.labels
        right = self.model.clean(images, labels)[1]
        final, distance = images.clone(), torch.zeros(len(images), dtype=torch.float64, device=images.device)
        notes = [""] * len(images)
        chosen = right.nonzero().flatten()
        if chosen.numel():
            batch = whole[chosen]
            candidates = self.search_nearest(batch) if nearest else self.search(batch)
            final[chosen], distance[chosen] = confirm(self.model, batch, candidates, shorten=self.shorten and nearest)
            for row in chosen[torch.isinf(distance[chosen])].tolist():
                offered = bool((candidates[chosen == row] != images[row]).any())
                notes[row] = "what the search offered did not pass the check" if offered else "the search found none"
        prediction = self.model.clean(final, labels)[0]
        outcome = tuple(
            MISCLASSIFIED if not bool(right[k]) else FOUND if bool(torch.isfinite(distance[k])) else NOT_FOUND
            for k in range(len(images))
        )
        return AttackResult(
            images=final,
            radius=distance,
            label=labels,
            prediction=prediction,
            outcome=outcome,
            note=tuple(notes),
            attack=self.name,
            ground=whole.ball.threat.ground,
            cap=whole.ball.threat.cap,
            seconds=time.perf_counter() - begin,
        )
