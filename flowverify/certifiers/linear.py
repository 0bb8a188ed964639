"""Linear classifiers: certified radii in closed form, exactly, and by linear programming.

For f(x) = W x + b, an image x of label y and a class t, let w_t = W_t - W_y (as an image) and the margin
m_t = f_y(x) - f_t(x) > 0. Class t is reached by the images nu with w_t . (nu - x) >= m_t, a half-space, and
every radius below is min over t of a distance to it, divided by the mass of x. Source: framework paper (2021),
Appendix A.

The proof of the paper's Lemma 7 takes the edge j at which the signed coefficient (A^T w_t)_j is largest. It has
to be the largest absolute value, as the statement of the lemma has it: flow goes either way along an edge. With
the signed choice the radius is too large wherever the steepest edge points the other way (theory, section 8).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowverify.ball import Threat
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, affine_rows, is_affine, operation_name
from flowverify.transport.backend import Backend
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.ground import parse_ground
from flowverify.transport.least_budget import least_budget, nearest_image

CAPPED_TOLERANCE = 1.005  # of the search of radii with a cap
CAPPED_STEP = 1.15  # from radius to radius, until one fails


@dataclass(frozen=True)
class HalfSpaces:
    """The half-spaces of the classes t != y, in ascending order of t, for each image of a batch (float64).

    Attributes:
        images: x, (B, C, H, W).
        mass: of each image, (B,).
        normals: w_t = W_t - W_y, (B, classes - 1, C, H, W).
        margins: m_t = f_y(x) - f_t(x), (B, classes - 1); not positive where x is misclassified.
        classes: t, (B, classes - 1).
    """

    images: Tensor
    mass: Tensor
    normals: Tensor
    margins: Tensor
    classes: Tensor


@dataclass(frozen=True)
class LinearRadius:
    """Radii of a linear classifier, in pixels on normalised images.

    Attributes:
        radius: min over t, (B,); 0 where misclassified, infinite where no image of equal mass changes the class.
        by_class: for each class, (B, classes - 1), in the order of the half-spaces.
        target: the class t that attains the radius, (B,).
        nearest: an image at that distance with f_t >= f_y (on the boundary), (B, C, H, W); None where the
            method has none. For the L1 and L2 norms on flows it need not be an image: pixels may be negative.
    """

    radius: Tensor
    by_class: Tensor
    target: Tensor
    nearest: Tensor | None


def half_spaces(network: Network, images: Tensor, labels: Tensor) -> HalfSpaces:
    """The half-spaces of an affine network, computed in float64.

    Raises:
        UnsupportedOperationError: the network is not affine; the message names the layer that is not.
    """
    for node in network.nodes:
        if not is_affine(node.operation):
            raise UnsupportedOperationError(
                f"linear certification: layer {node.name!r} ({operation_name(node.operation)}) is not affine; expected "
                "a network of affine layers only"
            )
    weights, bias = affine_rows(network, network.output)
    images = images.double()
    weights, bias = weights.to(images.device), bias.to(images.device)
    logits = images.flatten(1) @ weights.T + bias
    count, classes = logits.shape
    everything = torch.arange(classes, device=images.device).expand(count, classes)
    others = everything[everything != labels[:, None]].reshape(count, classes - 1)
    normals = weights[others] - weights[labels][:, None]
    return HalfSpaces(
        images=images,
        mass=images.flatten(1).sum(1),
        normals=normals.reshape(count, classes - 1, *images.shape[1:]),
        margins=logits.gather(1, labels[:, None]) - logits.gather(1, others),
        classes=others,
    )


def vanilla_radius(spaces: HalfSpaces) -> LinearRadius:
    """Lemma 7: min over t of m_t / max_j |(A^T w_t)_j|, the distance in the L1 norm on flows.

    The nearest point moves all of the budget along the one steepest edge.
    """
    slope = lipschitz_constant(spaces.normals)
    distances = _positive(spaces.margins) / slope
    distances = torch.where(slope > 0, distances, torch.inf)
    return _least(spaces, distances, _steepest_edge(spaces))


def l2_radius(spaces: HalfSpaces) -> LinearRadius:
    """min over t of m_t / ||A^T w_t||_2: the distance in the L2 norm on flows (Figure 4, middle).

    As ||delta||_2 <= ||delta||_1, it is a W1 certificate too, and never larger than the vanilla one.
    """
    right, down = spaces.normals.diff(dim=-1), spaces.normals.diff(dim=-2)
    squared = right.square().flatten(2).sum(-1) + down.square().flatten(2).sum(-1)
    norm = squared.sqrt()
    distances = torch.where(norm > 0, _positive(spaces.margins) / norm, torch.inf)
    # The flow m A^T w / ||A^T w||^2, applied: x + m A A^T w / ||A^T w||^2.
    divergence = torch.zeros_like(spaces.normals)
    divergence[..., 1:] += right
    divergence[..., :-1] -= right
    divergence[..., 1:, :] += down
    divergence[..., :-1, :] -= down
    step = torch.where(squared > 0, _positive(spaces.margins) / squared, 0.0)
    return _least(spaces, distances, spaces.images[:, None] + step[..., None, None, None] * divergence)


def exact_radius(spaces: HalfSpaces, *, backend: Backend = "auto", ground: str = "l1") -> LinearRadius:
    """Lemma 8 without a solver: min over t of the exact W1 from x to the half-space among images nu >= 0.

    For the p-th power of a distance, the exact W_p.

    One :func:`~flowverify.transport.least_budget.least_budget` for all images and classes. ``nearest`` is a
    nonnegative image of the mass of x at that distance.
    """
    found = least_budget(spaces.normals, spaces.images, spaces.margins, backend=backend, ground=ground)
    result = _least(spaces, found.budget, None)
    cost = parse_ground(ground)
    result = replace(result, radius=cost.radius(result.radius), by_class=cost.radius(result.by_class))
    chosen = (spaces.classes == result.target[:, None]).nonzero(as_tuple=True)
    normals, budget, bracket = (value[chosen][:, None] for value in (spaces.normals, found.budget, found.bracket))
    nearest = nearest_image(normals, spaces.images, budget, bracket, backend=backend, ground=ground)
    return replace(result, nearest=nearest[:, 0])


def capped_radius(spaces: HalfSpaces, radius: Tensor, threat: Threat) -> Tensor:
    """Radii (B,) that hold for images below the cap of a threat, at least those that hold without, ``radius`` (B,).

    The largest, to ``CAPPED_TOLERANCE``, at which the bound of :mod:`flowverify.transport.capped` is below every
    margin; lower bounds of the exact ones. What is infinite or 0 stays as it is.
    """
    ball = threat.unlimited(spaces.images)
    limit = threat.cost.budget(torch.tensor(threat.largest_radius(ball.grid), dtype=torch.float64))
    low = threat.cost.budget(radius.clone())
    high = torch.full_like(low, torch.inf)
    active = (torch.isfinite(low) & (low > 0) & (low < limit)).nonzero().flatten()
    while active.numel():
        trial = torch.where(torch.isinf(high[active]), low[active] * CAPPED_STEP, (low[active] + high[active]) / 2)
        found = ball[active].with_budget(trial * spaces.mass[active]).support(spaces.normals[active])
        holds = (found.excess < spaces.margins[active]).all(1)
        low[active[holds]] = trial[holds]
        high[active[~holds]] = trial[~holds]
        active = active[(high[active] > low[active] * CAPPED_TOLERANCE) & (low[active] < limit)]
    return threat.cost.radius(low)


def _positive(margins: Tensor) -> Tensor:
    return margins.clamp(min=0)


def _steepest_edge(spaces: HalfSpaces) -> Tensor:
    """x with m_t / |(A^T w_t)_j| of mass moved along the steepest edge j, up its slope."""
    images = spaces.images[:, None].expand_as(spaces.normals).clone()
    for axis in (-1, -2):
        if spaces.normals.shape[axis] == 1:
            continue
        difference = spaces.normals.diff(dim=axis)
        largest = difference.abs().flatten(2).amax(-1)
        steepest = (largest >= lipschitz_constant(spaces.normals)) & (largest > 0)
        flat = difference.flatten(2)
        edge = flat.abs().argmax(-1, keepdim=True)
        slope = flat.gather(-1, edge)
        amount = torch.where(steepest[..., None], _positive(spaces.margins)[..., None] / slope, 0.0)
        flow = torch.zeros_like(flat).scatter(-1, edge, amount).reshape(difference.shape)
        moved = torch.zeros_like(images)
        size = moved.shape[axis] - 1
        moved.narrow(axis, 1, size).add_(flow)
        moved.narrow(axis, 0, size).sub_(flow)
        untouched = (images == spaces.images[:, None]).flatten(2).all(-1)
        images = torch.where(untouched[..., None, None, None], images + moved, images)
    return images


def _least(spaces: HalfSpaces, distances: Tensor, points: Tensor | None) -> LinearRadius:
    by_class = distances / spaces.mass[:, None]
    radius, position = by_class.min(1)
    nearest = None
    if points is not None:
        nearest = points[torch.arange(len(points), device=points.device), position]
    target = spaces.classes.gather(1, position[:, None]).squeeze(1)
    return LinearRadius(radius, by_class, target, nearest)
