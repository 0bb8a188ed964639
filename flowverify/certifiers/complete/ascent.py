"""Raises lower bounds by Adam on their multipliers, problem by problem, until each is positive or time is up.

The steps are taken on the reduced problem; the bounds that come out are in float64 and on all pixels.

The bound is that of :mod:`~flowverify.certifiers.complete.relaxation`. Two implementations of its gradient give the
same numbers: compiled kernels on the CPU, autograd on any device. The gradient is a pass forwards through the relaxed
network: rho's is what a layer reads at the minimiser over the ball, and what the layer puts out there is the gradient
in the coefficients A, from which the next layer reads. The compiled pass knows no rounding: it is for the steps of a
search, whose last bound is :func:`lower_bound`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowverify.certifiers.complete.problem import Stage
from flowverify.certifiers.complete.relaxation import (
    Multipliers,
    Relaxation,
    adam_step,
    adam_step_on_sides,
    gains_of,
    left_to_rows,
    lower_bound,
    relax_gradients,
    relax_rows,
)
from flowverify.certifiers.options import AscentSettings


@dataclass(frozen=True)
class Slope:
    """Bounds (N,) with the sizes of their terms, the ball's multipliers and minimisers, gradients by variable.

    ``costs`` is what the relaxation of each neuron costs the bound at the minimiser, (N, n_k) a layer: its coefficient
    times the difference of what the ReLU makes of what the neuron reads there and of what the relaxation makes of it.
    """

    value: Tensor
    size: Tensor
    multiplier: Tensor
    point: Tensor
    gradients: list[Tensor]
    costs: list[Tensor]


def slope(relaxation: Relaxation, multipliers: Multipliers, tolerance: float) -> Slope:
    """Value and gradient; ``tolerance`` is that of the minimum over the ball."""
    return (compiled_slope if relaxation.compiled else traced_slope)(relaxation, multipliers, tolerance)


def values(relaxation: Relaxation, multipliers: Multipliers, tolerance: float) -> Tensor:
    """The bounds alone, (N,), float64."""
    if not relaxation.compiled:
        return lower_bound(relaxation, multipliers, tolerance=tolerance).value.double()
    found = _compiled_pass(relaxation, multipliers)
    least = relaxation.problem.ball.minimum(found.on_image, multipliers.guess, tolerance, gains=found.gains)
    return found.constant + least.value.double()


def traced_slope(relaxation: Relaxation, multipliers: Multipliers, tolerance: float) -> Slope:
    """By autograd, on any device."""
    leaves = [v.detach().requires_grad_(True) for v in multipliers.variables]
    problem = relaxation.problem
    # With a gradient in the specification all coefficients have one: what the relaxed layers put out.
    followed = replace(problem, specification=problem.specification.detach().requires_grad_(True))
    with torch.enable_grad():
        at = Multipliers.of(leaves, multipliers.guess)
        bound = lower_bound(replace(relaxation, problem=followed), at, tolerance=tolerance, point=True)
        wanted = [*leaves, *bound.coefficients]
        found = torch.autograd.grad(bound.value.sum(), wanted, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num()
        for leaf, gradient in zip(wanted, found, strict=True)
    ]
    value = bound.value.detach()
    assert bound.point is not None
    outputs, costs = {0: bound.point.detach()}, list[Tensor]()
    for layer, coefficients in enumerate(bound.coefficients):
        outputs[layer + 1] = output = gradients[len(leaves) + layer]
        read = _read(problem.maps.stages[layer], outputs, len(value))
        costs.append(coefficients.detach() * (read.clamp(min=0) - output))
    return Slope(value, value.abs(), bound.multiplier, bound.point.detach(), gradients[: len(leaves)], costs)


def _read(stage: Stage, outputs: Mapping[int, Tensor], count: int) -> Tensor:
    """What the neurons of a stage read (N, n), given what its sources put out."""
    read = stage.bias.expand(count, -1)
    for source, weight in stage.weights.items():
        read = torch.addmm(read, outputs[source], weight.T)
    return read


def compiled_slope(relaxation: Relaxation, multipliers: Multipliers, tolerance: float) -> Slope:
    """By compiled kernels, on the CPU."""
    problem = relaxation.problem
    passed = _compiled_pass(relaxation, multipliers)
    least = problem.ball.minimum(passed.on_image, multipliers.guess, tolerance, True, passed.gains)
    assert least.point is not None
    outputs = {0: least.point}
    heights = _heights(relaxation, least.flow)
    gradients: list[list[Tensor]] = [[], [], [], []]
    costs = list[Tensor]()
    for layer, known in enumerate(passed.layers):
        coefficients, rest = known.hull, (known.rho, known.steeper, known.flatter)
        read = _read(problem.maps.stages[layer], outputs, len(coefficients))
        output, by_alpha, by_gamma = (torch.empty_like(coefficients) for _ in range(3))
        theta = multipliers.theta[layer]
        by_theta = torch.empty_like(theta)
        relax_gradients(
            coefficients.numpy(), relaxation.lower[layer].numpy(), relaxation.upper[layer].numpy(),
            multipliers.alpha[layer].numpy(), *_limits(relaxation, layer), theta.numpy(), *(v.numpy() for v in rest),
            read.numpy(), output.numpy(), by_alpha.numpy(), by_gamma.numpy(), by_theta.numpy(),
        )  # fmt: skip
        by_share = torch.zeros_like(multipliers.share[layer])
        if known.part is not None and problem.above is not None:
            index = problem.above.index[layer]
            share, inner, whole = multipliers.share[layer][:, index], output[:, index], known.coefficients[:, index]
            open_ = (relaxation.lower[layer][:, index] < 0) & (relaxation.upper[layer][:, index] > 0) & (whole < 0)
            gap = torch.where(open_, heights[layer] - inner, 0.0)
            by_share[:, index] = whole * gap
            output[:, index] = inner + share * gap
        outputs[layer + 1] = output
        costs.append(known.coefficients * (read.clamp(min=0) - output))
        for group, gradient in zip(gradients, (by_alpha, by_gamma, by_theta, by_share), strict=True):
            group.append(gradient)
    value = passed.constant + least.value.double()
    size = passed.constant.abs() + least.value.abs().double()
    return Slope(value, size, least.multiplier, least.point, [g for group in gradients for g in group], costs)


@dataclass(frozen=True)
class _Layer:
    """Of one layer: A, the parts of it that are left to the hull and to rows, rho, U and D."""

    coefficients: Tensor
    hull: Tensor
    part: Tensor | None
    rho: Tensor
    steeper: Tensor
    flatter: Tensor


@dataclass(frozen=True)
class _Pass:
    """The constants, the functions on the image, what rows add on its flows, and the layers."""

    constant: Tensor
    on_image: Tensor
    gains: Tensor | None
    layers: list[_Layer]


def _heights(relaxation: Relaxation, flow: Tensor | None) -> Sequence[Tensor]:
    """What rows bound each layer's ReLUs by at flows (N, ways, C, H, W), (N, K_k)."""
    above, stage = relaxation.problem.above, relaxation.problem.stage
    if flow is None or above is None:
        return ()
    above = above.below(stage)
    found = flow.flatten(1) @ above.gains.flatten(1).T + torch.cat(above.values)
    return torch.split(found, [len(index) for index in above.index], 1)


def _compiled_pass(relaxation: Relaxation, multipliers: Multipliers) -> _Pass:
    """By the compiled kernels."""
    problem, specification = relaxation.problem, relaxation.problem.specification
    stages, stage = problem.maps.stages, problem.stage
    constant = (specification @ stages[stage].bias).double()
    carried = {source: specification @ weight for source, weight in stages[stage].weights.items()}
    layers = list[_Layer]()
    for layer in range(stage - 1, -1, -1):
        alpha = multipliers.alpha[layer]
        coefficients = carried.pop(layer + 1, torch.zeros_like(alpha))
        hull, part = left_to_rows(relaxation, coefficients, multipliers, layer)
        rho, steeper, flatter = (torch.empty_like(coefficients) for _ in range(3))
        relax_rows(
            hull.numpy(), relaxation.lower[layer].numpy(), relaxation.upper[layer].numpy(), alpha.numpy(),
            multipliers.gamma[layer].numpy(), *_limits(relaxation, layer), multipliers.theta[layer].numpy(),
            rho.numpy(), steeper.numpy(), flatter.numpy(), constant.numpy(),
        )  # fmt: skip
        constant += rho @ stages[layer].bias
        if part is not None and problem.above is not None:
            constant += part @ problem.above.values[layer]
        layers.append(_Layer(coefficients, hull, part, rho, steeper, flatter))
        for source, weight in stages[layer].weights.items():
            carried[source] = torch.addmm(carried[source], rho, weight) if source in carried else rho @ weight
    on_image = carried.get(0)
    if on_image is None:
        on_image = specification.new_zeros(len(specification), problem.maps.pixels)
    layers.reverse()
    return _Pass(constant, on_image, gains_of(relaxation, [layer.part for layer in layers]), layers)


def _limits(relaxation: Relaxation, layer: int) -> tuple[object, ...]:
    limits = relaxation.joint[layer]
    return limits.members.numpy(), limits.up.numpy(), limits.down.numpy(), limits.limit.numpy()


@dataclass
class Ascended:
    """The best bound of each problem, its multipliers, and the minimiser over the ball that belongs to it."""

    value: Tensor
    multipliers: Multipliers
    point: Tensor


def ascend(
    relaxation: Relaxation,
    start: Multipliers,
    iterations: int,
    *,
    enough: float = torch.inf,
    pace: float = 1.0,
    precise: bool = False,
) -> Ascended:
    """Maximises the bounds of :func:`lower_bound` over slopes, and multipliers of splits and joint limits.

    Args:
        iterations: evaluations of the bound, at least 1.
        enough: a problem whose bound exceeds this is left alone.
        pace: factor of all steps; small ones finish what large ones have begun.
        precise: steps in float64, for bounds that are to become positive by little.
    """
    multipliers = start
    if relaxation.problem.stage and iterations > 1 and len(relaxation):
        kind = torch.float64 if precise else torch.float32
        multipliers = _climb(relaxation.reduced(kind), start.to(kind), iterations, enough, pace)
    bound = lower_bound(relaxation, multipliers, tolerance=relaxation.problem.settings.ascent.tolerance, point=True)
    assert bound.point is not None
    multipliers = Multipliers.of(multipliers.variables, bound.multiplier.to(multipliers.guess))
    return Ascended(bound.value, multipliers, bound.point)


def _climb(relaxation: Relaxation, start: Multipliers, iterations: int, enough: float, pace: float) -> Multipliers:
    """The best multipliers that were met, in float64."""
    settings, specification = relaxation.problem.settings.ascent, relaxation.problem.specification
    count, device = len(specification), specification.device
    best = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
    kept, guesses = [v.clone() for v in start.variables], start.guess.clone()
    rows = torch.arange(count, device=device)
    adam = Adam(start, settings, pace)
    guess, unsure = start.guess, settings.unsure * torch.finfo(specification.dtype).eps
    for step in range(iterations):
        found = slope(relaxation, Multipliers.of(adam.values, guess), settings.rough_tolerance)
        better = found.value > best[rows]
        if bool(better.all()) and len(rows) == count:
            best, kept = found.value.double(), [v.clone() for v in adam.values]
        else:
            chosen = rows[better]
            best[chosen] = found.value[better].double()
            for target, source in zip(kept, adam.values, strict=True):
                target[chosen] = source[better]
        guess = found.multiplier
        guesses[rows] = guess.to(guesses)
        if step == iterations - 1:
            break
        adam.step(found.gradients, relaxation.signs, relaxation.compiled)
        going = ~(found.value > enough + unsure * found.size)
        left = int(going.sum())
        if left == 0:
            break
        if left <= settings.going_share * len(rows):
            rows, guess = rows[going], guess[going]
            adam.keep(going)
            relaxation = relaxation[going]
    return Multipliers.of([v.double() for v in kept], guesses)


class Adam:
    """Steps uphill on multipliers: slopes stay in [0, 1], gamma on the side of its split, theta nonnegative."""

    def __init__(self, multipliers: Multipliers, settings: AscentSettings, pace: float = 1.0) -> None:
        self.values = [v.clone() for v in multipliers.variables]
        self._means, self._squares = ([torch.zeros_like(v) for v in self.values] for _ in range(2))
        self._settings, self._pace, self._taken = settings, pace, 0

    def keep(self, chosen: Tensor) -> None:
        """Leaves only these problems."""
        self.values, self._means, self._squares = (
            [v[chosen] for v in group] for group in (self.values, self._means, self._squares)
        )

    def step(self, gradients: Sequence[Tensor], signs: Sequence[Tensor], compiled: bool) -> None:
        layers, own = len(signs), self._settings
        keep, keep_square = own.averages
        paces = own.slope_step, own.split_step, own.limit_step, own.share_step
        steps = [pace * self._pace for pace in paces]
        first, second = 1 - keep ** (self._taken + 1), 1 - keep_square ** (self._taken + 1)
        for index, gradient in enumerate(gradients):
            kind, layer = divmod(index, layers)
            rate = steps[kind] * own.decay**self._taken
            value, mean, square = self.values[index], self._means[index], self._squares[index]
            low, high = ((0.0, 1.0), (-torch.inf, torch.inf), (0.0, torch.inf), (0.0, 1.0))[kind]
            if compiled:
                arrays = (value.numpy(), gradient.numpy(), mean.numpy(), square.numpy())
                if kind == 1:
                    adam_step_on_sides(*arrays, signs[layer].numpy(), keep, keep_square, rate, first, second)
                else:
                    adam_step(*arrays, keep, keep_square, rate, first, second, low, high)
                continue
            mean.mul_(keep).add_(gradient, alpha=1 - keep)
            square.mul_(keep_square).addcmul_(gradient, gradient, value=1 - keep_square)
            moved = value + rate * (mean / first) / ((square / second).sqrt() + 1e-8)
            if kind == 1:
                sign = signs[layer]
                moved = torch.where(sign > 0, moved.clamp(max=0), torch.where(sign < 0, moved.clamp(min=0), 0.0))
            self.values[index] = moved.clamp(low, high)
        self._taken += 1
