"""When a search stops: seconds, nodes, or an event; and shares of them for the parts of a search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Deadline:
    """Counts from when it is made.

    Args:
        seconds, nodes: how much there is; None for no limit.
        clock: what tells the seconds, such as ``time.process_time`` on a busy machine.
    """

    def __init__(
        self, seconds: float | None = None, nodes: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._begin, self._spent = clock, clock(), 0
        self._seconds, self._nodes = seconds, nodes
        self._parent: Deadline | None = None
        self._until: Callable[[], bool] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._begin

    @property
    def seconds_left(self) -> float:
        """Infinite without a limit."""
        above = math.inf if self._parent is None else self._parent.seconds_left
        return above if self._seconds is None else min(above, self._seconds - self.elapsed)

    @property
    def nodes_left(self) -> float:
        """Infinite without a limit."""
        above = math.inf if self._parent is None else self._parent.nodes_left
        return above if self._nodes is None else min(above, self._nodes - self._spent)

    @property
    def left(self) -> float:
        """In the unit that is limited: seconds, or nodes where those are not; infinite without any limit."""
        seconds = self.seconds_left
        return self.nodes_left if seconds == math.inf else seconds

    def spend(self, nodes: int) -> None:
        """So many nodes were bounded; not for several threads at a time."""
        self._spent += nodes
        if self._parent is not None:
            self._parent.spend(nodes)

    def stop(self) -> bool:
        """Whether it is over."""
        return (
            (self._parent is not None and self._parent.stop())
            or (self._seconds is not None and self._seconds - self.elapsed <= 0)
            or (self._nodes is not None and self._nodes <= self._spent)
            or (self._until is not None and self._until())
        )

    def child(
        self, *, share: float | None = None, nodes: int | None = None, until: Callable[[], bool] | None = None
    ) -> Deadline:
        """A part of it, that ends when this does, or earlier.

        Args:
            share: of what is left, in the unit that is limited.
            nodes: at most so many.
            until: an event that ends it, asked about whenever :meth:`stop` is.
        """
        found = Deadline(None, nodes, self._clock)
        found._parent, found._until = self, until
        if share is not None and self.seconds_left < math.inf:
            found._seconds = share * self.seconds_left
        elif share is not None and self.nodes_left < math.inf:
            found._nodes = share * self.nodes_left
        return found
