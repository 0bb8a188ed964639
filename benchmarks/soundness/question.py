"""What a case asks about: a network, images, a threat model; and what points of the balls say, without the package."""

from __future__ import annotations

import copy
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.soundness.balls import best_points, draw_threat, scattered, single_moves
from benchmarks.soundness.exact import ROUNDINGS, NotExact, exact_margins, magnitudes, rational_point
from benchmarks.soundness.networks import KINDS, Drawn, draw_network, shift_outputs
from benchmarks.soundness.tally import Tally

SCATTERED, MOVES, STEPS = 240, 120, 5  # points of a ball
SHAPES = (
    (1, 2, 2), (1, 3, 3), (1, 3, 3), (1, 4, 4), (1, 5, 5), (1, 4, 6), (1, 5, 3), (1, 6, 6), (2, 3, 3), (3, 3, 3),
    (2, 4, 4), (3, 2, 4), (1, 1, 2), (1, 1, 7), (1, 9, 1), (1, 1, 24), (3, 1, 5), (2, 6, 1), (1, 1, 1), (4, 3, 3),
)  # fmt: skip
SMALL_SHAPES = ((1, 2, 2), (1, 3, 3), (1, 1, 7), (1, 5, 1), (2, 2, 2), (1, 2, 3), (2, 1, 3), (1, 3, 4))


def draw_images(dice: random.Random, shape: tuple[int, int, int], count: int) -> Tensor:
    """Images (count, C, H, W) in float64, of positive mass."""
    images = []
    for _ in range(count):
        image = torch.rand(shape, dtype=torch.float64)
        match dice.choice(["uniform", "sparse", "point", "empty channel", "255", "constant", "dyadic", "faint"]):
            case "sparse":
                image *= torch.rand(shape) < 0.4
            case "point":
                image = torch.zeros(shape, dtype=torch.float64)
                image.view(-1)[dice.randrange(image.numel())] = dice.choice([1.0, 0.7])
            case "empty channel":
                image[dice.randrange(shape[0])] = 0
            case "255":
                image = (255 * image).round()
            case "constant":
                image = torch.full(shape, 0.5, dtype=torch.float64)
            case "dyadic":
                image = (image * 16).round() / 16
            case "faint":
                image *= 1e-5
        if float(image.sum()) == 0:
            image.view(-1)[dice.randrange(image.numel())] = 0.5
        images.append(image)
    return torch.stack(images)


CLOSE = 64  # units in the last place of the largest logit


class Question:
    """Everything that is random about the case of a seed; with a network of any kind unless one is given.

    Attributes:
        drawn: the network; images (B, C, H, W), labels (B,), threat: what is asked about.
        centres: the images as (B, C, n), float64.
        dice: what further choices are made by.
    """

    def __init__(self, seed: int, tally: Tally, kind: str | None = None) -> None:
        self.tally, self.dice = tally, random.Random(seed)
        torch.manual_seed(seed)
        kind = kind or self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        self.shape = self.dice.choice(SMALL_SHAPES if kind in ("tiny", "offset") else SHAPES)
        self.drawn: Drawn = draw_network(self.dice, self.shape, kind)
        count = self.dice.randint(1, 3)
        self.images = draw_images(self.dice, self.shape, count).to(self.drawn.dtype)
        self.threat = draw_threat(self.dice, self.images)
        self.centres = self.images.double().flatten(2)  # (B, C, n)
        self._centre()
        with torch.no_grad():
            logits = self.drawn.oracle(self.images.double())
        self.labels = logits.nan_to_num(0.0).argmax(1)
        if self.dice.random() < 0.08:
            self.labels[-1] = (self.labels[-1] + 1) % logits.shape[1]
        self.classes = int(logits.shape[1])

    def describe(self) -> str:
        """The network and the threat model in a line."""
        steps = " > ".join(
            f"{type(step).__name__}{list(inputs) if inputs != (k,) else ''}"
            for k, (step, inputs) in enumerate(zip(self.drawn.oracle.sequence, self.drawn.oracle.wiring, strict=True))
        )
        return f"{self.drawn.kind} {self.drawn.dtype} {self.shape} {self.threat.ground} cap {self.threat.cap}: {steps}"

    @property
    def exact_ball(self) -> bool:
        """Whether exact methods know this very ball, rather than one around it."""
        return self.threat.ground == "l1" and self.threat.cap is None

    def _centre(self) -> None:
        """Often moves the first image's margins to where a ball of ordinary size brings them near 0."""
        if self.dice.random() < 0.3:
            return
        radius = 10 ** self.dice.uniform(-2, 0.3)
        points = self.points(0, radius, few=True)
        with torch.no_grad():
            values = self.drawn.oracle(points)
        clean = values[0]
        if bool(torch.isfinite(values).all()):
            label = int(clean.argmax())
            fall = (values - values[:, label : label + 1] - (clean - clean[label])).amax(0).clamp(min=0)
            room = fall * self.dice.choice([0.5, 0.9, 1.0, 1.05])
            shift_outputs(self.drawn, clean[label] - clean - room)

    def points(self, image: int, radius: float, *, few: bool = False) -> Tensor:
        """Points (N, C, H, W) of the ball around an image, itself the first: scattered ones and single moves."""
        centre = self.centres[image]
        budget = self.threat.budget(centre, radius)
        found = [centre[None]]
        if radius > 0:
            found.append(scattered(self.threat, centre, budget, 60 if few else SCATTERED))
            found.append(single_moves(self.threat, centre, budget, MOVES))
        return torch.cat(found).reshape(-1, *self.shape)

    def margins(self, points: Tensor, label: int) -> Tensor:
        """f_y - f_t for t != y, in ascending order (N, classes - 1)."""
        with torch.no_grad():
            values = self.drawn.oracle(points)
        self.tally.points += len(points)
        others = [t for t in range(self.classes) if t != label]
        return values[:, label : label + 1] - values[:, others]

    def attacked(self, image: int, radius: float) -> tuple[Tensor, Tensor]:
        """Points of a ball, with their margins: samples, then Frank-Wolfe steps to every other class."""
        label, centre = int(self.labels[image]), self.centres[image]
        points = self.points(image, radius)
        margins = self.margins(points, label)
        budget = self.threat.budget(centre, radius)
        if not radius > 0 or not bool(torch.isfinite(margins).all()):
            return points, margins
        targets = torch.arange(margins.shape[1])
        current = torch.cat(
            [points[margins.argmin(0)], centre.reshape(1, *self.shape).expand(len(targets), -1, -1, -1)]
        )
        targets = targets.repeat(2)
        for _ in range(2 if self.threat.cap is not None else STEPS):
            inputs = current.clone().requires_grad_(True)
            values = self.drawn.oracle(inputs)
            others = torch.tensor([t for t in range(self.classes) if t != label])[targets]
            objective = values[:, label] - values[torch.arange(len(values)), others]
            (gradient,) = torch.autograd.grad(objective.sum(), inputs, allow_unused=True)
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                break
            vertices = best_points(self.threat, centre, budget, -gradient.flatten(2)).reshape(current.shape)
            tried = torch.stack([current + step * (vertices - current) for step in (0.3, 0.7, 1.0)])
            found = self.margins(tried.flatten(0, 1), label)
            points, margins = torch.cat([points, tried.flatten(0, 1)]), torch.cat([margins, found])
            worth = found.reshape(len(tried), len(current), -1)[:, torch.arange(len(current)), targets]
            current = tried[worth.argmin(0), torch.arange(len(current))]
        return points, margins

    def rounding(self, points: Tensor) -> float:
        """More than float64 rounds any margin at these points."""
        found = magnitudes(self.drawn.oracle, points.amax(0))
        total = float(found.sum()) * ROUNDINGS * (len(self.drawn.oracle.order) + 2)
        return total if math.isfinite(total) else math.inf

    def misclassified(self, point: Tensor, image: int) -> bool:
        """In the module's own precision or in float64, to rounding: the canonical form may round otherwise."""
        label = int(self.labels[image])
        point = point.reshape(1, *self.shape)
        exact = float(self.margins(point.double(), label).min())
        own = copy.deepcopy(self.drawn.module).eval()
        with torch.no_grad():
            rounded = own(point.to(self.drawn.dtype))[0]
        others = torch.cat([rounded[:label], rounded[label + 1 :]])
        near = CLOSE * torch.finfo(rounded.dtype).eps * float(rounded.abs().max())
        return not exact > self.rounding(point) or not float(rounded[label]) > float(others.max()) + near

    def contradiction(self, image: int, radius: float, point: Tensor, margin: float) -> str:
        """What is wrong with a certificate of this radius, confirmed beyond rounding; "" if nothing."""
        rounding = self.rounding(point[None])
        label, centre, flat = int(self.labels[image]), self.centres[image], point.flatten(1)
        if margin > rounding:
            return ""
        distance = self.threat.distance(centre, flat)
        self.tally.distances += 1
        if margin < -rounding and distance <= radius * (1 + 1e-9):
            return f"a margin is {margin:.6g} (rounding {rounding:.1g}, distance {distance:.9g})"
        exact_point = rational_point(centre, flat, self.threat, radius) if radius > 0 else _fractions(centre)
        if exact_point is None:
            self.tally.undecided_points += 1
            return ""
        try:
            exact = min(exact_margins(self.drawn.oracle, exact_point.reshape(self.shape), label))
        except NotExact:
            self.tally.undecided_points += 1
            return ""
        self.tally.exact_points += 1
        return "" if exact > 0 else f"a margin is {float(exact):.6g} in exact arithmetic ({margin:.6g} in float64)"

    def check_points(self, image: int, radius: float, points: Tensor) -> None:
        """The oracle's own points are in the ball, by the exact solver."""
        for at in self.dice.sample(range(len(points)), 1):
            distance = self.threat.distance(self.centres[image], points[at].flatten(1))
            self.tally.distances += 1
            if not distance <= radius * (1 + 1e-6) + 1e-9:
                raise AssertionError(f"a point of the ball of radius {radius} has distance {distance}")


def _fractions(centre: Tensor) -> Any:
    return np.frompyfunc(Fraction, 1, 1)(centre.numpy())
