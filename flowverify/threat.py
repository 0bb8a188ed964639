"""The threat model: Wasserstein balls around images, and exact membership in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport.capped import check_below
from flowverify.transport.distance import (
    FLOAT32_MASS_TOLERANCE,
    channel_masses,
    check_measures,
    masses_agree,
    wasserstein_distance,
)
from flowverify.transport.ground import check_ground, parse_ground


def check_images(images: Tensor, grid: Grid | None = None) -> Tensor:
    """Returns a batch of images as (B, C, H, W), with its own dtype; (C, H, W) becomes a batch of one.

    Raises:
        InvalidInputError: not a floating-point tensor of such a shape (of the grid's, if one is given), a
            pixel that is NaN, infinite or negative, or an image of mass 0. The message names the first one.
    """
    batch = check_measures(images, "images")
    return batch if grid is None else grid.check_image(batch)


@dataclass(frozen=True)
class WassersteinBall:
    """{nu >= 0 : W(mu, nu) <= radius}, with the same mass in every channel, and nu <= cap if there is one.

    W is W1 for a ground cost that is a distance, W_p for its p-th power, and for ``local:k`` that of plans that
    move mass within k x k windows; see :mod:`flowverify.transport.ground`.

    Args:
        radius: in pixels, of the *normalised* images: 0.1 moves 10% of an image's mass by one pixel. On an
            image x of mass s, as networks see it, plans of the ball cost radius^p * s (see :meth:`budget`).
        ground: the name of the ground cost: l1, l2, l2^2, local:5, ...
        cap: largest value of a pixel of x as it is given (not normalised), or None for no limit.

    Raises:
        InvalidInputError: the radius is not a finite number >= 0, the cap not a finite number > 0, a power of the
            ground cost below 1, or an even window.
        UnknownNameError: the ground cost is unknown.
    """

    radius: float
    ground: str = "l1"
    cap: float | None = None

    def __post_init__(self) -> None:
        radius = _finite(self.radius)
        if radius is None or radius < 0:
            raise InvalidInputError(f"radius: given {self.radius!r}, expected a finite number >= 0 (pixels)")
        object.__setattr__(self, "radius", radius)
        object.__setattr__(self, "ground", check_ground(self.ground))
        if self.cap is not None:
            cap = _finite(self.cap)
            if cap is None or cap <= 0:
                raise InvalidInputError(f"cap: given {self.cap!r}, expected None or a finite number > 0")
            object.__setattr__(self, "cap", cap)

    def with_radius(self, radius: float) -> WassersteinBall:
        """The ball of another radius, with the same ground cost and cap."""
        return replace(self, radius=radius)

    @property
    def l1_radius(self) -> float:
        """The radius of a ball with l1 ground cost that contains this one.

        |di| + |dj| <= sqrt(2) * sqrt(di^2 + dj^2), so W1_l1 <= sqrt(2) * W1_l2: radius for l1, sqrt(2) *
        radius for l2 (theory, section 9); for powers see :meth:`flowverify.transport.ground.GroundCost.to_l1`.
        """
        return parse_ground(self.ground).to_l1(self.radius)

    def budget(self, images: Tensor) -> Tensor:
        """radius^p * mass: what plans from each unnormalised image may cost, float64 (B,)."""
        images = check_images(images)
        ground = parse_ground(self.ground)
        ground.check_grid(*images.shape[-2:])
        return ground.budget(torch.tensor(self.radius, dtype=torch.float64)) * channel_masses(images).sum(-1)

    def check_cap(self, images: Tensor) -> None:
        """Raises InvalidInputError if an image (B, C, H, W) has a pixel above the cap already."""
        check_cap(images, self.cap)

    def contains(self, images: Tensor, perturbed: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether each perturbed image is in the ball around its image, by an exact solver; bool (B,).

        True iff the pixels are finite and >= 0 (no tolerance), at most cap * (1 + tolerance), every channel's
        mass is the image's up to float32 rounding (a relative 1e-5, which W then ignores by scaling), and
        W <= radius * (1 + tolerance).

        Raises:
            InvalidInputError: ``images`` are not valid images or lie above the cap, or the shapes differ.
            SolverError: a distance could not be computed.
        """
        images = check_images(images).detach()
        self.check_cap(images)
        if not isinstance(perturbed, Tensor) or not perturbed.is_floating_point():
            given = perturbed.dtype if isinstance(perturbed, Tensor) else type(perturbed).__name__
            raise InvalidInputError(f"perturbed: given {given}, expected a floating-point torch.Tensor")
        perturbed = perturbed.detach() if perturbed.ndim == 4 else perturbed.detach().unsqueeze(0)
        if perturbed.shape != images.shape:
            raise InvalidInputError(
                f"perturbed of shape {tuple(perturbed.shape)}: expected that of images, {tuple(images.shape)}"
            )
        valid = torch.isfinite(perturbed) & (perturbed >= 0)
        if self.cap is not None:
            valid &= perturbed <= self.cap * (1 + tolerance)
        inside = valid.flatten(1).all(1) & masses_agree(images, perturbed, FLOAT32_MASS_TOLERANCE)
        if inside.any():
            distances = wasserstein_distance(images[inside], perturbed[inside], self.ground)
            within = distances <= self.radius * (1 + tolerance)
            inside[inside.clone()] = within.to(inside.device)
        return inside


def distance_name(ground: str, cap: float | None = None) -> str:
    """What radii and distances are shown with: "W1, l2"; "W2, l2^2" for a power; "W1, l1, cap 1" for capped balls.

    Raises:
        UnknownNameError, InvalidInputError: see :func:`flowverify.transport.ground.parse_ground`.
    """
    cost = parse_ground(ground)
    return f"W{cost.power:.12g}, {cost.name}" + ("" if cap is None else f", cap {cap:g}")


def check_cap(images: Tensor, cap: float | None) -> None:
    """Raises InvalidInputError if an image (B, C, H, W) has a pixel above the cap."""
    if cap is not None and images.numel():
        check_below(images, cap)


def _finite(value: object) -> float | None:
    """The value as a float, or None if it is not a finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
