"""The projected Sinkhorn attack on a smoothed classifier.

Source: Levine & Feizi 2020, Section 6.2: the attack of Wong et al. 2019 with the gradient of the soft smoothed
classifier (Salman et al. 2019), the mean of the base classifier's softmax over noisy samples; it has succeeded when the
smoothed classifier itself gives another class, or abstains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.attack.base import MNIST, Schedule
from flowverify.attack.sinkhorn import LocalCost, project_sinkhorn
from flowverify.ball import Threat
from flowverify.errors import InvalidInputError
from flowverify.network.subject import as_direction
from flowverify.smoothing.classifier import SmoothedClassifier
from flowverify.smoothing.noise import check_alpha, check_samples
from flowverify.smoothing.sampling import derive_key, noisy_images

GRADIENT = 3  # the stage of its samples, after those of the classifier
STEP = 0.1  # in pixel values, as in the authors' code


@dataclass(frozen=True)
class SmoothedAttackResult:
    """What the attack did to one image.

    Attributes:
        scheduled: the radius of the schedule at which the class changed (what the paper plots): 0 where the clean image
            is misclassified or abstained on, None where the attack failed.
        distance: the exact W1 of the image found, on normalised images in pixels; None where there is none.
        image: that image, or the clean one, float64 (C, H, W).
    """

    label: int
    scheduled: float | None
    distance: float | None
    image: Tensor
    seconds: float


def attack_smoothed(
    classifier: SmoothedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    n: int = 10_000,
    alpha: float = 0.05,
    gradient_samples: int = 128,
    ground: str = "l2",
    schedule: Schedule = MNIST,
    window: int = 5,
    regularisation: float = 1000.0,
    projection_iterations: int = 400,
    on_iteration: Callable[[int, int], None] | None = None,
) -> list[SmoothedAttackResult]:
    """Raises the radius until the smoothed classifier answers another class than the label, or abstains.

    As the classifier is asked ``n`` times anew at each step, images that are nearly at the boundary fall a little
    early: accuracies under this attack are lower bounds, as the paper says. Every image found keeps the mass of
    its channels and has no negative pixel, and its distance is computed exactly.

    Args:
        images: (B, C, H, W), nonnegative, of positive mass; not normalised.
        n, alpha: of the predictions; the paper's are the defaults.
        gradient_samples: noisy samples for the gradient of each step.
        ground: of the ball, in a window of ``window`` pixels, and of the distance.
        schedule, regularisation, projection_iterations: see :class:`flowverify.attack.ProjectedSinkhorn`.
        on_iteration: called with the steps done and how many images are still unharmed.

    Raises:
        InvalidInputError: bad images or labels, or numbers out of range.
    """
    check_samples("n", n)
    check_samples("gradient_samples", gradient_samples)
    check_alpha(alpha)
    threat = Threat(ground)
    images, targets = classifier.sampler.voter.check(images, labels, threat)
    if not len(images):
        raise InvalidInputError("images: given none, expected at least one")
    cost, begin = LocalCost.of_ground(ground, window), time.perf_counter()
    clean = images.double().cpu()
    ball = threat.unlimited(clean)
    mass = ball.mass[:, None, None, None]
    current = clean.clone()
    scheduled: list[float | None] = [None] * len(clean)

    def fallen(rows: list[int], iteration: int) -> list[int]:
        # Another part of the stream at each step: independent samples every time.
        places = [row + len(clean) * (iteration + 1) for row in rows]
        found = classifier.predict(current[rows], targets[rows], n=n, alpha=alpha, positions=places)
        return [row for row, one in zip(rows, found, strict=True) if one.outcome != "correct"]

    active = list(range(len(clean)))
    for row in fallen(active, -1):
        scheduled[row] = 0.0
        active.remove(row)
    for iteration in range(schedule.iterations):
        if not active:
            break
        radius = schedule.radius(iteration)
        gradient = torch.stack(
            [_gradient(classifier, current[row], int(targets[row]), gradient_samples, iteration, row) for row in active]
        )
        stepped = (current[active] + STEP * gradient.sign()) / mass[active]
        limit = ball.threat.budget(radius, clean[active]) / ball.mass[active]
        found = project_sinkhorn(
            (clean[active] / mass[active]).float(), stepped.float(), limit.float(), cost,
            regularisation, iterations=projection_iterations,
        )  # fmt: skip
        moved = (found.image.double() * mass[active]).clamp(min=0)
        offered = torch.where(torch.isfinite(moved), moved, current[active])
        current[active] = ball.threat.repair(clean[active], offered)
        for row in fallen(active, iteration):
            scheduled[row] = radius
            active.remove(row)
        if on_iteration is not None:
            on_iteration(iteration + 1, len(active))
    valid = ball.threat.admits(clean, current).tolist()
    hit = [row for row, radius in enumerate(scheduled) if radius and valid[row]]
    distances = dict(zip(hit, ball.threat.distance(clean[hit], current[hit]).tolist(), strict=True))
    share = (time.perf_counter() - begin) / len(clean)
    return [
        SmoothedAttackResult(
            label=int(targets[row]),
            scheduled=scheduled[row],
            distance=0.0 if scheduled[row] == 0 else distances.get(row),
            image=current[row] if row in distances else clean[row],
            seconds=share,
        )
        for row in range(len(clean))
    ]


def _gradient(
    classifier: SmoothedClassifier, image: Tensor, label: int, samples: int, iteration: int, row: int
) -> Tensor:
    """The gradient of -log(mean of softmax_label over noisy samples) in one image, float64 (C, H, W)."""
    sampler = classifier.sampler
    voter = sampler.voter
    base = image.to(voter.device, voter.dtype)
    key = derive_key(sampler.seed, row, GRADIENT)
    noisy = noisy_images(base, sampler.noise, key, iteration * samples, samples)
    # The mass of the images does not change, so neither does the noise's scale: the noise is a constant.
    variable = base.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = voter.own(variable + (noisy - base))
        scores = nn.functional.log_softmax(logits, dim=1)[:, label]
        (gradient,) = torch.autograd.grad(-torch.logsumexp(scores, dim=0), variable)
    return as_direction(gradient.double().cpu())
