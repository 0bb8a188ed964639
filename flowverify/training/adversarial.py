"""Adversarial training against the Wasserstein ball (Wong et al. 2019, Algorithm 1 and Appendix B).

Minimises the mean over images of the cross-entropy at x_adv, which the inner attack finds in a ball whose radius
grows until the image is misclassified or the iterations are spent (Appendix B.1, "Adaptive epsilon": 0.1, times
1.4 every 5 of 50 iterations for MNIST; B.2: 0.01, times 1.5 for CIFAR10). "Impossible" radii are never reached
for images that fall before (B.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowverify.attack.base import Schedule
from flowverify.attack.sinkhorn import LocalCost, project_sinkhorn
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network.subject import surplus
from flowverify.training.losses import LOSSES, BatchContext, BatchOutcome
from flowverify.transport.ground import check_ground
from flowverify.transport.support import best_moves

INNER_ATTACKS = ("frank-wolfe", "sinkhorn")


class Adversarial:
    """The mean cross-entropy on adversarial images, found anew for each batch.

    Args:
        attack: ``sinkhorn``, the paper's: a step of steepest ascent of the cross-entropy in the l-infinity norm,
            then a projected Sinkhorn iteration; or ``frank-wolfe``: a step of size 2 / (k + 2), k counted from 0
            since the radius grew, towards the exact maximiser of the linearised margin over the ball
            (:func:`flowverify.transport.support.best_moves`), which needs no projection and is many times faster.
        first, factor, every, iterations: of the growing radius (:class:`flowverify.attack.base.Schedule`).
        ground: ground cost; the paper's is "l2".
        cap: largest pixel, none by default.
        step_size: of sinkhorn, in pixel values.
        regularisation, window, projection_iterations: of sinkhorn's projection.

    Metrics: ``fooled``, the share of images for which an adversarial image was found (or that are misclassified
    as they are), and ``radius``, the mean of the radii at which the images fell, the largest where they did not.

    Raises:
        UnknownNameError: an unknown attack or ground cost.
        InvalidInputError: a value out of range.
    """

    def __init__(
        self,
        attack: str = "frank-wolfe",
        first: float = 0.1,
        factor: float = 1.4,
        every: int = 5,
        iterations: int = 50,
        ground: str = "l2",
        cap: float | None = None,
        step_size: float = 0.1,
        regularisation: float = 1000.0,
        window: int = 5,
        projection_iterations: int = 400,
    ) -> None:
        if attack not in INNER_ATTACKS:
            raise UnknownNameError("attack of adversarial training", attack, INNER_ATTACKS)
        if not step_size > 0 or not 0 < regularisation < float("inf") or projection_iterations < 1:
            raise InvalidInputError(
                f"loss adversarial: given step_size {step_size}, regularisation {regularisation} and "
                f"projection_iterations {projection_iterations}, expected numbers > 0"
            )
        if cap is not None and not cap > 0:
            raise InvalidInputError(f"loss adversarial: given cap {cap}, expected a number > 0, or none")
        self.schedule = Schedule(first, factor, every, iterations)
        self.ground, self.cap = check_ground(ground), cap
        self.cost = LocalCost.of_ground(ground, window)
        self.step_size, self.regularisation = step_size, regularisation
        self.projection_iterations = projection_iterations
        self._step: Callable[..., Tensor] = self._sinkhorn if attack == "sinkhorn" else self._frank_wolfe
        self._cross_entropy = attack == "sinkhorn"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        adversarial, radius, fooled = self.attack(model, images, labels)
        logits = model(adversarial)
        loss = nn.functional.cross_entropy(logits, labels)
        metrics = {"fooled": float(fooled.float().mean()), "radius": float(radius.mean())}
        return BatchOutcome(loss, logits, metrics)

    def attack(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first adversarial image found for each image, or the last iterate where none was.

        Returns:
            x_adv (B, C, H, W), the radius of the ball in which it lies (B,), and whether it is misclassified (B,).
        """
        current = images.clone()
        mass = images.flatten(1).sum(1)
        radius = torch.zeros_like(mass)
        fooled = torch.zeros_like(labels, dtype=torch.bool)
        active = torch.arange(len(images), device=images.device)
        for iteration in range(self.schedule.iterations + 1):
            values, gradient = self._gradient(model, current[active], labels[active])
            fooled[active[values > 0]] = True
            keep = values <= 0
            active, gradient = active[keep], gradient[keep]
            if iteration == self.schedule.iterations or not active.numel():
                break
            limit = self.schedule.radius(iteration)
            moved = self._step(images[active], current[active], gradient, mass[active], limit, iteration)
            current[active] = torch.where(torch.isfinite(moved), moved, current[active])
            radius[active] = limit
        return current, radius, fooled

    def _gradient(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """max over t of f_t - f_y, and the gradient in the image of what the attack ascends."""
        variable = images.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(variable)
            margins = surplus(logits, labels)
            ascended = nn.functional.cross_entropy(logits, labels, reduction="sum") if self._cross_entropy else margins
            (gradient,) = torch.autograd.grad(ascended.sum(), variable)
        return margins.detach(), gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _frank_wolfe(
        self, clean: Tensor, current: Tensor, gradient: Tensor, mass: Tensor, radius: float, iteration: int
    ) -> Tensor:
        goal = best_moves(gradient, clean, budget=radius * mass, ground=self.ground, cap=self.cap).image.to(clean)
        share = 2 / (iteration % self.schedule.every + 2)
        return current + share * (goal - current)

    def _sinkhorn(
        self, clean: Tensor, current: Tensor, gradient: Tensor, mass: Tensor, radius: float, iteration: int
    ) -> Tensor:
        scale = mass[:, None, None, None]
        stepped = (current + self.step_size * gradient.sign()) / scale
        found = project_sinkhorn(
            clean / scale,
            stepped,
            torch.full_like(mass, radius),
            self.cost,
            self.regularisation,
            iterations=self.projection_iterations,
        )
        return (found.image * scale).clamp(min=0, max=self.cap)


LOSSES["adversarial"] = Adversarial
