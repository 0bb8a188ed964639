"""The bound of :mod:`~flowverify.certifiers.complete.relaxation` with its gradient, and Adam on the multipliers.

Two implementations give the same numbers: compiled kernels on the CPU, autograd on any device. The gradient is a pass
forwards through the relaxed network: rho's is what a layer reads at the minimiser over the ball, and what the layer
puts out there is the gradient in the coefficients A, from which the next layer reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.joint import JointLimits
from flowverify.certifiers.complete.relaxation import Multipliers, linear_bound, lower_bound
from flowverify.certifiers.complete.sketch import sketch_of

FIRST, SECOND = 0.9, 0.99  # Adam's averages


@dataclass(frozen=True)
class Slope:
    """Bounds (N,) with the sizes of their terms, the ball's multipliers and minimisers, gradients by variable."""

    value: Tensor
    size: Tensor
    multiplier: Tensor
    point: Tensor
    gradients: list[Tensor]


@dataclass
class Problems:
    """N bounds of one stage: the arguments of :func:`lower_bound`, each tensor (N, ...)."""

    maps: AffineMaps
    ball: Polytope
    stage: int
    specification: Tensor
    lower: list[Tensor]
    upper: list[Tensor]
    signs: list[Tensor]
    joint: list[JointLimits]

    @classmethod
    def sketched(
        cls,
        maps: AffineMaps,
        ball: Polytope,
        stage: int,
        specification: Tensor,
        lower: Sequence[Tensor],
        upper: Sequence[Tensor],
        signs: Sequence[Tensor],
        joint: Sequence[JointLimits],
        kind: torch.dtype = torch.float32,
    ) -> Problems:
        """On the sketch of maps and ball, in this precision; of the layers, those below the stage."""
        small = sketch_of(maps, ball, kind)
        lower, upper = ([v.to(kind) for v in group[:stage]] for group in (lower, upper))
        none = JointLimits.none(len(specification), specification.device)
        limits = [own.closed().to(kind) for own in joint[:stage]] or [none.to(kind)] * stage
        return cls(small.maps, small.ball, stage, specification.to(kind), lower, upper, list(signs[:stage]), limits)

    def __getitem__(self, chosen: Tensor) -> Problems:
        lower, upper, signs = ([v[chosen] for v in group] for group in (self.lower, self.upper, self.signs))
        joint = [limits[chosen] for limits in self.joint]
        return Problems(self.maps, self.ball, self.stage, self.specification[chosen], lower, upper, signs, joint)

    @property
    def compiled(self) -> bool:
        return self.specification.device.type == "cpu"

    def slope(self, multipliers: Multipliers, tolerance: float) -> Slope:
        """Value and gradient; ``tolerance`` is that of the minimum over the ball."""
        return self._compiled(multipliers, tolerance) if self.compiled else self._traced(multipliers, tolerance)

    def values(self, multipliers: Multipliers, tolerance: float) -> Tensor:
        """The bounds alone, (N,), float64."""
        if not self.compiled:
            bound = lower_bound(
                self.maps, self.ball, self.stage, self.specification, self.lower, self.upper, multipliers, self.joint,
                tolerance=tolerance,
            )  # fmt: skip
            return bound.value.double()
        constant, on_image, _ = self._forward(multipliers)
        return constant + self.ball.minimum(on_image, multipliers.guess, tolerance).value.double()

    def coefficients(self, multipliers: Multipliers) -> list[Tensor]:
        """A (N, n_k) on the output of each layer."""
        if self.compiled:
            return [known[0] for known in self._forward(multipliers)[2]]
        return linear_bound(
            self.maps, self.stage, self.specification, self.lower, self.upper, multipliers, self.joint
        ).coefficients

    def _traced(self, multipliers: Multipliers, tolerance: float) -> Slope:
        leaves = [v.detach().requires_grad_(True) for v in multipliers.variables]
        with torch.enable_grad():
            bound = lower_bound(
                self.maps, self.ball, self.stage, self.specification, self.lower, self.upper,
                Multipliers.of(leaves, multipliers.guess), self.joint, tolerance=tolerance, point=True,
            )  # fmt: skip
            found = torch.autograd.grad(bound.value.sum(), leaves, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num()
            for leaf, gradient in zip(leaves, found, strict=True)
        ]
        value = bound.value.detach()
        assert bound.point is not None
        return Slope(value, value.abs(), bound.multiplier, bound.point.detach(), gradients)

    def _compiled(self, multipliers: Multipliers, tolerance: float) -> Slope:
        from flowverify.certifiers.complete import relaxation_kernel as kernel

        constant, on_image, known = self._forward(multipliers)
        least = self.ball.minimum(on_image, multipliers.guess, tolerance, True)
        assert least.point is not None
        outputs = {0: least.point}
        gradients: list[list[Tensor]] = [[], [], []]
        for layer in range(self.stage):
            coefficients, *rest = known[layer]
            own = self.maps.stages[layer]
            read = own.bias.expand(len(coefficients), -1)
            for source, weight in own.weights.items():
                read = torch.addmm(read, outputs[source], weight.T)
            output, by_alpha, by_gamma = (torch.empty_like(coefficients) for _ in range(3))
            theta = multipliers.theta[layer]
            by_theta = torch.empty_like(theta)
            kernel.relax_gradients(
                coefficients.numpy(), self.lower[layer].numpy(), self.upper[layer].numpy(),
                multipliers.alpha[layer].numpy(), *self._limits(layer), theta.numpy(), *(v.numpy() for v in rest),
                read.numpy(), output.numpy(), by_alpha.numpy(), by_gamma.numpy(), by_theta.numpy(),
            )  # fmt: skip
            outputs[layer + 1] = output
            for group, gradient in zip(gradients, (by_alpha, by_gamma, by_theta), strict=True):
                group.append(gradient)
        value = constant + least.value.double()
        size = constant.abs() + least.value.abs().double()
        return Slope(value, size, least.multiplier, least.point, [g for group in gradients for g in group])

    def _forward(self, multipliers: Multipliers) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """The constants, the functions on the image, and of each layer A, rho, U and D; by the compiled kernels."""
        from flowverify.certifiers.complete import relaxation_kernel as kernel

        stages = self.maps.stages
        constant = (self.specification @ stages[self.stage].bias).double()
        carried = {source: self.specification @ weight for source, weight in stages[self.stage].weights.items()}
        known: list[tuple[Tensor, ...]] = [()] * self.stage
        for layer in range(self.stage - 1, -1, -1):
            alpha = multipliers.alpha[layer]
            coefficients = carried.pop(layer + 1, torch.zeros_like(alpha))
            rho, steeper, flatter = (torch.empty_like(coefficients) for _ in range(3))
            kernel.relax_rows(
                coefficients.numpy(), self.lower[layer].numpy(), self.upper[layer].numpy(), alpha.numpy(),
                multipliers.gamma[layer].numpy(), *self._limits(layer), multipliers.theta[layer].numpy(), rho.numpy(),
                steeper.numpy(), flatter.numpy(), constant.numpy(),
            )  # fmt: skip
            constant += rho @ stages[layer].bias
            known[layer] = coefficients, rho, steeper, flatter
            for source, weight in stages[layer].weights.items():
                carried[source] = torch.addmm(carried[source], rho, weight) if source in carried else rho @ weight
        on_image = carried.get(0)
        if on_image is None:
            on_image = self.specification.new_zeros(len(self.specification), self.maps.pixels)
        return constant, on_image, known

    def _limits(self, layer: int) -> tuple[object, ...]:
        limits = self.joint[layer]
        return limits.members.numpy(), limits.up.numpy(), limits.down.numpy(), limits.limit.numpy()


class Adam:
    """Steps uphill on multipliers: slopes stay in [0, 1], gamma on the side of its split, theta nonnegative."""

    def __init__(self, multipliers: Multipliers, steps: tuple[float, float, float], decay: float) -> None:
        self.values = [v.clone() for v in multipliers.variables]
        self._means, self._squares = ([torch.zeros_like(v) for v in self.values] for _ in range(2))
        self._steps, self._decay, self._taken = steps, decay, 0

    def keep(self, chosen: Tensor) -> None:
        """Leaves only these problems."""
        self.values, self._means, self._squares = (
            [v[chosen] for v in group] for group in (self.values, self._means, self._squares)
        )

    def step(self, gradients: Sequence[Tensor], signs: Sequence[Tensor], compiled: bool) -> None:
        layers = len(signs)
        first, second = 1 - FIRST ** (self._taken + 1), 1 - SECOND ** (self._taken + 1)
        for index, gradient in enumerate(gradients):
            kind, layer = divmod(index, layers)
            rate = self._steps[kind] * self._decay**self._taken
            value, mean, square = self.values[index], self._means[index], self._squares[index]
            low, high = ((0.0, 1.0), (-torch.inf, torch.inf), (0.0, torch.inf))[kind]
            if compiled:
                from flowverify.certifiers.complete import relaxation_kernel as kernel

                arrays = (value.numpy(), gradient.numpy(), mean.numpy(), square.numpy())
                if kind == 1:
                    kernel.adam_step_on_sides(*arrays, signs[layer].numpy(), FIRST, SECOND, rate, first, second)
                else:
                    kernel.adam_step(*arrays, FIRST, SECOND, rate, first, second, low, high)
                continue
            mean.mul_(FIRST).add_(gradient, alpha=1 - FIRST)
            square.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
            moved = value + rate * (mean / first) / ((square / second).sqrt() + 1e-8)
            if kind == 1:
                sign = signs[layer]
                moved = torch.where(sign > 0, moved.clamp(max=0), torch.where(sign < 0, moved.clamp(min=0), 0.0))
            self.values[index] = moved.clamp(low, high)
        self._taken += 1
