"""Jobs that certify: a radius is decided, or the largest certified one is searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from flowverify.bench import sources
from flowverify.bench.image_tasks import ImageRun
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.options import DOMAINS
from flowverify.errors import FlowverifyError
from flowverify.registry import COMPLETE, INCOMPLETE, LINEAR, METHODS
from flowverify.settings import Natural, OneOf, PositiveNumber, SettingError, settings, several, wrong

if TYPE_CHECKING:
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset

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
