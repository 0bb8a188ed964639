"""Projected Sinkhorn iteration: approximate projection onto a Wasserstein ball (Wong et al. 2019, Algorithm 2).

For x of mass 1, a point w, a radius eps and local plans Pi of cost C, problem (6) of the paper, times lambda:

    minimise over z, Pi >= 0  lambda / 2 ||w - z||^2 + sum Pi log Pi
    subject to  Pi 1 = x,  Pi^T 1 = z,  <Pi, C> <= eps

by block coordinate ascent of its dual over alpha, beta, psi (Lemma 2). All is done in the log domain: alpha and
beta are never exponentiated by themselves, and Lambert's W is solved for its argument's logarithm, so that nothing
overflows however large lambda is. z = w - beta / lambda is computed as W / lambda, which is the same without the
cancellation. An entropic projection blurs: it is no exact projection, and for a finite number of iterations the
mass and the cost are only nearly right. What an attack returns is therefore repaired and measured.

The conjugate Sinkhorn iteration: an upper bound of the support function (Wong et al. 2019, Appendix D).

With beta fixed at lambda c, the dual (32) of the entropic problem (29) has alpha in closed form, and what is left is

    h_lambda(psi) = psi eps + sum_i mu_i (1 / lambda) log sum_j exp(lambda (c_j - psi d(i, j))),

a soft maximum in place of the dilation (theory, section 5; psi here is the paper's psi / lambda). A soft maximum is
never below the maximum, so every psi >= 0 gives an upper bound of the support function h(c), and the excess is at
most mass * log(pixels) / lambda. Weak duality needs plans between all pixels of a channel: local plans would bound a
smaller set. The paper omits the entropy's own constant, which this form includes; without it (32) is no bound.

Plans may be local: mass then moves within a k x k window around its pixel (Section 4.2).

The attack is projected gradient ascent, equation (2): a step of steepest ascent of the cross-entropy, in the l-infinity
or the l2 norm, then Algorithm 2. Settings are the paper's (Section 5): 5 x 5 local plans, 2-norm cost, lambda = 1000
for MNIST and 3000 for CIFAR10, and a radius that grows until the image is misclassified. The step size, 0.1 in pixel
values, is that of the authors' code; the paper gives none.

The paper's defence beside adversarial training (Section 5.1): binarised input, pixels set to 0 or 1 before the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.base import MNIST, BaseAttack, Batch, Schedule
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.transport.ground import GroundCost, ground_cost, parse_ground

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


ITERATIONS = 60
CHUNK = 1 << 23  # entries of one (sources, pixels) table


def conjugate_sinkhorn(
    coefficients: Tensor,  # c, (B, C, H, W)
    images: Tensor,  # mu, (B, C, H, W)
    budget: Tensor,  # eps, (B,), in mass times pixels
    ground: str = "l1",
    *,
    regularisation: float = 1000.0,
    iterations: int = ITERATIONS,
) -> Tensor:
    """An upper bound of max c . nu over {nu >= 0 : W1(mu, nu) <= eps}, float64 (B,).

    ``regularisation`` is lambda for coefficients whose range (largest minus smallest) is 1; they are scaled to it.
    Newton's method on psi, safeguarded by a bracket; the best value seen is returned, and is a bound at any point.

    Raises:
        InvalidInputError: shapes that do not fit, a negative budget or a regularisation that is not positive.
        UnknownNameError: the ground cost is unknown.
    """
    if images.ndim != 4 or coefficients.shape != images.shape or tuple(budget.shape) != (len(images),):
        raise InvalidInputError(
            f"coefficients {tuple(coefficients.shape)}, images {tuple(images.shape)}, budget {tuple(budget.shape)}: "
            "expected (B, C, H, W) twice and (B,)"
        )
    if not 0 < regularisation < float("inf") or bool((budget < 0).any()):
        raise InvalidInputError(f"regularisation {regularisation}, budget {budget.tolist()}: expected > 0 and >= 0")
    costs = ground_cost((images.shape[2], images.shape[3]), ground).to(images.device)
    bounds = [
        _bound(c.double(), mu.double(), float(eps), costs, regularisation, iterations)
        for c, mu, eps in zip(coefficients, images, budget, strict=True)
    ]
    return torch.stack(bounds)


def _bound(c: Tensor, mu: Tensor, eps: float, costs: Tensor, regularisation: float, iterations: int) -> Tensor:
    scale = (c.max() - c.min()).clamp(min=1e-300)
    channels = [
        (row / scale, mass[mass > 0], costs[mass > 0]) for row, mass in zip(c.flatten(1), mu.flatten(1), strict=True)
    ]

    def value_and_slopes(psi: float) -> tuple[Tensor, float, float]:
        value = torch.tensor(psi * eps, dtype=torch.float64, device=c.device)
        slope, curvature = eps, 0.0
        for row, mass, cost in channels:
            for start in range(0, len(mass), max(1, CHUNK // max(1, cost.shape[1]))):
                part = slice(start, start + max(1, CHUNK // max(1, cost.shape[1])))
                soft = regularisation * (row - psi * cost[part])
                value = value + (mass[part] * torch.logsumexp(soft, 1)).sum() / regularisation
                weight = torch.softmax(soft, 1)
                mean = (weight * cost[part]).sum(1)
                slope -= float((mass[part] * mean).sum())
                spread = (weight * cost[part] ** 2).sum(1) - mean**2
                curvature += regularisation * float((mass[part] * spread).sum())
        return value, slope, curvature

    psi, low, high = 1.0, 0.0, float("inf")
    best, slope, curvature = value_and_slopes(psi)
    for _ in range(iterations):
        if slope > 0:
            high = min(high, psi)
        else:
            low = max(low, psi)
        step = psi - slope / curvature if curvature > 0 else psi
        if not low < step < high:
            step = 2 * psi + 1e-6 if high == float("inf") else (low + high) / 2
        if abs(step - psi) <= 1e-12 * (1 + psi):
            break
        psi = step
        value, slope, curvature = value_and_slopes(psi)
        best = torch.minimum(best, value)
    return best * scale


@dataclass(frozen=True)
class LocalCost:
    """The cost ||offset||_norm ** power of moving a unit of mass within a window.

    Wong et al. use 5 x 5 windows and the 2-norm, and in Appendix C.1 its powers 1 to 5. A power other than 1 gives
    the p-th power of the p-Wasserstein distance; a radius is then in that unit.

    Args:
        size: k, odd.
        norm: of the offset, >= 1; infinity is the maximum norm.
        power: > 0.
        distance: a ground cost's distance, in place of the norm.

    Raises:
        InvalidInputError: another size, norm or power.
    """

    size: int = 5
    norm: float = 2.0
    power: float = 1.0
    distance: GroundCost | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 != 1:
            raise InvalidInputError(f"window size {self.size}: expected an odd number >= 1")
        if not self.norm >= 1:
            raise InvalidInputError(f"norm {self.norm}: expected a number >= 1 or infinity")
        if not (0 < self.power < math.inf):
            raise InvalidInputError(f"power {self.power}: expected a finite number > 0")

    @classmethod
    def of_ground(cls, ground: str, size: int = 5) -> LocalCost:
        """The cost of this name, in its own window or in one of this size."""
        cost = parse_ground(ground)
        return cls(cost.window or size, power=cost.power, distance=cost.distance)

    def matrix(self, like: Tensor) -> Tensor:
        """(k * k,), row by row, with the precision and device of ``like``."""
        centre = self.size // 2
        steps = torch.arange(-centre, centre + 1, dtype=torch.float64)
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        if self.distance is not None:
            lengths = torch.from_numpy(self.distance.of_offset(rows.numpy(), columns.numpy()))
        else:
            lengths = torch.linalg.vector_norm(torch.stack([rows, columns], -1), ord=self.norm, dim=-1)
        return (lengths**self.power).flatten().to(like)


def windows(values: Tensor, size: int) -> Tensor:
    """The k x k neighbours of every pixel, (B, C, H, W) -> (B, C, k * k, H, W); minus infinity outside the image."""
    batch, channels, height, width = values.shape
    edge = size // 2
    padded = torch.nn.functional.pad(values, (edge, edge, edge, edge), value=-torch.inf)
    patches = torch.nn.functional.unfold(padded.reshape(batch * channels, 1, *padded.shape[2:]), size)
    return patches.reshape(batch, channels, size * size, height, width)


NORMS = ("linf", "l2")


class ProjectedSinkhorn(BaseAttack):
    """Wong's attack. The smallest radius is searched as they do, by a growing radius.

    Args:
        regularisation: lambda.
        window: k, the size of the local plans.
        cost: of a plan; by default that of the threat model's ground cost, in a window of size ``window``.
        step_size: of a step, in pixel values: of each pixel for "linf", of the image's norm for "l2".
        norm: of the steepest ascent, "linf" or "l2".
        schedule: of the growing radius; at a given radius only its number of iterations counts.
        shorten: pull the adversarial image back to the decision boundary. The authors do not.
        projection_iterations: of Algorithm 2, at most.

    Attributes:
        scheduled: after a search of the smallest radius, the schedule's radius at which each image (by its position)
            fell: what the authors report. It is not the distance of the image that was found, which can be smaller
            or, as the projection is approximate, larger.

    Raises:
        InvalidInputError, UnknownNameError: a value out of range.
    """

    name: ClassVar[str] = "sinkhorn"

    def __init__(
        self,
        model: nn.Module,
        *,
        regularisation: float = 1000.0,
        window: int = 5,
        cost: LocalCost | None = None,
        step_size: float = 0.1,
        norm: str = "linf",
        schedule: Schedule = MNIST,
        shorten: bool = True,
        projection_iterations: int = 400,
        batch_size: int = 100,
        seed: int = 0,
        timeout: float | None = None,
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed, timeout=timeout)
        if norm not in NORMS:
            raise UnknownNameError("norm", norm, NORMS)
        if not step_size > 0 or not 0 < regularisation < float("inf"):
            raise InvalidInputError(f"step size {step_size}, regularisation {regularisation}: expected numbers > 0")
        LocalCost(window)
        self.regularisation, self.window, self.cost, self.step_size = regularisation, window, cost, step_size
        self.norm, self.schedule, self.shorten = norm, schedule, shorten
        self.projection_iterations = projection_iterations
        self.scheduled: dict[int, float] = {}

    def search(self, batch: Batch) -> Tensor:
        return self._ascend(batch, None)

    def search_nearest(self, batch: Batch) -> Tensor:
        return self._ascend(batch, self.schedule)

    def _ascend(self, batch: Batch, schedule: Schedule | None) -> Tensor:
        ball, threat = batch.ball, batch.ball.threat
        cost = self.cost or LocalCost.of_ground(threat.ground, self.window)
        dtype, mass = self.model.dtype, ball.mass[:, None, None, None]
        clean = (batch.images / mass).to(dtype)
        current, best = batch.images.clone(), batch.images.clone()
        active = torch.arange(len(batch), device=batch.images.device)
        for iteration in range(self.schedule.iterations):
            if not active.numel() or self.deadline.stop():
                break
            labels = batch.labels[active]

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return nn.functional.cross_entropy(logits, labels, reduction="none")

            _, gradient = self.model.gradient_of(current[active], loss)
            stepped = (current[active] + self._step(gradient)) / mass[active]
            if schedule is not None:
                ball = ball.with_budget(threat.budget(schedule.radius(iteration), batch.images))
            limit = (ball.budget / ball.mass)[active]
            found = project_sinkhorn(
                clean[active], stepped.to(dtype), limit.to(dtype), cost, self.regularisation,
                iterations=self.projection_iterations,
            )  # fmt: skip
            moved = (found.image.double() * mass[active]).clamp(min=0, max=threat.cap)
            current[active] = torch.where(torch.isfinite(moved), moved, current[active])
            # The projection leaves mass and cap only nearly right: what counts is the repaired image.
            offered = threat.repair(batch.images[active], current[active])
            hit = self.model.crossed(offered, labels)
            best[active[hit]] = offered[hit]
            if schedule is not None:
                self.scheduled |= dict.fromkeys(batch.positions[active[hit]].tolist(), schedule.radius(iteration))
            active = active[~hit]
        return best

    def _step(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return self.step_size * gradient.sign()
        length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
        return torch.where(length > 0, self.step_size * gradient / length.clamp(min=1e-300), 0.0)


class Binarised(nn.Module):
    """x -> network(1 where x >= threshold, else 0).

    A threshold has no derivative. Backwards it acts as the identity (a straight-through estimate, Bengio et al.
    2013), or as the derivative of a sigmoid of the given steepness, so that gradients lead to pixels near the
    threshold. It changes where an attack looks, never what it finds: that is checked on the hard threshold.

    In the authors' code the images are binarised once, before the attack, and the attack then perturbs the network
    without the threshold: to do the same, attack the network itself on :func:`binarise` d images.

    Args:
        network: any module of images.
        threshold: a finite number.
        steepness: of the sigmoid in the derivative; None for the identity.
    """

    def __init__(self, network: nn.Module, threshold: float = 0.5, steepness: float | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InvalidInputError(f"network of type {type(network).__name__}: expected a torch.nn.Module")
        if not abs(threshold) < float("inf") or (steepness is not None and not 0 < steepness < float("inf")):
            raise InvalidInputError(f"threshold {threshold}, steepness {steepness}: expected finite numbers")
        self.network, self.threshold, self.steepness = network, threshold, steepness

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> what the network returns for the binarised images."""
        binary: Tensor = _Threshold.apply(images, self.threshold, self.steepness)  # type: ignore[no-untyped-call]
        result: Tensor = self.network(binary)
        return result


def binarise(images: Tensor, threshold: float = 0.5) -> Tensor:
    """1 where a pixel is at least the threshold, else 0."""
    return (images >= threshold).to(images.dtype)


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, threshold: float, steepness: float | None) -> Tensor:
        ctx.save_for_backward(images)
        ctx.threshold, ctx.steepness = threshold, steepness
        return binarise(images, threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.steepness is None:
            return gradient, None, None
        (images,) = ctx.saved_tensors
        level = torch.sigmoid(ctx.steepness * (images - ctx.threshold))
        return gradient * ctx.steepness * level * (1 - level), None, None
