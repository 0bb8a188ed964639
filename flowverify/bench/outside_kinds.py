"""Jobs of programs from outside: verifiers, and scripts.

Verifiers work in the manner of the competition VNN-COMP: instances.csv, one network and property a line.

An outside verifier is started once for each line, by a command of the user's. Its answers are about the exported
network. ``unsat`` certifies, on the verifier's word: nothing here proves it again, and reports count it apart. ``sat``
falsifies only after its counterexample was replayed on the original network, which takes the folder of
``flowverify export`` and that network; without them the answer is kept and the verdict is unknown.

Of a script, for measurements that are no list of images, what it prints is kept.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from flowverify.bench import sources
from flowverify.bench.statistics import ON_WORD
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Run, Task
from flowverify.errors import BoundError, InvalidInputError
from flowverify.export.folder import MANIFEST, load_arrays, model_digest
from flowverify.export.results import WORDS, collect, read_manifest
from flowverify.settings import Text, expected, settings, unexpected, wrong
from flowverify.zoo import list_models

if TYPE_CHECKING:
    from flowverify.network import Network

GRACE = 10.0  # seconds beyond its timeout in which a verifier may end by itself
PLACES = ("onnx", "vnnlib", "timeout", "results")
VERDICTS = {"unsat": "certified", "sat": "unknown", "timeout": "timeout", "unknown": "unknown"}
NOT_REPLAYED = "a counterexample that was not replayed: no original network is known"


def _command(words: list[str]) -> list[str]:
    try:
        _fill(words, dict.fromkeys(PLACES, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise unexpected(f"no other places than {', '.join(PLACES)}") from error
    return words


@settings
class InstancesRun(Run):
    """One record for each line of ``file``: ``network.onnx,property.vnnlib,timeout`` relative to the file."""

    kind: Literal["instances"] = Field("instances", description="In the manner of the competition VNN-COMP.")
    file: Text = Field(description="Such as export/instances.csv, relative to the suite.")
    command: Annotated[
        list[str],
        Field(min_length=1),
        AfterValidator(_command),
        expected("a list of words, such as [verifier, {onnx}, {vnnlib}, {timeout}]"),
    ] = Field(description=f"The verifier, started for each line; its places are {', '.join(PLACES)}.")
    model: sources.Model | None = Field(
        None, description="What was exported, to replay counterexamples; a shipped model is known by itself."
    )


class Instances(Kind[InstancesRun]):
    """An outside verifier, started once for each line."""

    name = "instances"
    settings = InstancesRun

    def expand(self, run: InstancesRun, defaults: Defaults) -> list[Task]:
        path = sources.resolved(run.file, defaults.folder)
        model = _original(run, path.parent)
        lines = _read(path)
        settings = {"file": str(path), "command": run.command, "lines": [list(line) for line in lines], "model": model}
        if model is not None:
            settings["sha256"] = sources.digest(model)
        return [Task(f"instances/{run.label or path.parent.name}", self.name, settings, tuple(range(len(lines))), 1)]

    def prepare(self, task: Task, context: Context) -> Prepared:
        return _Instances(task)


def _original(run: InstancesRun, folder: Path) -> str | None:
    """The network that was exported: the one given, or the shipped model that the manifest names."""
    exported = (folder / MANIFEST).is_file()
    if run.model is not None:
        if not exported:
            raise wrong("model", run.model, f"instances of an export, with {MANIFEST} beside them")
        return run.model
    named = read_manifest(folder)["model"] if exported else None
    return named if named in [card.name for card in list_models()] else None


class _Instances(Prepared):
    def __init__(self, task: Task) -> None:
        self._folder = Path(task.settings["file"]).parent
        self._command, self._lines = task.settings["command"], task.settings["lines"]
        self._network: Network | None = None
        if task.settings["model"] is not None:
            sources.check_digest(task.settings)
            shape = load_arrays(self._folder)["images"].shape[1:]
            self._network = sources.network(task.settings["model"], (int(shape[0]), int(shape[1]), int(shape[2])))
            if model_digest(self._network) != read_manifest(self._folder)["model_sha256"]:
                raise InvalidInputError(
                    f"instances {self._folder}: exported from another network than {task.settings['model']}"
                )

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
        if not answer or answer == "error":
            message = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-1:]
            said = f"the answer {answer!r}" if answer else "without an answer"
            raise BoundError(
                f"{self._command[0]} ended with exit code {done.returncode} and {said}: {' '.join(message)}"
            )
        record: Record = {"onnx": onnx, "vnnlib": vnnlib, "answer": answer, "verdict": VERDICTS[answer]}
        if self._network is not None:
            record |= self._collected(self._network, onnx, vnnlib, answer, written)
        elif answer == "sat":
            record["note"] = NOT_REPLAYED
        if answer == "unsat" and record["verdict"] == "certified":
            record |= {"evidence": ON_WORD, "note": ON_WORD}
        return {**record, "seconds": round(time.perf_counter() - start, 6)}

    def _collected(self, network: Network, onnx: str, vnnlib: str, answer: str, written: str) -> dict[str, Any]:
        """What the answer shows about the exported image: a certificate's fields, and the image's position."""
        with tempfile.TemporaryDirectory() as scratch:
            results = Path(scratch) / "results.csv"
            with results.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([onnx, vnnlib, answer, 0])
            if "X_0" in written:
                stem = Path(vnnlib).name.removesuffix(".gz").removesuffix(".vnnlib")
                (Path(scratch) / f"{stem}.counterexample").write_text(written, encoding="utf-8")
            ((image, certificate),) = collect(network, self._folder, results, answered_only=True)
        return {"image": image, **certificate.to_json()}


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
    """The first word of the results file, or else of the last line printed that starts with an answer; "" for none."""
    for line in [*written.splitlines()[:1], *reversed(printed.splitlines())]:
        word = line.strip().split(" ")[0].strip(":").lower()
        if word in WORDS:
            return WORDS[word]
    return ""


LAST_LINES = 3


@settings
class ScriptRun(Run):
    """``python -m MODULE ARGUMENTS`` in a folder."""

    kind: Literal["script"] = Field("script", description="One record, with everything that a script printed.")
    module: Text = Field(description="Of the script, such as benchmarks.linear_radii.")
    arguments: Annotated[list[str | int | float], expected("a list of text and numbers")] = Field(
        [], description="What it is given."
    )
    folder: Text = Field(".", description="Where it runs, relative to the suite.")


class Script(Kind[ScriptRun]):
    """One record, with everything that the script printed."""

    name = "script"
    settings = ScriptRun

    def expand(self, run: ScriptRun, defaults: Defaults) -> list[Task]:
        folder = sources.resolved(run.folder, defaults.folder)
        if not (folder / f"{run.module.replace('.', '/')}.py").is_file():
            raise wrong("module", run.module, f"a module in {folder}")
        arguments = [str(one) for one in run.arguments]
        settings = {"module": run.module, "arguments": arguments, "folder": str(folder)}
        return [Task(f"script/{run.label or run.module.rpartition('.')[2]}", self.name, settings, (0,), 1)]

    def prepare(self, task: Task, context: Context) -> Prepared:
        return _Script(task)


class _Script(Prepared):
    def __init__(self, task: Task) -> None:
        self._settings = task.settings

    def run(self, positions: Sequence[int]) -> list[Record]:
        start = time.perf_counter()
        command = [sys.executable, "-m", self._settings["module"], *self._settings["arguments"]]
        # Its own errors come with what it printed before, in the order in which it did.
        done = subprocess.run(
            command,
            cwd=self._settings["folder"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout.decode(errors="replace").strip()
        if done.returncode:
            last = " / ".join(output.splitlines()[-LAST_LINES:])
            raise BoundError(f"{self._settings['module']} ended with exit code {done.returncode}: {last}")
        seconds = round(time.perf_counter() - start, 6)
        return [{"verdict": "done", "output": output, "seconds": seconds} for _ in positions]
