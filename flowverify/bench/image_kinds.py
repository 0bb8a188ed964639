"""Jobs over images, by models, ground costs and radii.

Those that certify decide a radius, or search the largest certified one; those that attack look at a radius, or for the
nearest adversarial image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator

from flowverify.bench import sources
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Run, Task
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.options import DOMAINS
from flowverify.errors import FlowverifyError
from flowverify.registry import ATTACKS, COMPLETE, INCOMPLETE, LINEAR, METHODS
from flowverify.settings import (
    Natural,
    Number,
    OneOf,
    Positive,
    PositiveNumber,
    SettingError,
    expected,
    settings,
    several,
    unexpected,
    wrong,
)
from flowverify.transport.ground import check_ground

if TYPE_CHECKING:
    from flowverify.attack.base import AttackResult, BaseAttack
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset


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
        return list(run.tasks(ways, defaults))

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
        records: list[dict[str, Any]] = [certificate.to_json() for certificate in found]
        return records


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
