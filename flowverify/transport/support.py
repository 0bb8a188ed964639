"""The support function of the Wasserstein ball: the exact maximum of a linear function over it.

For an image mu >= 0, a ground cost d and a budget eps (radius times mass; radius^p times mass for a p-th power) the
*polytope* is the set of images nu >= 0 of equal mass that a plan of cost at most eps leads to: W1(mu, nu) <= eps for
a metric. By linear programming duality (theory, section 5),

    h(c) = max {c . nu : nu in polytope} = min over lambda >= 0 of  lambda * eps + sum_i mu_i D_lambda(c)_i

with D the dilation of :mod:`flowverify.transport.dilation`. Every lambda >= 0 gives an upper bound, and
lambda = Lip(c) gives the one without positivity, c . mu + eps * Lip(c) (theory, section 4), so the result is
never worse than that. The function of lambda is convex and piecewise linear with slope eps minus the cost
of moving every source to its argmax; crossing the tangents of a bracket ends in a few steps. Mixing the
two sides so that the cost is exactly eps gives a primal solution, so that the stopping rule is a true
duality gap. The same duality is that of Wasserstein distributionally robust optimisation (Gao & Kleywegt
2016; Blanchet & Murthy 2019).

Two implementations give the same numbers: compiled kernels on the CPU
(:mod:`flowverify.transport.compiled`), and torch on any device (:mod:`flowverify.transport.search`). With a cap,
nu <= cap, the bound is that of :mod:`flowverify.transport.capped`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport import compiled, search
from flowverify.transport.backend import Backend, use_compiled
from flowverify.transport.capped import support_capped
from flowverify.transport.dilation import dilate, lipschitz_constant
from flowverify.transport.ground import check_ground


@dataclass(frozen=True)
class Support:
    """The solution of max c . nu over the polytope, for every image and coefficient vector.

    ``excess`` is h(c) - c . mu >= 0; the difference is kept because it does not cancel.
    """

    excess: Tensor  # (B, S)
    multiplier: Tensor  # (B, S), the lambda that attains the bound
    maximiser: Tensor | None  # (B, S, C, H, W), nu*
    reduced: Tensor | None = None  # (B, S, C, H, W), c less the multipliers of the cap


def support(
    coefficients: Tensor,  # (B, S, C, H, W), or (S, C, H, W) shared by all images
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    *,
    guess: Tensor | None = None,
    tolerance: float | None = None,
    maximiser: bool = False,
    backend: Backend = "auto",
    ground: str = "l1",
    cap: float | None = None,
) -> Support:
    """Maximises S linear functions over the polytope around each of B images.

    Args:
        coefficients: c. With the leading batch axis missing, the same functions for every image.
        images: mu, nonnegative. Their mass need not be 1.
        budget: eps >= 0, in mass times ground cost.
        guess: multipliers (B, S) to start from, 0 or less where there is none. They change the number
            of steps only.
        tolerance: duality gap, relative to the excess, at which the search over lambda stops; the default
            is 1e-10 in float64 and 1e-6 in float32. The result is an upper bound whatever it is.
        maximiser: also return nu*.
        backend: the compiled kernel is used for CPU tensors unless ``"torch"`` is asked for.
        ground: the name of the ground cost; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel of nu. The result is then an upper bound that is never larger than without,
            and the maximiser is the bound's gradient in c; see :mod:`flowverify.transport.capped`.

    Raises:
        InvalidInputError: shapes that do not fit, a pixel that is negative or NaN or above the cap, a negative or
            non-finite budget, a ground cost that does not fit the images.
        UnknownNameError: an unknown ground cost.

    Coefficients that are not finite give an excess of NaN, which no comparison takes for a bound.
    """
    check_problems(coefficients, images)
    _check_budget(budget, images.shape[0])
    ground = check_ground(ground, Grid.of(images))
    dtype = torch.promote_types(coefficients.dtype, images.dtype)
    coefficients, images = coefficients.detach().to(dtype), images.detach().to(dtype)
    budget = budget.detach().double()
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    problems = coefficients.shape[-4]
    shape = (images.shape[0], problems)
    if guess is None:
        guess = torch.zeros(shape, dtype=torch.float64)
    if tuple(guess.shape) != shape:
        raise InvalidInputError(f"guess of shape {tuple(guess.shape)}: expected {shape}")
    if not guess.numel():
        empty = images.new_empty(shape)
        return Support(empty, empty, images.new_empty(*shape, *images.shape[1:]) if maximiser else None)
    # A sum tells in one pass that all is finite; only where it is not, coefficients are looked at one by one.
    unbounded = None
    if not bool(torch.isfinite(coefficients.sum())):
        unbounded = ~torch.isfinite(coefficients).flatten(-3).all(-1).expand(shape)
        coefficients = torch.nan_to_num(coefficients, nan=0.0, posinf=0.0, neginf=0.0)
    if cap is not None:
        capped = support_capped(
            coefficients, images, budget, cap, tolerance=tolerance, maximiser=maximiser, backend=backend, ground=ground
        )
        excess, multiplier, moved = capped.excess, capped.multiplier, capped.maximiser
        if unbounded is not None:
            excess = torch.where(unbounded.to(excess.device), torch.nan, excess)
        return Support(excess, multiplier, moved, capped.reduced)
    solve = compiled.solve if use_compiled(backend, images) else search.solve
    excess, multiplier, moved = solve(
        coefficients, images, budget, guess.detach().double(), tolerance, maximiser, ground
    )
    if ground != "l1" and bool((budget == 0).any()):
        # Any multiplier from Lip(c) on attains the value 0; a knapsack that is never opened has none.
        still = (budget == 0).to(multiplier.device)[:, None]
        multiplier = torch.where(still, lipschitz_constant(coefficients, ground).to(multiplier), multiplier)
    if unbounded is not None:
        excess = torch.where(unbounded.to(excess.device), torch.nan, excess)
    return Support(excess, multiplier, moved)


def support_value(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    *,
    guess: Tensor | None = None,
    tolerance: float | None = None,
    ground: str = "l1",
    cap: float | None = None,
) -> Tensor:
    """h(c), differentiable in all three arguments; shapes as in :func:`support`, result (B, S).

    By Danskin's theorem the gradient in c is the maximiser nu*, in eps the multiplier lambda*, and in mu
    the dilation D_lambda*(c).
    With a cap they are those of the bound at its multipliers.
    """
    value: Tensor = _SupportFunction.apply(  # type: ignore[no-untyped-call]
        coefficients, images, budget, guess, tolerance, ground, cap
    )
    return value


def check_problems(coefficients: Tensor, images: Tensor) -> None:
    """Raises InvalidInputError unless coefficients and images fit each other; shapes as in :func:`support`."""
    if images.ndim != 4:
        raise InvalidInputError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")
    if not bool((images >= 0).all()):
        raise InvalidInputError(f"images with a pixel of {float(images.min())}: expected finite values >= 0")
    batch = images.shape[0]
    fits = coefficients.ndim in (4, 5) and coefficients.shape[-3:] == images.shape[-3:]
    if not fits or (coefficients.ndim == 5 and coefficients.shape[0] != batch):
        raise InvalidInputError(
            f"coefficients of shape {tuple(coefficients.shape)}: expected ({batch}, S, *{tuple(images.shape[-3:])}) "
            f"or (S, *{tuple(images.shape[-3:])})"
        )


def _check_budget(budget: Tensor, batch: int) -> None:
    if budget.shape != (batch,):
        raise InvalidInputError(f"budget of shape {tuple(budget.shape)}: expected ({batch},)")
    if not bool((torch.isfinite(budget) & (budget >= 0)).all()):
        raise InvalidInputError(f"budget {budget.tolist()}: expected finite numbers >= 0")


def inner(coefficients: Tensor, images: Tensor) -> Tensor:
    """c . mu for coefficients (B, S, C, H, W) or (S, C, H, W) and images (B, C, H, W), as (B, S)."""
    flat = images.flatten(1)
    if coefficients.ndim == 4:
        return flat @ coefficients.flatten(1).T
    return torch.einsum("bsp,bp->bs", coefficients.flatten(2), flat)


class _SupportFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        images: Tensor,
        budget: Tensor,
        guess: Tensor | None,
        tolerance: float | None,
        ground: str,
        cap: float | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        solution = support(
            coefficients,
            images,
            budget,
            guess=guess,
            tolerance=tolerance,
            maximiser=wanted,
            ground=ground,
            cap=cap,
        )
        ctx.ground = ground
        # At fixed multipliers of the cap the bound is that of the reduced coefficients, plus a constant.
        reduced = coefficients if solution.reduced is None else solution.reduced
        ctx.shared = coefficients.ndim == 4
        ctx.save_for_backward(reduced, solution.multiplier, solution.maximiser)
        return inner(coefficients, images) + solution.excess

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, multiplier, maximiser = ctx.saved_tensors
        for_coefficients = for_images = for_budget = None
        if ctx.needs_input_grad[0]:
            for_coefficients = gradient[..., None, None, None] * maximiser
            if ctx.shared:
                for_coefficients = for_coefficients.sum(0)
        if ctx.needs_input_grad[1]:
            value = dilate(
                coefficients.expand(*multiplier.shape, *coefficients.shape[-3:]), multiplier, ctx.ground
            ).value
            for_images = (gradient[..., None, None, None] * value).sum(1)
        if ctx.needs_input_grad[2]:
            for_budget = (gradient * multiplier).sum(1)
        return for_coefficients, for_images, for_budget, None, None, None, None
