"""What every benchmark prints first: where, when, and with what it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}  # the latter for a machine that does other work


def header(title: str) -> None:
    """Prints the title with date, machine and versions."""
    from flowverify.bounds.crown.backend import VERSION

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "numba", "scipy"))
    print(f"\n## {title}")
    print(
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, {versions}, auto_LiRPA {VERSION}"
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Appends the seconds of its block to the list that it yields."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def quartiles(values: torch.Tensor) -> str:
    """Median and quartiles, for a table cell."""
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"
