"""The least budget with which a linear function gains a given amount: the exact distance to a half-space.

For an image mu, coefficients c and a target m, over the polytope of :mod:`flowverify.transport.support`,

    least eps >= 0 such that h_eps(c) - c . mu >= m

is the cost of the cheapest plan from mu to {nu >= 0 of equal mass : c . (nu - mu) >= m}, on unnormalised measures: W1
for a metric (theory, section 8; framework paper, Lemma 8, where it is a linear program). The best gain as a function of
the budget is concave and piecewise linear. Its vertices are the plans that move every source to its argmax at some
multiplier; between a vertex that falls short of m and one that reaches it, the chord's slope is the next multiplier to
try, until the two are neighbours: finitely many steps, no tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport import compiled, dilation
from flowverify.transport.compiled import Backend, use_compiled
from flowverify.transport.dilation import dilate, lipschitz_constant
from flowverify.transport.ground import check_ground
from flowverify.transport.support import check_problems

MAX_STEPS = 64


@dataclass(frozen=True)
class LeastBudget:
    """The solution for every image and coefficient vector.

    ``budget`` is infinite where no image of equal mass gains the target; the maximiser is then the image that
    gains most.
    """

    budget: Tensor  # (B, S), in mass times ground cost
    multiplier: Tensor  # (B, S), gain for one more unit of budget there
    maximiser: Tensor | None  # (B, S, C, H, W), a nearest image that gains the target
    bracket: Tensor  # (B, S, 2), the multipliers on either side; see :func:`nearest_image`


def least_budget(
    coefficients: Tensor,  # (B, S, C, H, W), or (S, C, H, W) shared by all images
    images: Tensor,  # (B, C, H, W)
    target: Tensor,  # (B, S)
    *,
    maximiser: bool = False,
    backend: Backend = "auto",
    ground: str = "l1",
) -> LeastBudget:
    """The least budget that gains each target, exactly; 0 where the target is not positive.

    Raises:
        InvalidInputError: shapes that do not fit, coefficients that are not finite, or a target that is NaN.
        UnknownNameError: an unknown ground cost.
    """
    check_problems(coefficients, images)
    ground = check_ground(ground, Grid.of(images))
    dtype = torch.promote_types(coefficients.dtype, images.dtype)
    coefficients, images = coefficients.detach().to(dtype), images.detach().to(dtype)
    expected = (images.shape[0], coefficients.shape[-4])
    if tuple(target.shape) != expected or bool(torch.isnan(target).any()):
        raise InvalidInputError(f"target of shape {tuple(target.shape)}: expected {expected}, and no NaN")
    if not bool(torch.isfinite(coefficients.sum())) and not bool(torch.isfinite(coefficients).all()):
        raise InvalidInputError("coefficients: given NaN or infinite ones, expected finite numbers")
    if not target.numel():
        empty = images.new_empty(expected)
        moved = images.new_empty(*expected, *images.shape[1:]) if maximiser else None
        return LeastBudget(empty, empty, moved, images.new_empty(*expected, 2))
    target = target.detach().double()
    solve = compiled.solve_least_budget if use_compiled(backend, images) else _solve_torch
    budget, multiplier, bracket = solve(coefficients, images, target, ground)
    moved = None
    if maximiser:
        moved = nearest_image(coefficients, images, budget, bracket, backend=backend, ground=ground)
    return LeastBudget(budget.to(dtype), multiplier, moved, bracket)


def nearest_image(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    bracket: Tensor,
    *,
    backend: Backend = "auto",
    ground: str = "l1",
) -> Tensor:
    """The image of each problem that spends the budget, (B, S, C, H, W), from the bracket of its solution.

    For those who want few of many images: solve for all, choose, and ask for the images of the chosen.
    """
    dtype = torch.promote_types(coefficients.dtype, images.dtype)
    coefficients, images = coefficients.detach().to(dtype), images.detach().to(dtype)
    budget, bracket = budget.double(), bracket.double()
    if use_compiled(backend, images):
        return compiled.maximise(coefficients, images, budget, bracket, ground)
    coefficients = coefficients.expand(images.shape[0], *coefficients.shape[-4:])
    return dilation.mix(coefficients, images, budget, bracket[..., 0], bracket[..., 1], ground)


def _solve_torch(
    coefficients: Tensor, images: Tensor, target: Tensor, ground: str = "l1"
) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = coefficients.expand(images.shape[0], *coefficients.shape[-4:])
    mass = images[:, None]
    target = target.to(images.device)

    def evaluate(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        value, distance, _ = dilate(coefficients, multiplier.to(coefficients.dtype), ground)
        cost = (mass * distance).flatten(2).double().sum(-1)
        return (mass * (value - coefficients)).flatten(2).double().sum(-1) + multiplier * cost, cost

    near_at, near_cost, near_gain = lipschitz_constant(coefficients, ground).double(), 0 * target, 0 * target
    far_at = torch.zeros_like(target)
    far_gain, far_cost = evaluate(far_at)
    unreachable = far_gain < target
    trivial = target <= 0
    done = unreachable | trivial
    for _ in range(MAX_STEPS):
        chord = (far_gain - near_gain) / (far_cost - near_cost)
        done = done | ~((far_at < chord) & (chord < near_at))
        if bool(done.all()):
            break
        trial = torch.where(done, near_at, chord)
        gain, cost = evaluate(trial)
        done = done | (cost <= near_cost) | (cost >= far_cost)
        short, reaches = ~done & (gain < target), ~done & (gain >= target)
        near_at, near_cost, near_gain = (
            torch.where(short, new, old) for new, old in ((trial, near_at), (cost, near_cost), (gain, near_gain))
        )
        far_at, far_cost, far_gain = (
            torch.where(reaches, new, old) for new, old in ((trial, far_at), (cost, far_cost), (gain, far_gain))
        )
    slope = (far_gain - near_gain) / (far_cost - near_cost)
    budget = near_cost + (target - near_gain) / slope
    budget = torch.where(unreachable, torch.inf, torch.where(trivial, 0.0, budget))
    slope = torch.where(unreachable | trivial, 0.0, slope)
    low = torch.where(trivial | unreachable, -1.0, far_at)
    bracket = torch.stack([low, torch.where(unreachable, 0.0, near_at)], dim=-1)
    return budget, slope.to(images.dtype), bracket
