"""What a worker may use, and what it used: threads, memory, and the machine that it was."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
