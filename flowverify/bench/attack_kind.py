"""Jobs that attack: at a radius, or for the nearest adversarial image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flowverify.attack.make import ATTACKS
from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.image_tasks import ImageTasks
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.errors import InvalidInputError

if TYPE_CHECKING:
    from flowverify.attack.base import BaseAttack
    from flowverify.attack.result import AttackResult
    from flowverify.data import Dataset

VERDICTS = {"found": "falsified", "not found": "unknown", "misclassified": "misclassified"}


class Attack(Kind):
    """Every model x attack x ground cost x radius of a run, over its images."""

    name = "attack"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        images = ImageTasks.read(fields, defaults)
        attacks = fields.names("attacks", tuple(ATTACKS))
        cap = fields.cap()
        options = fields.take("options", {})
        if not isinstance(options, dict):
            raise fields.wrong("options", options, "options of the attack with their values")
        fields.finish()
        after = [f"{key} {_text(value)}" for key, value in options.items()]
        ways = [([attack], {"attack": attack, "cap": cap, "options": dict(options)}, after) for attack in attacks]
        tasks = list(images.expand(self.name, ways, sources.positions_of(fields, images.data, defaults)))
        for task in tasks:
            _try(fields, task)
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
        record["verdict"] = VERDICTS[record.pop("outcome")]
        if record["verdict"] == "falsified":
            record["upper_radius"] = distance
        return record


def _attack(task: Task, data: Dataset, context: Context) -> BaseAttack:
    from flowverify.attack.make import make_attack
    from flowverify.attack.schedule import Schedule

    network = sources.network(task.settings["model"], data.input_shape).to(context.device)
    options = {"batch_size": task.chunk, "seed": context.seed, **task.settings["options"]}
    if isinstance(options.get("schedule"), dict):
        options["schedule"] = Schedule(**options["schedule"])
    return make_attack(task.settings["attack"], network, **options)


def _text(value: Any) -> str:
    """The value of an option in the name of a task."""
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _try(fields: Fields, task: Task) -> None:
    """Builds the attack once, so that an option that it does not take is found before anything starts."""
    if not task.settings["options"]:
        return
    try:
        _attack(task, sources.dataset(task.settings["data"]), Context())
    except (TypeError, ValueError, LookupError) as error:
        raise InvalidInputError(f"{fields.name('options')}: {error}") from error
