"""What a worker does, wherever it runs: it prepares tasks, computes jobs, and answers, whatever happens.

With each answer goes what the worker used: threads, memory, and the machine that it was.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from flowverify.bench.tasks import Context, Job, Prepared, Record
from flowverify.errors import FlowverifyError

try:
    import resource
except ImportError:  # not a POSIX system: memory is neither limited nor measured
    resource = None  # type: ignore[assignment]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
MEBIBYTE = 1 << 20
_STATUS = Path("/proc/self/status")
_PACKAGES = ("torch", "numpy", "numba", "scipy", "POT")


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that keep numerical libraries to so many threads; they read them when they are loaded."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def limit_memory(mebibytes: float) -> None:
    """Lets this process allocate so much more than it has; beyond it, allocations fail as if memory were full."""
    if resource is None or not _STATUS.is_file():
        return
    held = _status("VmSize")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = int(held + mebibytes * MEBIBYTE)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def physical_memory() -> float:
    """MiB of this machine, or of the control group that this process is confined to."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            most = min(most, int(text))
    return most / MEBIBYTE


def available_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forget_peak() -> None:
    """Lets :func:`peak_memory` count from now on, where the system can."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Hands freed memory back to the system, so that one large job does not count against the next."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> float | None:
    """MiB: the most that this process has had in memory since :func:`forget_peak`."""
    if _STATUS.is_file():
        return round(_status("VmHWM") / MEBIBYTE, 1)
    return None if resource is None else round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, as every record has them."""
    import flowverify

    versions = {"flowverify": flowverify.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    try:
        from flowverify.bounds.crown.backend import VERSION

        versions["auto_LiRPA"] = VERSION
    except ImportError:
        versions["auto_LiRPA"] = "none"
    return {
        "versions": versions,
        "host": platform.node(),
        "processor": processor(),
        "processors": available_processors(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+([0-9]+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


KEPT = 2  # prepared tasks a worker holds; jobs come sorted by task


@dataclass(frozen=True)
class Setup:
    """How a worker sets itself up."""

    context: Context
    threads: int
    memory: float | None  # MiB beyond what it starts with; None for no limit
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The answer to one request.

    Attributes:
        records: of a job that was computed.
        reason: why it was not; "" if nothing went wrong.
        divisible: whether its images may fare better one by one.
        seconds: the worker's own time for the request.
    """

    records: list[Record] = field(default_factory=list)
    reason: str = ""
    divisible: bool = True
    seconds: float = 0.0


class Session:
    """A worker's state from job to job. Its process computes nothing else."""

    def __init__(self, setup: Setup) -> None:
        import torch

        self._context = setup.context
        # Not numba's threads: no kernel uses them, and to set their number takes a lock that all workers forked from
        # one server share, which a worker that is killed while it holds it takes with it.
        torch.set_num_threads(setup.threads)
        self._prepared: OrderedDict[str, Prepared] = OrderedDict()
        self._environment = {**environment(), "threads": setup.threads, "device": setup.context.device}
        gc.collect()
        gc.freeze()  # the libraries stay: collections between jobs need not look at them
        if setup.memory is not None:
            limit_memory(setup.memory)

    def handle(self, action: Literal["prepare", "run"], job: Job) -> Reply:
        """Answers a request; an exception becomes an answer too."""
        start = time.perf_counter()
        try:
            records = self._run(job) if action == "run" else self._prepare(job)
        except Exception as error:
            # A mistake in the suite or the model is the same for every image; anything else may be one image's.
            divisible = action == "run"
            records, reason = [], _reason(error)
        else:
            divisible, reason = True, ""
        if reason:
            release_memory()
        return Reply(records, reason, divisible, time.perf_counter() - start)

    def _prepare(self, job: Job) -> list[Record]:
        from flowverify.bench.tasks import find_kind

        name = job.task.name
        if name not in self._prepared:
            while len(self._prepared) >= KEPT:
                self._prepared.popitem(last=False)
            self._prepared[name] = find_kind(job.task.kind).prepare(job.task, self._context)
        self._prepared.move_to_end(name)
        return []

    def _run(self, job: Job) -> list[Record]:
        forget_peak()
        found = self._prepared[job.task.name].run(job.positions)
        if len(found) != len(job.positions):
            raise RuntimeError(f"{len(found)} results for {len(job.positions)} images")
        memory = peak_memory()
        own = {"peak_memory_mib": memory, "environment": self._environment}
        return [
            complete(job, position, {**record, **own}, self._context)
            for position, record in zip(job.positions, found, strict=True)
        ]


def complete(job: Job, position: int, result: Record, context: Context) -> Record:
    """A record with what all records have; the settings of its task are in the suite."""
    own = {key: value for key, value in job.task.settings.items() if isinstance(value, str | int | float | None)}
    for key in ("sha256", "file", "folder"):
        own.pop(key, None)
    data = job.task.settings.get("data")
    if data is not None:
        own |= {"dataset": data["name"], "split": data["split"]}
    return {
        "task": job.task.name,
        "index": position,
        "kind": job.task.kind,
        **own,
        **result,
        "seed": context.seed,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }


def failure(job: Job, position: int, verdict: str, reason: str, seconds: float, context: Context) -> Record:
    """The record of an image without a result."""
    radius = job.task.settings.get("radius")
    result = {"radius": radius, "verdict": verdict, "margin": None, "seconds": round(seconds, 6), "note": reason}
    return complete(job, position, {**result, "environment": environment()}, context)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "std::bad_alloc" in text:
        return f"out of memory: {text or name}"
    return text if isinstance(error, FlowverifyError) else f"{name}: {text}" if text else name
