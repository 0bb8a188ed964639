"""Raises lower bounds by Adam on their multipliers, problem by problem, until each is positive or time is up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certify.complete.affine_maps import AffineMaps
from flowverify.certify.complete.balls import Polytope
from flowverify.certify.complete.joint import JointLimits
from flowverify.certify.complete.relaxation import Bound, Multipliers, lower_bound

SLOPE_STEP = 0.03
SPLIT_STEP = 0.2
LIMIT_STEP = 0.05
STEPS = (SLOPE_STEP, SPLIT_STEP, LIMIT_STEP)
DECAY = 0.98
FIRST, SECOND = 0.9, 0.99  # Adam's averages
LOOSE, TIGHT = 1e-3, 1e-6  # the ball's tolerance on the way, and of the last bound; all of them are sound


@dataclass
class Ascended:
    """The best bound of each problem, its multipliers, and the minimiser over the ball of the last evaluation."""

    value: Tensor
    multipliers: Multipliers
    point: Tensor


def ascend(
    maps: AffineMaps,
    ball: Polytope,
    stage: int,
    specification: Tensor,
    lower: Sequence[Tensor],  # (N, n_k) each
    upper: Sequence[Tensor],
    signs: Sequence[Tensor],  # +1 where split active, -1 inactive, 0 elsewhere
    start: Multipliers,
    iterations: int,
    joint: Sequence[JointLimits] = (),
    *,
    enough: float = torch.inf,
    pace: float = 1.0,
) -> Ascended:
    """Maximises the bounds of :func:`lower_bound` over slopes, and multipliers of splits and joint limits.

    Args:
        iterations: evaluations of the bound, at least 1.
        enough: a problem whose bound exceeds this is left alone.
        pace: factor of all steps; small ones finish what large ones have begun.
    """
    count = len(specification)
    best = specification.new_full((count,), -torch.inf)
    kept = Multipliers.of([v.clone() for v in start.variables], start.guess.clone())
    points = specification.new_empty(count, ball.flat.numel())
    rows = torch.arange(count, device=specification.device)
    layers = len(start.alpha)
    values = start.variables
    means, squares = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    own_lower, own_upper, own_signs, own_joint = list(lower), list(upper), list(signs), list(joint)
    guess = start.guess
    for step in range(iterations):
        final = step == iterations - 1 and step > 0
        leaves = [v.detach().requires_grad_(not final) for v in values]
        with torch.set_grad_enabled(not final):
            tolerance = LOOSE if values and step < iterations - 1 else TIGHT
            bound: Bound = lower_bound(
                maps, ball, stage, specification, own_lower, own_upper,
                Multipliers.of(leaves, guess), own_joint, tolerance=tolerance, point=not final,
            )  # fmt: skip
        value = bound.value.detach()
        better = value > best[rows]
        chosen = rows[better]
        best[chosen] = value[better]
        for target, source in zip(kept.variables, leaves, strict=True):
            target[chosen] = source.detach()[better]
        kept.guess[rows] = bound.multiplier.to(kept.guess)
        if bound.point is not None:
            points[rows] = bound.point.detach()
        if final or step == iterations - 1 or not leaves or not bound.value.requires_grad:
            break
        gradients = torch.autograd.grad(bound.value.sum(), leaves, allow_unused=True)
        with torch.no_grad():
            values = []
            for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num()
                means[index] = FIRST * means[index] + (1 - FIRST) * gradient
                squares[index] = SECOND * squares[index] + (1 - SECOND) * gradient.square()
                size = (squares[index] / (1 - SECOND ** (step + 1))).sqrt() + 1e-8
                kind, layer = divmod(index, layers)
                rate = STEPS[kind] * DECAY**step * pace
                moved = leaf.detach() + rate * means[index] / (1 - FIRST ** (step + 1)) / size
                if kind == 0:
                    values.append(moved.clamp(0, 1))
                elif kind == 1:
                    values.append(_on_side(moved, own_signs[layer]))
                else:
                    values.append(moved.clamp(min=0))
        guess = bound.multiplier.to(guess)
        going = value <= enough
        if not bool(going.all()):
            if not bool(going.any()):
                break
            rows, guess, specification = rows[going], guess[going], specification[going]
            values, means, squares, own_lower, own_upper, own_signs = (
                [v[going] for v in group] for group in (values, means, squares, own_lower, own_upper, own_signs)
            )
            own_joint = [limits[going] for limits in own_joint]
    return Ascended(best, kept, points)


def _on_side(gamma: Tensor, sign: Tensor) -> Tensor:
    """Gamma is -beta where z >= 0 and beta where z <= 0, beta >= 0; 0 where nothing is split."""
    return torch.where(sign > 0, gamma.clamp(max=0), torch.where(sign < 0, gamma.clamp(min=0), 0.0))
