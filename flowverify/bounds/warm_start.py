"""Multipliers carried from one bound computation to the next."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class WarmStart:
    """Multipliers of earlier solutions, by place in the computation, to start the next search from.

    ``place`` is set by the caller before each bound computation; ``images`` are the rows of the batch that
    are being bounded. Starting values change the time and never the validity of a bound.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.place: Hashable = None
        self.images: Tensor = torch.arange(batch)
        self._multipliers: dict[Hashable, Tensor] = {}

    def at(self, place: Hashable, images: Tensor | None = None) -> WarmStart:
        """Sets the place, and the images where they are given; returns itself."""
        self.place = place
        if images is not None:
            self.images = images
        return self

    def guess(self, sign: int, count: int) -> Tensor | None:
        """Multipliers of shape (images, count) for the present place, or None."""
        known = self._multipliers.get((self.place, sign))
        return None if known is None or known.shape[1] != count else known[self.images]

    def keep(self, sign: int, multipliers: Tensor) -> None:
        """Remembers the multipliers found at the present place."""
        key = (self.place, sign)
        known = self._multipliers.get(key)
        if known is None or known.shape[1] != multipliers.shape[1]:
            known = torch.zeros(self.batch, multipliers.shape[1], dtype=torch.float64)
            self._multipliers[key] = known
        known[self.images] = multipliers.detach().double().cpu()
