"""The support function of one image and budget, solved for one batch of coefficients after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowverify.transport.compiled import mass_layout, share_out


class Prepared:
    """As :func:`flowverify.transport.compiled.solve` with l1 ground cost, again and again: what stays is kept.

    Nothing is checked. Coefficients that are not finite give an excess without meaning.

    Args:
        image: (C, H, W), on the CPU, float32 or float64, which is then the dtype of all coefficients.
        budget: mass times distance.
    """

    def __init__(self, image: Tensor, budget: float) -> None:
        self._shape: tuple[int, ...] = tuple(image.shape)
        self._mass = image.contiguous().reshape(-1).numpy()
        self._layout = mass_layout(self._mass.reshape(self._shape))
        self._budget = float(budget)

    def solve(
        self, coefficients: Tensor, guess: Tensor | None, tolerance: float, maximiser: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Excess (S,) and multiplier (S,), float64, and maximisers (S, pixels), for coefficients (S, pixels)."""
        from flowverify.transport import scan_kernel

        rows = coefficients.contiguous().numpy()
        count = len(rows)
        guesses = np.zeros(count) if guess is None else guess.contiguous().numpy()
        excess, multipliers, brackets = np.empty(count), np.empty(count), np.empty((count, 2))
        points = np.empty((count if maximiser else 0, self._mass.size), self._mass.dtype)
        budgets = np.full(count, self._budget) if maximiser else guesses

        def work(first: int, last: int) -> None:
            scan_kernel.solve_problems(
                rows, self._mass, *self._layout, self._budget, guesses, tolerance, self._shape, first, last, excess,
                multipliers, brackets,
            )  # fmt: skip
            if maximiser:
                scan_kernel.maximise_problems(
                    rows, self._mass, *self._layout, budgets, brackets, self._shape, first, last, points
                )  # fmt: skip

        share_out(work, count)
        return torch.from_numpy(excess), torch.from_numpy(multipliers), torch.from_numpy(points) if maximiser else None
