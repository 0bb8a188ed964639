"""The images of one search of an attack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from flowverify.ball import Ball


@dataclass(frozen=True)
class Batch:
    """Images of one search, all classified right, on the model's device.

    Attributes:
        ball: around the images, float64 (B, C, H, W); its budgets are infinite where the nearest image is sought.
        labels: int64 (B,).
        logits: of the images, float64 (B, classes).
        positions: of the images in what the user gave, for seeding; int64 (B,).
    """

    ball: Ball
    labels: Tensor
    logits: Tensor
    positions: Tensor

    @property
    def images(self) -> Tensor:
        return self.ball.images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.ball[rows], self.labels[rows], self.logits[rows], self.positions[rows])

    def with_budget(self, budget: Tensor) -> Batch:
        """The same images in balls of other budgets (B,)."""
        return replace(self, ball=self.ball.with_budget(budget))
