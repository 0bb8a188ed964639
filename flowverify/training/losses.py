"""What one training step minimises: the only part in which training methods differ.

*Adversarial* training against the Wasserstein ball (Wong et al. 2019, Algorithm 1 and Appendix B)
minimises the mean over images of the cross-entropy at x_adv, which the inner attack finds in a ball whose radius
grows until the image is misclassified or the iterations are spent (Appendix B.1, "Adaptive epsilon": 0.1, times
1.4 every 5 of 50 iterations for MNIST; B.2: 0.01, times 1.5 for CIFAR10). "Impossible" radii are never reached
for images that fall before (B.3).

*Certified* training: the worst case over a Wasserstein ball, from bounds that need no attack.
The loss of an image is the cross-entropy of upper bounds of f_t - f_y over its ball (Wong and Kolter 2018,
Gowal et al. 2018, arXiv:1810.12715, for other balls), mixed with the clean cross-entropy. A radius that is the
same for all images is out of reach for many of them: they then push the weights without an effect on what is
certified, and the clean accuracy pays. So each training image may keep a radius of its own, which follows what
is certified for it, as in adversarial training with an adaptive radius (Ding et al. 2020, arXiv:1812.02637).

Training on *noisy* images: the base classifiers of randomised smoothing (Levine & Feizi 2020, Appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowverify.attack.base import Schedule
from flowverify.attack.sinkhorn import LocalCost, project_sinkhorn
from flowverify.ball import Threat
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.network.subject import as_direction, ascent_direction, surplus
from flowverify.registry import OUTSIDE, find_outside, is_outside
from flowverify.smoothing.noise import Noise
from flowverify.smoothing.splitting import Splitting
from flowverify.training.bounds import LiftedTrainableBounds, TrainableBounds
from flowverify.transport.ground import check_ground
from flowverify.transport.support import best_moves


@dataclass(frozen=True)
class BatchContext:
    """Where in the training a batch stands.

    ``epoch`` counts from 0, ``progress`` is the share of all steps done, in [0, 1) (for radii and weights
    that grow), ``generator`` draws the randomness of a loss (on the CPU; seeded by the recipe). ``positions``
    (N,) are those of the batch's images among the ``training_size`` images, for a loss that keeps something
    for each of them.
    """

    epoch: int
    progress: float
    generator: torch.Generator
    positions: Tensor | None = None
    training_size: int = 0


@dataclass(frozen=True)
class BatchOutcome:
    """A scalar ``loss`` to minimise and the ``logits`` (N, classes) that it scored.

    ``metrics`` are further averages over the batch; the loop reports their mean over each epoch.
    """

    loss: Tensor
    logits: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class BatchLoss(Protocol):
    """A training method: what to minimise on a batch of images (N, C, H, W) with labels (N,)."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome: ...


@runtime_checkable
class StatefulLoss(Protocol):
    """A training method that remembers something from batch to batch, which a checkpoint has to hold."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class CrossEntropy:
    """The mean cross-entropy on the images as they are."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        logits = model(images)
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits)


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
        if not self._cross_entropy:
            return ascent_direction(model, images, labels)
        with torch.enable_grad():
            variable = images.detach().requires_grad_(True)
            logits = model(variable)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, variable)
        return surplus(logits.detach(), labels), as_direction(gradient)

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


BOUNDS = ("ibp", "crown-ibp", "lifted")
STEP = 0.02  # of a growing radius, in pixels, beside its growth factor, at the start; falls linearly to 0
GROWTH, DECAY, DROP = 1.08, 0.93, 0.6


class Certified:
    """``clean_weight`` * clean cross-entropy + (1 - ``clean_weight``) * worst-case cross-entropy.

    The radius grows linearly from 0 to ``radius`` over the first ``warm_up`` of all steps. With ``own_radii``
    that is the upper limit only: an image's own radius starts at 0, grows by a factor of 1.08 and by 0.02 pixels
    (falling to 0 with the progress) each time that it is certified, and shrinks by 0.93 where it is not, by 0.6
    where it is misclassified. Late in the training about half of the images are certified at their radius.

    Args:
        radius: of the ball (l1 ground), in pixels on normalised images.
        warm_up: share of the training, in [0, 1].
        clean_weight: in [0, 1].
        bound: ``ibp``, intervals above the first layer; ``crown-ibp``, CROWN over these intervals for the
            ``targets`` classes with the largest clean scores beside the label's, and nothing for the others; or
            ``lifted``, rows of moves for these (:class:`flowverify.training.bounds.LiftedTrainableBounds`).
        targets: of crown-ibp and lifted.
        share: of the images of each batch, in (0, 1], that get a worst case; the others only count for the clean
            cross-entropy. The batches are shuffled, so that it is another choice in each epoch. With a half, an
            epoch takes little more than half the time.
        refresh: after how many steps the rows of the first layer are dilated anew; see
            :class:`flowverify.training.TrainableBounds`.

    Metrics: ``certified``, the share of images whose worst case over the bounded classes is right at the radius
    that they were trained at, and ``radius``, the mean of these radii.

    Raises:
        InvalidInputError: a value out of range.
    """

    def __init__(
        self,
        radius: float = 0.4,
        warm_up: float = 0.5,
        clean_weight: float = 0.5,
        own_radii: bool = True,
        bound: str = "ibp",
        targets: int = 2,
        share: float = 1.0,
        refresh: int = 1,
    ) -> None:
        _check_number("certified", "radius", radius, math.inf)
        for name, value in (("warm_up", warm_up), ("clean_weight", clean_weight), ("share", share)):
            _check_number("certified", name, value)
        if not isinstance(own_radii, bool):
            raise InvalidInputError(f"loss certified: given own_radii {own_radii!r}, expected true or false")
        self.radius, self.warm_up, self.clean_weight = float(radius), float(warm_up), float(clean_weight)
        if bound not in BOUNDS:
            raise UnknownNameError("bound of certified training", bound, BOUNDS)
        for name, number in (("targets", targets), ("refresh", refresh)):
            _check_count("certified", name, number)
        if share == 0:
            raise InvalidInputError(
                "loss certified: given share 0, expected a number > 0 (clean_weight 1 trains plainly)"
            )
        self._refresh, self._epoch = refresh, -1
        self.own_radii, self.share = own_radii, float(share)
        self._kind = LiftedTrainableBounds if bound == "lifted" else TrainableBounds
        self._targets = targets if bound != "ibp" else 0
        self._radii = torch.zeros(0)
        self._multipliers: dict[str, Tensor] = {}
        self._bounds: TrainableBounds | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        bounds = self._bounds_of(model)
        if context.epoch != self._epoch:  # an epoch depends on nothing that a checkpoint does not hold
            bounds.forget()
            self._epoch = context.epoch
        limit = self.radius * min(1.0, context.progress / self.warm_up) if self.warm_up else self.radius
        count = math.ceil(self.share * len(images))
        chosen, own_labels = images[:count], labels[:count]
        radii = torch.full_like(chosen[:, 0, 0, 0], limit)
        if self.own_radii:
            radii = self._radii_of(context)[:count].to(chosen).clamp(max=limit)
        logits, worst, loss = self._scored(bounds, model, chosen, own_labels, radii)
        certified = worst.detach().scatter(1, own_labels[:, None], -torch.inf).amax(1) < 0
        if self.own_radii:
            self._adapt(context, radii, certified, logits.argmax(1) == own_labels)
        if count < len(images):
            logits = torch.cat([logits, model(images[count:])])
        if self.clean_weight:
            clean = nn.functional.cross_entropy(logits, labels)
            loss = self.clean_weight * clean + (1 - self.clean_weight) * loss
        metrics = {"certified": float(certified.float().mean()), "radius": float(radii.mean())}
        return BatchOutcome(loss, logits, metrics)

    def _scored(
        self, bounds: TrainableBounds, model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, upper bounds of f_t - f_y over what is bounded of each ball, and the loss of the worst case."""
        logits, worst = bounds.bound(images, labels, Threat().budget(radii, images))
        return logits, worst, nn.functional.cross_entropy(worst, labels)

    def state_dict(self) -> dict[str, Tensor]:
        """Radii of the images and multipliers of the rows: what a resumed training needs."""
        multipliers = self._multipliers if self._bounds is None else self._bounds.multipliers
        return {"radii": self._radii, **{f"multipliers.{name}": value for name, value in multipliers.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._radii = state["radii"]
        prefix = "multipliers."
        self._multipliers = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        self._bounds = None

    def _bounds_of(self, model: nn.Module) -> TrainableBounds:
        if not isinstance(model, Network):
            raise InvalidInputError(
                f"loss certified: given a module {type(model).__name__}, expected a flowverify.network.Network "
                "(load_network converts)"
            )
        if self._bounds is None or self._bounds.network is not model:
            self._bounds = self._kind(model, self._targets, self._refresh)
            self._bounds.multipliers = dict(self._multipliers)
        return self._bounds

    def _radii_of(self, context: BatchContext) -> Tensor:
        positions = self._positions(context)
        missing = context.training_size - len(self._radii)
        if missing > 0:
            self._radii = torch.cat([self._radii, torch.zeros(missing)])
        return self._radii[positions]

    def _adapt(self, context: BatchContext, radii: Tensor, certified: Tensor, correct: Tensor) -> None:
        shrunk = torch.where(correct, DECAY, DROP) * radii
        grown = (GROWTH * radii + STEP * (1 - context.progress)).clamp(max=self.radius)
        self._radii[self._positions(context)[: len(radii)]] = torch.where(certified, grown, shrunk).cpu()

    def _positions(self, context: BatchContext) -> Tensor:
        if context.positions is None:
            raise InvalidInputError("loss certified with own_radii: expected a context with positions of the images")
        return context.positions


class Expressive(Certified):
    """Worst cases mixed with adversarial ones, so that weights are not bent to what intervals can prove alone.

    De Palma et al. 2024 (arXiv:2305.13991): MTL-IBP takes (1 - ``worst_weight``) of the cross-entropy at the
    adversarial image and ``worst_weight`` of that of the worst case; CC-IBP the cross-entropy of the scores mixed so.
    What is trained less tightly is left for tighter bounds to certify.

    Args:
        worst_weight: in [0, 1].
        mix: ``losses`` (MTL-IBP) or ``scores`` (CC-IBP).
        attack_steps: of Frank-Wolfe within the ball, from the image.
        options: of :class:`Certified`; ``clean_weight`` is 0 by default.

    Raises:
        UnknownNameError: another ``mix``.
        InvalidInputError: a value out of range.
    """

    def __init__(
        self, worst_weight: float = 0.1, mix: str = "losses", attack_steps: int = 2, clean_weight: float = 0.0,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(clean_weight=clean_weight, **options)
        if mix not in MIXES:
            raise UnknownNameError("mix of expressive losses", mix, MIXES)
        _check_number("expressive", "worst_weight", worst_weight)
        _check_count("expressive", "attack_steps", attack_steps)
        self.worst_weight, self.mix, self.attack_steps = float(worst_weight), mix, attack_steps

    def _scored(
        self, bounds: TrainableBounds, model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, worst, robust = super()._scored(bounds, model, images, labels, radii)
        found = model(adversarial_images(model, images, labels, radii, self.attack_steps))
        if self.mix == "losses":
            attacked = nn.functional.cross_entropy(found, labels)
            return logits, worst, self.worst_weight * robust + (1 - self.worst_weight) * attacked
        differences = found - found.gather(1, labels[:, None])
        mixed = self.worst_weight * worst + (1 - self.worst_weight) * differences
        return logits, worst, nn.functional.cross_entropy(mixed, labels)


class SmallBalls(Certified):
    """The worst case over a small ball around an adversarial image, which lies in the ball of the image.

    SABR (Mueller et al. 2023, arXiv:2210.04871): the adversarial image is within (1 - ``small``) times the radius, and
    intervals are of a ball of ``small`` times the radius around it. By the triangle inequality that lies in the ball;
    with ``small`` 1 it is the ball. ``certified`` in the metrics, and what adapts an image's own radius, are of the
    small ball.

    Args:
        small: in [0, 1].
        attack_steps: of Frank-Wolfe.
        options: of :class:`Certified`.

    Raises:
        InvalidInputError: a value out of range.
    """

    def __init__(self, small: float = 0.4, attack_steps: int = 2, **options: Any) -> None:
        super().__init__(**options)
        _check_number("small-balls", "small", small)
        _check_count("small-balls", "attack_steps", attack_steps)
        self.small, self.attack_steps = float(small), attack_steps

    def _scored(
        self, bounds: TrainableBounds, model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        middle = adversarial_images(model, images, labels, (1 - self.small) * radii, self.attack_steps)
        _, worst, robust = super()._scored(bounds, model, middle, labels, self.small * radii)
        return model(images), worst, robust


MIXES = ("losses", "scores")


def adversarial_images(model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor, steps: int) -> Tensor:
    """Images (B, C, H, W) within ``radii`` (B,) pixels (l1) of the given ones, by so many steps of Frank-Wolfe.

    Up the margin of the class that is nearest to overtaking the label.
    """
    budget, current = Threat().budget(radii, images), images
    for step in range(steps):
        _, gradient = ascent_direction(model, current, labels)
        goal = best_moves(gradient, images, budget=budget, ground="l1", cap=None).image.to(images)
        current = current + 2 / (step + 2) * (goal - current)
    return current.detach()


def _check_number(loss: str, name: str, value: object, most: float = 1) -> None:
    """Raises InvalidInputError unless a value is a number between 0 and ``most``."""
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or not 0 <= value <= most:  # type: ignore[operator]
        limit = f"a number between 0 and {most:g}" if most < math.inf else "a number >= 0"
        raise InvalidInputError(f"loss {loss}: given {name} {value!r}, expected {limit}")


def _check_count(loss: str, name: str, value: object) -> None:
    """Raises InvalidInputError unless a value is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"loss {loss}: given {name} {value!r}, expected an integer >= 1")


class NoisyCrossEntropy:
    """The mean cross-entropy on noisy images: one draw of noise for each image and epoch.

    Minimises the mean of cross-entropy(model(x + s * noise), label), s the mass of x.

    Args:
        sigma, domain, distribution: of :class:`flowverify.smoothing.Noise`; 0.01 is the paper's best.
        shared: 1: all images of a batch get the same draw (the paper's choice, for speed); 0: each its own.

    Raises:
        UnknownNameError, InvalidInputError: see :class:`flowverify.smoothing.Noise`.
    """

    def __init__(
        self, sigma: float = 0.01, shared: float = 1, *, domain: str = "flow", distribution: str = "laplace"
    ) -> None:
        self.noise = Noise(sigma, domain, distribution)
        self.shared = bool(shared)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        count = 1 if self.shared else len(images)
        draw = self.noise.draw(Grid.of(images), count, context.generator, images.dtype).to(images.device)
        logits = model(images + images.sum(dim=(1, 2, 3), keepdim=True) * draw)
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits)


class SplitCrossEntropy:
    """The mean cross-entropy on what :class:`flowverify.smoothing.Splitting` shows of images.

    Each batch draws one shift of the blocks, and each image its own offset t.

    Raises:
        InvalidInputError: see :class:`flowverify.smoothing.Splitting`.
    """

    def __init__(self, step: float, block: int = 4, scattered: float = 0) -> None:
        self.splitting = Splitting(step, int(block), bool(scattered))

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        splitting, generator = self.splitting, context.generator
        shift = splitting.shifts[int(torch.randint(len(splitting.shifts), (), generator=generator))]
        t = torch.rand(len(images), 1, 1, 1, dtype=torch.float64, generator=generator).to(images.device)
        logits = model(splitting.show(images, t * splitting.step, shift).to(images.dtype))
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits)


LOSSES: dict[str, Callable[..., BatchLoss]] = {
    "cross-entropy": CrossEntropy,
    "adversarial": Adversarial,
    "certified": Certified,
    "expressive": Expressive,
    "small-balls": SmallBalls,
    "wasserstein-noise": NoisyCrossEntropy,
    "laplace-noise": partial(NoisyCrossEntropy, domain="pixels"),
    "uniform-noise": partial(NoisyCrossEntropy, distribution="uniform"),
    "splitting-noise": SplitCrossEntropy,
}
"""Training methods by the name that recipes use; each is called with the recipe's ``loss_options``."""


def build_loss(name: str, options: Mapping[str, Any]) -> BatchLoss:
    """The training method of this name, or MODULE:CLASS.

    Raises:
        UnknownNameError: the name is not in :data:`LOSSES`, or an option that this loss does not have.
        InvalidInputError: a value that the option cannot have, or no such class.
    """
    if name not in LOSSES and not is_outside(name):
        raise UnknownNameError("loss", name, [*LOSSES, OUTSIDE])
    loss: Callable[..., BatchLoss] = LOSSES[name] if name in LOSSES else find_outside("loss", name)
    valid = _options_of(loss)
    for option in options:
        if option not in valid:
            raise UnknownNameError(f"option of the loss {name}", option, valid or ["none"])
    try:
        return loss(**options)
    except TypeError as error:
        raise InvalidInputError(f"loss {name}: given options {dict(options)}: {error}") from error


def _options_of(loss: Callable[..., BatchLoss]) -> list[str]:
    """Its own, and where it hands others on, those of the class that it is derived from."""
    names: list[str] = []
    for kind in getattr(loss, "__mro__", (loss,)):
        parameters = signature(kind).parameters.values()
        names += [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name not in names]
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return names
