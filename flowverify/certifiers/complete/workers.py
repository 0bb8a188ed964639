"""Threads that share out the rows of a batch: one row's bound has nothing to do with another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")

SMALL = 8  # rows that are not worth a thread

# A thread of the pool has a context of its own, so that what it does is not shared out again.
_workers: ContextVar[tuple[int, ThreadPoolExecutor] | None] = ContextVar("workers", default=None)


@contextmanager
def workers(device: torch.device) -> Iterator[None]:
    """Within it :func:`each` uses as many threads as torch had, and torch uses one in each of them; on the CPU."""
    count = torch.get_num_threads()
    if device.type != "cpu" or count < 2 or _workers.get() is not None:
        yield
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)
    token = _workers.set((count, pool))
    try:
        yield
    finally:
        _workers.reset(token)
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(count)


def each(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """``function`` of every part, in order; the first exception is raised once all have ended."""
    own = _workers.get()
    if own is None or len(parts) < 2:
        return [function(part) for part in parts]
    futures = [own[1].submit(function, part) for part in parts]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def count() -> int:
    """How many threads there are."""
    own = _workers.get()
    return 1 if own is None else own[0]


def parts(rows: Tensor, largest: int) -> list[Tensor]:
    """The rows in runs of at most ``largest``, and at least one run for each thread where there are enough."""
    if not len(rows):
        return []
    runs = max(-(-len(rows) // largest), min(count(), max(1, len(rows) // SMALL)))
    return list(torch.tensor_split(rows, runs))
