"""Jobs that certify: a radius is decided, or the largest certified one is searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.image_tasks import ImageTasks
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.options import DOMAINS
from flowverify.errors import FlowverifyError, InvalidInputError
from flowverify.registry import COMPLETE, INCOMPLETE, LINEAR, METHODS

if TYPE_CHECKING:
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset


class Certify(Kind):
    """Every model x method x bound x ground cost x radius of a run, over its images."""

    name = "certify"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        images = ImageTasks.read(fields, defaults)
        methods = fields.names("methods", METHODS, "fine-tuned")
        bounds = fields.names("bounds", tuple(BOUNDS), "best")
        references = fields.integer("references", 0)
        domain = fields.one_of("domain", DOMAINS, "auto")
        cap = fields.cap()
        complete, linear = METHODS.family(COMPLETE), METHODS.family(LINEAR)
        seconds = fields.number("seconds", 60.0, above=True) if set(methods) & set(complete) else None
        options = fields.take("options", {})
        if not isinstance(options, dict):
            raise fields.wrong("options", options, "options of the methods with their values")
        fields.finish()
        if references and set(methods) & {*linear, "complete", "milp"}:
            raise fields.wrong("references", references, "none for methods that are exact")
        after = [f"references {references}"] if references else []
        after += [f"domain {domain}"] if domain != "auto" else []
        after += [f"cap {cap:g}"] if cap is not None else []
        after += [f"{key} {value}" for key, value in options.items()]
        ways = []
        for method in methods:
            bounded = method in METHODS.family(INCOMPLETE)
            for bound in bounds if bounded else [_decided_by(method, images.grounds, cap)]:
                own: dict[str, Any] = {
                    "method": method,
                    "bound": bound,
                    "references": references,
                    "domain": domain,
                    "cap": cap,
                }
                values = {**({"timeout": seconds} if method in complete else {}), **options}
                try:  # what a method does not take is found before anything starts
                    METHODS.options(method, values)
                except FlowverifyError as error:
                    raise InvalidInputError(f"{fields.name('options')}: {error}") from error
                own["options"] = values
                ways.append(([method, bound], own, after))
        return list(images.expand(self.name, ways, sources.positions_of(fields, images.data, defaults)))

    def prepare(self, task: Task, context: Context) -> Prepared:
        from flowverify.api import make_certifier
        from flowverify.ball import WassersteinBall

        settings = task.settings
        domain = {} if settings["domain"] == "auto" else {"domain": settings["domain"]}
        data = sources.dataset(settings["data"])
        sources.check_digest(settings)
        certifier = make_certifier(
            sources.network(settings["model"], data.input_shape).to(context.device),
            settings["method"],
            settings["bound"],
            references=settings["references"],
            pool=data.images if settings["references"] else None,
            **domain,
            **settings["options"],
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
