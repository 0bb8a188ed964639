"""Keeps a process that runs Marabou, and ends it when it hangs; whatever happens becomes an outcome."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flowverify.errors import DependencyError
from flowverify.export.encodings import FloatArray
from flowverify.export.plan import Instance

GRACE = 20.0  # seconds beyond its own limit that Marabou has for reading files and for ending
TIGHTENINGS = ("deeppoly", "sbt")
WORKER = Path(__file__).with_name("marabou_worker.py")


@dataclass(frozen=True)
class Outcome:
    """What an engine said: sat, unsat, timeout, unknown or error, with its input vector for sat."""

    result: str
    seconds: float
    values: FloatArray | None = None
    message: str = ""


def marabou_missing() -> str:
    """Why Marabou cannot be run here, or "" if it can."""
    for package in ("maraboupy", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
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
            message = f"marabou ended with exit code {code}; last line: {self._last_line()}"
            self.close()
            return Outcome("error", self._clock() - start, message=message)
        except TimeoutError:
            message = f"marabou did not stop by itself after {timeout:g} s; last line: {self._last_line()}"
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
        if result not in ("sat", "unsat", "timeout", "error", "unknown"):
            result, message = "error", f"marabou answered {result!r}"
        if result == "error":
            message = f"{message}; last line: {self._last_line()}"
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

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "none"
