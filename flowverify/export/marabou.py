"""Complete certification by Marabou, through cuts or exported files, with every counterexample replayed.

A reduced question is decided class by class, with cuts added until it is proven or an image is found. Marabou runs in
a process of its own, which is ended when it hangs; whatever happens becomes an outcome.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.options import MarabouOptions
from flowverify.errors import DependencyError
from flowverify.export.cuts import ReducedQuestion
from flowverify.export.outside import RESULTS, Found, Outcome, OutsideCertifier, is_installed, last_line
from flowverify.export.plan import Export, Instance
from flowverify.export.results import falsify, replay
from flowverify.network import write_onnx
from flowverify.results import Verdict
from flowverify.transport.references import flow_by_transport
from flowverify.transport.support import support

GRACE = 20.0  # seconds beyond its own limit that Marabou has for reading files and for ending
TIGHTENINGS = ("deeppoly", "sbt")
WORKER = Path(__file__).with_name("marabou_worker.py")


def marabou_missing() -> str:
    """Why Marabou cannot be run here, or "" if it can."""
    for package in ("maraboupy", "onnxruntime"):
        if not is_installed(package):
            return (
                f"{package} is not installed: pip install 'flowverify[marabou]' (maraboupy 2.0.0 has wheels for "
                "CPython up to 3.11 on Linux x86-64)"
            )
    return ""


class MarabouProcess:
    """A Marabou that answers one question after the other; use as a context manager.

    Args:
        worker: the program that answers; another one than Marabou's needs nothing of Marabou.
        clock: of the limits, in seconds.

    Raises:
        DependencyError: Marabou cannot be run here.
    """

    def __init__(self, worker: Path = WORKER, clock: Callable[[], float] = time.perf_counter) -> None:
        if worker == WORKER and (reason := marabou_missing()):
            raise DependencyError(f"engine marabou: {reason}")
        self._worker, self._clock = worker, clock
        self._process: subprocess.Popen[str] | None = None
        self._log: Any = None
        self._answers = -1
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        os.close(self._answers)
        self._log.close()
        self._process = None

    def solve(
        self,
        onnx: Path,
        vnnlib: Path,
        instance: Instance,
        flows: int,
        split: bool,
        timeout: float,
        tightening: str = TIGHTENINGS[0],
        first_layer: Sequence[Sequence[float]] = (),
    ) -> Outcome:
        """Asks about the instance of two files; never raises for anything that Marabou does.

        Args:
            flows: how many inputs are flows; ``split``: whether they are p and q.
            tightening: Marabou's method of bounding neurons; another one leads it along another path.
            first_layer: bias, lower and upper bound of every neuron of the first layer, where they are known.
        """
        lower, upper = instance.property.lower, instance.property.upper
        reach = float(instance.budget)
        if split:  # outward rounding of the box may have moved the lower ends
            reach += float(np.maximum(instance.centre - lower, 0)[:flows].sum())
        request = {
            "onnx": str(onnx),
            "vnnlib": str(vnnlib),
            "lower": lower.tolist(),
            "upper": upper.tolist(),
            "flows": flows,
            "split": split,
            "reach": reach,
            "first_layer": [list(row) for row in first_layer],
        }
        return self._ask(request, timeout, tightening)

    def solve_program(self, path: Path, timeout: float) -> Outcome:
        """Asks about a saved :class:`~flowverify.export.cuts.Program`; otherwise as :meth:`solve`."""
        return self._ask({"program": str(path)}, timeout, TIGHTENINGS[0])

    def _ask(self, request: dict[str, Any], timeout: float, tightening: str) -> Outcome:
        start = self._clock()
        request |= {"timeout": timeout, "tightening": tightening}
        process = self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._read_line(start + timeout + GRACE)
        except (BrokenPipeError, EOFError):
            code = process.wait()
            message = f"marabou ended with exit code {code}; last line: {last_line(self._log)}"
            self.close()
            return Outcome("error", self._clock() - start, message=message)
        except TimeoutError:
            message = f"marabou did not stop by itself after {timeout:g} s; last line: {last_line(self._log)}"
            self.close()
            return Outcome("timeout", self._clock() - start, message=message)
        try:
            found = json.loads(line)
        except ValueError:
            self.close()
            return Outcome("error", self._clock() - start, message=f"marabou answered {line[:200]!r}")
        values = np.array(found["values"], dtype=np.float64) if "values" in found else None
        message = found.get("message", "")
        result = found["result"]
        if result not in RESULTS:
            result, message = "error", f"marabou answered {result!r}"
        if result == "error":
            message = f"{message}; last line: {last_line(self._log)}"
        return Outcome(result, self._clock() - start, values, message)

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
            self._answers, theirs = os.pipe()
            self._pending = b""
            self._process = subprocess.Popen(
                [sys.executable, str(self._worker), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                text=True,
            )
            os.close(theirs)
        return self._process

    def _read_line(self, deadline: float) -> str:
        while b"\n" not in self._pending:
            left = deadline - self._clock()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()


ROUNDS = 20  # for one class; each cut says less than the last, and each question takes longer

Shown = TypeVar("Shown")


@dataclass(frozen=True, eq=False)
class Decision(Generic[Shown]):
    """What an image showed; or the positions of the classes that are open, ascending, and the last word on one."""

    shown: Shown | None
    undecided: tuple[int, ...] = ()
    message: str = ""


def decide_by_cuts(
    question: ReducedQuestion,
    process: MarabouProcess,
    folder: Path,
    end: float,
    show: Callable[[Tensor], Shown | None],
    clock: Callable[[], float] = time.perf_counter,
) -> Decision[Shown]:
    """Asks about every class t != label, the hardest first.

    Only ``unsat`` settles a class. Nothing undecided and nothing shown: the label is certified.

    Args:
        folder: for the files of the process.
        end: on the clock.
        show: what an image of the ball, (C, H, W), shows, None for nothing.
    """
    undecided: list[int] = []
    message = ""
    for target in question.margins.argsort().tolist():
        proven = False
        for _ in range(ROUNDS):
            left = end - clock()
            if left <= 0:
                message = message or "no time was left for it"
                break
            path = folder / "program.npz"
            question.program(target).save(path)
            outcome = process.solve_program(path, left)
            proven = outcome.result == "unsat"
            if outcome.result != "sat" or outcome.values is None:
                message = message if proven else outcome.message or f"the engine answered {outcome.result}"
                break
            refinement = question.refine(target, outcome.values)
            for image in refinement.images:
                shown = show(image)
                if shown is not None:
                    return Decision(shown)
            message = "the counterexamples are no images"
            if not refinement.cut:
                break
        if not proven:
            undecided.append(target)
    return Decision(None, tuple(sorted(undecided)), message)


ROUNDING = 1e-6  # relative; rounding a weight to float32 changes it by at most 6e-8 of itself
SHARE = 0.5  # of the time is for cuts


class MarabouCertifier(OutsideCertifier):
    """Marabou 2.0.0 on the exported network: certified, falsified with a replayed image, or neither.

    It claims what :class:`~flowverify.export.outside.OutsideCertifier` does.

    Args:
        encoding: "cuts" asks class by class over the first layer's values (:mod:`flowverify.export.cuts`), and what
            that leaves open as "linear"; or one that Marabou takes from files: linear, outputs or penalty.
        process: that answers, a new one by default.

    Raises:
        DependencyError: Marabou cannot be run here.
        InvalidInputError: a timeout that is not positive.
        UnknownNameError: another encoding or method.
    """

    ways = TIGHTENINGS

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "fine-tuned",
        *,
        encoding: str = MarabouOptions.encoding,
        timeout: float = MarabouOptions.timeout,
        input_shape: tuple[int, int, int] | None = None,
        process: MarabouProcess | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        MarabouOptions(encoding, timeout)  # checks them
        super().__init__(model, method, "marabou", encoding, timeout, input_shape, clock)
        self._process = process or MarabouProcess()

    def close(self) -> None:
        """Ends the process that runs Marabou."""
        self._process.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    @classmethod
    def missing(cls) -> str:
        return marabou_missing()

    @property
    def file_encodings(self) -> Sequence[str]:
        return ("linear" if self.encoding == "cuts" else self.encoding,)

    def _answer(
        self, folder: Path, image: Tensor, label: int, ball: WassersteinBall, export: Export, end: float
    ) -> Found:
        """By cuts, where they are asked for; then by files, about the classes that are still open."""
        (instance,) = export.instances
        if self.encoding == "cuts":
            decision = self._by_cuts(folder, image, label, ball, export, end - (1 - SHARE) * self.timeout)
            if decision.shown is not None or not decision.undecided:
                return decision.shown or (Verdict.CERTIFIED, "", None)
            if self._clock() >= end:
                open_ = len(decision.undecided)
                note = f"{open_} classes undecided after {self.timeout:g} s; the last one: {decision.message}"
                return Verdict.TIMEOUT, note, None
            unsafe = tuple(instance.property.unsafe[k] for k in decision.undecided)
            instance = replace(instance, property=replace(instance.property, unsafe=unsafe))
        return self._by_files(folder, image, label, ball, export, instance, end)

    def _by_cuts(
        self, folder: Path, image: Tensor, label: int, ball: WassersteinBall, export: Export, end: float
    ) -> Decision[Found]:
        (instance,), inputs = export.instances, export.network.inputs
        centre = inputs.image(instance.centre).clamp(min=0)
        threat = Threat(positive=export.network.positivity)
        question = ReducedQuestion(self._parts, threat.ball(centre.double(), instance.budget), label)
        return decide_by_cuts(
            question,
            self._process,
            folder,
            end,
            lambda candidate: self._replay_image(folder, image, label, ball, export, candidate),
            self._clock,
        )

    def _replay_image(
        self, folder: Path, image: Tensor, label: int, ball: WassersteinBall, export: Export, candidate: Tensor
    ) -> Found | None:
        """Falsified if steps inside the ball lead from the candidate to a misclassified image, which is replayed."""
        shown = falsify(self.subject, candidate, image, label, ball, scales=(1.0,))
        if shown.image is None:
            return None
        inputs, values = export.network.inputs, export.instances[0].centre.copy()
        flow = flow_by_transport(inputs.image(values)[None].clamp(min=0), shown.image[None])[0]
        values[: inputs.flows] += torch.cat([flow.clamp(min=0), (-flow).clamp(min=0)]).numpy()
        onnx = folder / "network.onnx"
        write_onnx(export.network.graph, onnx)
        shown = replay(self.subject, image, label, ball, values, inputs, export.network.encoding, onnx)
        return (Verdict.FALSIFIED, "", shown.distance) if shown.falsified else None

    def ask(self, onnx: Path, vnnlib: Path, export: Export, instance: Instance, way: str, timeout: float) -> Outcome:
        inputs, bounds = export.network.inputs, self._first_layer(export, instance)
        return self._process.solve(onnx, vnnlib, instance, inputs.flows, inputs.form == "split", timeout, way, bounds)

    def _first_layer(self, export: Export, instance: Instance) -> list[list[float]]:
        """Bias, lower and upper bound of every neuron of the first layer over the ball; none for vanilla.

        The bounds are the exact ones (theory, section 5), widened by what rounding the layer may change.
        """
        if not export.network.positivity:
            return []
        inputs = export.network.inputs
        weight = self._parts.weight.reshape(-1, *inputs.grid.image_shape)
        image = inputs.image(instance.centre)[None].clamp(min=0)
        budget = torch.tensor([instance.budget], dtype=torch.float64)
        rows = torch.cat([weight, -weight])
        reach = support(rows, image, budget).excess[0]
        middle = (weight * image).sum((-1, -2, -3)) + self._parts.bias
        bias = self._parts.bias + self._parts.weight @ inputs.offset.flatten()
        up, down = reach[: len(weight)], reach[len(weight) :]
        slack = ROUNDING * (1 + bias.abs() + weight.abs().sum((-1, -2, -3)) * (image.max() + instance.budget))
        return torch.stack([bias, middle - down - slack, middle + up + slack], 1).tolist()
