"""The least value of many linear functions over one ball: images of the polytope, or the L1 ball of flows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.network.rounding import reach
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.prepared import Prepared
from flowverify.transport.support import support


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


class Polytope:
    """Images nu >= 0 of the mass of ``image`` that plans of cost at most ``budget`` reach (theory, section 5).

    Args:
        image: (C, H, W), float64.
        budget: radius times mass, for a ground cost that is a metric.
        ground: the ground cost.
        cap: largest value of a pixel; minima are then lower bounds, never looser than without.
    """

    feasible = True

    def __init__(self, image: Tensor, budget: float, ground: str = "l1", cap: float | None = None) -> None:
        self.image, self.budget, self.ground, self.cap = image, budget, ground, cap
        self.flat = image.flatten()
        self._prepared: dict[torch.dtype, Prepared] = {}

    @property
    def reach(self) -> float:
        """What multiplies the largest coefficient of a pixel in bounds on rounding."""
        return float(reach(self.image.double().sum(), self.budget))

    @property
    def is_program(self) -> bool:
        """Whether the ball is a polytope of flows on the grid's edges."""
        return self.ground == "l1" and self.cap is None

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
        shaped = -coefficients.reshape(-1, *self.image.shape)
        budget = self.image.new_tensor([self.budget])
        start = None if guess is None else guess[None]
        found = support(
            shaped, self.image[None], budget, guess=start, tolerance=tolerance, maximiser=point, ground=self.ground,
            cap=self.cap,
        )  # fmt: skip
        nearest = None if found.maximiser is None else found.maximiser[0].flatten(1)
        return Minimum(coefficients @ self.flat - found.excess[0], found.multiplier[0].double(), nearest)

    def cut(self, rows: slice, columns: slice, kind: torch.dtype) -> Polytope:
        """The ball of a window of the image, in this precision; not the same where mass can leave the window."""
        image = self.image[:, rows, columns].to(kind).contiguous()
        return type(self)(image, self.budget, self.ground, self.cap)

    @property
    def _compiled(self) -> bool:
        return self.is_program and self.image.device.type == "cpu"

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
        if self._compiled:
            excess = self._solver(kind).solve(coefficients, None, tolerance, False)[0]
        else:
            shaped, budget = coefficients.reshape(-1, *self.image.shape), self.image.new_tensor([self.budget])
            excess = support(
                shaped, self.image[None].to(kind), budget, tolerance=tolerance, ground=self.ground, cap=self.cap
            ).excess[0].double()  # fmt: skip
        unit = torch.finfo(kind).eps / 2
        scanned = (sum(self.image.shape[1:]) + 4) * float(self.flat.sum()) * coefficients.abs().amax(1).double()
        return excess + unit * (scanned + (self.flat.numel() + 4) * excess) + 2 * self.budget * error


class FlowBall(Polytope):
    """{image + A d : ||d||_1 <= budget}: the L1 ball of flows; pixels may be negative (theory, section 4)."""

    feasible = False

    def minimum(
        self, coefficients: Tensor, guess: Tensor | None = None, tolerance: float = 1e-9, point: bool = False
    ) -> Minimum:
        shaped = coefficients.detach().reshape(-1, *self.image.shape)
        slope = lipschitz_constant(shaped)
        value = coefficients.detach() @ self.flat - self.budget * slope
        return Minimum(value, slope, self._steepest(shaped) if point else None)

    def greatest_excess(self, coefficients: Tensor, error: Tensor, tolerance: float) -> Tensor:
        slope = lipschitz_constant(coefficients.reshape(-1, *self.image.shape)).double()
        return self.budget * (slope * (1 + 4 * torch.finfo(coefficients.dtype).eps) + 2 * error)

    def _steepest(self, shaped: Tensor) -> Tensor:
        """All of the budget moved down the steepest edge of each function."""
        moved = torch.zeros_like(shaped)
        right, down = shaped.diff(dim=-1), shaped.diff(dim=-2)
        edges = torch.cat([right.flatten(1), down.flatten(1)], 1)
        if edges.shape[1]:
            steepest = edges.abs().argmax(1, keepdim=True)
            amount = -self.budget * torch.sign(edges.gather(1, steepest))
            flow = torch.zeros_like(edges).scatter(1, steepest, amount)
            across, along = flow[:, : right[0].numel()], flow[:, right[0].numel() :]
            across, along = across.reshape(right.shape), along.reshape(down.shape)
            moved[..., :, 1:] += across
            moved[..., :, :-1] -= across
            moved[..., 1:, :] += along
            moved[..., :-1, :] -= along
        return (self.image + moved).flatten(1)
