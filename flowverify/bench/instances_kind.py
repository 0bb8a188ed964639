"""Jobs in the manner of the verification competition VNN-COMP: instances.csv, one network and property a line.

An outside verifier is started once for each line, by a command of the user's. Its answers are about the exported
network. ``unsat`` certifies. ``sat`` is not a falsification here: that needs an image that is replayed on the
original network, which is the business of ``flowverify export``'s own engines.
"""

from __future__ import annotations

import csv
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.errors import BoundError, InvalidInputError

GRACE = 10.0  # seconds beyond its timeout in which a verifier may end by itself
PLACES = ("onnx", "vnnlib", "timeout", "results")
WORDS = {
    "unsat": "unsat",
    "holds": "unsat",
    "verified": "unsat",
    "sat": "sat",
    "violated": "sat",
    "falsified": "sat",
    "timeout": "timeout",
    "unknown": "unknown",
}
VERDICTS = {"unsat": "certified", "sat": "unknown", "timeout": "timeout", "unknown": "unknown"}


class Instances(Kind):
    """One record for each line of ``file``: ``network.onnx,property.vnnlib,timeout`` relative to the file."""

    name = "instances"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        path = sources.resolved(fields.text("file"), defaults.folder)
        label = fields.text("label", path.parent.name)
        command = fields.take("command")
        if not isinstance(command, list) or not command or not all(isinstance(one, str) for one in command):
            raise fields.wrong("command", command, "a list of words, such as [verifier, {onnx}, {vnnlib}, {timeout}]")
        try:
            _fill(command, dict.fromkeys(PLACES, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise fields.wrong("command", command, f"no other places than {', '.join(PLACES)}") from error
        fields.finish()
        lines = _read(path)
        settings = {"file": str(path), "command": command, "lines": [list(line) for line in lines]}
        return [Task(f"instances/{label}", self.name, settings, tuple(range(len(lines))), 1)]

    def prepare(self, task: Task, context: Context) -> Prepared:
        return _Instances(task)


class _Instances(Prepared):
    def __init__(self, task: Task) -> None:
        self._folder = Path(task.settings["file"]).parent
        self._command, self._lines = task.settings["command"], task.settings["lines"]

    def run(self, positions: Sequence[int]) -> list[Record]:
        return [self._solve(*self._lines[position]) for position in positions]

    def _solve(self, onnx: str, vnnlib: str, timeout: float) -> Record:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            results = Path(scratch) / "results.txt"
            places = {
                "onnx": str(self._folder / onnx),
                "vnnlib": str(self._folder / vnnlib),
                "timeout": f"{timeout:g}",
                "results": str(results),
            }
            try:
                done = subprocess.run(
                    _fill(self._command, places), capture_output=True, timeout=timeout + GRACE, check=False
                )
                written = results.read_text(errors="replace") if results.is_file() else ""
                answer = _answer(written, done.stdout.decode(errors="replace"))
            except subprocess.TimeoutExpired:
                answer = "timeout"
            except OSError as error:
                raise BoundError(f"{self._command[0]} cannot be started ({error.strerror})") from error
        if not answer:
            message = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-1:]
            raise BoundError(
                f"{self._command[0]} ended with exit code {done.returncode} and without an answer: {' '.join(message)}"
            )
        record = {"onnx": onnx, "vnnlib": vnnlib, "answer": answer, "verdict": VERDICTS[answer]}
        if answer == "sat":
            record["note"] = "a counterexample that was not replayed on the original network"
        return {**record, "seconds": round(time.perf_counter() - start, 6)}


def _read(path: Path) -> list[tuple[str, str, float]]:
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    except OSError as error:
        raise InvalidInputError(f"instances {path}: cannot be read ({error.strerror}), expected a CSV file") from error
    found = []
    for number, row in enumerate(rows, start=1):
        place = f"instances {path} line {number}"
        try:
            onnx, vnnlib, limit = (cell.strip() for cell in row)
            timeout = float(limit)
        except ValueError as error:
            raise InvalidInputError(f"{place}: given {row}, expected network, property, timeout") from error
        if not 0 < timeout < float("inf"):
            raise InvalidInputError(f"{place}: timeout {limit}, expected seconds > 0")
        for file in (onnx, vnnlib):
            if not (path.parent / file).is_file():
                raise InvalidInputError(f"{place}: no file {file}, expected it beside instances.csv")
        found.append((onnx, vnnlib, timeout))
    if not found:
        raise InvalidInputError(f"instances {path}: no line, expected at least one")
    return found


def _fill(command: Sequence[str], places: dict[str, str]) -> list[str]:
    return [word.format(**places) for word in command]


def _answer(written: str, printed: str) -> str:
    """The first word of the results file, or else of the last line printed that starts with an answer."""
    for line in [*written.splitlines()[:1], *reversed(printed.splitlines())]:
        word = line.strip().split(" ")[0].strip(":").lower()
        if word in WORDS:
            return WORDS[word]
    return ""
