"""Perturbation classes for auto_LiRPA: the Wasserstein ball in image and in flow coordinates.

    network = BoundedModule(model, images)
    ball = PerturbationWasserstein(radius=0.05)
    lower, upper = network.compute_bounds(x=(BoundedTensor(images, ball),), method="CROWN")

Both answer ``concretize``, by which the CROWN family turns linear bounds into numbers, with the exact
maximum over the ball (theory, sections 5 and 6). Interval propagation never asks a perturbation; it reads
``norm``, ``eps`` and the end points of the input. So that no path through auto_LiRPA can lose part of the
ball, both classes present themselves there as the smallest box that holds it (norm infinity, ``x_L``,
``x_U``): sound everywhere, exact where it counts. A class that claimed norm 1 in the image domain would be
bounded as an image L1 ball of radius eps, while moving eps of mass changes the image by 2 eps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.bounds.crown.backend import (
    PATCHES_KEEP_SHAPE,
    LinearBound,
    Patches,
    PerturbationLpNorm,
    eyeC,
    patches_to_matrix,
)
from flowverify.bounds.engine import WarmStart
from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.transport.support import check_below, inner, support_value


class _Polytope(PerturbationLpNorm):  # type: ignore[misc]
    """What the two classes share: shapes of coefficients, the box, signs."""

    exact_by_concretize = True  # see bounds.crown.backend

    def __init__(
        self,
        radius: float | Tensor,
        feasible: bool,
        tolerance: float | None,
        warm_start: WarmStart | None,
        ground: str = "l1",
        cap: float | None = None,
    ) -> None:
        values = torch.as_tensor(radius, dtype=torch.float64)
        if values.ndim > 1 or not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise InvalidInputError(
                f"radius {radius!r}: expected a finite number >= 0, or one for each image of the batch"
            )
        super().__init__(eps=float(values.max()), norm=np.inf)
        self.radius = values
        self.threat = Threat(ground, cap if feasible else None, feasible)
        self.tolerance = tolerance
        self.warm_start = warm_start

    def box(self, center: Tensor) -> tuple[Tensor, Tensor]:
        """Componentwise least and largest values over the set, for a batch of centers."""
        raise NotImplementedError

    def excess(self, center: Tensor, coefficients: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """a . center and the largest sign * a . (x - center) over the set, for a (B, S, *input); each (B, S)."""
        raise NotImplementedError

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> tuple[Any, Tensor, Any]:
        if forward:
            raise UnsupportedOperationError(
                f"{type(self).__name__}: forward-mode bounds are not supported, use IBP, CROWN-IBP, CROWN or "
                "CROWN-Optimized"
            )
        self.x_L, self.x_U = self.box(x)
        return LinearBound(None, None, None, None, self.x_L, self.x_U), x, None

    def concretize(
        self,
        x: Tensor,
        A: Any,  # noqa: N803 - auto_LiRPA passes it by this name
        sign: int = -1,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        """The least (sign -1) or largest (sign +1) value of A x over the set, exactly."""
        if A is None:
            return None
        shape: tuple[int, ...] | None = None
        if isinstance(A, Patches):
            if A.identity:
                coefficients = _identity(x)
                shape = tuple(x.shape)
            else:
                coefficients = patches_to_matrix(
                    A.patches, x.shape, A.stride, A.padding, A.output_shape, A.unstable_idx
                )
                if A.unstable_idx is None:
                    patches = A.patches
                    shape = (coefficients.shape[0], patches.size(0), patches.size(2), patches.size(3))
        elif isinstance(A, eyeC):
            coefficients = _identity(x)
        else:
            coefficients = A
        coefficients = coefficients.reshape(coefficients.shape[0], -1, *x.shape[1:])
        if coefficients.shape[0] != x.shape[0]:
            coefficients = coefficients.expand(x.shape[0], *coefficients.shape[1:])
        value, excess = self.excess(x, coefficients, int(sign))
        bound = value + sign * excess
        return bound.reshape(shape) if shape is not None and PATCHES_KEEP_SHAPE else bound

    def _budget(self, images: Tensor) -> Tensor:
        return self.threat.budget(self.radius, images)

    def _largest_excess(self, images: Tensor, coefficients: Tensor, sign: int) -> Tensor:
        """max over the ball of sign * c . (nu - mu), of shape (B, S)."""
        ball = Ball(self.threat, images, self._budget(images))
        signed = coefficients if sign > 0 else -coefficients
        if not self.threat.positive:
            return ball.support(signed).excess
        guess = None if self.warm_start is None else self.warm_start.guess(sign, signed.shape[1])
        if signed.requires_grad and torch.is_grad_enabled():
            value = support_value(
                signed, images, ball.budget, guess=guess, tolerance=self.tolerance, ground=self.threat.ground,
                cap=self.threat.cap,
            )  # fmt: skip
            return value - inner(signed, images)
        found = ball.support(signed, guess=guess, tolerance=self.tolerance)
        if self.warm_start is not None:
            self.warm_start.keep(sign, found.multiplier)
        return found.excess

    def __repr__(self) -> str:
        threat = self.threat
        return (
            f"{type(self).__name__}(radius={self.radius.tolist()}, ground={threat.ground!r}, cap={threat.cap}, "
            f"feasible={threat.positive})"
        )


class PerturbationWasserstein(_Polytope):
    """All images of equal mass within a Wasserstein distance: for any network on images.

    The set is {nu >= 0 : some plan from x to nu costs at most radius^p * mass(x)}, x the nonnegative input of shape
    (B, C, H, W), p the power of the ground cost: W1(x, nu) <= radius * mass(x) for a distance.

    Args:
        radius: of the images divided by their mass, in pixels; one number, or one an image (B,).
        ground: the name of the ground cost; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel of nu; None for no limit.
        feasible: False drops nu >= 0, which gives the vanilla certificate (theory, section 4). It has no use for a cap.
        tolerance: duality gap at which the search over the multiplier stops; bounds are sound at any.
        warm_start: where to find and leave multipliers; see :class:`WarmStart`.

    Raises:
        InvalidInputError: a radius that is negative or not finite; an input that is negative anywhere, above the
            cap, or not a batch of images; as :func:`flowverify.transport.ground.check_ground`.
        UnknownNameError: an unknown ground cost.
    """

    def __init__(
        self,
        radius: float | Tensor,
        *,
        ground: str = "l1",
        cap: float | None = None,
        feasible: bool = True,
        tolerance: float | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        super().__init__(radius, feasible, tolerance, warm_start, ground, cap)

    def box(self, center: Tensor) -> tuple[Tensor, Tensor]:
        _check_images(center)
        check_below(center, self.threat.cap)
        mass = center.flatten(1).sum(1)[:, None, None, None]
        budget = self._budget(center).to(center.dtype)[:, None, None, None]
        if not self.threat.positive:
            return center - budget, center + budget
        # Mass that leaves or reaches a pixel travels at least one pixel, at a cost of at least 1, so it is at most the
        # budget.
        per_channel = center.flatten(2).sum(2)[..., None, None]
        arriving = torch.minimum(budget, per_channel - center).clamp(min=0) + 1e-6 * mass
        upper = center + arriving
        if self.threat.cap is not None:
            upper = torch.maximum(upper.clamp(max=self.threat.cap), center)
        return center - torch.minimum(budget, center), upper

    def excess(self, center: Tensor, coefficients: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        return inner(coefficients, center), self._largest_excess(center, coefficients, sign)


class PerturbationFlowPolytope(_Polytope):
    """The flows {d : ||d - x||_1 <= radius * mass, R + A d >= 0}: for networks folded to take flows.

    The input x holds the flows delta_mu of the images mu = R + A delta_mu, either as vectors (B, edges) or as
    planes (B, 2C, H, W) (:meth:`flowverify.grid.Grid.to_planes`). For a coefficient a on flows the bound is
    that of section 6 of the theory with y = dilation(c) - c, where c is read off a along a spanning tree. What a
    deviates from A^T c is charged to the bound, so its soundness does not rest on how c was found.

    Args:
        radius: as for :class:`PerturbationWasserstein`; the budget is radius * mass(R).
        reference: R, nonnegative, of shape (B, C, H, W) or (1, C, H, W).
        cap: largest value of a pixel of R + A d; None for no limit.
        feasible: False drops R + A d >= 0 (and the cap), which leaves the L1 ball.
        tolerance, warm_start: as for :class:`PerturbationWasserstein`.

    Raises:
        InvalidInputError: as above; flows of a shape that does not fit the reference.
    """

    def __init__(
        self,
        radius: float | Tensor,
        reference: Tensor,
        *,
        cap: float | None = None,
        feasible: bool = True,
        tolerance: float | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        super().__init__(radius, feasible, tolerance, warm_start, cap=cap)
        _check_images(reference)
        self.reference = reference
        self.grid = Grid.of(reference)

    def _vector(self, flow: Tensor) -> Tensor:
        planes = (2 * self.grid.channels, self.grid.height, self.grid.width)
        if tuple(flow.shape[-3:]) == planes and flow.ndim >= 4:
            return self.grid.from_planes(flow)
        return self.grid.check_flow(flow)

    def _images(self, flow: Tensor) -> Tensor:
        # Rounding leaves pixels of -1e-17 where mass has left; as mass they would be nonsense.
        images = self.grid.apply(self.reference, self._vector(flow)).clamp(min=0)
        if self.threat.cap is None:
            return images
        # Nor may rounding put a pixel above the cap; an image that lies there does not pass as rounding.
        return torch.where(images <= self.threat.cap * (1 + 1e-5), images.clamp(max=self.threat.cap), images)

    def box(self, center: Tensor) -> tuple[Tensor, Tensor]:
        budget = self._budget(self._images(center)).to(center.dtype)
        budget = budget.reshape(-1, *[1] * (center.ndim - 1))
        return center - budget, center + budget

    def excess(self, center: Tensor, coefficients: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        value = torch.einsum("bsp,bp->bs", coefficients.flatten(2), center.flatten(1))
        images = self._images(center)
        flow_coefficients = self._vector(coefficients)
        potential = self.grid.potential(flow_coefficients)
        residual = (flow_coefficients - self.grid.differences(potential)).abs()
        largest = residual.amax(-1) if residual.shape[-1] else residual.sum(-1)
        charge = self._budget(images)[:, None].to(center.dtype) * largest
        return value, self._largest_excess(images, potential, sign) + charge


def _identity(x: Tensor) -> Tensor:
    size = x[0].numel()
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(1, size, *x.shape[1:])
    return eye.expand(x.shape[0], size, *x.shape[1:])


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise InvalidInputError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")
    least = float(images.min())
    if not least >= 0:
        raise InvalidInputError(f"images with a pixel of {least}: expected finite values >= 0")
