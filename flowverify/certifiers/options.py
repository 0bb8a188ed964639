"""The options of incomplete certification; nothing heavy is imported, so that help texts can be read from here."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.bounds.recipes import BOUNDS, check_bound
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import option

DOMAINS = ("auto", "image", "flow")


@dataclass(frozen=True)
class IncompleteOptions:
    """How bounds over a ball are computed, and how far a radius is searched.

    Raises:
        UnknownNameError: an unknown bound or domain.
        InvalidInputError: a tolerance outside (0, 1), or a batch size below 1.
    """

    bound: str = option("best", f"{', '.join(list(BOUNDS)[:-1])} or {list(BOUNDS)[-1]}.")
    domain: str = option("auto", f"Where CROWN runs: {', '.join(DOMAINS[:-1])} or {DOMAINS[-1]}.")
    tolerance: float = option(0.01, "Of a searched radius, relative.")
    batch_size: int = option(100, "Images whose radii are searched together.")

    def __post_init__(self) -> None:
        check_bound(self.bound)
        if self.domain not in DOMAINS:
            raise UnknownNameError("domain", self.domain, DOMAINS)
        if not 0 < self.tolerance < 1:
            raise InvalidInputError(f"tolerance {self.tolerance!r}: expected a number between 0 and 1")
        if self.batch_size < 1:
            raise InvalidInputError(f"batch size {self.batch_size!r}: expected at least 1")
