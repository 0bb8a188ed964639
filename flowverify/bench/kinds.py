"""The kinds of jobs that a suite is made of: over images, by outside verifiers, and scripts.

Jobs over images go by models, ground costs and radii. Those that certify decide a radius, or search the largest
certified one; those that attack look at a radius, or for the nearest adversarial image.

Outside verifiers work in the manner of the competition VNN-COMP: instances.csv, one network and property a line. One is
started once for each line, by a command of the user's. Its answers are about the exported network. ``unsat`` certifies,
on the verifier's word: nothing here proves it again, and reports count it apart. ``sat`` falsifies only after its
counterexample was replayed on the original network, which takes the folder of ``flowverify export`` and that network;
without them the answer is kept and the verdict is unknown.

Of a script, for measurements that are no list of images, what it prints is kept.
"""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator

from flowverify.bench import sources
from flowverify.bench.statistics import ON_WORD
from flowverify.bench.tasks import WITNESS, Context, Defaults, Kind, Prepared, Record, Run, Task, packed
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.options import DOMAINS
from flowverify.errors import BoundError, FlowverifyError, InvalidInputError
from flowverify.export.folder import MANIFEST, load_arrays, model_digest
from flowverify.export.results import WORDS, collect, read_manifest
from flowverify.registry import ATTACKS, COMPLETE, INCOMPLETE, LINEAR, METHODS
from flowverify.results import Certificate, Verdict
from flowverify.settings import (
    Natural,
    Number,
    OneOf,
    Positive,
    PositiveNumber,
    SettingError,
    Text,
    expected,
    settings,
    several,
    unexpected,
    wrong,
)
from flowverify.transport.ground import check_ground
from flowverify.zoo import list_models

if TYPE_CHECKING:
    from flowverify.attack.base import AttackResult, BaseAttack
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset
    from flowverify.network import Network


def _ground(name: str) -> str:
    try:
        return check_ground(name)
    except FlowverifyError as error:
        raise unexpected(f"the name of a ground cost ({error})") from error


Ground = Annotated[str, AfterValidator(_ground), expected("the name of a ground cost")]
_SEVERAL_RADII = several(Number)


def _radii(value: Any, handler: Callable[[Any], list[float]]) -> list[float]:
    return [] if value == "search" else _SEVERAL_RADII.func(value, handler)  # type: ignore[call-arg, arg-type]


@settings
class ImageRun(Run):
    """Every model x way x ground cost x radius, over the same images; the kind says what ways there are."""

    models: sources.Models | None = Field(
        None, description="Shipped models, or ONNX files relative to the suite; by default the suite's."
    )
    data: sources.Data | None = Field(None, description="By default the suite's.")
    grounds: Annotated[list[Ground], several(Ground)] = Field(
        ["l1"], description="Ground costs: l1, l2, local:5, or powers such as l2^2."
    )
    radii: Annotated[
        list[Number],
        WrapValidator(_radii, json_schema_input_type=Literal["search"] | Number | list[Number]),
    ] = Field([], description="In pixels on normalised images, or search, the default: each image has its own.")
    cap: PositiveNumber | None = Field(None, description="The largest value of a pixel; none by default.")
    chunk: Positive | None = Field(None, description="Images computed together; by default the suite's.")

    def tasks(
        self, ways: Sequence[tuple[Sequence[str], Mapping[str, Any], Sequence[str]]], defaults: Defaults
    ) -> Iterator[Task]:
        """One task for each model, way, ground cost and radius.

        Args:
            ways: what the task's name has before the ground cost, its own settings, and what its name has after it.

        Raises:
            SettingError: no model or no images are given, or images that the data set does not have.
        """
        models, data = self.models or defaults.models, self.data or defaults.data
        if not models:
            raise wrong("models", [], "one or more, here or in the suite")
        if data is None:
            raise SettingError("data", "missing, expected this key here or in the suite")
        positions = sources.positions_of(data, defaults)
        radii: Sequence[float | None] = self.radii or [None]
        for model, (before, own, after), ground, radius in itertools.product(models, ways, self.grounds, radii):
            last = "search" if radius is None else f"radius {radius:g}"
            name = "/".join(filter(None, [self.label, self.kind, sources.short(model), *before, ground, *after, last]))
            settings = {
                "model": model,
                "sha256": sources.digest(model),
                "data": asdict(data),
                "ground": ground,
                "radius": radius,
                "cap": self.cap,
                **own,
            }
            yield Task(name, self.kind, settings, positions, self.chunk or defaults.chunk)


Method = Annotated[str, OneOf(tuple(METHODS), outside=True)]
Bound = Annotated[str, OneOf(tuple(BOUNDS), outside=True)]


@settings
class CertifyRun(ImageRun):
    """Every model x method x bound x ground cost x radius, over the same images."""

    kind: Literal["certify"] = Field("certify", description="Jobs that certify, the default.")
    methods: Annotated[list[Method], several(Method)] = Field(["fine-tuned"], description=f"{METHODS.listing()}.")
    bounds: Annotated[list[Bound], several(Bound)] = Field(
        ["best"], description=f"{', '.join(BOUNDS)}; exact methods take none."
    )
    seconds: PositiveNumber = Field(60.0, description="For an image, of complete methods.")
    options: dict[str, Any] = Field({}, description="Of the methods, by their names; such as {tolerance: 0.001}.")
    references: Natural = Field(0, description="The maximum over so many references.")
    domain: Annotated[str, OneOf(DOMAINS)] = Field("auto", description="Where CROWN runs: auto, image or flow.")


class Certify(Kind[CertifyRun]):
    """A radius is decided, or the largest certified one is searched."""

    name = "certify"
    settings = CertifyRun

    def expand(self, run: CertifyRun, defaults: Defaults) -> list[Task]:
        if run.references and set(run.methods) & {*METHODS.family(LINEAR), "complete", "milp"}:
            raise wrong("references", run.references, "none for methods that are exact")
        after = [f"references {run.references}"] if run.references else []
        after += [f"domain {run.domain}"] if run.domain != "auto" else []
        after += [f"cap {run.cap:g}"] if run.cap is not None else []
        after += [f"{key} {value}" for key, value in run.options.items()]
        ways = []
        for method in run.methods:
            bounded = method in METHODS.family(INCOMPLETE)
            limit = {"seconds": run.seconds} if method in METHODS.family(COMPLETE) else {}
            try:  # what a method does not take is found before anything starts
                METHODS.options(method, run.options)
            except FlowverifyError as error:
                raise SettingError("options", str(error)) from error
            for bound in run.bounds if bounded else [_decided_by(method, run.grounds, run.cap)]:
                own = {"method": method, "bound": bound, "references": run.references, "domain": run.domain, **limit}
                own |= {"options": run.options} if run.options else {}
                ways.append(([method, bound], own, after))
        tasks = list(run.tasks(ways, defaults))
        _check_networks(tasks)
        return tasks

    def prepare(self, task: Task, context: Context) -> Prepared:
        from flowverify.api import make_certifier
        from flowverify.ball import WassersteinBall

        settings = task.settings
        options = {} if settings["domain"] == "auto" else {"domain": settings["domain"]}
        options |= {"timeout": settings["seconds"]} if "seconds" in settings else {}
        data = sources.dataset(settings["data"])
        sources.check_digest(settings)
        certifier = make_certifier(
            sources.network(settings["model"], data.input_shape).to(context.device),
            settings["method"],
            settings["bound"],
            references=settings["references"],
            pool=data.images if settings["references"] else None,
            **{**options, **settings.get("options", {})},
        )
        radius = settings["radius"]
        ball = WassersteinBall(0.0 if radius is None else radius, settings["ground"], settings.get("cap"))
        certifier.prepare(ball.threat)
        return _Certification(certifier, data, ball, searching=radius is None)


def _check_networks(tasks: Sequence[Task]) -> None:
    """Finds networks that a method does not take before anything starts; bounds take all, or say so image by image.

    Raises:
        SettingError: a method and a network that do not go together.
    """
    known: dict[tuple[str, str], Network] = {}
    for task in tasks:
        method, model, data = (task.settings[key] for key in ("method", "model", "data"))
        if method in METHODS.family(INCOMPLETE):
            continue
        key = model, repr(data)
        try:
            if key not in known:
                known[key] = sources.network(model, sources.dataset(data).input_shape)
            METHODS.find(method).check_network(known[key])
        except FlowverifyError as error:
            raise SettingError("methods", f"{method} for {sources.short(model)}: {error}") from error


def _decided_by(method: str, grounds: Sequence[str], cap: float | None) -> str:
    """What stands for a bound in the names of methods that take none; "exact" only where every certificate is."""
    if method not in METHODS:
        return "own"
    if method in METHODS.family(COMPLETE):
        return "highs" if method == "milp" else "branch-and-bound"
    exact = cap is None and (method == "linear" or set(grounds) == {"l1"})
    return "exact" if exact else "lower-bound"


class _Certification(Prepared):
    def __init__(self, certifier: BaseCertifier, data: Dataset, ball: WassersteinBall, *, searching: bool) -> None:
        self._certifier, self._data, self._ball, self._searching = certifier, data, ball, searching

    def run(self, positions: Sequence[int]) -> list[Record]:
        chosen = self._data[list(positions)]
        if self._searching:
            found = self._certifier.search(chosen.images, chosen.labels, self._ball.threat)
        else:
            found = self._certifier.certify(chosen.images, chosen.labels, self._ball)
        return [self._record(one) for one in found]

    def _record(self, one: Certificate) -> Record:
        """With the counterexample, unless it lies beyond the radius that was decided."""
        record: Record = one.to_json()
        if one.witness is not None and (self._searching or one.verdict is Verdict.FALSIFIED):
            record[WITNESS] = packed(one.witness.cpu().numpy())
        return record


AttackName = Annotated[str, OneOf(tuple(ATTACKS), outside=True)]


@settings
class AttackRun(ImageRun):
    """Every model x attack x ground cost x radius, over the same images; ``search`` is for the nearest images."""

    kind: Literal["attack"] = Field("attack", description="Jobs that attack.")
    attacks: Annotated[list[AttackName], several(AttackName)] = Field(description=f"{ATTACKS.listing()}.")
    options: dict[str, Any] = Field(
        {}, description="Of the attack's class; schedule: {first: .., factor: .., every: .., iterations: ..}."
    )


class Attack(Kind[AttackRun]):
    """Attacks, and their checked results."""

    name = "attack"
    settings = AttackRun

    def expand(self, run: AttackRun, defaults: Defaults) -> list[Task]:
        after = [f"{key} {_text(value)}" for key, value in run.options.items()]
        ways = [([attack], {"attack": attack, "options": dict(run.options)}, after) for attack in run.attacks]
        tasks = list(run.tasks(ways, defaults))
        for task in tasks:
            _try(task)
        return tasks

    def prepare(self, task: Task, context: Context) -> Prepared:
        sources.check_digest(task.settings)
        data = sources.dataset(task.settings["data"])
        attack = _attack(task, data, context)
        prepared = _Attack(attack, data, task.settings)
        with suppress(Exception):  # compiles what the first image would; what is wrong with it is for its record
            prepared.run(task.positions[:1])
        return prepared


class _Attack(Prepared):
    def __init__(self, attack: BaseAttack, data: Dataset, settings: Any) -> None:
        self._attack, self._data, self._settings = attack, data, settings

    def run(self, positions: Sequence[int]) -> list[Record]:
        from flowverify.ball import WassersteinBall

        chosen = self._data[list(positions)]
        radius, ground, cap = (self._settings[key] for key in ("radius", "ground", "cap"))
        if radius is None:
            found = self._attack.minimise(chosen.images, chosen.labels, ground, cap)
        else:
            found = self._attack.run(chosen.images, chosen.labels, WassersteinBall(radius, ground, cap))
        return [self._record(found, index) for index in range(len(positions))]

    def _record(self, found: AttackResult, index: int) -> Record:
        record = found.to_json(index)
        distance = record.pop("radius")
        record["radius"] = self._settings["radius"]
        record.pop("outcome")
        if record["verdict"] == "falsified":
            record["upper_radius"] = distance
            record[WITNESS] = packed(found.images[index].cpu().numpy())
        return record


def _attack(task: Task, data: Dataset, context: Context) -> BaseAttack:
    from flowverify.attack.base import make_attack

    network = sources.network(task.settings["model"], data.input_shape).to(context.device)
    options = {"batch_size": task.chunk, "seed": context.seed, **task.settings["options"]}
    return make_attack(task.settings["attack"], network, **options)


def _text(value: Any) -> str:
    """The value of an option in the name of a task."""
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _try(task: Task) -> None:
    """Builds the attack once, so that an option that it does not take is found before anything starts."""
    if not task.settings["options"]:
        return
    try:
        _attack(task, sources.dataset(task.settings["data"]), Context())
    except (TypeError, ValueError, LookupError) as error:
        raise SettingError("options", str(error)) from error


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
