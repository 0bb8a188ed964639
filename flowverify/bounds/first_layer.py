"""Exact bounds of a value that is affine in the image, over the Wasserstein ball around each image.

Entry k of the value is c_k . x + b_k, so its bounds over the ball are support functions (theory, sections 4
and 5; section 13 for what stands above). The coefficients do not depend on the image: they are computed once a
network and shared by the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowverify.bounds.intervals import Interval
from flowverify.bounds.warm_start import WarmStart
from flowverify.network import Network, affine_rows
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.support import inner, support

CHUNK_ENTRIES = 1 << 26


class AffineValue:
    """One affine value of a network, ready to be bounded over balls.

    Args:
        network: the network in canonical form.
        name: a value in ``network.affine_of_input()``.
        dtype: the precision of the bounds.
        ground, cap: the ground cost of the balls, and the largest value of a pixel in them.
    """

    def __init__(
        self, network: Network, name: str, dtype: torch.dtype, ground: str = "l1", cap: float | None = None
    ) -> None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        rows, bias = affine_rows(network, name, dtype)
        self.name = name
        self.shape: tuple[int, ...] = network.input_shape if name == "input" else network.node(name).shape
        self.bias = bias.to(device)
        self.rows = rows.to(device).reshape(-1, *network.input_shape)
        self.ground, self.cap = ground, cap
        self.lipschitz = lipschitz_constant(self.rows, ground)

    def bounds(
        self, images: Tensor, budget: Tensor, feasible: bool, tolerance: float | None, warm_start: WarmStart | None
    ) -> Interval:
        """Lower and upper bounds over the ball around each image, of shape (B, *shape).

        Args:
            images: (B, C, H, W).
            budget: what the plans from each image may cost, (B,).
            feasible: whether the ball holds nonnegative images only (fine-tuned) or all (vanilla).
        """
        centre = inner(self.rows, images) + self.bias
        if feasible:
            above = self._excess(self.rows, +1, images, budget, tolerance, warm_start)
            below = self._excess(self.rows, -1, images, budget, tolerance, warm_start)
        else:
            above = below = budget[:, None].to(images.dtype) * self.lipschitz
        lower, upper = centre - below, centre + above
        return lower.reshape(-1, *self.shape), upper.reshape(-1, *self.shape)

    def margins(
        self,
        specification: Tensor,  # (B, S, entries)
        images: Tensor,
        budget: Tensor,
        feasible: bool,
        tolerance: float | None,
    ) -> Tensor:
        """Exact lower bounds of linear functions of the value, (B, S): for networks that are affine."""
        rows = torch.einsum("bse,ep->bsp", specification, self.rows.flatten(1))
        rows = rows.reshape(*specification.shape[:2], *self.rows.shape[1:])
        centre = inner(rows, images) + specification @ self.bias
        if not feasible:
            return centre - budget[:, None].to(images.dtype) * lipschitz_constant(rows, self.ground)
        found = support(-rows, images, budget, tolerance=tolerance, ground=self.ground, cap=self.cap)
        return centre - found.excess

    def _excess(
        self,
        rows: Tensor,
        sign: int,
        images: Tensor,
        budget: Tensor,
        tolerance: float | None,
        warm_start: WarmStart | None,
    ) -> Tensor:
        def solve(part: Tensor) -> Tensor:
            guess = None if warm_start is None else warm_start.guess(sign, part.shape[0])
            solution = support(
                sign * part, images, budget, guess=guess, tolerance=tolerance, ground=self.ground, cap=self.cap
            )
            if warm_start is not None:
                warm_start.keep(sign, solution.multiplier)
            return solution.excess

        return _in_chunks(solve, rows, warm_start, self.name)


def _in_chunks(solve: Callable[[Tensor], Tensor], rows: Tensor, warm_start: WarmStart | None, name: str) -> Tensor:
    """Applies ``solve`` to runs of rows, so that a large layer is never copied whole."""
    size = max(1, CHUNK_ENTRIES // rows[0].numel())
    parts = []
    for start in range(0, rows.shape[0], size):
        if warm_start is not None:
            warm_start.place = ("first layer", name, start)
        parts.append(solve(rows[start : start + size]))
    return torch.cat(parts, dim=1)
