"""The options of complete methods; nothing heavy is imported, so that help texts can be read from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowverify.certifiers.complete.deadline import Deadline
from flowverify.certifiers.complete.settings import SearchSettings
from flowverify.errors import InvalidInputError
from flowverify.registry import option

if TYPE_CHECKING:
    from flowverify.certifiers.complete.counterexamples import Adversary
    from flowverify.certifiers.complete.radius_search import Progress


@dataclass(frozen=True)
class CompleteOptions:
    """How far a complete method goes.

    Attributes:
        adversary: such as :class:`flowverify.attack.minimal.MinimalRadius`; :func:`flowverify.api.make_certifier` takes
            the name of an attack, too.
        progress: told what is known, now and then.
        clock: what seconds are counted by.
        settings: how the search goes about its work; nothing that is proven.

    Raises:
        InvalidInputError: a timeout or a number of nodes that is not positive, a tolerance outside (0, 1).
    """

    timeout: float | None = option(60.0, "Seconds for an image, and radius; none for no limit.")
    nodes: int | None = option(None, "Nodes of the search trees of each image; none for no limit.")
    tolerance: float = option(0.01, "Of the bracket that a radius search closes, relative.")
    adversary: Adversary | None = field(
        default=None, metadata={"help": "An attack for first counterexamples; without, the search finds its own."}
    )
    progress: Callable[[Progress], None] | None = None
    clock: Callable[[], float] = time.perf_counter
    settings: SearchSettings = field(default=SearchSettings())

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInputError(f"timeout: given {self.timeout!r}, expected seconds > 0")
        if self.nodes is not None and self.nodes < 1:
            raise InvalidInputError(f"nodes: given {self.nodes!r}, expected at least 1")
        if not 0 < self.tolerance < 1:
            raise InvalidInputError(f"tolerance: given {self.tolerance!r}, expected a number between 0 and 1")

    def deadline(self) -> Deadline:
        """For one image, from now on."""
        return Deadline(self.timeout, self.nodes, self.clock)
