"""Exact bounds of a value that is affine in the image, over the Wasserstein ball around each image.

Entry k of the value is c_k . x + b_k, so its bounds over the ball are support functions (theory, sections 4
and 5; section 13 for what stands above). The coefficients do not depend on the image: they are computed once a
network and shared by the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.bounds.intervals import Interval
from flowverify.bounds.warm_start import WarmStart
from flowverify.network import Network, affine_rows
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.support import inner

CHUNK_ENTRIES = 1 << 26  # of rows that are bounded at once, so that a large layer is never copied whole


class AffineValue:
    """One affine value of a network, ready to be bounded over balls of a threat.

    Args:
        network: the network in canonical form.
        name: a value in ``network.affine_of_input()``.
        dtype: the precision of the bounds.
    """

    def __init__(self, network: Network, name: str, dtype: torch.dtype, threat: Threat) -> None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        rows, bias = affine_rows(network, name, dtype)
        self.name, self.threat = name, threat
        self.shape = network.shape(name)
        self.bias = bias.to(device)
        self.rows = rows.to(device).reshape(-1, *network.input_shape)
        self.lipschitz = lipschitz_constant(self.rows, threat.ground)

    def bounds(self, ball: Ball, tolerance: float | None = None, warm_start: WarmStart | None = None) -> Interval:
        """Lower and upper bounds over each ball, of shape (B, *shape)."""
        centre = inner(self.rows, ball.images) + self.bias
        if self.threat.positive:
            above, below = (self._excess(sign, ball, tolerance, warm_start) for sign in (+1, -1))
        else:
            above = below = ball.budget[:, None].to(centre) * self.lipschitz
        lower, upper = centre - below, centre + above
        return lower.reshape(-1, *self.shape), upper.reshape(-1, *self.shape)

    def margins(self, specification: Tensor, ball: Ball, tolerance: float | None = None) -> Tensor:
        """Exact lower bounds of linear functions (B, S, entries) of the value, (B, S): for networks that are affine."""
        rows = torch.einsum("bse,ep->bsp", specification, self.rows.flatten(1))
        rows = rows.reshape(*specification.shape[:2], *self.rows.shape[1:])
        centre = inner(rows, ball.images) + specification @ self.bias
        return centre - ball.support(-rows, tolerance=tolerance).excess

    def _excess(self, sign: int, ball: Ball, tolerance: float | None, warm_start: WarmStart | None) -> Tensor:
        size = max(1, CHUNK_ENTRIES // self.rows[0].numel())
        parts = []
        for start in range(0, len(self.rows), size):
            rows, guess = self.rows[start : start + size], None
            if warm_start is not None:
                guess = warm_start.at(("first layer", self.name, start)).guess(sign, len(rows))
            found = ball.support(sign * rows, guess=guess, tolerance=tolerance)
            if warm_start is not None:
                warm_start.keep(sign, found.multiplier)
            parts.append(found.excess)
        return torch.cat(parts, dim=1)
