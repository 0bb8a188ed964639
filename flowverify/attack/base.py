"""What every attack has: a model, valid inputs, a search, and a check that it cannot avoid.

What a search offers is repaired, and pulled back along the segment from the clean image to where the class changes.
There W1(mu, (1 - t) mu + t nu) = t W1(mu, nu) for every t in [0, 1]: W1 is the maximum of f . (nu - mu) over
1-Lipschitz f, which is homogeneous in nu - mu. For a ground cost that is no metric, the cost of the cheapest plan is
convex: at most t times that to nu. Nonnegativity, mass and a cap hold on the whole segment.

The classifier under attack is any torch module that maps images (B, C, H, W) to logits (B, classes). Where radii grow,
the first at which an attack succeeds is its answer (Wong et al. 2019, Section 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowverify.ball import Ball, Threat, WassersteinBall, between, distance_name
from flowverify.deadline import Deadline
from flowverify.errors import InvalidInputError
from flowverify.network.subject import Subject, as_direction, surplus
from flowverify.notebook import counted, html_table
from flowverify.registry import ATTACKS
from flowverify.results import Verdict
from flowverify.witness import replay

ROUNDING = 16  # units in the last place of the largest logit: how far beyond a tie a search goes at least


class LeakyGradients(TorchFunctionMode):
    """Within it ReLUs keep their values and have the gradient of a leaky ReLU, whatever module calls them.

    Args:
        slope: below 0.
    """

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self._slope = slope

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function not in _RELUS:
            return function(*arguments, **(options or {}))
        read = arguments[0] if arguments else (options or {})["input"]
        leaky = torch.where(read > 0, read, self._slope * read)
        return leaky + (read.detach().clamp(min=0) - leaky.detach())


_RELUS = (nn.functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class AttackedModel(Subject):
    """A classifier with the gradients that a search follows.

    A search runs in the classifier's own precision, and goes a little beyond ties; what counts is the rule of
    :mod:`flowverify.network.subject`. The module should be differentiable where its gradient is to lead anywhere.
    """

    def gradients(
        self, images: Tensor, labels: Tensor, targets: Tensor, *, leaky: bool = False
    ) -> tuple[Tensor, Tensor]:
        """f_t - f_y and the direction of :meth:`gradient_of`, float64 (B,) and (B, C, H, W); NaN gradients become 0.

        Args:
            leaky: the gradient as if ReLUs had a slope below 0, for all.
        """

        def margin(logits: Tensor) -> Tensor:
            return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

        if not leaky:
            return self.gradient_of(images, margin)
        with LeakyGradients():
            return self._differentiated(images, margin)

    def gradient_of(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Values (B,) of a function of the logits, and a direction of ascent of each in its image, float64.

        It is the gradient, unless that is 0: then, where all ReLUs that lead on are off, the gradient as if they had a
        slope below 0, which leads to where one switches on (Section 3.3 of Athalye et al. 2018, "Obfuscated Gradients
        Give a False Sense of Security", replaces gradients that are no use in the same way).
        """
        values, gradient = self._differentiated(images, function)
        if bool((gradient.flatten(1) == 0).all(1).any()):
            with LeakyGradients():
                leaky = self._differentiated(images, function)[1]
            flat = (gradient.flatten(1) == 0).all(1)
            gradient = torch.where(flat[:, None, None, None], leaky, gradient)
        return values, gradient

    def _differentiated(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        variable = images.to(self.dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            values = function(self.call(self.own, variable))
            if not values.requires_grad:  # nothing depends on the image
                return values.detach().double(), torch.zeros_like(images, dtype=torch.float64)
            (gradient,) = torch.autograd.grad(values.sum(), variable)
        return values.detach().double(), as_direction(gradient.double())

    def margins(self, images: Tensor, labels: Tensor) -> Tensor:
        """max over t of f_t - f_y, float64 (B,): positive where misclassified; NaN where a logit is."""
        return surplus(self.logits(images), labels)

    def crossed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is misclassified in the classifier's own precision, well beyond rounding; bool (B,)."""
        logits = self.logits(images)
        return surplus(logits, labels) > self.rounding(logits, 4)

    def rounding(self, logits: Tensor, times: float = 1.0) -> Tensor:
        """``times`` the allowance for rounding in the classifier's own precision, (B, classes) -> (B,)."""
        return times * ROUNDING * torch.finfo(self.dtype).eps * logits.abs().amax(1)


FOUND, NOT_FOUND, MISCLASSIFIED = "found", "not found", "misclassified"
VERDICTS = {FOUND: Verdict.FALSIFIED, NOT_FOUND: Verdict.UNKNOWN, MISCLASSIFIED: Verdict.MISCLASSIFIED}


@dataclass(frozen=True, repr=False)
class AttackResult:
    """Adversarial images that passed every check, and what the others failed on.

    The claim, for every image with outcome "found": ``images[k]`` is nonnegative, at most the cap if there is one,
    has the mass of the clean image in every channel to a relative 1e-9, is misclassified by the model strictly, in
    float64 and in its own precision, and ``radius[k]`` is its exact W1 from the clean image, so no certificate of a
    larger radius can hold.

    Attributes:
        images: float64 (B, C, H, W); the clean image where nothing was found.
        radius: float64 (B,), in pixels, of normalised images; 0 where the clean image is misclassified already,
            infinite where nothing was found.
        label, prediction: int64 (B,); the prediction is that of ``images``.
        outcome: "found", "misclassified" (the clean image is) or "not found".
        note: why nothing was found, where there is more to say.
        attack, ground, cap: which attack, under which threat model.
        seconds: wall time of the whole batch.
    """

    images: Tensor
    radius: Tensor
    label: Tensor
    prediction: Tensor
    outcome: tuple[str, ...]
    note: tuple[str, ...]
    attack: str
    ground: str
    cap: float | None
    seconds: float

    @property
    def found(self) -> Tensor:
        """Whether an adversarial image was found (or the clean one is misclassified); bool (B,)."""
        return torch.isfinite(self.radius)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(self.outcome).items()))
        parts = [f"{counted(len(self), 'image')}: {counts}"]
        if radii := [r for r, outcome in zip(self.radius.tolist(), self.outcome, strict=True) if outcome == FOUND]:
            span = f"{min(radii):.4g} to {max(radii):.4g}"
            parts.append(f"radii {span} pixels ({distance_name(self.ground, self.cap)})")
        return f"AttackResult({self.attack}, {'; '.join([*parts, f'{self.seconds:.3g} s'])})"

    def _repr_html_(self) -> str:
        columns = ("image", "label", "predicted", "outcome", "radius")
        rows = [
            (k, int(self.label[k]), int(self.prediction[k]), outcome, f"{float(self.radius[k]):.4f}")
            for k, outcome in enumerate(self.outcome)
        ]
        return html_table(repr(self), rows, columns)

    def __len__(self) -> int:
        return len(self.outcome)

    def to_json(self, index: int) -> dict[str, Any]:
        """One image's outcome as plain JSON values; ``radius`` is null where nothing was found.

        ``verdict`` says the same in the words of certificates: of the radius asked about, or of the one found.
        """
        radius = float(self.radius[index])
        record: dict[str, Any] = {
            "label": int(self.label[index]),
            "prediction": int(self.prediction[index]),
            "attack": self.attack,
            "ground": self.ground,
            "cap": self.cap,
            "outcome": self.outcome[index],
            "verdict": str(VERDICTS[self.outcome[index]]),
            "radius": radius if self.found[index] else None,
            "seconds": round(self.seconds / len(self), 6),
        }
        if self.note[index]:
            record["note"] = self.note[index]
        return record


def join(parts: list[AttackResult]) -> AttackResult:
    """The results of consecutive batches as one."""
    first = parts[0]
    return AttackResult(
        images=torch.cat([part.images for part in parts]),
        radius=torch.cat([part.radius for part in parts]),
        label=torch.cat([part.label for part in parts]),
        prediction=torch.cat([part.prediction for part in parts]),
        outcome=tuple(word for part in parts for word in part.outcome),
        note=tuple(word for part in parts for word in part.note),
        attack=first.attack,
        ground=first.ground,
        cap=first.cap,
        seconds=sum(part.seconds for part in parts),
    )


FIRST_RADIUS = 0.05  # pixels; the order of radii on plainly trained networks
GROWTH = 2.0
BISECTION = 1.02  # the search for the smallest radius ends when the bracket is this narrow
TRIALS = 60  # or after so many radii


class BaseAttack(ABC):
    """A search for adversarial images, and the check of what it finds (:mod:`flowverify.attack.base`).

    A subclass says how to search; it is not trusted. Every image that an attack returns has been repaired and
    re-checked against the threat model on the model itself, or is reported as not found.

    Args:
        model: a :class:`~flowverify.network.Network` or any torch module from (B, C, H, W) to logits; it is copied.
        batch_size: images searched together; results do not depend on it, unless time runs out.
        seed: of what is random.
        timeout: seconds that a search may take for each image of a batch; None for no limit. What was found until
            then counts.

    Attributes:
        deadline: of the batch that is searched; a subclass ends its search where it says so.

    Raises:
        InvalidInputError: not such a model, a batch size below 1, or a timeout that is no number > 0.
    """

    name: ClassVar[str]
    shorten: bool = True  # whether an adversarial image is pulled back to the decision boundary

    def __init__(self, model: nn.Module, *, batch_size: int = 100, seed: int = 0, timeout: float | None = None) -> None:
        if batch_size < 1:
            raise InvalidInputError(f"batch_size {batch_size}: expected at least 1")
        self.model = AttackedModel(model)
        if timeout is not None and not timeout > 0:
            raise InvalidInputError(f"timeout {timeout}: expected a number of seconds > 0, or none")
        self.batch_size, self.seed, self.timeout = batch_size, seed, timeout
        self.deadline = Deadline()

    @abstractmethod
    def search(self, batch: Batch) -> Tensor:
        """Candidates (B, C, H, W) within the balls of the batch; the clean image where there is none."""

    def search_nearest(self, batch: Batch) -> Tensor:
        """Candidates (B, C, H, W) as near as possible: by default, bisection of the radius."""
        threat, images = batch.ball.threat, batch.images
        limit = float(batch.ball.grid.diameter)
        best = images.clone()
        low = torch.zeros(len(batch), dtype=torch.float64, device=images.device)
        high = torch.full_like(low, torch.inf)
        radius = torch.full_like(low, FIRST_RADIUS)
        active = torch.arange(len(batch), device=low.device)
        for _ in range(TRIALS):
            if not active.numel() or self.deadline.stop():
                break
            part = batch[active].with_budget(threat.budget(radius[active], images[active]))
            found, distance = confirm(self.model, part, self.search(part))
            hit = torch.isfinite(distance)
            better = active[hit & (distance < high[active])]
            best[better] = found[hit & (distance < high[active])]
            low[active[~hit]] = radius[active[~hit]]
            high[active[hit]] = torch.minimum(distance[hit], high[active[hit]])
            radius = torch.where(torch.isinf(high), radius * GROWTH, (low * high).sqrt().clamp(min=0.5 * high))
            done = torch.where(torch.isinf(high), low >= limit, high <= low * BISECTION) | (high < 1e-6)
            radius = radius.clamp(max=limit)
            active = active[~done[active]]
        return best

    def run(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> AttackResult:
        """Looks for an adversarial image within the radius of ``ball`` of each image.

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; not normalised.
            labels: (B,).
            ball: radius in pixels on normalised images, ground cost, cap.

        Raises:
            InvalidInputError: as :meth:`check`, or no image.
        """
        return self._run(images, labels, ball.threat, ball.radius)

    def minimise(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> AttackResult:
        """Looks for the nearest adversarial image of each image; the radius found is an upper bound.

        Raises:
            InvalidInputError: as :meth:`check`, or no image.
            UnknownNameError: an unknown ground cost.
        """
        return self._run(images, labels, Threat(ground, cap), None)

    def check(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch in float64, and labels; see :meth:`flowverify.network.subject.Subject.check`."""
        images, labels = self.model.check(images, labels, threat)
        return images.double(), labels

    def _run(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> AttackResult:
        images, labels = self.check(images, labels, threat)
        if not len(images):
            raise InvalidInputError("images: given none, expected at least one")
        ball = threat.unlimited(images) if radius is None else Ball(threat, images, threat.budget(radius, images))
        positions = torch.arange(len(images), device=images.device)
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = positions[start : start + self.batch_size]
            batch = Batch(ball[rows], labels[rows], self.model.logits(images[rows]), positions[rows])
            parts.append(self._run_batch(batch, radius is None))
        return join(parts)

    def _run_batch(self, whole: Batch, nearest: bool) -> AttackResult:
        self.deadline = Deadline(None if self.timeout is None else self.timeout * len(whole))
        images, labels = whole.images, whole.labels
        right = self.model.clean(images, labels)[1]
        final, distance = images.clone(), torch.zeros(len(images), dtype=torch.float64, device=images.device)
        notes = [""] * len(images)
        chosen = right.nonzero().flatten()
        if chosen.numel():
            batch = whole[chosen]
            candidates = self.search_nearest(batch) if nearest else self.search(batch)
            final[chosen], distance[chosen] = confirm(self.model, batch, candidates, shorten=self.shorten and nearest)
            for row in chosen[torch.isinf(distance[chosen])].tolist():
                offered = bool((candidates[chosen == row] != images[row]).any())
                notes[row] = "what the search offered did not pass the check" if offered else "the search found none"
                if self.timeout is not None and self.deadline.stop():
                    notes[row] += f" within {self.timeout:g} s an image"
        prediction = self.model.clean(final, labels)[0]
        outcome = tuple(
            MISCLASSIFIED if not bool(right[k]) else FOUND if bool(torch.isfinite(distance[k])) else NOT_FOUND
            for k in range(len(images))
        )
        return AttackResult(
            images=final,
            radius=distance,
            label=labels,
            prediction=prediction,
            outcome=outcome,
            note=tuple(notes),
            attack=self.name,
            ground=whole.ball.threat.ground,
            cap=whole.ball.threat.cap,
            seconds=self.deadline.elapsed,
        )


@dataclass(frozen=True)
class Batch:
    """Images of one search, all classified right, on the model's device.

    Attributes:
        ball: around the images, float64 (B, C, H, W); its budgets are infinite where the nearest image is sought.
        labels: int64 (B,).
        logits: of the images, float64 (B, classes).
        positions: of the images in what the user gave, for seeding; int64 (B,).
    """

    ball: Ball
    labels: Tensor
    logits: Tensor
    positions: Tensor

    @property
    def images(self) -> Tensor:
        return self.ball.images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.ball[rows], self.labels[rows], self.logits[rows], self.positions[rows])

    def with_budget(self, budget: Tensor) -> Batch:
        """The same images in balls of other budgets (B,)."""
        return replace(self, ball=self.ball.with_budget(budget))


BEYOND = 0.01  # a trial lands this far past the expected crossing, since only that side is of use
SETTLED = 3e-4  # of the clean margin: what is beyond the boundary by so little is near enough
ALLOWANCE = 1.1  # times the rounding beyond which a misclassification is looked for: it should not hang by a hair
NUDGES = (0.0, 1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 5e-3, 1e-2)


def first_crossing(
    model: AttackedModel,
    clean: Tensor,  # (B, C, H, W)
    far: Tensor,  # (B, C, H, W)
    labels: Tensor,  # (B,)
    margins: tuple[Tensor, Tensor],  # (B,) each
    *,
    above: Tensor | None = None,  # (B,)
    steps: int = 4,
    settled: float = SETTLED,
) -> Tensor:
    """A share t in (0, 1], (B,), at which max f_t - f_y exceeds ``above`` in the model's own precision.

    Bracketing by the Illinois rule, at most ``steps`` evaluations of each image; the margin is nearly linear on
    short segments, so few are needed. It need not be the first crossing where there are several.

    Args:
        margins: max f_t - f_y at ``clean`` and at ``far``, where it is expected to exceed ``above``.
        above: 0 by default.
        settled: an image is done at a point that exceeds ``above`` by at most this share of the clean margin.
    """
    above = torch.zeros_like(margins[0]) if above is None else above
    low_value, high_value = margins[0] - above, margins[1] - above
    low, high = torch.zeros_like(low_value), torch.ones_like(high_value)
    reached, side = high_value.clone(), torch.zeros_like(low)
    for _ in range(steps):
        rows = (~((reached > 0) & (reached <= settled * margins[0].abs()))).nonzero().flatten()
        if not rows.numel():
            break
        start, end, under, over = low[rows], high[rows], low_value[rows], high_value[rows]
        share = under / (under - over)
        share = torch.where((share > 0) & (share < 1), share, 0.5).clamp(1e-6, 1 - 1e-6)
        trial = start + (end - start) * (share + (1 - share) * BEYOND)
        value = model.margins(between(clean[rows], far[rows], trial), labels[rows]) - above[rows]
        crossed = value > 0
        # The side that stays for a second time counts half, so that both ends move.
        low_value[rows] = torch.where(crossed, torch.where(side[rows] > 0, under / 2, under), value)
        high_value[rows] = torch.where(crossed, value, torch.where(side[rows] < 0, over / 2, over))
        reached[rows] = torch.where(crossed, value, reached[rows])
        low[rows], high[rows] = torch.where(crossed, start, trial), torch.where(crossed, trial, end)
        side[rows] = torch.where(crossed, 1.0, -1.0).to(side.dtype)
    return high


def confirmed_crossing(
    model: AttackedModel,
    clean: Tensor,  # (B, C, H, W)
    far: Tensor,  # (B, C, H, W)
    labels: Tensor,  # (B,)
    logits: tuple[Tensor, Tensor],  # (B, classes) each
    cap: float | None = None,
) -> Tensor:
    """Images just beyond the boundary by which the network is fooled (:mod:`flowverify.network.subject`).

    Where no point tried is, the image is ``far``.

    Args:
        logits: at ``clean`` and at ``far``, in the model's own precision.
    """
    margins = surplus(logits[0], labels), surplus(logits[1], labels)
    share = first_crossing(model, clean, far, labels, margins, above=model.rounding(logits[1], ALLOWANCE))
    result, confirmed = far.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for nudge in NUDGES:
        trial = share * (1 + nudge)
        todo = (~confirmed & (trial <= 1)).nonzero().flatten()
        if not todo.numel():
            break
        images = between(clean[todo], far[todo], trial[todo]).clamp(max=torch.inf if cap is None else cap)
        hit = model.fooled(images, labels[todo])
        result[todo[hit]], confirmed[todo[hit]] = images[hit], True
    return result


def confirm(model: AttackedModel, batch: Batch, candidates: Tensor, *, shorten: bool = True) -> tuple[Tensor, Tensor]:
    """Checked adversarial images with their exact W_p (B,), in pixels; the clean one and infinity where there is none.

    A candidate (C, H, W) that lies beyond its ball is pulled back to it along the segment from the clean image; with
    ``shorten`` each is pulled back to where it is only just misclassified.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    ball, labels, logits = batch.ball, batch.labels, batch.logits
    final = ball.threat.repair(ball.images, candidates)
    changed = (final != ball.images).flatten(1).any(1)
    away = model.logits(final) if bool(changed.any()) else logits
    good = changed & (surplus(away, labels) >= 0)
    limited = (good & torch.isfinite(ball.budget)).nonzero().flatten()
    if limited.numel():
        final[limited] = ball[limited].pull_back(final[limited])
        away[limited] = model.logits(final[limited])
        good[limited] = surplus(away[limited], labels[limited]) >= 0
    chosen = good.nonzero().flatten()
    if shorten and chosen.numel():
        final[chosen] = confirmed_crossing(
            model, ball.images[chosen], final[chosen], labels[chosen], (logits[chosen], away[chosen]), ball.threat.cap
        )
    if ball.threat.cap is not None:
        final = final.clamp(max=ball.threat.cap)  # changes nothing in an image of the threat
    distance = torch.full((len(batch),), torch.inf, dtype=torch.float64, device=final.device)
    if chosen.numel():
        distance[chosen] = replay(model, ball[chosen], labels[chosen], final[chosen])
    kept = torch.isfinite(distance)
    return torch.where(kept[:, None, None, None], final, ball.images), distance


@dataclass(frozen=True)
class Schedule:
    """The radius starts at ``first`` and grows by ``factor`` every ``every`` of ``iterations`` steps.

    Raises:
        InvalidInputError: a radius that is not positive, a factor below 1, fewer than one step.
    """

    first: float
    factor: float
    every: int
    iterations: int

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.factor >= 1 and self.every >= 1 and self.iterations >= 1):
            raise InvalidInputError(f"{self}: expected first > 0, factor >= 1, every >= 1 and iterations >= 1")

    def radius(self, iteration: int) -> float:
        """The radius of a step, counted from 0."""
        return self.first * self.factor ** (iteration // self.every)


MNIST = Schedule(0.3, 1.1, 10, 200)
CIFAR10 = Schedule(0.001, 1.17, 10, 400)


def make_attack(name: str, model: nn.Module, **options: Any) -> BaseAttack:
    """The attack of this name, or MODULE:CLASS, on a model; ``options`` are those of its class.

    A mapping given as ``schedule`` holds the fields of a :class:`~flowverify.attack.base.Schedule`.

    Raises:
        UnknownNameError: no attack has this name.
        InvalidInputError: a model or an option that the attack does not take.
    """
    if isinstance(schedule := options.get("schedule"), Mapping):
        options["schedule"] = Schedule(**schedule)
    made: BaseAttack = ATTACKS.make(name, ATTACKS.options(name, options), model)
    return made
