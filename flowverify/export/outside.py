"""Certification by verifiers from outside: exported questions, and every counterexample replayed.

What a verifier says becomes an outcome, whatever happens to it, and an outcome becomes a verdict. ``unsat`` is a proof
as far as its arithmetic is; ``sat`` counts only with an image that the original network misclassifies.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.export.encodings import FloatArray, Parts, take_apart
from flowverify.export.plan import Export, Instance, Request, by_a_gap, plan, write_property
from flowverify.export.results import replay
from flowverify.network import write_onnx
from flowverify.network.subject import Subject
from flowverify.registry import INCOMPLETE, METHODS
from flowverify.results import Certificate, Verdict

RAISE = 1.5  # a search multiplies a certified radius by this until one is not
GAP = 1e-4  # of the clean margin
SEARCH_TOLERANCE = 0.02
LEAST = 1.0  # second that a question gets

RESULTS = ("sat", "unsat", "timeout", "unknown", "error")


@dataclass(frozen=True)
class Outcome:
    """What an engine said: sat, unsat, timeout, unknown or error, with its input vector for sat."""

    result: str
    seconds: float
    values: FloatArray | None = None
    message: str = ""


Found = tuple[Verdict, str, float | None]  # with a note, and for falsified the distance of the replayed image


class OutsideCertifier(BaseCertifier):
    """A verifier from outside on the exported network: certified, falsified with a replayed image, or neither.

    The claim of ``certified`` is that of every other method. It rests on the verifier, whose arithmetic is
    floating-point with tolerances; the exported question allows for the rounding of the file to float32.

    A subclass asks the verifier (:meth:`ask`), in several ways where it knows them (``ways``).

    Args:
        method: "fine-tuned", or "vanilla" for the flows of the L1 ball without positivity. A vanilla counterexample
            that is no image is unknown.
        engine: the verifier's name, which stands in the certificates.
        encoding: how the question is put.
        timeout: seconds for each image and radius.
        clock: of the timeout, in seconds.

    Raises:
        UnknownNameError: another method.
        FoldError, UnsupportedOperationError: the network cannot be exported, which comes out in :meth:`prepare`.
    """

    batched = False
    ways: ClassVar[tuple[str, ...]] = ("",)  # the first is what is asked; a counterexample that fails leads to the last

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str,
        engine: str,
        encoding: str,
        timeout: float,
        input_shape: tuple[int, int, int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        METHODS.check_family(method, INCOMPLETE)
        super().__init__(model, method, engine, input_shape)
        self.encoding, self.timeout, self._clock = encoding, float(timeout), clock

    @classmethod
    @abstractmethod
    def missing(cls) -> str:
        """Why the verifier cannot be run here and what to do about it, or "" if it can, without options."""

    @abstractmethod
    def ask(self, onnx: Path, vnnlib: Path, export: Export, instance: Instance, way: str, timeout: float) -> Outcome:
        """The verifier's answer about the two files, in one of the ``ways``; raises for nothing that it does."""

    def prepare(self, threat: Threat | None = None) -> None:
        assert self._parts is not None

    @cached_property
    def _parts(self) -> Parts:
        return take_apart(self.network)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """A verdict for each image at the radius of ``ball``; a radius of 0 asks for the prediction only.

        The verifier is asked about the ball without a cap; counterexamples keep to the cap.
        """
        images, labels = self.check(images, labels, ball.threat)
        predictions, correct = self.clean(images, labels)
        return [
            self._decide(images[k], int(labels[k]), int(predictions[k]), bool(correct[k]), ball)
            for k in range(len(images))
        ]

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The largest radius that is certified, to 2%, and the least with a replayed counterexample.

        It starts at the radius of CROWN's certificate. A radius at which the verifier does not decide ends the search.
        """
        from flowverify.certifiers.incomplete import Certifier

        started = Certifier(self.network, self.method).search(images, labels, threat)
        return [
            self._search_one(image, int(label), first)
            for image, label, first in zip(images, torch.as_tensor(labels).reshape(-1), started, strict=True)
        ]

    def _search_one(self, image: Tensor, label: int, first: Certificate) -> Certificate:
        begin = self._clock()
        start = WassersteinBall(first.radius, first.ground, first.cap)
        assert first.prediction is not None
        if first.verdict is Verdict.MISCLASSIFIED:
            return self._certificate(Verdict.MISCLASSIFIED, label, first.prediction, start, begin)
        low, high, note = first.radius, None, "radius of CROWN's certificate"
        limit = float(self.network.grid.diameter)
        while low < limit and (high is None or high > low * (1 + SEARCH_TOLERANCE)):
            trial = min(limit, max(low * RAISE, 1e-3)) if high is None else (low + high) / 2
            found = self._decide(image, label, first.prediction, True, start.with_radius(trial))
            if found.verdict is Verdict.CERTIFIED:
                low, note = trial, ""
            elif found.verdict is Verdict.FALSIFIED:
                high = min(trial, found.upper_radius or trial)
            else:
                note = f"at radius {trial:.4g}: {found.verdict}" + (f", {found.note}" if found.note else "")
                break
        verdict = Verdict.CERTIFIED if low > 0 else Verdict.UNKNOWN
        return self._certificate(verdict, label, first.prediction, start.with_radius(low), begin, note, high)

    def _decide(self, image: Tensor, label: int, prediction: int, correct: bool, ball: WassersteinBall) -> Certificate:
        begin = self._clock()
        if not correct:
            return self._certificate(Verdict.MISCLASSIFIED, label, prediction, ball, begin)
        if ball.radius == 0:
            return self._certificate(Verdict.CERTIFIED, label, prediction, ball, begin)
        end, encodings, found = begin + self.timeout, self.file_encodings, list[Found]()
        for number, encoding in enumerate(encodings):
            request = Request(encoding, (ball.radius,), self.method == "fine-tuned", ground=ball.ground)
            export = next(plan(self.network, image[None], torch.tensor([label]), request))
            start = self._clock()
            with tempfile.TemporaryDirectory() as folder:
                part = start + (end - start) / (len(encodings) - number)
                found.append(self._answer(Path(folder), image, label, ball, export, part))
            if found[-1][0] in (Verdict.CERTIFIED, Verdict.FALSIFIED):
                break
        else:  # what broke down is said
            found.sort(key=lambda one: one[0] is Verdict.ERROR)
        verdict, note, upper = found[-1]
        return self._certificate(verdict, label, prediction, ball, begin, note, upper)

    @property
    def file_encodings(self) -> Sequence[str]:
        """The encodings of the files, one after the other until one decides; they share the time."""
        return (self.encoding,)

    def _answer(
        self, folder: Path, image: Tensor, label: int, ball: WassersteinBall, export: Export, end: float
    ) -> Found:
        """What the verifier says about the one instance of ``export`` until ``end``, with a folder for files."""
        (instance,) = export.instances
        return self._by_files(folder, image, label, ball, export, instance, end)

    def _by_files(
        self,
        folder: Path,
        image: Tensor,
        label: int,
        ball: WassersteinBall,
        export: Export,
        asked: Instance,
        end: float,
    ) -> Found:
        """Asks; and where a counterexample does not hold, for one that is clearer, then in another way."""

        def attempt(instance: Instance, way: str) -> tuple[Outcome, Found]:
            onnx, vnnlib = folder / "network.onnx", folder / "property.vnnlib"
            write_onnx(export.network.graph, onnx)
            comments = [f"encoding {export.network.encoding.name}"]
            vnnlib.write_text(write_property(instance.property, comments), encoding="ascii")
            outcome = self.ask(onnx, vnnlib, export, instance, way, max(LEAST, end - self._clock()))
            return outcome, verdict_of(self.subject, image, label, ball, outcome, export, onnx)

        outcome, found = attempt(asked, self.ways[0])
        if outcome.result != "sat" or found[0] is Verdict.FALSIFIED:
            return found
        clearer = replace(asked, property=by_a_gap(asked.property, self._gap(image, label, export)))
        _, second = attempt(clearer, self.ways[0])
        if second[0] is Verdict.FALSIFIED:
            return second
        outcome, third = attempt(asked, self.ways[-1])
        return third if outcome.result == "unsat" or third[0] is Verdict.FALSIFIED else found

    def _gap(self, image: Tensor, label: int, export: Export) -> float:
        """A small share of the clean margin, well above what rounding may hide."""
        with torch.no_grad():
            logits = self.precise(image[None].double())[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        return max(GAP * float(logits[label] - others.max()), 10 * export.network.allowance)

    def _certificate(
        self,
        verdict: Verdict,
        label: int,
        prediction: int,
        ball: WassersteinBall,
        begin: float,
        note: str = "",
        upper: float | None = None,
    ) -> Certificate:
        seconds = self._clock() - begin
        return Certificate(
            verdict, label, prediction, self.method, self.bound, ball.ground, ball.radius, None, seconds, upper, note,
            ball.cap,
        )  # fmt: skip


def verdict_of(
    subject: Subject,
    image: Tensor,
    label: int,
    ball: WassersteinBall,
    outcome: Outcome,
    export: Export,
    onnx: Path,
) -> Found:
    if outcome.result == "unsat":
        return Verdict.CERTIFIED, "", None
    if outcome.result == "sat" and outcome.values is not None:
        shown = replay(
            subject, image, label, ball, outcome.values, export.network.inputs, export.network.encoding, onnx
        )
        return (Verdict.FALSIFIED, "", shown.distance) if shown.falsified else (Verdict.UNKNOWN, shown.reason, None)
    if outcome.result in ("timeout", "error"):
        return Verdict(outcome.result), outcome.message, None
    return Verdict.UNKNOWN, outcome.message or f"the engine answered {outcome.result}", None


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def last_line(log: Any) -> str:
    """The last line of a verifier's log, an open binary file, for messages."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none"
