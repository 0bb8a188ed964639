"""Certification by alpha-beta-CROWN, run on exported files, with every counterexample replayed.

It runs in a process of its own for each question, which is ended with all that it started when its time is over;
whatever happens becomes an outcome.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from torch import nn

from flowverify.certifiers.options import AlphaBetaCrownOptions
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.export.outside import Outcome, OutsideCertifier, is_installed, last_line
from flowverify.export.plan import LOADER, LOADER_TEXT, Export, Instance, configuration
from flowverify.export.results import read_witness
from flowverify.settings import read_yaml

GRACE = 60.0  # seconds beyond its own limit that it has for its imports, for reading files and for ending
POLL = 0.05  # seconds between two looks at a process
PROGRAM, PYTHON = "FLOWVERIFY_ABCROWN", "FLOWVERIFY_ABCROWN_PYTHON"
SECTIONS = ("general", "solver", "bab", "attack")  # the others say what is asked, and that is said here
# Where it shrinks or splits the box of an L1 ball, release 2025.12 forgets the radius, and would prove everything.
OWN_BALL_SECTIONS = ("general", "solver")
WITHOUT_ATTACK = "without attack"
# Bounds in float32 would leave rounding out of a proof; convolutions behind a dense layer need matrices.
DEFAULTS = {"general": {"double_fp": True, "conv_mode": "matrix"}}
# What it says about one pair of files, and about data of a loader.
WORDS = {
    r"unsat|safe(-(incomplete|mip|incomplete-refine))?": "unsat",
    r"sat|unsafe(-[a-z]+)*": "sat",
    r"timeout|unknown(-mip)?|.* \(timed out\)": "timeout",
}


def abcrown_command(program: str = "", python: str = "") -> list[str]:
    """What runs alpha-beta-CROWN: the options, or else the environment variables.

    Raises:
        DependencyError: no program is named, or there is none of this name; or onnxruntime is missing, for replays.
    """
    if not is_installed("onnxruntime"):
        raise _missing("replays need onnxruntime: pip install 'flowverify[runtime]'")
    named = program or os.environ.get(PROGRAM, "")
    path = Path(named).expanduser().absolute()
    script = path.suffix == ".py"
    found = path if script and path.is_file() else None if script or not named else _which(named)
    if found is None:
        raise _missing(
            f"{f'there is no program {named}' if named else 'no program is named'}; install "
            "https://github.com/Verified-Intelligence/alpha-beta-CROWN and name its complete_verifier/abcrown.py by "
            f"--option program=PATH or {PROGRAM}"
        )
    if not script:
        return [str(found)]
    interpreter = python or os.environ.get(PYTHON, "") or sys.executable
    runs = _which(interpreter)
    if runs is None:
        raise _missing(
            f"there is no Python {interpreter}; name that of the environment that alpha-beta-CROWN is installed in by "
            f"--option python=PATH or {PYTHON}"
        )
    return [str(runs), str(found)]


def _which(name: str) -> Path | None:
    found = shutil.which(Path(name).expanduser())
    return None if found is None else Path(found).absolute()


def _missing(reason: str) -> DependencyError:
    return DependencyError(f"engine alpha-beta-crown: {reason}")


class AlphaBetaCrown:
    """The program, as it is to be run.

    Args:
        clock: of the limits, in seconds.

    Raises:
        DependencyError: it cannot be run here.
        DataError, InvalidInputError: the file of settings cannot be read, or has sections that are not to be set.
    """

    def __init__(self, options: AlphaBetaCrownOptions, clock: Callable[[], float] = time.perf_counter) -> None:
        self._command = abcrown_command(options.program, options.python)
        self._settings = own_settings(options.config)
        self._device, self._clock = options.device, clock

    def solve(self, asked: Mapping[str, Any], inputs: int, folder: Path, timeout: float) -> Outcome:
        """Asks what a configuration says; never raises for anything that alpha-beta-CROWN does.

        Args:
            asked: its network and its specification; other keys replace those of the settings.
            inputs: of the network.
            folder: where it runs.
        """
        start = self._clock()
        results, witness, config = (folder / name for name in ("results.txt", "counterexample.txt", "config.yaml"))
        for path in (results, witness):
            path.unlink(missing_ok=True)
        demanded: dict[str, Any] = {
            "general": {
                "device": self._device,
                "results_file": str(results),
                "save_adv_example": True,
                "csv_name": None,  # which would name other questions
                "root_path": "",
            },
            "attack": {"cex_path": str(witness)},
            "bab": {"timeout": float(timeout), "decision_thresh": 0.0},
        }
        by_files, own = "vnnlib_path" in asked["specification"], self._settings
        if not by_files:
            own = {name: section for name, section in own.items() if name in OWN_BALL_SECTIONS}
            demanded["general"]["complete_verifier"] = "bab"
        settings = merged(DEFAULTS, own, asked, demanded)
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        with tempfile.TemporaryFile() as log:
            try:
                code = run_alone([*self._command, "--config", str(config)], folder, log, timeout + GRACE, self._clock)
            except OSError as error:
                return self._outcome("error", start, f"it cannot be run ({error.strerror or error})")
            said = f"last line: {last_line(log)}"
            if code is None:
                return self._outcome("timeout", start, f"it did not stop by itself after {timeout:g} s; {said}")
            if code:
                return self._outcome("error", start, f"it ended with exit code {code}; {said}")
            word = _answer(results, log, by_files)
        result = next((result for form, result in WORDS.items() if re.fullmatch(form, word)), "error")
        if result == "error":
            answer = f"it answered {word[:200]!r}" if word else "it gave no answer"
            return self._outcome("error", start, f"{answer}; {said}")
        if result == "timeout":
            over = self._clock() - start >= timeout
            return self._outcome("timeout" if over else "unknown", start, f"it answered {word}")
        if result == "unsat":
            return self._outcome("unsat", start)
        try:
            values = read_witness(witness, inputs)
        except InvalidInputError as error:
            return self._outcome("unknown", start, f"it answered {word}, with no counterexample to replay: {error}")
        if not np.isfinite(values).all():
            return self._outcome("unknown", start, f"it answered {word}, with a counterexample that is not finite")
        return Outcome("sat", self._clock() - start, values)

    def _outcome(self, result: str, start: float, message: str = "") -> Outcome:
        return Outcome(result, self._clock() - start, message=f"alpha-beta-crown: {message}" if message else "")


def own_settings(path: str) -> dict[str, Any]:
    """The settings of a user's YAML file, by section; of no file, none.

    Raises:
        DataError: the file cannot be read.
        InvalidInputError: something else than sections that may be set.
    """
    if not path:
        return {}
    found = read_yaml(Path(path).expanduser())
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise InvalidInputError(f"config {path}: expected sections of settings, as alpha-beta-CROWN has them")
    for section in found:
        if section not in SECTIONS:
            raise InvalidInputError(f"config {path}: section {section!r}, expected only {', '.join(SECTIONS)}")
    return found


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """All of them, section by section; the last value of a key counts."""
    found: dict[str, Any] = {}
    for one in settings:
        for key, value in one.items():
            known = found.get(key)
            found[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return found


def run_alone(
    command: Sequence[str], folder: Path, log: BinaryIO, limit: float, clock: Callable[[], float]
) -> int | None:
    """The exit code of a command, None if it took longer than ``limit`` seconds; nothing that it started is left.

    Raises:
        OSError: it cannot be started.
    """
    end = clock() + limit
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # so that the last line is there when it is ended
    )
    try:
        while process.poll() is None and clock() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
        return process.returncode
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answer(results: Path, log: BinaryIO, by_files: bool) -> str:
    """The word in the file of results, or in the log for data of a loader, whose results are pickled; "" for none."""
    if by_files:
        with suppress(OSError, UnicodeDecodeError):
            return results.read_text(encoding="utf-8").partition("\n")[0].strip()
        return ""
    log.seek(0)
    found = re.findall(r"^Result: (.+) in [0-9.]+ seconds$", log.read().decode(errors="replace"), re.MULTILINE)
    return found[0] if len(found) == 1 else ""


class AlphaBetaCrownCertifier(OutsideCertifier):
    """alpha-beta-CROWN on the exported network: certified, falsified with a replayed image, or neither.

    It claims what :class:`~flowverify.export.outside.OutsideCertifier` does.

    Its own L1 ball proves most, and has no attack; the box has one. Asked both ways, each has half of the time.

    Args:
        options: how it is run and asked.
        engine: the program, by default that of the options.

    Raises:
        DependencyError: it cannot be run here.
        DataError, InvalidInputError, UnknownNameError: options that cannot be, or another method.
    """

    ways = ("", WITHOUT_ATTACK)  # its attack counts what is unsafe by a tolerance of its own

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "fine-tuned",
        *,
        options: AlphaBetaCrownOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
        engine: AlphaBetaCrown | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options = options = options or AlphaBetaCrownOptions()
        self._engine = engine or AlphaBetaCrown(options, clock)
        super().__init__(model, method, "alpha-beta-crown", options.encoding, options.timeout, input_shape, clock)

    @classmethod
    def missing(cls) -> str:
        try:
            abcrown_command()
        except DependencyError as error:
            return str(error).partition(": ")[2]
        return ""

    @property
    def file_encodings(self) -> Sequence[str]:
        return ("l1-penalty", "penalty") if self.encoding == "both" else (self.encoding,)

    def ask(self, onnx: Path, vnnlib: Path, export: Export, instance: Instance, way: str, timeout: float) -> Outcome:
        folder, inputs = onnx.parent, export.network.inputs
        asked: dict[str, Any] = {
            "model": {"onnx_path": str(onnx)},
            "specification": {"vnnlib_path": str(vnnlib)},
        }
        if inputs.form == "delta":  # without the VNN-LIB file, whose box is larger than the ball
            (folder / LOADER).write_text(LOADER_TEXT, encoding="ascii")
            asked = yaml.safe_load(configuration(instance.property, str(onnx), instance.budget, timeout))
        if way == WITHOUT_ATTACK:
            asked = merged(asked, {"attack": {"pgd_order": "skip"}})
        return self._engine.solve(asked, inputs.size, folder, timeout)
