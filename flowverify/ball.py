"""The threat model and its balls: the one place where a radius, a power and a mass become a budget.

A :class:`Threat` says what may be done to an image, for no image and no radius in particular. A :class:`Ball` is a
batch of images of a threat, each with its budget: what the plan that leads to another image of the ball may cost, in
mass times ground cost. :class:`WassersteinBall` is what users write.

Searches run in budgets; the radius of what they find, W_p of normalised images in pixels, is computed once, at the
end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport.compiled import Backend
from flowverify.transport.dilation import lipschitz_constant, steepest_moves
from flowverify.transport.distance import (
    EXACT_MASS_TOLERANCE,
    FLOAT32_MASS_TOLERANCE,
    channel_masses,
    check_measures,
    masses_agree,
    wasserstein_distance,
)
from flowverify.transport.ground import GroundCost, check_ground, parse_ground
from flowverify.transport.support import Moves, Support, best_moves, check_below, support

REFILLS = 50
INSIDE = 1 - 1e-9  # of a budget: what is pulled back costs no more than it, whatever the exact solver rounds


def check_images(images: Any, grid: Grid | None = None) -> Tensor:
    """Returns a batch of images as (B, C, H, W), with its own dtype; (C, H, W) becomes a batch of one.

    Raises:
        InvalidInputError: not a floating-point tensor (or numpy array) of such a shape (of the grid's, if one is
            given), a pixel that is NaN, infinite or negative, or an image of mass 0. The message names the first one.
    """
    batch = check_measures(images, "images")
    return batch if grid is None else grid.check_image(batch)


@dataclass(frozen=True)
class Threat:
    """What may be done to an image: its mass moves within each channel, at a price.

    Images nu >= 0 of the masses of an image mu, at most ``cap`` if there is one, that a plan of cost at most the
    budget leads to. Without ``positive``, mu + A delta for flows delta of cost at most the budget, which mass that mu
    does not have may take part in (the L1 ball of flows for l1): a larger set, which knows neither the sign of pixels
    nor a cap.

    Args:
        ground: the name of the ground cost: l1, l2, l2^2, local:5, ...; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel as it is given (not normalised), or None for no limit.
        positive: whether pixels stay nonnegative.

    Raises:
        InvalidInputError: a cap that is not a finite number > 0, or one without ``positive``; a power of the ground
            cost below 1, or an even window.
        UnknownNameError: the ground cost is unknown.
    """

    ground: str = "l1"
    cap: float | None = None
    positive: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ground", check_ground(self.ground))
        if self.cap is not None:
            cap = _finite(self.cap)
            if cap is None or cap <= 0:
                raise InvalidInputError(f"cap: given {self.cap!r}, expected None or a finite number > 0")
            if not self.positive:
                raise InvalidInputError(f"cap: given {cap:g} for images whose pixels may be negative, expected None")
            object.__setattr__(self, "cap", cap)

    @property
    def cost(self) -> GroundCost:
        return parse_ground(self.ground)

    @property
    def name(self) -> str:
        """What its radii are shown with: "W1, l2"; "W2, l2^2" for a power; "W1, l1, cap 1"; "W1, l1, flows"."""
        cost = self.cost
        name = f"W{cost.power:.12g}, {cost.name}" + ("" if self.cap is None else f", cap {self.cap:g}")
        return name if self.positive else f"{name}, flows"

    def check(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """Returns images of this threat as (B, C, H, W), with their own dtype.

        Raises:
            InvalidInputError: as :func:`check_images`; a pixel above the cap; a window of the ground cost that is
                larger than the images.
        """
        images = check_images(images, grid)
        self.cost.check_grid(*images.shape[-2:])
        check_below(images, self.cap)
        return images

    def budget(self, radius: float | Tensor, images: Tensor) -> Tensor:
        """radius^p * mass: what plans from each image (B, C, H, W) may cost within a radius or radii (B,).

        Returns:
            float64 (B,), on the device of the images.
        """
        mass = _masses(images)
        return self.cost.budget(torch.as_tensor(radius, dtype=torch.float64, device=mass.device)) * mass

    def radius(self, budget: Tensor, images: Tensor) -> Tensor:
        """(budget / mass)^(1/p), the inverse of :meth:`budget`: (B,) -> float64 (B,)."""
        mass = _masses(images)
        return self.cost.radius(budget.to(mass) / mass)

    def largest_radius(self, grid: Grid) -> float:
        """The largest radius that means anything: within it every image of equal mass that plans lead to lies."""
        return self.cost.largest_distance(grid.height, grid.width)

    def covers(self) -> list[Threat]:
        """This threat, and looser ones, in whose balls its balls lie (:meth:`Ball.within`); the tightest first."""
        result = [self]
        if self.cap is not None:
            result.append(replace(self, cap=None))
        if self.positive:
            result.append(Threat(self.ground, positive=False))
        if self.ground != "l1":
            result.append(Threat("l1", positive=self.positive))
        return result

    def ball(self, images: Tensor, budget: float | Tensor) -> Ball:
        """The balls of these budgets, one number or (B,), around images (B, C, H, W).

        Raises:
            InvalidInputError: images as :meth:`check`; a budget of another shape, or one that is not a finite
                number >= 0.
        """
        images = self.check(images)
        given = torch.as_tensor(budget, dtype=torch.float64, device=images.device).detach()
        if given.ndim > 1 or (given.ndim == 1 and len(given) != len(images)):
            raise InvalidInputError(f"budget of shape {tuple(given.shape)}: expected ({len(images)},) or a number")
        if not bool((torch.isfinite(given) & (given >= 0)).all()):
            raise InvalidInputError(f"budget {given.tolist()}: expected finite numbers >= 0")
        return Ball(self, images, given.expand(len(images)).clone())

    def unlimited(self, images: Tensor) -> Ball:
        """Balls that reach as far as plans do, around images (B, C, H, W) that are valid: of infinite budget."""
        return Ball(self, images, torch.full_like(_masses(images), torch.inf))

    def price(self, images: Tensor, others: Tensor, mass_tolerance: float = EXACT_MASS_TOLERANCE) -> Tensor:
        """What the cheapest plan to each other image costs, exactly: float64 (B,), infinite where no plan is finite.

        Args:
            images: (B, C, H, W), nonnegative.
            others: of the same shape; nonnegative, if the threat is ``positive``.
            mass_tolerance: as for :func:`~flowverify.transport.distance.wasserstein_distance`.

        Raises:
            InvalidInputError: the masses of a channel differ by more than the tolerance; or flows at a ground cost
                that is no metric.
            SolverError: it could not be computed.
        """
        if not self.positive:
            if not self.cost.is_metric:
                raise InvalidInputError(f"flows at ground cost {self.ground!r}: expected a metric, such as l1 or l2")
            # Mass that is added to both changes nothing for a metric.
            lacking = (-others.double()).clamp(min=0)
            images, others = images.double() + lacking, others.double() + lacking
        found = wasserstein_distance(images, others, self.ground, False, mass_tolerance=mass_tolerance)
        return found.to(images.device)

    def distance(self, images: Tensor, others: Tensor, mass_tolerance: float = EXACT_MASS_TOLERANCE) -> Tensor:
        """The exact distance of normalised images in pixels, W_p, float64 (B,); as :meth:`price`."""
        return self.radius(self.price(images, others, mass_tolerance), images)

    def admits(
        self, images: Tensor, others: Tensor, tolerance: float = 0.0, mass_tolerance: float = EXACT_MASS_TOLERANCE
    ) -> Tensor:
        """Whether the others are images of the threat, at whatever distance; bool (B,).

        Their pixels are finite and >= 0 if it is ``positive`` (no tolerance), at most cap * (1 + tolerance), and the
        mass of each channel is the image's to the mass tolerance.
        """
        valid = torch.isfinite(others)
        if self.positive:
            valid &= others >= 0
        if self.cap is not None:
            valid &= others <= self.cap * (1 + tolerance)
        return valid.flatten(1).all(1) & masses_agree(images, others, mass_tolerance)

    def repair(self, images: Tensor, candidates: Tensor) -> Tensor:
        """The candidates (B, C, H, W) as images of the threat, at whatever distance from float64 images; float64.

        Values are clipped, and each channel is scaled to its mass; with a cap, what it cuts off is filled in by
        scaling the pixels below it, and what is then left by raising all pixels towards the cap. A candidate with NaN
        or infinite pixels, or with an empty channel that should not be, becomes the clean image.
        """
        cap, wanted = self.cap, channel_masses(images)[..., None, None]
        usable = torch.isfinite(candidates).flatten(1).all(1)
        result = torch.where(usable[:, None, None, None], candidates.double(), images).clamp(min=0, max=cap)
        for _ in range(REFILLS if cap is not None else 1):
            mass = result.sum((-2, -1), keepdim=True)
            ratio = torch.where(mass > 0, wanted / mass, 0.0)
            result = (result * ratio).clamp(max=cap) if cap is not None else result * ratio
            if cap is None or bool(((result.sum((-2, -1), keepdim=True) - wanted).abs() <= 1e-12 * wanted).all()):
                break
        if cap is not None:
            room = cap - result
            missing = (wanted - result.sum((-2, -1), keepdim=True)).clamp(min=0)
            result = (result + room * missing / room.sum((-2, -1), keepdim=True).clamp(min=1e-300)).clamp(max=cap)
        whole = masses_agree(images, result, EXACT_MASS_TOLERANCE)
        return torch.where(whole[:, None, None, None], result, images)


@dataclass(frozen=True, eq=False)
class Ball:
    """Balls of one threat, one around each image of a batch; made by :meth:`Threat.ball`, which checks them.

    Attributes:
        images: mu, (B, C, H, W), of any floating-point dtype.
        budget: what plans may cost, in mass times ground cost, float64 (B,), on the device of the images.
    """

    threat: Threat
    images: Tensor
    budget: Tensor

    @cached_property
    def mass(self) -> Tensor:
        """Of each image, float64 (B,)."""
        return _masses(self.images)

    @property
    def radius(self) -> Tensor:
        """In pixels, of normalised images; float64 (B,)."""
        return self.threat.radius(self.budget, self.images)

    @property
    def grid(self) -> Grid:
        return Grid.of(self.images)

    def __len__(self) -> int:
        return len(self.budget)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Ball:
        return replace(self, images=self.images[rows], budget=self.budget[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Ball:
        """Images on another device or in another precision; budgets stay in float64."""
        return replace(self, images=self.images.to(device=device, dtype=dtype), budget=self.budget.to(device=device))

    def with_budget(self, budget: Tensor) -> Ball:
        """The balls of other budgets (B,) around the same images."""
        return replace(self, budget=budget.to(self.budget))

    def within(self, threat: Threat) -> Ball:
        """The balls of a looser threat that contain these; equal to them, if it is their own.

        For another ground cost than l1, the l1 ball of the radius of
        :meth:`~flowverify.transport.ground.GroundCost.to_l1` (theory, section 9). For flows, which may be chained, only
        the price of each move counts: they cost at most :attr:`~flowverify.transport.ground.GroundCost.steepness` times
        as much.

        Raises:
            InvalidInputError: the threat is none of :meth:`Threat.covers`, nor one of those of l1 that keep the cap.
        """
        asked = self.threat
        looser_cap = threat.cap is None or (asked.cap is not None and asked.cap <= threat.cap)
        if threat.ground not in (asked.ground, "l1") or not looser_cap or (threat.positive and not asked.positive):
            raise InvalidInputError(f"balls of {asked.name} within balls of {threat.name}: expected a looser threat")
        if threat.ground == asked.ground:
            return replace(self, threat=threat)
        if not asked.positive:
            return Ball(threat, self.images, self.budget * asked.cost.steepness)
        radii = [asked.cost.to_l1(one) for one in self.radius.tolist()]
        return Ball(threat, self.images, threat.budget(self.budget.new_tensor(radii), self.images))

    def support(
        self,
        coefficients: Tensor,
        *,
        guess: Tensor | None = None,
        tolerance: float | None = None,
        maximiser: bool = False,
        backend: Backend = "auto",
    ) -> Support:
        """The maxima of linear functions over the balls; see :func:`flowverify.transport.support.support`.

        Without positivity it is c . mu + budget * Lip(c), attained where the whole budget moves mass along the one
        steepest offset (theory, section 4).

        Args:
            coefficients: c, (B, S, C, H, W), or (S, C, H, W) for the same functions over every ball.
            guess: multipliers (B, S) to start from; they change the number of steps only.
            tolerance: relative duality gap; the result is an upper bound whatever it is.
            maximiser: also return where it is attained; for a cap, the gradient of the bound.
        """
        threat = self.threat
        if threat.positive:
            return support(
                coefficients, self.images, self.budget, guess=guess, tolerance=tolerance, maximiser=maximiser,
                backend=backend, ground=threat.ground, cap=threat.cap,
            )  # fmt: skip
        slope = lipschitz_constant(coefficients, threat.ground).expand(len(self), coefficients.shape[-4])
        budget, moved = self.budget[:, None].to(slope), None
        if maximiser:
            moves = steepest_moves(coefficients, threat.ground)
            moved = self.images[:, None] + budget[..., None, None, None] * moves
        return Support(slope * budget, slope, moved)

    def best_moves(self, coefficients: Tensor, target: Tensor | None = None) -> Moves:
        """The best moves of mass for one function an image, (B, C, H, W); see :mod:`flowverify.transport.support`.

        Unlike :meth:`support` it is exact with a cap, too, takes infinite budgets, and stops where ``target`` (B,) is
        gained. For images that stay nonnegative only.
        """
        if not self.threat.positive:
            raise InvalidInputError(f"moves in balls of {self.threat.name}: expected a threat that is positive")
        ground, cap = self.threat.ground, self.threat.cap
        return best_moves(coefficients, self.images, budget=self.budget, target=target, ground=ground, cap=cap)

    def contains(self, others: Tensor, tolerance: float = 0.0, mass_tolerance: float = EXACT_MASS_TOLERANCE) -> Tensor:
        """Whether each other image (B, C, H, W) lies in its ball, by an exact solver; bool (B,).

        True iff :meth:`Threat.admits` it, and its distance is at most the radius times (1 + tolerance).

        Raises:
            SolverError: a distance could not be computed.
        """
        inside = self.threat.admits(self.images, others, tolerance, mass_tolerance)
        rows = inside.nonzero().flatten()
        if rows.numel():
            price = self.threat.price(self.images[rows], others[rows], mass_tolerance)
            inside[rows] = price <= self.budget[rows] * self.threat.cost.budget(1 + tolerance)
        return inside

    def pull_back(self, others: Tensor) -> Tensor:
        """Images of the threat (B, C, H, W), those beyond their ball moved to just within it; float64.

        They move along the segment from the image. The cost of the cheapest plan is convex, and 0 at the image, so that
        budget / cost of the way costs no more than the budget. Mass, positivity and a cap hold on all of the segment.
        Where no plan of a ground cost with windows leads to the other image, it may lead to no point of the segment
        either: that one becomes the image itself.

        Raises:
            SolverError: an exact distance could not be computed.
        """
        price = self.threat.price(self.images, others)
        share = torch.where(price > self.budget, self.budget * INSIDE / price.clamp(min=1e-300), 1.0)
        return between(self.images.double(), others.double(), share, self.threat.positive)


def between(clean: Tensor, far: Tensor, share: Tensor, positive: bool = True) -> Tensor:
    """(1 - t) clean + t far for t of shape (B,); far itself for t = 1."""
    share = share[:, None, None, None]
    mixed = torch.where(share >= 1, far, clean + share * (far - clean))
    return mixed.clamp(min=0) if positive else mixed


@dataclass(frozen=True)
class WassersteinBall:
    """{nu >= 0 : W(mu, nu) <= radius}, with the same mass in every channel, and nu <= cap if there is one.

    W is W1 for a ground cost that is a distance, W_p for its p-th power, and for ``local:k`` that of plans that
    move mass within k x k windows; see :mod:`flowverify.transport.ground`.

    Args:
        radius: in pixels, of the *normalised* images: 0.1 moves 10% of an image's mass by one pixel. On an
            image x of mass s, as networks see it, plans of the ball cost radius^p * s (see :meth:`Threat.budget`).
        ground, cap: see :class:`Threat`.

    Raises:
        InvalidInputError: the radius is not a finite number >= 0; the others as :class:`Threat`.
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
        threat = self.threat
        object.__setattr__(self, "ground", threat.ground)
        object.__setattr__(self, "cap", threat.cap)

    @property
    def threat(self) -> Threat:
        return Threat(self.ground, self.cap)

    def with_radius(self, radius: float) -> WassersteinBall:
        """The ball of another radius, with the same ground cost and cap."""
        return replace(self, radius=radius)

    @property
    def l1_radius(self) -> float:
        """The radius of a ball with l1 ground cost that contains this one.

        |di| + |dj| <= sqrt(2) * sqrt(di^2 + dj^2), so W1_l1 <= sqrt(2) * W1_l2: radius for l1, sqrt(2) *
        radius for l2 (theory, section 9); for powers see :meth:`flowverify.transport.ground.GroundCost.to_l1`.
        """
        return self.threat.cost.to_l1(self.radius)

    def around(self, images: Tensor) -> Ball:
        """The balls of this radius around valid images; raises as :meth:`Threat.check`."""
        images = self.threat.check(images).detach()
        return Ball(self.threat, images, self.threat.budget(self.radius, images))

    def budget(self, images: Tensor) -> Tensor:
        """radius^p * mass: what plans from each unnormalised image may cost, float64 (B,)."""
        return self.around(images).budget

    def contains(self, images: Tensor, perturbed: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether each perturbed image is in the ball around its image, by an exact solver; bool (B,).

        True iff the pixels are finite and >= 0 (no tolerance), at most cap * (1 + tolerance), every channel's
        mass is the image's up to float32 rounding (a relative 1e-5, which W then ignores by scaling), and
        W <= radius * (1 + tolerance).

        Raises:
            InvalidInputError: ``images`` are not valid images or lie above the cap, or the shapes differ.
            SolverError: a distance could not be computed.
        """
        ball = self.around(images)
        if not isinstance(perturbed, Tensor) or not perturbed.is_floating_point():
            given = perturbed.dtype if isinstance(perturbed, Tensor) else type(perturbed).__name__
            raise InvalidInputError(f"perturbed: given {given}, expected a floating-point torch.Tensor")
        perturbed = perturbed.detach() if perturbed.ndim == 4 else perturbed.detach().unsqueeze(0)
        if perturbed.shape != ball.images.shape:
            raise InvalidInputError(
                f"perturbed of shape {tuple(perturbed.shape)}: expected that of images, {tuple(ball.images.shape)}"
            )
        return ball.contains(perturbed, tolerance, FLOAT32_MASS_TOLERANCE)


def distance_name(ground: str, cap: float | None = None) -> str:
    """What radii and distances are shown with; see :attr:`Threat.name`.

    Raises:
        UnknownNameError, InvalidInputError: as :class:`Threat`.
    """
    return Threat(ground, cap).name


def _masses(images: Tensor) -> Tensor:
    return channel_masses(images).sum(-1)


def _finite(value: object) -> float | None:
    """The value as a float, or None if it is not a finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
