"""Jobs that attack: at a radius, or for the nearest adversarial image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowverify.attack.make import ATTACKS
from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.errors import InvalidInputError
from flowverify.transport.ground import GROUNDS

if TYPE_CHECKING:
    from flowverify.attack.base import BaseAttack
    from flowverify.attack.result import AttackResult
    from flowverify.data import Dataset

VERDICTS = {"found": "falsified", "not found": "unknown", "misclassified": "misclassified"}


class Attack(Kind):
    """Every model x attack x ground cost x radius of a run, over its images."""

    name = "attack"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        label = fields.text("label", "")
        models = sources.read_models(fields, defaults.folder, defaults.models)
        data = sources.read_data(fields.inside("data", dict(defaults.data)), defaults.folder)
        attacks = fields.names("attacks", tuple(ATTACKS))
        grounds = fields.names("grounds", tuple(GROUNDS), "l1")
        radii = fields.radii("radii")
        cap = fields.take("cap", None)
        if cap is not None:
            cap = Fields({"cap": cap}, fields.place).number("cap", above=True)
        options = fields.take("options", {})
        if not isinstance(options, dict):
            raise fields.wrong("options", options, "options of the attack with their values")
        chunk = fields.integer("chunk", defaults.chunk, least=1)
        fields.finish()
        positions = sources.positions_of(fields, data, defaults)
        tasks = []
        for model, attack, ground, radius in itertools.product(models, attacks, grounds, radii):
            parts = [label, self.name, sources.short(model), attack, ground]
            parts += [f"{key} {value}" for key, value in options.items()]
            parts += ["search" if radius is None else f"radius {radius:g}"]
            settings = {
                "model": model,
                "sha256": sources.digest(model),
                "data": data,
                "attack": attack,
                "ground": ground,
                "radius": radius,
                "cap": cap,
                "options": dict(options),
            }
            task = Task("/".join(filter(None, parts)), self.name, settings, positions, chunk)
            _try(fields, task, defaults)
            tasks.append(task)
        return tasks

    def prepare(self, task: Task, context: Context) -> Prepared:
        sources.check_digest(task.settings)
        data = sources.dataset(task.settings["data"])
        attack = _attack(task, data, context)
        attack.model.logits(data.images[:1].to(context.device).double())
        return _Attack(attack, data, task.settings)


class _Attack(Prepared):
    def __init__(self, attack: BaseAttack, data: Dataset, settings: Any) -> None:
        self._attack, self._data, self._settings = attack, data, settings

    def run(self, positions: Sequence[int]) -> list[Record]:
        from flowverify.threat import WassersteinBall

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

    network = sources.network(task.settings["model"], data).to(context.device)
    options = {"batch_size": task.chunk, "seed": context.seed, **task.settings["options"]}
    return make_attack(task.settings["attack"], network, **options)


def _try(fields: Fields, task: Task, defaults: Defaults) -> None:
    """Builds the attack once, so that an option that it does not take is found before anything starts."""
    if not task.settings["options"]:
        return
    try:
        _attack(task, sources.dataset(task.settings["data"]), Context())
    except (TypeError, ValueError, LookupError) as error:
        raise InvalidInputError(f"{fields.name('options')}: {error}") from error
