"""Projected Sinkhorn iteration: approximate projection onto a Wasserstein ball (Wong et al. 2019, Algorithm 2).

For x of mass 1, a point w, a radius eps and local plans Pi of cost C, problem (6) of the paper, times lambda:

    minimise over z, Pi >= 0  lambda / 2 ||w - z||^2 + sum Pi log Pi
    subject to  Pi 1 = x,  Pi^T 1 = z,  <Pi, C> <= eps

by block coordinate ascent of its dual over alpha, beta, psi (Lemma 2). All is done in the log domain: alpha and
beta are never exponentiated by themselves, and Lambert's W is solved for its argument's logarithm, so that nothing
overflows however large lambda is. z = w - beta / lambda is computed as W / lambda, which is the same without the
cancellation. An entropic projection blurs: it is no exact projection, and for a finite number of iterations the
mass and the cost are only nearly right. What an attack returns is therefore repaired and measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.attack.local_plans import LocalCost, windows
from flowverify.errors import InvalidInputError

NEWTON_STEPS = 6  # of Lambert's W; quadratic from a start that is off by less than one
HALVINGS = 60


@dataclass(frozen=True)
class Projection:
    """``image``: z, (B, C, H, W); ``cost``: <Pi, C>, (B,); ``iterations``: until convergence, (B,) int64."""

    image: Tensor
    cost: Tensor
    iterations: Tensor
    converged: Tensor


def project_sinkhorn(
    images: Tensor,  # x, (B, C, H, W), each of total mass 1
    points: Tensor,  # w, (B, C, H, W)
    radius: Tensor,  # eps, (B,)
    cost: LocalCost,
    regularisation: float = 1000.0,
    *,
    iterations: int = 400,
    tolerance: float = 1e-4,
) -> Projection:
    """Approximately the nearest image to w (Euclidean) in the ball of radius eps around x.

    An image is done when its dual objective changes by no more than ``tolerance`` (1 + |objective|).

    Raises:
        InvalidInputError: shapes that do not fit, a regularisation that is not positive and finite.
    """
    if images.ndim != 4 or points.shape != images.shape or tuple(radius.shape) != (images.shape[0],):
        raise InvalidInputError(
            f"images {tuple(images.shape)}, points {tuple(points.shape)}, radius {tuple(radius.shape)}: expected "
            "(B, C, H, W) twice and (B,)"
        )
    if not 0 < regularisation < float("inf"):
        raise InvalidInputError(f"regularisation {regularisation}: expected a finite number > 0")
    costs = cost.matrix(images)[:, None, None]  # (kk, 1, 1)
    log_mass, pull = images.log(), regularisation * points
    log_regularisation = float(torch.tensor(regularisation, dtype=torch.float64).log())
    count = images.shape[0]
    image, spent = images.clone(), torch.zeros_like(radius)
    used = torch.full((count,), iterations, device=images.device)
    active = torch.arange(count, device=images.device)
    beta = torch.full_like(images, -float(torch.tensor(float(images[0].numel())).log()))
    psi, eps = torch.ones_like(radius), radius
    objective = torch.full_like(radius, -torch.inf)
    for iteration in range(iterations):
        price = psi[:, None, None, None, None] * costs + 1
        alpha = log_mass - torch.logsumexp(windows(beta, cost.size) - price, 2)
        terms = windows(alpha, cost.size) - price
        top = terms.amax(2, keepdim=True).clamp(min=torch.finfo(images.dtype).min)
        weights = (terms - top).exp()
        total = weights.sum(2)
        argument = log_regularisation + pull + total.log() + top.squeeze(2)
        scaled = lambert_of_exponential(argument)
        beta = pull - scaled
        moved = scaled / regularisation
        # Column sums of the plan are z after the beta step, so its cost needs no further exponentials.
        share = moved / total.clamp(min=torch.finfo(images.dtype).tiny)
        first = (share * (weights * costs).sum(2)).flatten(1).sum(1)
        second = (share * (weights * costs * costs).sum(2)).flatten(1).sum(1)
        psi_next = _newton_step(psi, first - eps, second)
        value = _dual(alpha, beta, psi, images[active], points[active], eps, moved, regularisation)
        done = (value - objective).abs() <= tolerance * (1 + value.abs())
        image[active], spent[active] = moved, first
        used[active[done]] = iteration + 1
        if bool(done.all()):
            active = active[:0]
            break
        keep = ~done
        active, beta, psi, eps, objective = active[keep], beta[keep], psi_next[keep], eps[keep], value[keep]
        log_mass, pull = log_mass[keep], pull[keep]
    converged = torch.ones(count, dtype=torch.bool, device=images.device)
    converged[active] = False
    return Projection(image, spent, used, converged)


def _newton_step(psi: Tensor, excess: Tensor, second: Tensor) -> Tensor:
    """psi + t * excess / second, with t halved until it is not negative (Algorithm 2's line search)."""
    step = excess / second.clamp(min=torch.finfo(psi.dtype).tiny)
    step = step.nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)
    share = torch.ones_like(psi)
    for _ in range(HALVINGS):
        negative = psi + share * step < 0
        if not bool(negative.any()):
            break
        share = torch.where(negative, share / 2, share)
    return (psi + share * step).clamp(min=0)


def _dual(
    alpha: Tensor, beta: Tensor, psi: Tensor, images: Tensor, points: Tensor, eps: Tensor, moved: Tensor, lam: float
) -> Tensor:
    """g(alpha, beta, psi), equation (8); the plan's total is that of its column sums z."""
    held = torch.where(images > 0, alpha * images, 0.0)
    inner = held - beta * beta / (2 * lam) + beta * points - moved
    return inner.flatten(1).sum(1) - psi * eps


def lambert_of_exponential(argument: Tensor) -> Tensor:
    """W(exp(L)), Lambert's W of an argument given by its logarithm: the w > 0 with w + log w = L.

    0 at minus infinity; neither overflows nor cancels for any finite L.
    """
    start = torch.nn.functional.softplus(argument)
    result = start.clamp(min=torch.finfo(argument.dtype).tiny)
    for _ in range(NEWTON_STEPS):
        result = result * (1 + argument - result.log()) / (1 + result)
        result = result.clamp(min=torch.finfo(argument.dtype).tiny)
    return torch.where(argument > -50.0, result, argument.exp())
