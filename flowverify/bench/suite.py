"""Suite files: what is to be computed, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, TypeAdapter, ValidationInfo, WithJsonSchema, WrapValidator
from pydantic_core import PydanticCustomError

from flowverify.bench import sources
from flowverify.bench.kinds import AttackRun, CertifyRun, InstancesRun, ScriptRun
from flowverify.bench.statistics import Comparison, resolved
from flowverify.bench.tasks import Context, Defaults, Job, Run, Task, find_kind
from flowverify.errors import FlowverifyError, InvalidInputError
from flowverify.settings import (
    Natural,
    Positive,
    PositiveNumber,
    SettingError,
    Settings,
    Text,
    expected,
    read_settings,
    read_yaml,
    settings,
)


@settings
class Budget(Settings):
    """What a job may use."""

    seconds: PositiveNumber = Field(default=300.0, description="For each image; a job of many images has the sum.")
    preparation: PositiveNumber = Field(
        default=600.0, description="Seconds for loading, tracing and compiling, once for each worker and task."
    )
    memory: PositiveNumber | None = Field(
        default=None,
        description="MiB that a worker may add to what it starts with; by default an equal share of the machine.",
    )


def _read_run(values: Any, handler: object, info: ValidationInfo) -> Run:
    """A run as its kind wants it; those of the package's own kinds stand in the schema."""
    name = values.get("kind", "certify") if isinstance(values, Mapping) else "certify"
    try:
        kind = find_kind(str(name))
    except FlowverifyError as error:
        raise PydanticCustomError("refused", "{reason}", {"reason": str(error)}) from error
    return TypeAdapter(kind.settings).validate_python(values, context=info.context)


OwnRun = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "description": "A run of somebody else's kind, a class derived from flowverify.bench.tasks.Kind.",
            "properties": {"kind": {"type": "string", "pattern": ":", "description": "MODULE:CLASS."}},
            "required": ["kind"],
        }
    ),
]
AnyRun = Annotated[CertifyRun | AttackRun | InstancesRun | ScriptRun | OwnRun, WrapValidator(_read_run)]


@settings
class SuiteFile(Settings):
    """A suite of `flowverify bench`: what is to be computed, and what it is compared with."""

    name: Text = Field(description="Of the suite.")
    description: str = Field("", description="What it is for.")
    seed: Natural = Field(0, description="Of what is random.")
    device: Annotated[str, Field(pattern="^(cpu|cuda)(:[0-9]+)?$"), expected("cpu, cuda or cuda:N")] = Field(
        "cpu", description="Where to compute: cpu, cuda or cuda:N."
    )
    chunk: Positive = Field(50, description="Images computed together; results may depend on it in the last digits.")
    models: sources.Models | None = Field(
        None, description="Of runs that have none: shipped models, or ONNX files relative to this file."
    )
    data: sources.Data | None = Field(None, description="Of runs that have none.")
    budget: Budget = Field(default=Budget(), description="Time and memory of jobs.")
    runs: Annotated[list[AnyRun], Field(min_length=1)] = Field(
        description="Every combination in a run is a task; a record is one image of one task."
    )
    comparisons: list[Comparison] = Field([], description="Numbers of papers beside ours.")


@dataclass(frozen=True)
class Suite:
    """A suite as it was read.

    ``fingerprint`` is the SHA-256 of all that results depend on: tasks with their images and models, seed,
    device. Budgets and comparisons may be changed between runs into the same folder.
    """

    name: str
    description: str
    context: Context
    budget: Budget
    tasks: tuple[Task, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def fingerprint(self) -> str:
        content = {"context": asdict(self.context), "tasks": [task.to_json() for task in self.tasks]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        """How many records a finished run has."""
        return sum(len(task.positions) for task in self.tasks)

    def jobs(self) -> Iterator[Job]:
        for task in self.tasks:
            yield from task.jobs()

    def to_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, **asdict(self)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Suite:
        return Suite(
            name=values["name"],
            description=values["description"],
            context=Context(**values["context"]),
            budget=Budget(**values["budget"]),
            tasks=tuple(Task.from_json(one) for one in values["tasks"]),
            comparisons=tuple(Comparison(**one) for one in values["comparisons"]),
        )


def read_suite(path: str | Path) -> Suite:
    """Reads and checks a suite file, a :class:`SuiteFile`.

    Raises:
        InvalidInputError: not YAML, or a key that is unknown, missing, or has a value that is not valid; or a data set
            or a model that is not there.
    """
    path = Path(path)
    folder = str(path.resolve().parent)
    try:
        return _expand(read_settings(SuiteFile, read_yaml(path), "suite", folder=folder), folder)
    except FlowverifyError as error:
        prefix = "suite " if str(error).startswith(str(path)) else f"suite {path}: "
        raise InvalidInputError(f"{prefix}{error}") from error


def _expand(file: SuiteFile, folder: str) -> Suite:
    defaults = Defaults(file.models or [], file.data, file.chunk, folder)
    tasks: list[Task] = []
    for number, run in enumerate(cast("list[Run]", file.runs)):
        with _place(f"runs[{number}]"):
            tasks += find_kind(run.kind).expand(run, defaults)
    names = [task.name for task in tasks]
    for task in names:
        if names.count(task) > 1:
            raise InvalidInputError(f"runs: {task!r} is there twice, expected runs that differ, or a label for one")
    comparisons = []
    for number, comparison in enumerate(file.comparisons):
        with _place(f"comparisons[{number}]"):
            comparisons.append(resolved(comparison, tasks))
    context = Context(file.seed, file.device)
    description = " ".join(file.description.split())
    return Suite(file.name, description, context, file.budget, tuple(tasks), tuple(comparisons))


@contextmanager
def _place(place: str) -> Iterator[None]:
    """Says where in the suite something is wrong."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{place}.{error.place}", error.reason) from error
    except FlowverifyError as error:
        raise InvalidInputError(f"{place}: {error}") from error
