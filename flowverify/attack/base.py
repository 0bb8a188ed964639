"""What every attack has: a model, valid inputs, a search, and a check that it cannot avoid."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.check import confirm
from flowverify.attack.model import AttackedModel
from flowverify.attack.result import FOUND, MISCLASSIFIED, NOT_FOUND, AttackResult, join
from flowverify.conventions import check_labels
from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.threat import WassersteinBall, check_images
from flowverify.transport.distance import channel_masses
from flowverify.transport.ground import check_ground, parse_ground
from flowverify.witness import clean

FIRST_RADIUS = 0.05  # pixels; the order of radii on plainly trained networks
GROWTH = 2.0
BISECTION = 1.02  # the search for the smallest radius ends when the bracket is this narrow
TRIALS = 60  # or after so many radii


@dataclass(frozen=True)
class Batch:
    """Images of one search, all classified right, on the model's device.

    Attributes:
        images: float64 (B, C, H, W).
        labels: int64 (B,).
        logits: of the images, float64 (B, classes).
        mass: float64 (B,).
        positions: of the images in what the user gave, for seeding; int64 (B,).
        ground, cap: the threat model.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    mass: Tensor
    positions: Tensor
    ground: str
    cap: float | None

    def __len__(self) -> int:
        return len(self.labels)

    def budget(self, radius: Tensor) -> Tensor:
        """What plans within these radii (B,) may cost, (B,)."""
        return parse_ground(self.ground).budget(radius) * self.mass

    def __getitem__(self, rows: Tensor) -> Batch:
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            logits=self.logits[rows],
            mass=self.mass[rows],
            positions=self.positions[rows],
        )


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
    def _at_radius(self, batch: Batch, radius: Tensor) -> Tensor:
        """Candidates (B, C, H, W) within these radii (B,), in pixels; the clean image where there is none."""

    def _smallest(self, batch: Batch) -> Tensor:
        """Candidates (B, C, H, W) as near as possible: by default, bisection of the radius."""
        count, limit = len(batch), float(Grid.of(batch.images).diameter)
        best = batch.images.clone()
        low = torch.zeros(count, dtype=torch.float64, device=batch.images.device)
        high = torch.full_like(low, torch.inf)
        radius = torch.full_like(low, FIRST_RADIUS)
        active = torch.arange(count, device=low.device)
        for _ in range(TRIALS):
            if not active.numel():
                break
            part = batch[active]
            candidates = self._at_radius(part, radius[active])
            images, distance = confirm(
                self.model, part.images, part.labels, part.logits, candidates, part.ground, part.cap,
                radius=radius[active],
            )  # fmt: skip
            hit = torch.isfinite(distance)
            better = active[hit & (distance < high[active])]
            best[better] = images[hit & (distance < high[active])]
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
            InvalidInputError: as :meth:`check`.
        """
        return self._run(images, labels, ball.ground, ball.cap, ball.radius)

    def minimise(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> AttackResult:
        """Looks for the nearest adversarial image of each image; the radius found is an upper bound.

        Raises:
            InvalidInputError: as :meth:`check`.
            UnknownNameError: an unknown ground cost.
        """
        ball = WassersteinBall(0.0, check_ground(ground), cap)
        return self._run(images, labels, ball.ground, ball.cap, None)

    def check(self, images: Tensor, labels: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch in float64, labels as int64 (B,), both on the model's device.

        Raises:
            InvalidInputError: wrong shape, a pixel that is negative, not finite or above the cap, mass 0, a label
                that is not a class of the model, or a model that does not take such images.
        """
        images = check_images(images).detach().to(self.model.device).double()
        labels = check_labels(labels, len(images), device=self.model.device)
        if len(images):
            labels = check_labels(labels, len(images), self.model.logits(images[:1]).shape[1])
        if cap is not None and images.numel() and float(images.max()) > cap:
            at = int((images.flatten(1).amax(1) > cap).nonzero()[0])
            raise InvalidInputError(
                f"image {at} has a pixel of {float(images[at].max()):g}: expected at most the cap, {cap:g}"
            )
        return images, labels

    def _run(
        self, images: Tensor, labels: Tensor, ground: str, cap: float | None, radius: float | None
    ) -> AttackResult:
        checked, labels = self.check(images, labels, cap)
        check_ground(ground, Grid.of(checked))
        if not len(checked):
            raise InvalidInputError("images: given none, expected at least one")
        parts = []
        for start in range(0, len(checked), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self._run_batch(checked[part], labels[part], start, ground, cap, radius))
        return join(parts)

    def _run_batch(
        self, images: Tensor, labels: Tensor, start: int, ground: str, cap: float | None, radius: float | None
    ) -> AttackResult:
        begin = time.perf_counter()
        own = self.model.logits(images)
        right = clean(self.model, images, labels)[1]
        final, distance = images.clone(), torch.zeros(len(images), dtype=torch.float64, device=images.device)
        notes = [""] * len(images)
        chosen = right.nonzero().flatten()
        if chosen.numel():
            mass = channel_masses(images[chosen]).sum(-1)
            batch = Batch(images[chosen], labels[chosen], own[chosen], mass, chosen + start, ground, cap)
            limit = None if radius is None else torch.full_like(batch.mass, radius)
            candidates = self._smallest(batch) if limit is None else self._at_radius(batch, limit)
            final[chosen], distance[chosen] = confirm(
                self.model,
                batch.images,
                batch.labels,
                batch.logits,
                candidates,
                ground,
                cap,
                radius=limit,
                shorten=self.shorten and limit is None,
            )
            for row in chosen[torch.isinf(distance[chosen])].tolist():
                offered = bool((candidates[chosen == row] != images[row]).any())
                notes[row] = "what the search offered did not pass the check" if offered else "the search found none"
        prediction = clean(self.model, final, labels)[0]
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
            ground=ground,
            cap=cap,
            seconds=time.perf_counter() - begin,
        )
