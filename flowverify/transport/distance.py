"""Exact Wasserstein distances and optimal transport plans, by POT's network simplex.

For each channel, with unnormalised measures mu, nu >= 0 of equal mass and ground cost d:

    W1(mu, nu) = min over plans P >= 0 of sum_ij P_ij d(i, j), with row sums mu and column sums nu.

For the p-th power of a distance the minimum is W_p(mu, nu)^p. For a cost that is infinite outside a window there may
be no plan at all; mass within the mass tolerance that no window reaches is rounding, and costs its distance.

Mass moves within a channel only, so an image's distance is the sum over its channels (Levine & Feizi 2020,
Corollary 2). All is computed in float64, and every plan is checked before it is returned: the solver's
status, the marginals and the duality gap.

Masses that differ by no more than a relative ``mass_tolerance`` are put right by scaling the target, channel
by channel; any greater difference is an error. float32 pixels carry a relative rounding of 6e-8, hence the
wider default of :func:`wasserstein_distance`, which is made for images that an attack or a network returns.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.conventions import as_tensor
from flowverify.errors import InvalidInputError, SolverError
from flowverify.grid import Grid
from flowverify.transport.ground import (
    FloatArray,
    IndexArray,
    check_ground,
    is_metric,
    parse_ground,
    pixel_costs,
    unrestricted_costs,
)

EXACT_MASS_TOLERANCE = 1e-9
FLOAT32_MASS_TOLERANCE = 1e-5

_MARGINAL_TOLERANCE = 1e-9  # of the mass that moves
_GAP_TOLERANCE = 1e-7  # of the cost, or of the mass that moves times one pixel
_ROUNDING = 8 * float(np.finfo(np.float64).eps)  # of a pixel: smaller differences are common mass
_MAX_ITERATIONS = 10_000_000
_OPTIMAL = 1  # POT's result code


@dataclass(frozen=True)
class TransportPlan:
    """A plan from one image of shape ``image_shape`` = (C, H, W) to another, as a sparse matrix.

    Entry e moves ``mass[e]`` (float64, > 0) from pixel ``row[e]`` to pixel ``column[e]``: int64 indices into
    the flattened (C, H, W) image, both in the same channel. Mass that stays is on the diagonal.
    """

    row: Tensor  # (entries,)
    column: Tensor  # (entries,)
    mass: Tensor  # (entries,)
    image_shape: tuple[int, int, int]
    ground: str

    @property
    def cost(self) -> float:
        """Sum of mass * ground cost: W1 of the unnormalised images, in mass times pixels; W_p^p for a power."""
        area, width = self.image_shape[1] * self.image_shape[2], self.image_shape[2]
        costs = unrestricted_costs(self.row.numpy() % area, self.column.numpy() % area, width, self.ground)
        return float(self.mass.numpy() @ costs)

    def dense(self) -> Tensor:
        """The plan as one matrix a channel, float64 (C, H*W, H*W)."""
        channels, area = self.image_shape[0], self.image_shape[1] * self.image_shape[2]
        matrix = torch.zeros(channels, area, area, dtype=torch.float64)
        channel = self.row // area
        return matrix.index_put_((channel, self.row % area, self.column % area), self.mass, accumulate=True)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Row and column sums as images, each float64 (C, H, W)."""
        empty = torch.zeros(math.prod(self.image_shape), dtype=torch.float64)
        sources = empty.index_add(0, self.row, self.mass).reshape(self.image_shape)
        return sources, empty.index_add(0, self.column, self.mass).reshape(self.image_shape)


def check_measures(images: Any, what: str = "images") -> Tensor:
    """Returns ``images`` as (B, C, H, W) if each is a measure of positive mass; (C, H, W) becomes B = 1.

    Raises:
        InvalidInputError: not a floating-point tensor or numpy array, another shape, a pixel that is NaN, infinite or
            negative, or an image without mass. The message names the first offender.
    """
    images = as_tensor(images, what)
    if not images.is_floating_point():
        raise InvalidInputError(f"{what} of dtype {images.dtype}: expected a floating-point dtype")
    if images.ndim not in (3, 4) or 0 in images.shape[-3:]:
        raise InvalidInputError(f"{what} of shape {tuple(images.shape)}: expected (B, C, H, W) or (C, H, W)")
    batch: Tensor = images if images.ndim == 4 else images.unsqueeze(0)
    bad = ~(torch.isfinite(batch) & (batch >= 0)).detach()
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise InvalidInputError(f"{what}: value {batch[index].item()!r} at {index}, expected finite and >= 0")
    empty = batch.detach().flatten(1).amax(1) <= 0
    if empty.any():
        first = int(empty.nonzero()[0])
        raise InvalidInputError(f"{what}: image {first} has mass 0.0, expected a positive mass")
    return batch


def channel_masses(images: Tensor) -> Tensor:
    """Mass of each channel in float64: (B, C, H, W) -> (B, C)."""
    return images.to(torch.float64).sum((-2, -1))


def masses_agree(sources: Tensor, targets: Tensor, mass_tolerance: float) -> Tensor:
    """Whether every channel's masses differ by at most ``mass_tolerance`` of the larger; bool (B,)."""
    return _agree(channel_masses(sources), channel_masses(targets), mass_tolerance).all(-1)


def _agree(source_masses: Tensor, target_masses: Tensor, mass_tolerance: float) -> Tensor:
    larger = torch.maximum(source_masses, target_masses)
    return (source_masses - target_masses).abs() <= mass_tolerance * larger


def balance(
    sources: Tensor,  # (B, C, H, W)
    targets: Tensor,  # (B, C, H, W)
    mass_tolerance: float,
    what: tuple[str, str] = ("source", "target"),
) -> tuple[Tensor, Tensor]:
    """Both batches in float64, with the targets scaled to the sources' mass, channel by channel.

    Raises:
        InvalidInputError: shapes differ, the tolerance is not in [0, 1), or a channel's two masses differ by
            more than ``mass_tolerance`` times the larger one.
    """
    if sources.shape != targets.shape:
        raise InvalidInputError(
            f"{what[0]} of shape {tuple(sources.shape)}, {what[1]} of shape {tuple(targets.shape)}: "
            "expected equal shapes"
        )
    if not 0.0 <= mass_tolerance < 1.0:
        raise InvalidInputError(f"mass_tolerance: given {mass_tolerance!r}, expected a number in [0, 1)")
    sources, targets = sources.to(torch.float64), targets.to(torch.float64)
    source_masses, target_masses = channel_masses(sources), channel_masses(targets)
    wrong = ~_agree(source_masses, target_masses, mass_tolerance)
    if wrong.any():
        image, channel = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"image {image}, channel {channel}: {what[0]} mass {source_masses[image, channel].item()!r}, "
            f"{what[1]} mass {target_masses[image, channel].item()!r}: expected equal masses "
            f"(relative tolerance {mass_tolerance:g})"
        )
    ratio = torch.where(target_masses > 0, source_masses, 1.0) / torch.where(target_masses > 0, target_masses, 1.0)
    return sources, targets * ratio[..., None, None]


def transport_plan(
    source: Tensor,  # (C, H, W)
    target: Tensor,  # (C, H, W)
    ground: str = "l1",
    *,
    mass_tolerance: float = EXACT_MASS_TOLERANCE,
) -> TransportPlan:
    """An optimal plan between two images of equal mass in every channel (the problem in the module's text).

    For a metric ground cost the common mass min(mu, nu) stays where it is, which loses no optimality and
    leaves a problem of the size of the change.

    Raises:
        InvalidInputError: an image is not a measure of positive mass, or shapes or masses differ.
        UnknownNameError: the ground cost is unknown.
        SolverError: the solver's status is not optimal, or its plan fails the checks.
    """
    for image, what in ((source, "source"), (target, "target")):
        if check_measures(image, what).shape[0] != 1:
            raise InvalidInputError(f"{what} of shape {tuple(image.shape)}: expected one image (C, H, W)")
    sources, targets = check_measures(source, "source"), check_measures(target, "target")
    sources, targets = balance(sources, targets, mass_tolerance)
    ground = check_ground(ground, Grid.of(sources))
    plan = _plan_of_image(sources[0], targets[0], ground, mass_tolerance)
    if plan is None:
        raise InvalidInputError(f"source and target: no plan of finite cost for ground cost {ground!r}, expected one")
    return plan


def wasserstein_distance(
    sources: Tensor,  # (B, C, H, W)
    targets: Tensor,  # (B, C, H, W)
    ground: str = "l1",
    normalised: bool = True,
    *,
    mass_tolerance: float = FLOAT32_MASS_TOLERANCE,
) -> Tensor:
    """Exact W1 of each pair of images, W_p for a p-th power, float64 (B,); infinite where no plan has a finite cost.

    Args:
        sources: images (B, C, H, W), or one image (C, H, W); float32 is converted to float64 first.
        targets: images of the same shape and, channel by channel, of the same mass.
        ground: the name of a ground cost.
        normalised: divide the cost by the mass of the source image, and take the p-th root: the unit is then that
            of a radius (pixels). Without, the cost of the plan, that of a budget.
        mass_tolerance: the target is scaled to the source's mass if they differ by no more than this share
            of it. The default is for float32 images. It lets a target's mass be off by that share: pass
            ``EXACT_MASS_TOLERANCE`` for float64 images whose masses are to be equal.

    Raises:
        InvalidInputError, UnknownNameError, SolverError: as :func:`transport_plan`.
    """
    check_ground(ground)
    sources = check_measures(sources.detach() if isinstance(sources, Tensor) else sources, "sources")
    targets = check_measures(targets.detach() if isinstance(targets, Tensor) else targets, "targets")
    sources, targets = balance(sources, targets, mass_tolerance)
    ground = check_ground(ground, Grid.of(sources))
    plans = [_plan_of_image(*pair, ground, mass_tolerance) for pair in zip(sources, targets, strict=True)]
    costs = torch.tensor([math.inf if plan is None else plan.cost for plan in plans], dtype=torch.float64)
    return parse_ground(ground).radius(costs / channel_masses(sources).sum(-1).cpu()) if normalised else costs


def _plan_of_image(source: Tensor, target: Tensor, ground: str, mass_tolerance: float) -> TransportPlan | None:
    """The plan between balanced float64 images (C, H, W); None if more than the tolerance cannot be moved."""
    channels, height, width = source.shape
    area = height * width
    rows, columns, masses = [], [], []
    pairs = zip(
        source.detach().cpu().numpy().reshape(channels, area),
        target.detach().cpu().numpy().reshape(channels, area),
        strict=True,
    )
    for channel, (mu, nu) in enumerate(pairs):
        row, column, mass = _plan_of_channel(mu, nu, width, ground)
        if mass[np.isinf(pixel_costs(row, column, width, ground))].sum() > mass_tolerance * mu.sum():
            return None
        rows.append(row + channel * area)
        columns.append(column + channel * area)
        masses.append(mass)
    return TransportPlan(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(columns)),
        torch.from_numpy(np.concatenate(masses)),
        (channels, height, width),
        ground,
    )


def _plan_of_channel(
    mu: FloatArray, nu: FloatArray, width: int, ground: str
) -> tuple[IndexArray, IndexArray, FloatArray]:
    staying = np.zeros_like(mu)
    if is_metric(ground):
        equal = np.abs(mu - nu) <= _ROUNDING * np.maximum(mu, nu)
        staying = np.where(equal, mu, np.minimum(mu, nu))
        mu, nu = mu - staying, np.where(equal, 0.0, nu - staying)
    fixed, rows, columns = (np.flatnonzero(measure) for measure in (staying, mu, nu))
    if rows.size == 0 or columns.size == 0:
        return fixed, fixed, staying[fixed]
    costs = pixel_costs(rows[:, None], columns[None, :], width, ground)
    if not np.isfinite(costs).all():
        # Beyond what any detour through the window could save: mass goes that way only where it has to.
        allowed = np.isfinite(costs)
        detour = (rows.size + columns.size) * max(1.0, float(costs[allowed].max(initial=0.0)))
        costs = np.where(allowed, costs, detour + unrestricted_costs(rows[:, None], columns[None, :], width, ground))
    moving = _solve(mu[rows], nu[columns], costs)
    source, target = moving.nonzero()
    return (
        np.concatenate([fixed, rows[source]]),
        np.concatenate([fixed, columns[target]]),
        np.concatenate([staying[fixed], moving[source, target]]),
    )


def _solve(mu: FloatArray, nu: FloatArray, costs: FloatArray) -> FloatArray:
    """The checked optimal plan (n, m) between positive vectors of equal sums (up to rounding).

    The masses are solved at a sum of 1, because the solver's feasibility test is absolute. POT is imported
    here, not with the package, because that takes as long as importing torch.
    """
    import ot  # type: ignore[import-untyped,unused-ignore]

    total = mu.sum()
    shares, target_shares = mu / total, nu / nu.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the status is checked below
        plan, log = ot.emd(shares, target_shares, costs, numItermax=_MAX_ITERATIONS, log=True, check_marginals=False)
    _check_solution(plan, shares, target_shares, costs, log)
    scaled: FloatArray = plan * total
    return scaled


def _check_solution(
    plan: FloatArray, mu: FloatArray, nu: FloatArray, costs: FloatArray, log: dict[str, object]
) -> None:
    status = f"status {log.get('result_code')!r}, message {log.get('warning')!r}"
    if log.get("result_code") != _OPTIMAL or log.get("warning") is not None:
        raise SolverError(f"optimal transport: {status}, expected an optimal plan")
    error = max(float(np.abs(plan.sum(1) - mu).max()), float(np.abs(plan.sum(0) - nu).max()))
    least = float(plan.min())
    if not (error <= _MARGINAL_TOLERANCE and least >= 0.0):
        raise SolverError(
            f"optimal transport: marginals off by {error:.3g}, least entry {least:.3g} ({status}); "
            f"expected at most {_MARGINAL_TOLERANCE:g} and a nonnegative plan"
        )
    u, v = np.asarray(log["u"], dtype=np.float64), np.asarray(log["v"], dtype=np.float64)
    v = np.minimum(v, (costs - u[:, None]).min(0))
    value = float((plan * costs).sum())
    gap = value - float(mu @ u + nu @ v)
    if not gap <= _GAP_TOLERANCE * max(value, 1.0):
        raise SolverError(f"optimal transport: duality gap {gap:.3g} at cost {value:.6g} ({status})")
