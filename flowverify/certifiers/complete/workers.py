"""Who does the work of a search: threads that share out the rows of a batch, of which none depends on another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

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
