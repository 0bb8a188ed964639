"""One case of the fuzzer: a network, images and a threat model; what the package says of them, and whether it holds."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flowverify as fv
from benchmarks.soundness.claims import BEYOND_TIE, BRACKET, Claim, failures
from benchmarks.soundness.exact import least_radius, magnitudes
from benchmarks.soundness.question import Question
from benchmarks.soundness.tally import Tally
from flowverify.ball import Threat
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.options import CompleteOptions
from flowverify.errors import FlowverifyError
from flowverify.network import Network, load_network
from flowverify.network.graph import exact_constants
from flowverify.network.reading import Reading
from flowverify.registry import COMPLETE, INCOMPLETE, METHODS
from flowverify.results import Certificate, Verdict

BOUNDS = ("ibp", "crown-ibp", "crown", "alpha-crown", "lifted", "best")
NODES = 40  # of a search tree: by number, not by the clock, so that a case says the same every time


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
        try:
            Case(seed, tally).run()
        except Exception as error:  # so that hours of cases are not lost; the package's own errors are caught inside
            tally.failures.append((seed, f"the case itself: {type(error).__name__}: {error}"))


class Case:
    """The case of one seed; with a network of any kind unless one is given."""

    def __init__(self, seed: int, tally: Tally, kind: str | None = None) -> None:
        self.seed, self.tally = seed, tally
        self.given = Question(seed, tally, kind)
        self.claims: list[Claim] = []

    def fail(self, text: str) -> None:
        self.tally.failures.append((self.seed, text))

    def run(self) -> None:
        self.tally.networks += 1
        network = self._loaded()
        if network is None:
            return
        with torch.no_grad():
            answers = self.given.drawn.oracle(self.given.images.double()).shape[1]
        if answers != network.num_classes:  # one number is read as two classes; the oracles know logits
            self.tally.refuse("reading", "one answer is two classes, of which the oracles know nothing", self.seed)
            return
        self._same_values(network)
        for setting in self._settings():
            with self._guarded(str(setting)):
                self._ask(network, setting)
        for text in failures(self.given, self.claims):
            self.fail(text)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Counts refusals; whatever else is raised is a failure."""
        try:
            yield
        except FlowverifyError as error:
            reason = re.sub(r"\(?-?\d[\d., ()e+-]*", "# ", re.sub(r"'[^']*'", "'...'", str(error)))
            self.tally.refuse(what, f"{type(error).__name__}: {reason[:110]}", self.seed)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(
                f"{what}: {type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
            )

    def _loaded(self) -> Network | None:
        """The network as a user brings it: the module, sometimes by way of an ONNX file."""
        with self._guarded("reading"):
            network = load_network(self.given.drawn.module, self.given.shape)
            if self.given.dice.random() < 0.4 and self._fits_a_file(network):
                with tempfile.TemporaryDirectory() as folder, self._guarded("ONNX"):
                    path = Path(folder) / "network.onnx"
                    fv.write_onnx(network, path)
                    network = load_network(path, reading=Reading(layout="nchw"))
            return network
        return None

    def _fits_a_file(self, network: Network) -> bool:
        """Whether an ONNX file, which holds float32, has this very network, and not one with rounded constants."""
        steps = self.given.drawn.oracle.steps
        slopes = [step.negative_slope for step in steps if isinstance(step, nn.LeakyReLU)]
        computed = any(exact_constants(node.operation) for node in network.nodes)
        single = all(float(torch.tensor(slope, dtype=torch.float32)) == slope for slope in slopes)
        return self.given.drawn.dtype == torch.float32 and single and not computed

    def _same_values(self, network: Network) -> None:
        points = self.given.points(0, 0.3, few=True)
        with torch.no_grad():
            expected, found = self.given.drawn.oracle(points), copy.deepcopy(network).double()(points)
        self.tally.points += len(points)
        finite = torch.isfinite(expected)
        gap = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
        allowed = self.given.rounding(points)
        if not gap <= allowed:
            self.fail(
                f"reading: the network read differs from the module by {gap:.3g}, rounding explains {allowed:.3g}"
            )

    def _settings(self) -> list[Setting]:
        dice = self.given.dice
        domain = lambda: dice.choices(["auto", "image", "flow"], [0.7, 0.15, 0.15])[0]  # noqa: E731
        found = [Setting(dice.choice(["vanilla", "fine-tuned"]), bound, domain()) for bound in dice.sample(BOUNDS, 2)]
        found.append(Setting("fine-tuned", "best"))
        if dice.random() < 0.1:
            found.append(Setting("fine-tuned", "crown", references=2))
        if self.given.drawn.is_affine or dice.random() < 0.05:
            found += [Setting("linear"), Setting("linear-lp")]
        small = self.given.drawn.kind in ("tiny", "offset")
        if small or dice.random() < 0.12:
            found.append(Setting(dice.choice(["complete", "vanilla-complete"])))
            found.append(Setting("complete"))
        if (small or dice.random() < 0.03) and (self.given.exact_ball or dice.random() < 0.1):
            found.append(Setting("milp"))
        return list(dict.fromkeys(found))

    def _certifier(self, network: Network, setting: Setting) -> Any:
        given: dict[str, Any] = {}
        if setting.method in METHODS.family(COMPLETE):
            given["options"] = CompleteOptions(timeout=None, nodes=NODES)
        elif setting.method in METHODS.family(INCOMPLETE):
            given["domain"] = setting.domain
        return fv.make_certifier(
            network, setting.method, setting.bound, references=setting.references,
            pool=self.given.images if setting.references else None, **given,
        )  # fmt: skip

    def _ask(self, network: Network, setting: Setting) -> None:
        """The largest radii, and verdicts at radii below and above; bounds of the engines are checked on the way."""
        certifier = self._certifier(network, setting)
        dice, threat = self.given.dice, Threat(self.given.threat.ground, self.given.threat.cap)
        exact = setting.method not in ("vanilla", "fine-tuned")
        start = 10 ** dice.uniform(-2, 0.5)
        if setting.references == 0 and dice.random() < (0.8 if exact else 0.6):
            found = certifier.search(self.given.images, self.given.labels, threat)
            self._record(found, setting, searched=True)
            start = max((one.radius for one in found), default=0.0) or start
        factors = [0.0, dice.choice([0.5, 0.9])] if dice.random() < 0.3 else [dice.choice([0.9, 1.0])]
        if dice.random() < 0.5:
            factors.append(dice.choice([1.02, 1.3, 3.0]))
        previous: list[Certificate] = []
        for factor in factors:
            ball = fv.WassersteinBall(start * factor, threat.ground, threat.cap)
            found = certifier.certify(self.given.images, self.given.labels, ball)
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
        if isinstance(certifier, Certifier) and self.given.dice.random() < 0.6:
            self._check_bounds(certifier, setting, self.given.dice.choice([start, start, 0.0]))

    def _record(self, found: list[Certificate], setting: Setting, *, searched: bool, certifier: Any = None) -> None:
        for image, one in enumerate(found):
            bound = setting.bound if setting.method in ("vanilla", "fine-tuned") else one.bound
            self.tally.certificates[setting.method, bound, str(one.verdict)] += 1
            self.claims.append(Claim(one, image, f"{setting}{' (search)' if searched else ''}"))
            if len(found) != len(self.given.images):
                self.fail(f"{setting}: {len(found)} certificates for {len(self.given.images)} images")
            if one.upper_radius is not None and one.radius > one.upper_radius and one.verdict is Verdict.CERTIFIED:
                self.fail(
                    f"{setting}: image {image} certified to {one.radius!r}, above upper_radius {one.upper_radius!r}"
                )
            if one.verdict is Verdict.FALSIFIED or (
                one.witness is not None and one.verdict is not Verdict.MISCLASSIFIED
            ):
                self._replay(one, image, setting, certifier)
            if one.verdict is Verdict.MISCLASSIFIED:
                self._replay_clean(one, image, setting)
            upper = one.upper_radius
            tie = (
                setting.method == "complete"
                and "tie" in one.note
                and searched
                and one.radius > 0
                and self.given.exact_ball
            )
            if tie and upper is not None and upper - one.radius > BRACKET * upper and not self._ties(image, one.radius):
                self.fail(f"{setting}: image {image}: {one.note!r} on the bracket {one.radius:.6g} to {upper:.6g}")

    def _ties(self, image: int, radius: float) -> bool:
        """Whether a little beyond this radius some image ties: one that descent finds, or that is nearest of all."""
        given, beyond = self.given, radius * (1 + BEYOND_TIE)
        points, margins = given.attacked(image, beyond)
        if not float(margins.min()) > given.rounding(points):
            return True
        if given.drawn.kind not in ("tiny", "offset"):
            return False
        return least_radius(given.drawn.oracle, given.threat, given.centres[image], int(given.labels[image])) <= beyond

    def _replay(self, one: Certificate, image: int, setting: Setting, certifier: Any) -> None:
        """A witness is an image of the ball that the user's network puts into another class."""
        witness = one.witness
        if witness is None and setting.method in ("linear", "linear-lp") and certifier is not None:
            own, label = self.given.images[image : image + 1], self.given.labels[image : image + 1]
            ball = fv.WassersteinBall(one.radius, self.given.threat.ground, self.given.threat.cap)
            witness = certifier.witness(ball.around(own), label)[0][0]
        if witness is None:
            self.fail(f"{setting}: image {image} {one.verdict} at {one.radius:.6g} without a witness")
            return
        radius = one.radius if one.verdict is Verdict.FALSIFIED else one.upper_radius
        centre, point = self.given.centres[image], witness.double().flatten(1)
        self.tally.distances += 1
        faults = []
        if not bool(torch.isfinite(point).all()) or float(point.min()) < 0:
            faults.append(f"a pixel of {float(point.min()):.3g}")
        if self.given.threat.cap is not None and float(point.max()) > self.given.threat.cap * (1 + 1e-6):
            faults.append(f"a pixel of {float(point.max())!r} above the cap {self.given.threat.cap!r}")
        masses = (point.sum(1) - centre.sum(1)).abs() / centre.sum()
        if float(masses.max()) > 1e-5:
            faults.append(f"the mass of a channel differs by {float(masses.max()):.3g} of the image's")
        distance = math.inf if faults else self.given.threat.distance(centre, point)
        if not faults and radius is not None and not distance <= radius * (1 + 1e-5) + 1e-9:
            faults.append(f"its distance is {distance:.9g}, claimed {radius:.9g}")
        if not self.given.misclassified(witness, image):
            faults.append("the module gives it the label")
        if faults:
            self.fail(f"{setting}: image {image}, witness of {one.verdict} at {radius}: {'; '.join(faults)}")

    def _replay_clean(self, one: Certificate, image: int, setting: Setting) -> None:
        if not self.given.misclassified(self.given.images[image], image):
            self.fail(f"{setting}: image {image} of label {int(self.given.labels[image])} is called misclassified")

    def _check_bounds(self, certifier: Certifier, setting: Setting, radius: float) -> None:
        """Bounds of margins and of what activations read, against values at points of the ball."""
        images = self.given.images.double()
        ball = fv.WassersteinBall(radius, self.given.threat.ground, self.given.threat.cap).around(images)
        cover = certifier.covers(ball.threat)[0]
        engine, ball = certifier.engine(cover), ball.within(cover)
        lower, inner = engine.margins(ball, self.given.labels), engine.neurons(ball)
        names = [node.inputs[0] for node in engine.network.activations]
        for image in range(len(images)):
            points, margins = self.given.attacked(image, radius)
            slack = 2 * self.given.rounding(points)
            self.tally.bounds += 1
            above = (lower[image] - margins.amin(0)).nan_to_num(nan=-math.inf)
            if bool(torch.isfinite(margins).all()) and float(above.max()) > slack:
                self.fail(
                    f"{setting}: image {image} at radius {radius:.6g}: a margin's lower bound exceeds a value by "
                    f"{float(above.max()):.3g} (value {float(margins.min()):.6g}, rounding {slack:.3g})"
                )
            largest = float(magnitudes(self.given.drawn.oracle, points.amax(0)).max())
            # Tangents of curved activations are looked up in tables by the host: loose by their step, not wrong.
            curved = any(isinstance(step, nn.Sigmoid | nn.Tanh) for step in self.given.drawn.oracle.steps)
            share = 1e-4 if curved else 1e-6
            if radius == 0 and not float((margins[0] - lower[image]).max()) <= slack + share * largest:
                gap = float((margins[0] - lower[image]).max())
                self.fail(
                    f"{setting}: image {image} at radius 0: bound {gap:.3g} below the margin (largest {largest:.3g})"
                )
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

    def _inner_slack(self, points: torch.Tensor) -> float:
        """More than float64 rounds any value inside of the network."""
        largest = max(float(value.abs().max()) for value in self.given.drawn.oracle.values(points[:50]))
        scale = self.given.rounding(points)
        return 1e-11 * largest + (scale if math.isfinite(scale) else math.inf)
