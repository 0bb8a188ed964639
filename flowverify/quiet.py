"""Silence for solvers that print from native code, past ``sys.stdout``, and for libraries that warn of themselves."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

_STDOUT = 1
_lock = Lock()
_inside = 0
_kept: int | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Standard output goes nowhere inside, on the level of the file descriptor; errors are heard.

    The descriptor belongs to the process, so that what other threads print meanwhile is lost too: for calls of a
    solver only. Blocks may be nested and overlap in several threads; the last one to end restores the output.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Warnings go nowhere inside: those that a library gives about the use that is made of it here.

    The filter belongs to the process: for calls of a library only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _enter() -> None:
    global _inside, _kept
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        _flush()
        with suppress(OSError):  # a closed standard output is quiet as it is
            _kept = os.dup(_STDOUT)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, _STDOUT)
            os.close(nowhere)


def _leave() -> None:
    global _inside, _kept
    with _lock:
        _inside -= 1
        if _inside or _kept is None:
            return
        _flush()
        os.dup2(_kept, _STDOUT)
        os.close(_kept)
        _kept = None


def _flush() -> None:
    """What Python and C hold in their buffers goes where it was meant to go."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
