"""The options of outside engines; nothing heavy is imported, so that help texts can be read from here."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import option

ENCODINGS = ("cuts", "linear", "outputs", "penalty")


@dataclass(frozen=True)
class MarabouOptions:
    """How Marabou is asked, and how long.

    Raises:
        UnknownNameError: another encoding.
        InvalidInputError: a timeout that is not positive.
    """

    encoding: str = option(
        "cuts", "How marabou is asked: cuts (class by class), or by files: linear, outputs or penalty."
    )
    timeout: float = option(300.0, "Seconds for an image and a radius.")

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise UnknownNameError("encoding for marabou", self.encoding, ENCODINGS)
        if not self.timeout > 0:
            raise InvalidInputError(f"timeout: given {self.timeout!r}, expected seconds > 0")
