"""One case of the fuzzer: a network, images and a threat model; what the package says of them, and whether it holds."""

from __future__ import annotations

import copy
import math
import random
import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowverify as fv
from benchmarks.soundness.balls import Threat, best_points, draw_threat, scattered, single_moves
from benchmarks.soundness.exact import (
    ROUNDINGS, NotExact, exact_margins, least_radius, magnitudes, rational_point,
)  # fmt: skip
from benchmarks.soundness.networks import KINDS, Drawn, draw_network, shift_outputs
from flowverify.certify.certificate import Certificate, Verdict
from flowverify.certify.complete.certifier import CompleteOptions
from flowverify.certify.verify import Certifier
from flowverify.errors import FlowverifyError
from flowverify.network import Network, load_network

BOUNDS = ("ibp", "crown-ibp", "crown", "alpha-crown", "best")
NODES = 40  # of a search tree: by number, not by the clock, so that a case says the same every time
SCATTERED, MOVES, STEPS = 240, 120, 5  # points of a ball
LIMIT = 1e-5  # relative: what linear programs of the oracle may be off
BRACKET = 0.015  # what a bracket that is closed to 1% may measure, with the tolerances of its last steps


@dataclass
class Tally:
    """What was tried, and what failed."""

    networks: int = 0
    points: int = 0
    exact_points: int = 0
    undecided_points: int = 0
    distances: int = 0
    enumerations: int = 0
    bounds: int = 0
    certificates: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A certificate of one image of the case."""

    certificate: Certificate
    image: int
    how: str

    @property
    def certified(self) -> bool:
        return self.certificate.verdict is Verdict.CERTIFIED


@dataclass(frozen=True)
class Setting:
    """A method, with its bound, its domain and its references."""

    method: str
    bound: str = "best"
    domain: str = "auto"
    references: int = 0

    def __str__(self) -> str:
        more = [self.domain] * (self.domain != "auto") + [f"{self.references} references"] * bool(self.references)
        return " ".join([self.method, self.bound if self.method in ("vanilla", "fine-tuned") else "", *more]).strip()


def run_case(seed: int, tally: Tally) -> None:
    """Draws the case of this seed, asks the package, and checks its answers; everything is counted in ``tally``."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Case(seed, tally).run()


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


SHAPES = (
    (1, 2, 2), (1, 3, 3), (1, 3, 3), (1, 4, 4), (1, 5, 5), (1, 4, 6), (1, 5, 3), (1, 6, 6), (2, 3, 3), (3, 3, 3), (2, 4, 4),
    (3, 2, 4), (1, 1, 2), (1, 1, 7), (1, 9, 1), (1, 1, 24), (3, 1, 5), (2, 6, 1), (1, 1, 1), (4, 3, 3),
)  # fmt: skip
SMALL_SHAPES = ((1, 2, 2), (1, 3, 3), (1, 1, 7), (1, 5, 1), (2, 2, 2), (1, 2, 3), (2, 1, 3), (1, 3, 4))


class Case:
    """The case of one seed."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.seed, self.tally, self.dice = seed, tally, random.Random(seed)
        torch.manual_seed(seed)
        kind = self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        self.shape = self.dice.choice(SMALL_SHAPES if kind in ("tiny", "offset") else SHAPES)
        self.drawn: Drawn = draw_network(self.dice, self.shape, kind)
        count = self.dice.randint(1, 3)
        self.images = draw_images(self.dice, self.shape, count).to(self.drawn.dtype)
        self.threat = draw_threat(self.dice, self.images)
        self.centres = self.images.double().flatten(2)  # (B, C, n)
        self._centre_margins()
        with torch.no_grad():
            logits = self.drawn.oracle(self.images.double())
        self.labels = logits.nan_to_num(0.0).argmax(1)
        if self.dice.random() < 0.08:
            self.labels[-1] = (self.labels[-1] + 1) % logits.shape[1]
        self.classes = int(logits.shape[1])
        self.claims: list[Claim] = []

    def fail(self, text: str) -> None:
        self.tally.failures.append((self.seed, text))

    def describe(self) -> str:
        """The network and the threat model in a line."""
        steps = " > ".join(
            f"{type(step).__name__}{list(inputs) if inputs != (k,) else ''}"
            for k, (step, inputs) in enumerate(zip(self.drawn.oracle.sequence, self.drawn.oracle.wiring, strict=True))
        )
        return f"{self.drawn.kind} {self.drawn.dtype} {self.shape} {self.threat.ground} cap {self.threat.cap}: {steps}"

    def _centre_margins(self) -> None:
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
        """Points of a ball, with their margins: samples, then Frank-Wolfe steps for every other class from the worst."""
        label, centre = int(self.labels[image]), self.centres[image]
        points = self.points(image, radius)
        margins = self.margins(points, label)
        budget = self.threat.budget(centre, radius)
        if not radius > 0 or not bool(torch.isfinite(margins).all()):
            return points, margins
        targets = torch.arange(margins.shape[1])
        current = torch.cat([points[margins.argmin(0)], centre.reshape(1, *self.shape).expand(len(targets), -1, -1, -1)])
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

    def run(self) -> None:
        self.tally.networks += 1
        network = self._loaded()
        if network is None:
            return
        self._same_values(network)
        for setting in self._settings():
            with self._guarded(str(setting)):
                self._ask(network, setting)
        self._refute()
        self._compare()
        if self.drawn.kind == "tiny":
            self._enumerate()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Counts refusals; whatever else is raised is a failure."""
        try:
            yield
        except FlowverifyError as error:
            reason = re.sub(r"\(?-?\d[\d., ()e+-]*", "# ", re.sub(r"'[^']*'", "'...'", str(error)))
            self.tally.refusals[what, f"{type(error).__name__}: {reason[:110]}"] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(f"{what}: {type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})")

    def _loaded(self) -> Network | None:
        """The network as a user brings it: the module, sometimes by way of an ONNX file."""
        with self._guarded("reading"):
            network = load_network(self.drawn.module, self.shape)
            if self.dice.random() < 0.2:
                with tempfile.TemporaryDirectory() as folder, self._guarded("ONNX"):
                    path = Path(folder) / "network.onnx"
                    fv.write_onnx(network, path)
                    network = load_network(path)
            return network
        return None

    def _same_values(self, network: Network) -> None:
        points = self.points(0, 0.3, few=True)
        with torch.no_grad():
            expected, found = self.drawn.oracle(points), copy.deepcopy(network).double()(points)
        self.tally.points += len(points)
        finite = torch.isfinite(expected)
        gap = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
        # Constants of the reader, such as batch normalisation's, may be rounded to the network's precision.
        unit = 2.0**-22 if self.drawn.dtype == torch.float32 else 2.0**-53
        allowed = self.rounding(points) * (1 + unit * 2.0**53 / 64)
        if not gap <= allowed:
            self.fail(f"reading: the network read differs from the module by {gap:.3g}, rounding explains {allowed:.3g}")

    def _settings(self) -> list[Setting]:
        dice = self.dice
        domain = lambda: dice.choices(["auto", "image", "flow"], [0.7, 0.15, 0.15])[0]  # noqa: E731
        found = [Setting(dice.choice(["vanilla", "fine-tuned"]), bound, domain()) for bound in dice.sample(BOUNDS, 2)]
        found.append(Setting("fine-tuned", "best"))
        if dice.random() < 0.1:
            found.append(Setting("fine-tuned", "crown", references=2))
        if self.drawn.is_affine or dice.random() < 0.05:
            found += [Setting("linear"), Setting("linear-lp")]
        small = self.drawn.kind in ("tiny", "offset")
        if small or dice.random() < 0.12:
            found.append(Setting(dice.choice(["complete", "vanilla-complete"])))
            found.append(Setting("complete"))
        if small or dice.random() < 0.03:
            found.append(Setting("milp"))
        return list(dict.fromkeys(found))

    def _certifier(self, network: Network, setting: Setting) -> Any:
        options = CompleteOptions(timeout=None, nodes=NODES)
        return fv.make_certifier(
            network, setting.method, setting.bound, domain=setting.domain, references=setting.references,
            pool=self.images if setting.references else None, options=options,
        )  # fmt: skip

    def _ask(self, network: Network, setting: Setting) -> None:
        """The largest radii, and verdicts at radii below and above; bounds of the engines are checked on the way."""
        certifier = self._certifier(network, setting)
        ground, cap = self.threat.ground, self.threat.cap
        exact = setting.method not in ("vanilla", "fine-tuned")
        start = 10 ** self.dice.uniform(-2, 0.5)
        if setting.references == 0 and self.dice.random() < (0.8 if exact else 0.6):
            found = certifier.search(self.images, self.labels, ground, cap)
            self._record(found, setting, searched=True)
            start = max((one.radius for one in found), default=0.0) or start
        factors = [0.0, self.dice.choice([0.5, 0.9])] if self.dice.random() < 0.3 else [self.dice.choice([0.9, 1.0])]
        if self.dice.random() < 0.5:
            factors.append(self.dice.choice([1.02, 1.3, 3.0]))
        previous: list[Certificate] = []
        for factor in factors:
            ball = fv.WassersteinBall(start * factor, ground, cap)
            found = certifier.certify(self.images, self.labels, ball)
            self._record(found, setting, searched=False, certifier=certifier)
            if exact or setting.bound == "ibp":
                for image, (smaller, larger) in enumerate(zip(previous, found, strict=False)):
                    undecided = Verdict.TIMEOUT, Verdict.CERTIFIED
                    if larger.verdict is Verdict.CERTIFIED and smaller.verdict not in undecided:
                        self.fail(
                            f"{setting}: image {image} certified at {larger.radius:.6g}, {smaller.verdict} at "
                            f"{smaller.radius:.6g}: not monotone"
                        )
            previous = found
        if isinstance(certifier, Certifier) and self.dice.random() < 0.6:
            self._check_bounds(certifier, setting, self.dice.choice([start, start, 0.0]))

    def _record(
        self, found: list[Certificate], setting: Setting, *, searched: bool, certifier: Any = None
    ) -> None:
        for image, one in enumerate(found):
            bound = setting.bound if setting.method in ("vanilla", "fine-tuned") else one.bound
            self.tally.certificates[setting.method, bound, str(one.verdict)] += 1
            self.claims.append(Claim(one, image, f"{setting}{' (search)' if searched else ''}"))
            if len(found) != len(self.images):
                self.fail(f"{setting}: {len(found)} certificates for {len(self.images)} images")
            if one.upper_radius is not None and one.radius > one.upper_radius and one.verdict is Verdict.CERTIFIED:
                self.fail(f"{setting}: image {image} certified to {one.radius!r}, above upper_radius {one.upper_radius!r}")
            if one.verdict is Verdict.FALSIFIED or (one.witness is not None and one.verdict is not Verdict.MISCLASSIFIED):
                self._replay(one, image, setting, certifier)
            if one.verdict is Verdict.MISCLASSIFIED:
                self._replay_clean(one, image, setting)
            if "tie" in one.note and searched:
                upper = one.upper_radius
                if upper is not None and one.radius > 0 and upper - one.radius > BRACKET * upper and self._exact_ball():
                    self.fail(f"{setting}: image {image}: {one.note!r} on the bracket {one.radius:.6g} to {upper:.6g}")

    def _exact_ball(self) -> bool:
        return self.threat.ground == "l1" and self.threat.cap is None

    def _replay(self, one: Certificate, image: int, setting: Setting, certifier: Any) -> None:
        """A witness is an image of the ball that the user's network puts into another class."""
        witness = one.witness
        if witness is None and setting.method in ("linear", "linear-lp") and certifier is not None:
            part = slice(image, image + 1)
            radius = torch.tensor([one.radius], dtype=torch.float64)
            witness = certifier.witness(
                self.images[part], self.labels[part], radius, self.threat.ground, self.threat.cap
            )[0][0]  # fmt: skip
        if witness is None:
            self.fail(f"{setting}: image {image} {one.verdict} at {one.radius:.6g} without a witness")
            return
        radius = one.radius if one.verdict is Verdict.FALSIFIED else one.upper_radius
        centre, point = self.centres[image], witness.double().flatten(1)
        self.tally.distances += 1
        faults = []
        if not bool(torch.isfinite(point).all()) or float(point.min()) < 0:
            faults.append(f"a pixel of {float(point.min()):.3g}")
        if self.threat.cap is not None and float(point.max()) > self.threat.cap * (1 + 1e-6):
            faults.append(f"a pixel of {float(point.max())!r} above the cap {self.threat.cap!r}")
        masses = (point.sum(1) - centre.sum(1)).abs() / centre.sum()
        if float(masses.max()) > 1e-5:
            faults.append(f"the mass of a channel differs by {float(masses.max()):.3g} of the image's")
        distance = math.inf if faults else self.threat.distance(centre, point)
        if not faults and radius is not None and not distance <= radius * (1 + 1e-5) + 1e-9:
            faults.append(f"its distance is {distance:.9g}, claimed {radius:.9g}")
        if not self._misclassified(witness, image):
            faults.append("the module gives it the label")
        if faults:
            self.fail(f"{setting}: image {image}, witness of {one.verdict} at {radius}: {'; '.join(faults)}")

    def _replay_clean(self, one: Certificate, image: int, setting: Setting) -> None:
        if not self._misclassified(self.images[image], image):
            self.fail(f"{setting}: image {image} of label {int(self.labels[image])} is called misclassified")

    def _misclassified(self, point: Tensor, image: int) -> bool:
        """In the module's own precision or in float64, to rounding."""
        label = int(self.labels[image])
        point = point.reshape(1, *self.shape)
        exact = float(self.margins(point.double(), label).min())
        own = copy.deepcopy(self.drawn.module).eval()
        with torch.no_grad():
            rounded = own(point.to(self.drawn.dtype))[0]
        others = torch.cat([rounded[:label], rounded[label + 1 :]])
        return not exact > self.rounding(point) or not float(rounded[label]) > float(others.max())

    def _check_bounds(self, certifier: Certifier, setting: Setting, radius: float) -> None:
        """Bounds of margins and of what activations read, against values at points of the ball."""
        ground, cap = self.threat.ground, self.threat.cap
        cover = certifier.covers(ground, cap)[0]
        radii = torch.full((len(self.images),), radius, dtype=torch.float64)
        engine = certifier.engine(torch.float64, cover.method, cover.ground, cover.cap)
        power = Threat(self.shape, cover.ground, None).power
        budget = cover.radius(radii) ** power * self.centres.sum((1, 2))
        images = self.images.double()
        lower = engine.lower_bounds(images, self.labels, budget)
        inner = engine.preactivation_bounds(images, budget)
        names = [node.inputs[0] for node in engine.network.activations]
        for image in range(len(images)):
            points, margins = self.attacked(image, radius)
            slack = 2 * self.rounding(points)
            self.tally.bounds += 1
            above = (lower[image] - margins.amin(0)).nan_to_num(nan=-math.inf)
            if bool(torch.isfinite(margins).all()) and float(above.max()) > slack:
                self.fail(
                    f"{setting}: image {image} at radius {radius:.6g}: a margin's lower bound exceeds a value by "
                    f"{float(above.max()):.3g} (value {float(margins.min()):.6g}, rounding {slack:.3g})"
                )
            largest = float(magnitudes(self.drawn.oracle, points.amax(0)).max())
            if radius == 0 and not float((margins[0] - lower[image]).max()) <= slack + 1e-8 * largest:
                gap = float((margins[0] - lower[image]).max())
                self.fail(f"{setting}: image {image} at radius 0: bound {gap:.3g} below the margin (largest {largest:.3g})")
            with torch.no_grad():
                values = engine.network.values(points)
            for name, (low, high) in zip(names, inner, strict=True):
                seen = values[name]
                size = float(seen.abs().max())
                beyond = torch.maximum(low[image] - seen.amin(0), seen.amax(0) - high[image]).nan_to_num(nan=-math.inf)
                if math.isfinite(size) and float(beyond.max()) > slack + 1e-9 * size + self._inner_slack(points):
                    self.fail(
                        f"{setting}: image {image} at radius {radius:.6g}: what the activation after {name} reads "
                        f"leaves its bounds by {float(beyond.max()):.3g} (size {size:.3g})"
                    )

    def _inner_slack(self, points: Tensor) -> float:
        """More than float64 rounds any value inside of the network."""
        largest = max(float(value.abs().max()) for value in self.drawn.oracle.values(points[:50]))
        scale = self.rounding(points)
        return 1e-11 * largest + (scale if math.isfinite(scale) else math.inf)

    def _refute(self) -> None:
        """No point of a certified ball may have a margin that is not positive."""
        for image in range(len(self.images)):
            claims = [one for one in self.claims if one.image == image and one.certified]
            radii = sorted({one.certificate.radius for one in claims}, reverse=True)
            if len(radii) > 4:
                radii = [radii[0], radii[1], *self.dice.sample(radii[2:], 2)]
            for radius in radii:
                points, margins = self.attacked(image, radius)
                if radius == radii[0]:
                    self._check_points(image, radius, points)
                worst = margins.amin(1)
                if not bool(torch.isfinite(worst).all()):
                    self.tally.undecided_points += 1
                    continue
                at = int(worst.argmin())
                reason = self._contradiction(image, radius, points[at], float(worst[at]))
                if reason:
                    wrong = [one for one in claims if one.certificate.radius >= radius]
                    for how in dict.fromkeys(f"{one.how} at {one.certificate.radius!r}" for one in wrong):
                        self.fail(f"{how}: image {image} certified, but within {radius!r} {reason}")
                    break

    def _contradiction(self, image: int, radius: float, point: Tensor, margin: float) -> str:
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

    def _check_points(self, image: int, radius: float, points: Tensor) -> None:
        """The oracle's own points are in the ball, by the exact solver."""
        for at in self.dice.sample(range(len(points)), 1):
            distance = self.threat.distance(self.centres[image], points[at].flatten(1))
            self.tally.distances += 1
            if not distance <= radius * (1 + 1e-6) + 1e-9:
                raise AssertionError(f"a point of the ball of radius {radius} has distance {distance}")

    def _compare(self) -> None:
        """What certificates of the same balls say of each other."""
        for image in range(len(self.images)):
            own = [one for one in self.claims if one.image == image]
            proven = max((one for one in own if one.certified), key=lambda one: one.certificate.radius, default=None)
            for one in own:
                shown = one.certificate
                limit = shown.radius if shown.verdict is Verdict.FALSIFIED else shown.upper_radius
                outside = shown.method == "vanilla-complete"  # its counterexamples need not be images
                if proven is not None and limit is not None and not outside:
                    if proven.certificate.radius > limit * (1 + 1e-6) + 1e-9:
                        self.fail(f"image {image}: {proven.how} certified {proven.certificate.radius!r}, {one.how} {limit!r} above")
            searched = {one.certificate.method: one.certificate for one in own if "(search)" in one.how}
            pair = [searched.get(name) for name in ("linear", "linear-lp")]
            if pair[0] and pair[1] and self._exact_ball() and Verdict.ERROR not in (pair[0].verdict, pair[1].verdict):
                first, second = pair[0].radius, pair[1].radius
                if abs(first - second) > 1e-4 * max(first, second) + 1e-7:
                    self.fail(f"image {image}: linear {first!r} ({pair[0].verdict}), linear-lp {second!r} ({pair[1].verdict})")

    def _enumerate(self) -> None:
        """Every radius against the exact one of a tiny network, by enumeration of its patterns."""
        for image in range(len(self.images)):
            own = [one for one in self.claims if one.image == image]
            if self.centres[image].numel() > 12 or not any(one.certified for one in own):
                continue
            if any(one.certificate.verdict is Verdict.MISCLASSIFIED for one in own):
                continue
            exact = least_radius(self.drawn.oracle, self.threat, self.centres[image], int(self.labels[image]))
            self.tally.enumerations += 1
            for one in own:
                shown = one.certificate
                if one.certified and shown.radius > exact * (1 + LIMIT) + 1e-9:
                    self.fail(f"{one.how}: image {image} certified {shown.radius!r}, the exact radius is {exact!r}")
                upper = shown.upper_radius
                inside = shown.method in ("complete", "milp", "linear")
                if inside and upper is not None and upper < exact * (1 - LIMIT) - 1e-9:
                    self.fail(f"{one.how}: image {image} upper_radius {upper!r}, the exact radius is {exact!r}")
                closed = one.certified and "(search)" in one.how and not shown.note and self._exact_ball()
                if closed and shown.method in ("complete", "milp") and math.isfinite(exact):
                    if shown.radius < exact * (1 - BRACKET):
                        self.fail(f"{one.how}: image {image} radius {shown.radius!r}, the exact radius is {exact!r}")


def _fractions(centre: Tensor) -> Any:
    return np.frompyfunc(Fraction, 1, 1)(centre.numpy())
