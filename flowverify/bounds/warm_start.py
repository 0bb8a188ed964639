"""What is carried from one bound computation to the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


class WarmStart:
    """What earlier computations found for the same images, by place in the computation, to start the next from.

    ``place`` is set by the caller before each bound computation; ``images`` are the rows of the batch that
    are being bounded. Starting values change the time and never the validity of a bound.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.place: Hashable = None
        self.images: Tensor = torch.arange(batch)
        self._kept: dict[Hashable, Tensor] = {}

    def at(self, place: Hashable, images: Tensor | None = None) -> WarmStart:
        """Sets the place, and the images where they are given; returns itself."""
        self.place = place
        if images is not None:
            self.images = images
        return self

    def guess(self, sign: int, count: int) -> Tensor | None:
        """Multipliers of shape (images, count) for the present place, or None."""
        return self.recall((self.place, sign), (count,))

    def keep(self, sign: int, multipliers: Tensor) -> None:
        """Remembers the multipliers found at the present place."""
        self.remember((self.place, sign), multipliers.double(), 0.0)

    def recall(self, key: Hashable, shape: Sequence[int]) -> Tensor | None:
        """What was remembered of the present images, (images, *shape), or None."""
        known = self._kept.get(key)
        return None if known is None or known.shape[1:] != tuple(shape) else known[self.images]

    def remember(self, key: Hashable, values: Tensor, otherwise: float) -> None:
        """Keeps values (images, *shape) of the present images; the other images get ``otherwise``."""
        known = self._kept.get(key)
        if known is None or known.shape[1:] != values.shape[1:]:
            known = torch.full((self.batch, *values.shape[1:]), otherwise, dtype=values.dtype)
            self._kept[key] = known
        known[self.images] = values.detach().to(known)
