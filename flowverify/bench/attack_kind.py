"""Jobs that attack: at a radius, or for the nearest adversarial image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from flowverify.bench import sources
from flowverify.bench.image_tasks import ImageRun
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.registry import ATTACKS
from flowverify.settings import OneOf, SettingError, settings, several

if TYPE_CHECKING:
    from flowverify.attack.base import BaseAttack
    from flowverify.attack.result import AttackResult
    from flowverify.data import Dataset


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
    from flowverify.attack.make import make_attack

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
