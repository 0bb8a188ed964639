"""The support function of the Wasserstein ball, the exact maximum of a linear function over it, and its inverse.

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
(:mod:`flowverify.transport.compiled`), and torch on any device (:mod:`flowverify.transport.dilation`).

A cap on the pixels, nu <= cap, makes it an upper bound, tightened step by step. The cap adds one multiplier eta_j >= 0
for every target pixel to the duality (theory, sections 5 and 10):

    h_cap(c) = min over lambda, eta >= 0 of
               lambda * eps + sum_i mu_i max_j (c_j - eta_j - lambda d(i, j)) + cap * sum_j eta_j
             = min over eta >= 0 of  h(c - eta) + cap * sum_j eta_j,

with h the support function without a cap. EVERY eta >= 0 gives a sound bound (weak duality), and eta = 0 that without a
cap, so the result is never worse. The function of eta is convex, and cap - nu*(c - eta) is a subgradient: a pixel that
receives more than the cap costs more, one that has room costs less. The steps are Polyak's with an estimated optimum
(Polyak 1969; Brannlund 1993): a share below the best value so far, which shrinks whenever a step fails.

The maximiser itself, for one function an image and any ground cost, needs neither a search nor a solver. For an image
mu >= 0, coefficients c and a ground cost d, over the images nu >= 0 of equal mass per channel,

    maximise c . nu  subject to  W1(mu, nu) <= budget          (the linear-minimisation oracle of an attack)
    minimise W1(mu, nu)  subject to  c . (nu - mu) >= target   (the distance to a half-space)

are one problem read in two ways. In terms of plans it is: each source i sends its mass mu_i to pixels j, gaining c_j -
c_i at cost d(i, j) a unit. The gains that a source can have at each cost form a concave envelope, and the optimum takes
the steps of all envelopes in order of their slope until the budget is spent or the target is reached: a continuous
multiple-choice knapsack, whose slope at the end is the dual's lambda (theory, section 5). :func:`support` and
:func:`least_budget` do the same for many functions of each image.

With a cap, nu <= cap, the plans that reach a pixel share its room. See :mod:`flowverify.transport.moves_kernel`.

The inverse is the least budget with which a linear function gains a given amount: the exact distance to a half-space.
For an image mu, coefficients c and a target m, over the polytope,

    least eps >= 0 such that h_eps(c) - c . mu >= m

is the cost of the cheapest plan from mu to {nu >= 0 of equal mass : c . (nu - mu) >= m}, on unnormalised measures: W1
for a metric (theory, section 8; framework paper, Lemma 8, where it is a linear program). The best gain as a function of
the budget is concave and piecewise linear. Its vertices are the plans that move every source to its argmax at some
multiplier; between a vertex that falls short of m and one that reaches it, the chord's slope is the next multiplier to
try, until the two are neighbours: finitely many steps, no tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport import compiled, dilation
from flowverify.transport.compiled import Backend, share_out, use_compiled
from flowverify.transport.dilation import dilate, lipschitz_constant
from flowverify.transport.ground import check_ground, offsets_by_cost, parse_ground

STEPS = 15
FIRST_SHARE = 0.15  # by which the optimum is first believed to lie below the best value
SHRINK = 0.6  # of that share when a step does not improve
ENOUGH = 1e-3  # relative; no more steps where the share has become this small
DEAREST = 5.0  # prices at most this many times the largest coefficient: the bound on rounding counts on it
CHUNK = 1 << 22  # entries of coefficients at a time


@dataclass(frozen=True)
class CappedSupport:
    """The bound for every image and coefficient vector.

    Attributes:
        excess: an upper bound of max c . (nu - mu) over the capped ball, (B, S).
        multiplier: lambda, (B, S).
        reduced: c - eta, (B, S, C, H, W).
        maximiser: if it was asked for (as ``reduced``), nu* of ``reduced`` without a cap, (B, S, C, H, W): the bound's
            gradient in c. It is in the ball, but some of its pixels may lie above the cap.
    """

    excess: Tensor
    multiplier: Tensor
    reduced: Tensor | None
    maximiser: Tensor | None


def support_capped(
    coefficients: Tensor,  # (B, S, C, H, W), or (S, C, H, W) shared by all images
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    cap: float,
    *,
    tolerance: float | None = None,
    maximiser: bool = False,
    backend: Backend = "auto",
    ground: str = "l1",
    steps: int = STEPS,
) -> CappedSupport:
    """Bounds S linear functions over the capped ball around each of B images.

    Raises:
        InvalidInputError: an image has a pixel above the cap; and as
            :func:`flowverify.transport.support.support`.
    """
    check_below(images, cap)
    if use_compiled(backend, images):
        rule = (steps, FIRST_SHARE, SHRINK, ENOUGH, DEAREST)
        return CappedSupport(*compiled.solve_capped(coefficients, images, budget, cap, rule, maximiser, ground))
    batch, shape = images.shape[0], coefficients.shape[-4:]
    if coefficients.ndim == 4:
        coefficients = coefficients.expand(batch, *shape)
    images_at_once = max(1, CHUNK // max(1, shape.numel()))
    at_once = max(1, CHUNK // max(1, shape[1:].numel()))
    rows = []
    for start in range(0, batch, images_at_once):
        part = slice(start, start + images_at_once)
        pieces = [
            _descend(
                coefficients[part, first : first + at_once], images[part], budget[part], cap, tolerance, backend,
                ground, steps,
            )
            for first in range(0, shape[0], at_once)
        ]  # fmt: skip
        rows.append([torch.cat(values, 1) for values in zip(*pieces, strict=True)])
    return CappedSupport(*(torch.cat(values) for values in zip(*rows, strict=True)))


def check_below(images: Tensor, cap: float | None) -> None:
    """Raises InvalidInputError if a pixel of the images (B, C, H, W) is above the cap, where there is one."""
    if cap is None:
        return
    above = (images > cap).flatten(1).any(1).nonzero().flatten()
    if above.numel():
        at = int(above[0])
        raise InvalidInputError(
            f"image {at} has a pixel of {float(images[at].max()):g}: expected at most the cap, {cap:g}"
        )


def _descend(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    cap: float,
    tolerance: float | None,
    backend: Backend,
    ground: str,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:

    room = (cap - images.double())[:, None]
    reduced = coefficients
    best: Tensor | None = None
    share = torch.full(coefficients.shape[:2], FIRST_SHARE, dtype=torch.float64, device=images.device)
    for step in range(steps + 1):
        found = support(
            reduced,
            images,
            budget,
            tolerance=tolerance,
            maximiser=True,
            backend=backend,
            ground=ground,
        )
        assert found.maximiser is not None
        # From the rounded c - eta, so that rounding it costs no soundness.
        prices = coefficients.double() - reduced.double()
        value = found.excess.double() + (prices * room).flatten(2).sum(-1)
        if best is None:
            best, multiplier, best_reduced, moved = value, found.multiplier, reduced, found.maximiser
        else:
            better = value < best
            share = torch.where(better, share, share * SHRINK)
            wide = better[..., None, None, None]
            best, multiplier = torch.where(better, value, best), torch.where(better, found.multiplier, multiplier)
            best_reduced = torch.where(wide, reduced, best_reduced)
            moved = torch.where(wide, found.maximiser, moved)
        slope = cap - found.maximiser.double()
        slope = torch.where((prices <= 0) & (slope > 0), 0.0, slope)
        size = slope.square().flatten(2).sum(-1)
        if step == steps or not bool(((size > 0) & (share > ENOUGH) & (best > 0)).any()):
            break
        length = torch.where(size > 0, (value - (1 - share) * best) / size, 0.0)
        prices = (prices - length[..., None, None, None] * slope).clamp(min=0)
        prices = torch.minimum(prices, DEAREST * coefficients.double().abs().amax((-3, -2, -1), keepdim=True))
        reduced = (coefficients.double() - prices).to(coefficients.dtype)
        reduced = torch.minimum(reduced, coefficients)
    assert best is not None
    return best.to(images.dtype), multiplier, best_reduced, moved


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
            and the maximiser is the bound's gradient in c; see :mod:`flowverify.transport.support`.

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
    solve = compiled.solve if use_compiled(backend, images) else dilation.solve
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


Array = NDArray[Any]


@dataclass(frozen=True)
class Moves:
    """The best moves for each image, float64, on the device of the images.

    ``image`` is nonnegative, of the mass of its image up to rounding, and the optimal plan between the two costs at
    most ``cost`` (without a cap, exactly that).
    """

    image: Tensor  # (B, C, H, W)
    gain: Tensor  # (B,), c . (nu - mu)
    cost: Tensor  # (B,), in mass times ground cost
    slope: Tensor  # (B,), gain for one more unit of budget; 0 where nothing more can be gained


def best_moves(
    coefficients: Tensor,  # (B, C, H, W)
    images: Tensor,  # (B, C, H, W)
    *,
    budget: Tensor | None = None,  # (B,)
    target: Tensor | None = None,  # (B,)
    ground: str = "l1",
    cap: float | None = None,
) -> Moves:
    """Moves mass as profitably as possible until ``budget`` is spent or ``target`` is gained, whichever is first.

    Args:
        coefficients: c, one function for each image.
        images: mu, finite and nonnegative.
        budget: in mass times ground cost; infinite by default.
        target: of c . (nu - mu); infinite by default. Where it cannot be reached, all that can be is gained.
        ground: the name of a ground cost; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel; pixels of ``images`` above it are an error.

    Raises:
        InvalidInputError: shapes that do not fit, NaN, or an image above the cap.
        UnknownNameError: the ground cost is unknown.
    """
    if images.ndim != 4 or coefficients.shape != images.shape:
        raise InvalidInputError(
            f"coefficients of shape {tuple(coefficients.shape)}, images of shape {tuple(images.shape)}: expected two "
            "equal shapes (B, C, H, W)"
        )
    device, (count, channels, height, width) = images.device, images.shape
    mass = np.ascontiguousarray(images.detach().double().cpu().numpy()).reshape(count, -1)
    rows = np.ascontiguousarray(coefficients.detach().double().cpu().numpy()).reshape(count, -1)
    budgets, targets = _limits(budget, count, "budget"), _limits(target, count, "target")
    if not np.isfinite(rows).all():
        raise InvalidInputError("coefficients: given NaN or infinite values, expected finite ones")
    if cap is not None and mass.max(initial=0.0) > cap:
        raise InvalidInputError(f"images: given a pixel of {mass.max():g}, expected at most the cap, {cap:g}")
    offsets, costs = offsets_by_cost(height, width, ground)
    moved, numbers = np.empty_like(mass), np.empty((count, 3))
    shape = (channels, height, width)
    metric, power = parse_ground(ground).is_metric, parse_ground(ground).power

    from flowverify.transport import moves_kernel  # numba compiles on first use

    longest = moves_kernel.WINDOW if metric else moves_kernel.SINGLE_WINDOW**power

    def work(first: int, last: int) -> None:
        for k in range(first, last):
            if cap is None:
                numbers[k] = moves_kernel.move_best(
                    rows[k], mass[k], shape, offsets, costs, budgets[k], targets[k], moved[k]
                )
            else:
                numbers[k] = moves_kernel.move_best_capped(
                    rows[k], mass[k], shape, offsets, costs, budgets[k], targets[k], cap, metric, longest, moved[k]
                )

    share_out(work, count)
    result = torch.from_numpy(numbers).to(device)
    return Moves(torch.from_numpy(moved).to(device).reshape(images.shape), result[:, 0], result[:, 1], result[:, 2])


def _limits(values: Tensor | None, count: int, what: str) -> Array:
    if values is None:
        return np.full(count, np.inf)
    if tuple(values.shape) != (count,) or bool(torch.isnan(values).any()):
        raise InvalidInputError(f"{what} of shape {tuple(values.shape)}: expected ({count},), and no NaN")
    return values.detach().double().cpu().numpy()


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
