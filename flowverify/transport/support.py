"""The support function of the Wasserstein ball: the exact maximum of a linear function over it.

For an image mu >= 0 and a budget eps (radius times mass, l1 ground cost d) the *polytope* is the set of
images nu >= 0 of equal mass with W1(mu, nu) <= eps. By linear programming duality, design fact F4,

    h(c) = max {c . nu : nu in polytope} = min over lambda >= 0 of  lambda * eps + sum_i mu_i D_lambda(c)_i

with D the dilation of :mod:`flowverify.transport.dilation`. Every lambda >= 0 gives an upper bound, and
lambda = Lip(c) gives the one without positivity, c . mu + eps * Lip(c) (design fact F3), so the result is
never worse than that. The function of lambda is convex and piecewise linear with slope eps minus the cost
of moving every source to its argmax; crossing the tangents of a bracket ends in a few steps. Mixing the
two sides so that the cost is exactly eps gives a primal solution, so that the stopping rule is a true
duality gap. The same duality is that of Wasserstein distributionally robust optimisation (Gao & Kleywegt
2016; Blanchet & Murthy 2019).

Two implementations give the same numbers: a compiled kernel on CPU, and torch on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.dilation import dilate, lipschitz_constant

Backend = Literal["auto", "compiled", "torch"]

MAX_STEPS = 64
TORCH_CHUNK = 1 << 24  # pixels of coefficients in one torch pass


@dataclass(frozen=True)
class Support:
    """The solution of max c . nu over the polytope, for every image and coefficient vector.

    ``excess`` is h(c) - c . mu >= 0; the difference is kept because it does not cancel.
    """

    excess: Tensor  # (B, S)
    multiplier: Tensor  # (B, S), the lambda that attains the bound
    maximiser: Tensor | None  # (B, S, C, H, W), nu*


def support(
    coefficients: Tensor,  # (B, S, C, H, W), or (S, C, H, W) shared by all images
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    *,
    guess: Tensor | None = None,
    tolerance: float | None = None,
    maximiser: bool = False,
    backend: Backend = "auto",
) -> Support:
    """Maximises S linear functions over the polytope around each of B images.

    Args:
        coefficients: c. With the leading batch axis missing, the same functions for every image.
        images: mu, nonnegative. Their mass need not be 1.
        budget: eps >= 0, in mass times pixels (radius * mass).
        guess: multipliers (B, S) to start from, 0 or less where there is none. They change the number
            of steps only.
        tolerance: duality gap, relative to the excess, at which the search over lambda stops; the default
            is 1e-10 in float64 and 1e-6 in float32. The result is an upper bound whatever it is.
        maximiser: also return nu*.
        backend: the compiled kernel is used for CPU tensors unless ``"torch"`` is asked for.

    Raises:
        InvalidInputError: shapes that do not fit, a negative or non-finite budget.
    """
    _check(coefficients, images, budget)
    dtype = torch.promote_types(coefficients.dtype, images.dtype)
    coefficients, images = coefficients.detach().to(dtype), images.detach().to(dtype)
    budget = budget.detach().double()
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    problems = coefficients.shape[-4]
    if guess is None:
        guess = torch.zeros(images.shape[0], problems, dtype=torch.float64)
    guess = guess.detach().double()
    compiled = backend == "compiled" or (backend == "auto" and images.device.type == "cpu")
    solve = _solve_compiled if compiled and dtype in (torch.float32, torch.float64) else _solve_torch
    return solve(coefficients, images, budget, guess, tolerance, maximiser)


def support_value(
    coefficients: Tensor, images: Tensor, budget: Tensor, *, guess: Tensor | None = None, tolerance: float | None = None
) -> Tensor:
    """h(c), differentiable in all three arguments; shapes as in :func:`support`, result (B, S).

    By Danskin's theorem the gradient in c is the maximiser nu*, in eps the multiplier lambda*, and in mu
    the dilation D_lambda*(c).
    """
    value: Tensor = _SupportFunction.apply(coefficients, images, budget, guess, tolerance)
    return value


def _check(coefficients: Tensor, images: Tensor, budget: Tensor) -> None:
    if images.ndim != 4:
        raise InvalidInputError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")
    batch = images.shape[0]
    fits = coefficients.ndim in (4, 5) and coefficients.shape[-3:] == images.shape[-3:]
    if not fits or (coefficients.ndim == 5 and coefficients.shape[0] != batch):
        raise InvalidInputError(
            f"coefficients of shape {tuple(coefficients.shape)}: expected ({batch}, S, *{tuple(images.shape[-3:])}) "
            f"or (S, *{tuple(images.shape[-3:])})"
        )
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
        ctx: Any, coefficients: Tensor, images: Tensor, budget: Tensor, guess: Tensor | None, tolerance: float | None
    ) -> Tensor:
        solution = support(
            coefficients, images, budget, guess=guess, tolerance=tolerance, maximiser=ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(coefficients, solution.multiplier, solution.maximiser)
        return inner(coefficients, images) + solution.excess

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, multiplier, maximiser = ctx.saved_tensors
        for_coefficients = for_images = for_budget = None
        if ctx.needs_input_grad[0]:
            for_coefficients = gradient[..., None, None, None] * maximiser
            if coefficients.ndim == 4:
                for_coefficients = for_coefficients.sum(0)
        if ctx.needs_input_grad[1]:
            value = dilate(coefficients.expand(*multiplier.shape, *coefficients.shape[-3:]), multiplier).value
            for_images = (gradient[..., None, None, None] * value).sum(1)
        if ctx.needs_input_grad[2]:
            for_budget = (gradient * multiplier).sum(1)
        return for_coefficients, for_images, for_budget, None, None


def _solve_compiled(
    coefficients: Tensor, images: Tensor, budget: Tensor, guess: Tensor, tolerance: float, maximiser: bool
) -> Support:
    from flowverify.transport import scan_kernel

    shared = coefficients.ndim == 4
    problems = coefficients.shape[-4]
    shape = tuple(images.shape[1:])
    rows = coefficients.contiguous().reshape(-1, problems, images[0].numel()).numpy()
    mass = images.contiguous().reshape(images.shape[0], -1).numpy()
    budgets = budget.numpy()
    guesses = guess.contiguous().numpy()
    excess = np.empty(guesses.shape)
    multipliers = np.empty(guesses.shape)
    brackets = np.empty((*guesses.shape, 2))
    maximisers = np.empty((*guesses.shape, mass.shape[1]), mass.dtype) if maximiser else None
    jobs: list[Callable[[], None]] = []
    workers = torch.get_num_threads()
    chunk = _chunk_size(problems, images.shape[0], workers, scan_kernel.LANES)
    for index in range(images.shape[0]):
        own = rows[0 if shared else index]
        columns, holders, held = _mass_layout(mass[index].reshape(shape))

        def job(first: int, index: int = index, own: Any = own, layout: Any = (columns, holders, held)) -> None:
            last = min(first + chunk, problems)
            scan_kernel.solve_problems(
                own, mass[index], *layout, budgets[index], guesses[index], tolerance, shape, first, last,
                excess[index], multipliers[index], brackets[index],
            )  # fmt: skip
            if maximisers is not None:
                scan_kernel.maximise_problems(
                    own, mass[index], budgets[index], brackets[index], shape, first, last, maximisers[index]
                )

        jobs.extend(lambda first=first, job=job: job(first) for first in range(0, problems, chunk))
    if workers > 1 and len(jobs) > 1:
        with ThreadPoolExecutor(workers) as pool:
            for outcome in [pool.submit(job) for job in jobs]:
                outcome.result()
    else:
        for one in jobs:
            one()
    return Support(
        torch.from_numpy(excess).to(images.dtype),
        torch.from_numpy(multipliers).to(images.dtype),
        None if maximisers is None else torch.from_numpy(maximisers).reshape(*guesses.shape, *shape),
    )


def _chunk_size(problems: int, images: int, workers: int, lanes: int) -> int:
    """Problems a job: whole vectors, and enough jobs to keep every worker busy."""
    jobs_an_image = max(1, -(-4 * workers // images)) if workers > 1 else 1
    return max(lanes, -(-problems // (jobs_an_image * lanes)) * lanes)


def _mass_layout(mass: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """Columns that hold mass, and for each pixel that does its place in the kernel's two layouts."""
    _, height, width = mass.shape
    columns = np.flatnonzero(mass.any(axis=(0, 1)))
    position = np.full(width, -1)
    position[columns] = np.arange(columns.size)
    channel, row, column = np.nonzero(mass)
    holders = np.stack(
        [channel, (channel * width + column) * height + row, row * columns.size + position[column]], axis=1
    )
    return columns, np.ascontiguousarray(holders), np.ascontiguousarray(mass[channel, row, column])


def _solve_torch(
    coefficients: Tensor, images: Tensor, budget: Tensor, guess: Tensor, tolerance: float, maximiser: bool
) -> Support:
    per_problem = images[0].numel()
    batch, problems = images.shape[0], coefficients.shape[-4]
    size = max(1, TORCH_CHUNK // (per_problem * problems))
    parts = []
    for start in range(0, batch, size):
        chosen = slice(start, start + size)
        own = coefficients.expand(batch, *coefficients.shape[-4:])[chosen]
        parts.append(
            _bracket_search(own, images[chosen], budget[chosen].to(images.device), guess[chosen], tolerance, maximiser)
        )
    return Support(
        torch.cat([part.excess for part in parts]),
        torch.cat([part.multiplier for part in parts]),
        torch.cat([part.maximiser for part in parts]) if maximiser else None,  # type: ignore[misc]
    )


def _bracket_search(
    coefficients: Tensor, images: Tensor, budget: Tensor, guess: Tensor, tolerance: float, maximiser: bool
) -> Support:
    mass = images[:, None]  # (B, 1, C, H, W)
    limit = lipschitz_constant(coefficients).double()  # (B, S)
    budget = budget[:, None].expand_as(limit)

    def evaluate(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        value, distance, _ = dilate(coefficients, multiplier.to(coefficients.dtype))
        gain = (mass * (value - coefficients)).flatten(2).double().sum(-1)
        cost = (mass * distance).flatten(2).double().sum(-1)
        return multiplier * budget + gain, budget - cost

    high, high_value, high_slope = limit, limit * budget, budget
    low = torch.full_like(limit, -1.0)
    low_value, low_slope = torch.zeros_like(limit), torch.zeros_like(limit)
    best, best_at = high_value, limit
    done = (limit == 0) | (budget == 0)
    guess = guess.to(limit.device)
    for step in range(MAX_STEPS):
        smaller = high * 0.35
        trial = torch.where(smaller > 1e-3 * limit, smaller, 0.0)
        if step == 0:
            trial = torch.where((guess > 0) & (guess < high), guess, trial)
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        trial = torch.where(low >= 0, crossing, trial)
        done = done | ((low >= 0) & ~((low < trial) & (trial < high)))
        if bool(done.all()):
            break
        trial = torch.where(done, limit, trial)
        value, slope = evaluate(trial)
        better = ~done & (value < best)
        best, best_at = torch.where(better, value, best), torch.where(better, trial, best_at)
        below, above = ~done & (slope < 0), ~done & (slope >= 0)
        low, low_value, low_slope = (
            torch.where(below, new, old) for new, old in ((trial, low), (value, low_value), (slope, low_slope))
        )
        high, high_value, high_slope = (
            torch.where(above, new, old) for new, old in ((trial, high), (value, high_value), (slope, high_slope))
        )
        done = done | (above & ((trial == 0) | (slope == 0)))
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        floor = low_value + (crossing - low) * low_slope
        done = done | ((low >= 0) & (best - floor <= tolerance * best))
    moved = _mix(coefficients, images, budget, low, high) if maximiser else None
    return Support(best.to(images.dtype), best_at.to(images.dtype), moved)


def _mix(coefficients: Tensor, images: Tensor, budget: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """nu*: sources moved to their argmax on either side of the bracket, mixed so as to spend the budget."""
    near, near_cost = _move(coefficients, images, high)
    far, far_cost = _move(coefficients, images, low.clamp(min=0))
    stay = images[:, None].expand_as(near)
    overspent = near_cost > budget
    near = torch.where(overspent[..., None, None, None], stay, near)
    near_cost = torch.where(overspent, 0.0, near_cost)
    usable = (low >= 0) & (far_cost > near_cost)
    share = torch.where(usable, (budget - near_cost) / (far_cost - near_cost), 0.0).clamp(0, 1)
    share = share.to(images.dtype)[..., None, None, None]
    return (1 - share) * near + share * far


def _move(coefficients: Tensor, images: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    _, distance, origin = dilate(coefficients, multiplier.to(coefficients.dtype))
    mass = images[:, None].expand_as(coefficients)
    moved = torch.zeros_like(coefficients).flatten(-2).scatter_add(-1, origin.flatten(-2), mass.flatten(-2))
    return moved.reshape(coefficients.shape), (mass * distance).flatten(2).double().sum(-1)
