"""Jobs that certify: a radius is decided, or the largest certified one is searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.image_tasks import ImageTasks
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.bounds.recipes import BOUNDS, METHODS
from flowverify.certifiers.methods import COMPLETE_METHODS, LINEAR_METHODS

if TYPE_CHECKING:
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset

DOMAINS = ("auto", "image", "flow")


class Certify(Kind):
    """Every model x method x bound x ground cost x radius of a run, over its images."""

    name = "certify"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        images = ImageTasks.read(fields, defaults)
        methods = fields.names("methods", (*METHODS, *LINEAR_METHODS, *COMPLETE_METHODS), "fine-tuned")
        bounds = fields.names("bounds", tuple(BOUNDS), "best")
        references = fields.integer("references", 0)
        domain = fields.one_of("domain", DOMAINS, "auto")
        cap = fields.cap()
        seconds = fields.number("seconds", 60.0, above=True) if set(methods) & set(COMPLETE_METHODS) else None
        fields.finish()
        if references and set(methods) & {*LINEAR_METHODS, "complete", "milp"}:
            raise fields.wrong("references", references, "none for methods that are exact")
        after = [f"references {references}"] if references else []
        after += [f"domain {domain}"] if domain != "auto" else []
        after += [f"cap {cap:g}"] if cap is not None else []
        ways = []
        for method in methods:
            exact = method in LINEAR_METHODS or method in COMPLETE_METHODS
            for bound in [_decided_by(method, images.grounds, cap)] if exact else bounds:
                own = {"method": method, "bound": bound, "references": references, "domain": domain, "cap": cap}
                if method in COMPLETE_METHODS:
                    own["seconds"] = seconds
                ways.append(([method, bound], own, after))
        return list(images.expand(self.name, ways, sources.positions_of(fields, images.data, defaults)))

    def prepare(self, task: Task, context: Context) -> Prepared:
        from flowverify.ball import WassersteinBall
        from flowverify.certifiers.complete.certifier import CompleteOptions
        from flowverify.certifiers.make import make_certifier

        settings = task.settings
        seconds = settings.get("seconds")
        data = sources.dataset(settings["data"])
        sources.check_digest(settings)
        certifier = make_certifier(
            sources.network(settings["model"], data.input_shape).to(context.device),
            settings["method"],
            settings["bound"],
            domain=settings["domain"],
            references=settings["references"],
            pool=data.images if settings["references"] else None,
            options=None if seconds is None else CompleteOptions(timeout=seconds),
        )
        radius = settings["radius"]
        ball = WassersteinBall(0.0 if radius is None else radius, settings["ground"], settings.get("cap"))
        certifier.prepare(ball.ground, ball.cap)
        return _Certification(certifier, data, ball, searching=radius is None)


def _decided_by(method: str, grounds: Sequence[str], cap: float | None) -> str:
    """What stands for a bound in the names of methods that take none; "exact" only where every certificate is."""
    if method in COMPLETE_METHODS:
        return "highs" if method == "milp" else "branch-and-bound"
    exact = cap is None and (method == "linear" or set(grounds) == {"l1"})
    return "exact" if exact else "lower-bound"


class _Certification(Prepared):
    def __init__(self, certifier: BaseCertifier, data: Dataset, ball: WassersteinBall, *, searching: bool) -> None:
        self._certifier, self._data, self._ball, self._searching = certifier, data, ball, searching

    def run(self, positions: Sequence[int]) -> list[Record]:
        chosen = self._data[list(positions)]
        if self._searching:
            found = self._certifier.search(chosen.images, chosen.labels, self._ball.ground, self._ball.cap)
        else:
            found = self._certifier.certify(chosen.images, chosen.labels, self._ball)
        records: list[dict[str, Any]] = [certificate.to_json() for certificate in found]
        return records
