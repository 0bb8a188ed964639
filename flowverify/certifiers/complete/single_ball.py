"""The least value of many linear functions over one and the same ball, again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.ball import Ball
from flowverify.network.rounding import reach
from flowverify.transport.prepared import Prepared


@dataclass(frozen=True)
class Minimum:
    """min of c . nu over the ball, one row a function.

    Attributes:
        value: a sound lower bound, exact to the tolerance, (N,).
        multiplier: to start the next search from, (N,).
        point: where it is attained, (N, pixels), if it was asked for.
    """

    value: Tensor
    multiplier: Tensor
    point: Tensor | None


class SingleBall:
    """A batch of one ball (:class:`flowverify.ball.Ball`), with what is prepared for its image in each precision.

    With a cap minima are lower bounds, never looser than without.

    Attributes:
        image: (C, H, W); flat: the same, (pixels,).
        budget: mass times ground cost.
        positive: whether its points are images; otherwise they may have negative pixels.
        is_program: whether it is a polytope of flows on the grid's edges.
    """

    def __init__(self, ball: Ball) -> None:
        self.ball, self.image, self.budget = ball, ball.images[0], float(ball.budget[0])
        self.flat = self.image.flatten()
        threat = ball.threat
        self.positive = threat.positive
        self.is_program = threat.ground == "l1" and threat.cap is None
        self._prepared: dict[torch.dtype, Prepared] = {}

    @property
    def reach(self) -> float:
        """What multiplies the largest coefficient of a pixel in bounds on rounding."""
        return float(reach(self.image.double().sum(), self.budget))

    def window(self, rows: slice, columns: slice, kind: torch.dtype) -> SingleBall:
        """The ball of a part of the image, in this precision; a smaller one where mass could leave the window."""
        image = self.image[:, rows, columns].to(kind).contiguous()
        return SingleBall(Ball(self.ball.threat, image[None], self.ball.budget))

    def minimum(
        self,
        coefficients: Tensor,  # (N, pixels)
        guess: Tensor | None = None,
        tolerance: float = 1e-9,
        point: bool = False,
    ) -> Minimum:
        coefficients = coefficients.detach()
        if self._compiled:
            excess, multiplier, nearest = self._solver(coefficients.dtype).solve(-coefficients, guess, tolerance, point)
            centre = coefficients @ self.flat  # not finite if any coefficient is not: then the excess says nothing
            value = torch.where(torch.isfinite(centre), centre - excess.to(centre), torch.nan)
            return Minimum(value, multiplier, nearest)
        found = self.ball.support(
            -coefficients.reshape(-1, *self.image.shape), guess=None if guess is None else guess[None],
            tolerance=tolerance, maximiser=point,
        )  # fmt: skip
        nearest = None if found.maximiser is None else found.maximiser[0].flatten(1)
        return Minimum(coefficients @ self.flat - found.excess[0], found.multiplier[0].double(), nearest)

    @property
    def _compiled(self) -> bool:
        return self.positive and self.is_program and self.image.device.type == "cpu"

    def _solver(self, kind: torch.dtype) -> Prepared:
        if kind not in self._prepared:
            self._prepared[kind] = Prepared(self.image.to(kind), self.budget)
        return self._prepared[kind]

    def greatest_excess(self, coefficients: Tensor, error: Tensor, tolerance: float) -> Tensor:
        """An upper bound (N,), float64, of max c . (nu - image) for functions c (N, pixels) in any precision.

        Args:
            coefficients: c, each entry off by at most ``error`` (N,).

        The bound allows for them and for its own rounding: half a unit for each step of a scan, a subtraction, and
        the sum over the pixels. A unit of mass moves at a cost of at least 1, so that errors of c count with twice
        the budget.
        """
        kind = coefficients.dtype
        shaped = coefficients.reshape(-1, *self.image.shape)
        if not self.positive:
            slope = self.ball.support(shaped).multiplier[0].double()
            return self.budget * (slope * (1 + 4 * torch.finfo(kind).eps) + 2 * error)
        if self._compiled:
            excess = self._solver(kind).solve(coefficients, None, tolerance, False)[0]
        else:
            excess = self.ball.to(dtype=kind).support(shaped, tolerance=tolerance).excess[0].double()
        unit = torch.finfo(kind).eps / 2
        scanned = (sum(self.image.shape[1:]) + 4) * float(self.flat.sum()) * coefficients.abs().amax(1).double()
        return excess + unit * (scanned + (self.flat.numel() + 4) * excess) + 2 * self.budget * error
