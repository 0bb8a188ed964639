"""Verdicts and certificates: what a certifier says about one image, and on what grounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.notebook import html_table

if TYPE_CHECKING:
    from torch import Tensor

OPTIONAL = ("upper_radius", "note")  # in a record only where there is something to say


class Verdict(StrEnum):
    """The outcome for one image."""

    CERTIFIED = "certified"  # no image in the ball is classified otherwise: proven
    FALSIFIED = "falsified"  # an image in the ball is classified otherwise: shown, and replayed
    UNKNOWN = "unknown"  # neither
    MISCLASSIFIED = "misclassified"  # the image itself is not classified as its label says
    TIMEOUT = "timeout"  # the budget ran out first
    ERROR = "error"  # the computation broke down; the note says how


@dataclass(frozen=True, repr=False)
class Certificate:
    """What was shown about one image.

    Attributes:
        prediction: None where a randomised classifier has none.
        verdict: at ``radius``. A radius search that certified some radius > 0 says certified.
        radius: W1 of normalised images, in pixels, for the ground cost ``ground`` (W_p for a p-th power): the
            radius asked about, or the largest one that a search certified (0 if none).
        margin: the proven lower bound on min over t of f_y - f_t at ``radius``; None where nothing was computed.
        upper_radius: a radius known not to be certifiable, from an attack or a complete method.
        seconds: wall time; for a batch, its share.
        note: what the verdict does not say, such as an error's message.
        cap: largest value of a pixel in the ball; None for no limit.
        witness: an image (C, H, W) at ``upper_radius`` that is classified otherwise, where a method gives it.
    """

    verdict: Verdict
    label: int
    prediction: int | None
    method: str
    bound: str
    ground: str
    radius: float
    margin: float | None
    seconds: float
    upper_radius: float | None = None
    note: str = ""
    cap: float | None = None
    witness: Tensor | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        shown = [f"{name} {value}" for name, value in self._shown() if name != "verdict"]
        return f"{type(self).__name__}({self.verdict}: {', '.join(shown)})"

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._shown())

    def _shown(self) -> list[tuple[str, object]]:
        """What a reader wants to know, by name."""
        from flowverify.ball import distance_name  # needs torch, without which commands are listed sooner

        distance = distance_name(self.ground, self.cap)
        margin = None if self.margin is None else f"{self.margin:.4g}"
        upper = None if self.upper_radius is None else f"{self.upper_radius:.4g} pixels ({distance})"
        shown = [
            ("verdict", self.verdict),
            ("label", self.label),
            ("predicted", self.prediction),
            ("radius", f"{self.radius:.4g} pixels ({distance})"),
            ("at most", upper),
            ("margin", margin),
            ("method", self.method),
            ("bound", self.bound),
            ("seconds", f"{self.seconds:.3g}"),
            ("note", self.note or None),
        ]
        return [(name, value) for name, value in shown if value is not None]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; ``upper_radius`` and ``note`` only where there is one. No witness."""
        record: dict[str, Any] = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name != "witness" and (one.name not in OPTIONAL or getattr(self, one.name) not in (None, ""))
        }
        return record | {"verdict": str(self.verdict), "seconds": round(self.seconds, 6)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The certificate of a record of :meth:`to_json`, whatever else the record holds.

        Raises:
            InvalidInputError: a record without one of the fields.
            UnknownNameError: another word for the verdict.
        """
        needed = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
        if lacking := [name for name in needed if name not in record]:
            given = ", ".join(record)
            raise InvalidInputError(f"record with {given}: expected a certificate, which has {', '.join(lacking)} too")
        if record["verdict"] not in list(Verdict):
            raise UnknownNameError("verdict", record["verdict"], [str(verdict) for verdict in Verdict])
        values = {one.name: record[one.name] for one in fields(cls) if one.name in record and one.name != "witness"}
        return cls(**values | {"verdict": Verdict(record["verdict"])})


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a long search, with the certificates that were reached until then."""

    def __init__(self, certificates: Sequence[Certificate]) -> None:
        super().__init__()
        self.certificates = list(certificates)
