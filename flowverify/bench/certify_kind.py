"""Jobs that certify: a radius is decided, or the largest certified one is searched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.certify.methods import BOUNDS, LINEAR_METHODS, METHODS
from flowverify.transport.ground import GROUNDS

if TYPE_CHECKING:
    from flowverify.certify.base import BaseCertifier
    from flowverify.data import Dataset
    from flowverify.threat import WassersteinBall

DOMAINS = ("auto", "image", "flow")


class Certify(Kind):
    """Every model x method x bound x ground cost x radius of a run, over its images."""

    name = "certify"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        label = fields.text("label", "")
        models = sources.read_models(fields, defaults.folder, defaults.models)
        data = sources.read_data(fields.inside("data", dict(defaults.data)), defaults.folder)
        methods = fields.names("methods", (*METHODS, *LINEAR_METHODS), "fine-tuned")
        bounds = fields.names("bounds", tuple(BOUNDS), "best")
        grounds = fields.names("grounds", tuple(GROUNDS), "l1")
        radii = fields.radii("radii")
        references = fields.integer("references", 0)
        domain = fields.one_of("domain", DOMAINS, "auto")
        chunk = fields.integer("chunk", defaults.chunk, least=1)
        fields.finish()
        if references and set(methods) & set(LINEAR_METHODS):
            raise fields.wrong("references", references, "none for methods that are exact")
        positions = sources.positions_of(fields, data, defaults)
        tasks = []
        for model, method, ground, radius in itertools.product(models, methods, grounds, radii):
            for bound in ["exact"] if method in LINEAR_METHODS else bounds:
                parts = [label, self.name, sources.short(model), method, bound, ground]
                parts += [f"references {references}"] if references else []
                parts += [f"domain {domain}"] if domain != "auto" else []
                parts += ["search" if radius is None else f"radius {radius:g}"]
                settings = {
                    "model": model,
                    "sha256": sources.digest(model),
                    "data": data,
                    "method": method,
                    "bound": bound,
                    "ground": ground,
                    "radius": radius,
                    "references": references,
                    "domain": domain,
                }
                tasks.append(Task("/".join(filter(None, parts)), self.name, settings, positions, chunk))
        return tasks

    def prepare(self, task: Task, context: Context) -> Prepared:
        from flowverify.certify.make import make_certifier
        from flowverify.threat import WassersteinBall

        settings = task.settings
        data = sources.dataset(settings["data"])
        sources.check_digest(settings)
        certifier = make_certifier(
            sources.network(settings["model"], data).to(context.device),
            settings["method"],
            settings["bound"],
            domain=settings["domain"],
            references=settings["references"],
            pool=data.images if settings["references"] else None,
        )
        certifier.prepare()
        radius, ground = settings["radius"], settings["ground"]
        return _Certification(certifier, data, None if radius is None else WassersteinBall(radius, ground), ground)


class _Certification(Prepared):
    def __init__(self, certifier: BaseCertifier, data: Dataset, ball: WassersteinBall | None, ground: str) -> None:
        self._certifier, self._data, self._ball, self._ground = certifier, data, ball, ground

    def run(self, positions: Sequence[int]) -> list[Record]:
        chosen = self._data[list(positions)]
        if self._ball is None:
            found = self._certifier.search(chosen.images, chosen.labels, self._ground)
        else:
            found = self._certifier.certify(chosen.images, chosen.labels, self._ball)
        records: list[dict[str, Any]] = [certificate.to_json() for certificate in found]
        return records
