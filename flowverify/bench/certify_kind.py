"""Jobs that certify: a radius is decided, or the largest certified one is searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from flowverify.bench import sources
from flowverify.bench.image_tasks import ImageRun
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.bounds.recipes import BOUNDS, METHODS
from flowverify.certifiers.methods import COMPLETE_METHODS, LINEAR_METHODS
from flowverify.settings import Natural, OneOf, PositiveNumber, settings, several, wrong

if TYPE_CHECKING:
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset

DOMAINS = ("auto", "image", "flow")
ALL_METHODS = (*METHODS, *LINEAR_METHODS, *COMPLETE_METHODS)
Method = Annotated[str, OneOf(ALL_METHODS)]
Bound = Annotated[str, OneOf(tuple(BOUNDS))]


@settings
class CertifyRun(ImageRun):
    """Every model x method x bound x ground cost x radius, over the same images."""

    kind: Literal["certify"] = Field("certify", description="Jobs that certify, the default.")
    methods: Annotated[list[Method], several(Method)] = Field(["fine-tuned"], description=f"{', '.join(ALL_METHODS)}.")
    bounds: Annotated[list[Bound], several(Bound)] = Field(
        ["best"], description=f"{', '.join(BOUNDS)}; exact methods take none."
    )
    seconds: PositiveNumber = Field(60.0, description="For an image, of complete methods.")
    references: Natural = Field(0, description="The maximum over so many references.")
    domain: Annotated[str, OneOf(DOMAINS)] = Field("auto", description="Where CROWN runs: auto, image or flow.")


class Certify(Kind[CertifyRun]):
    """A radius is decided, or the largest certified one is searched."""

    name = "certify"
    settings = CertifyRun

    def expand(self, run: CertifyRun, defaults: Defaults) -> list[Task]:
        if run.references and set(run.methods) & {*LINEAR_METHODS, "complete", "milp"}:
            raise wrong("references", run.references, "none for methods that are exact")
        after = [f"references {run.references}"] if run.references else []
        after += [f"domain {run.domain}"] if run.domain != "auto" else []
        after += [f"cap {run.cap:g}"] if run.cap is not None else []
        ways = []
        for method in run.methods:
            exact = method in LINEAR_METHODS or method in COMPLETE_METHODS
            for bound in [_decided_by(method, run.grounds, run.cap)] if exact else run.bounds:
                own = {"method": method, "bound": bound, "references": run.references, "domain": run.domain}
                if method in COMPLETE_METHODS:
                    own["seconds"] = run.seconds
                ways.append(([method, bound], own, after))
        return list(run.tasks(ways, defaults))

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
