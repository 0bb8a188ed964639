"""When a search stops: seconds, nodes, or an event; and shares of them for the parts of a search.

And who does the work until then: threads that share out the rows of a batch, of which none depends on another.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor


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


Part = TypeVar("Part")
Result = TypeVar("Result")

WORTH_A_THREAD = 8  # rows


class Workers:
    """Within ``with`` as many threads as torch had, and torch uses one in each of them; on the CPU.

    Outside of it, and in a thread of its own, work is done one after the other.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self._pool: ThreadPoolExecutor | None = None
        self._owner, self._threads = 0, 1

    def __enter__(self) -> Workers:
        threads = torch.get_num_threads()
        if self._device.type == "cpu" and threads > 1:
            torch.set_num_threads(1)
            self._pool, self._threads, self._owner = ThreadPoolExecutor(threads), threads, threading.get_ident()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)
            self._pool, self._threads = None, 1

    @property
    def count(self) -> int:
        """How many threads share the work of the one that asks."""
        return self._threads if threading.get_ident() == self._owner else 1

    def each(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """``function`` of every part, in order; the first exception is raised once all have ended."""
        if self._pool is None or self.count < 2 or len(parts) < 2:
            return [function(part) for part in parts]
        futures = [self._pool.submit(function, part) for part in parts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def parts(self, rows: Tensor, largest: int) -> list[Tensor]:
        """The rows in runs of at most ``largest``, and at least one run for each thread where there are enough."""
        if not len(rows):
            return []
        runs = max(-(-len(rows) // largest), min(self.count, max(1, len(rows) // WORTH_A_THREAD)))
        return list(torch.tensor_split(rows, runs))

    def dealt(self, size: int) -> list[Tensor]:
        """So many rows, dealt to the threads in turn."""
        hands = min(self.count, max(1, size // WORTH_A_THREAD))
        return [torch.arange(first, size, hands) for first in range(hands)]
