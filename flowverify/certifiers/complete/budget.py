"""How long a search may go on, and what it tells meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """What is known while a search runs: the bracket, the radius of the present tree, its open nodes."""

    radius: float
    upper_radius: float
    trial: float
    open_nodes: int
    done: float
    nodes: int


@dataclass
class Budget:
    """When to stop: seconds of wall time, or nodes; None for no limit.

    Attributes:
        clock: what tells the time, such as ``time.process_time`` on a busy machine.
    """

    seconds: float | None = None
    nodes: int | None = None
    clock: Callable[[], float] = field(default=time.perf_counter)
