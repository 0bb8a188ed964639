"""A suite from start to end: what is left to do, who does it, and what becomes of jobs that fail."""

from __future__ import annotations

import datetime
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from flowverify.bench.pool import Backend, Outcome, Pool, Times
from flowverify.bench.session import environment, failure
from flowverify.bench.store import Store, key_of
from flowverify.bench.suite import Suite
from flowverify.bench.tasks import Job, Record
from flowverify.errors import DataError

FAILURES = ("error", "timeout")
SECOND_CHANCES = 1  # for a job whose worker died, before its images are tried one by one


@dataclass(frozen=True)
class Progress:
    """How far a run is: records in the store, of how many, and those that this run has added."""

    done: int
    total: int
    added: int
    failed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.added / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds that are left at this rate."""
        return (self.total - self.done) / self.rate if self.added else None


@dataclass(frozen=True)
class RunReport:
    """What one run did."""

    added: int
    seconds: float
    times: Times


def run_suite(
    suite: Suite,
    store: Store,
    backend: Backend,
    *,
    retry_timeouts: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RunReport:
    """Computes what the store lacks, and what it holds as ``error``.

    A job of several images that fails is divided into its images, so that one image costs no other its result. A
    job whose worker died is tried once more as a whole, since the cause may have been outside. Images that fail
    alone become records with the verdict ``error`` or ``timeout`` and the reason. Budgets are seconds of ``clock``.

    Raises:
        DataError: the store cannot be written to; what it holds is kept.
        BoundError: workers do not start.
    """
    begin, before = clock(), len(store.records)
    queue = deque(_open_jobs(suite, store, retry_timeouts))
    missing = {key for job in queue for key in job.keys if _wanted(store.records.get(key), retry_timeouts)}
    added, failed = 0, 0

    def report() -> None:
        if on_progress is not None:
            elapsed = clock() - begin
            on_progress(Progress(suite.size - len(missing), suite.size, added, failed, elapsed))

    pool = Pool(backend, suite.budget, clock)
    report()
    try:
        while queue or pool.busy:
            while queue and pool.room():
                pool.start(queue.popleft())
            for outcome in pool.wait():
                again, records = _settle(outcome, suite)
                queue.extendleft(reversed(again))
                # A job that was interrupted is computed as a whole, and so is known in part.
                fresh = [record for record in records if key_of(record) in missing]
                if fresh:
                    store.append(fresh)
                    missing.difference_update(key_of(record) for record in fresh)
                    added += len(fresh)
                    failed += sum(record["verdict"] in FAILURES for record in fresh)
                    report()
    finally:
        with _undisturbed():
            pool.close()
            seconds = clock() - begin
            if added:
                with suppress(DataError):  # a full disk has said so already
                    store.log(_log_entry(backend, pool.times, before, added, seconds, complete=not missing))
    return RunReport(added, seconds, pool.times)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds back a second Ctrl-C, which would leave workers behind that the process then waits for when it ends."""
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _log_entry(
    backend: Backend, times: Times, before: int, added: int, seconds: float, *, complete: bool
) -> dict[str, Any]:
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "records_before": before,
        "records_added": added,
        "seconds": round(seconds, 3),
        "workers": backend.workers,
        **{key: round(value, 3) for key, value in asdict(times).items()},
        "overhead": round(times.overhead, 5),
        "environment": environment(),
    }


def _open_jobs(suite: Suite, store: Store, retry_timeouts: bool) -> Iterator[Job]:
    """Jobs with a record to be made. A job is computed as a whole, as it would have been without interruption.

    Where a part of its images has failed before, only these are tried again, each alone.
    """
    for job in suite.jobs():
        known = [store.records.get(key) for key in job.keys]
        wanted = [
            position for position, record in zip(job.positions, known, strict=True) if _wanted(record, retry_timeouts)
        ]
        if None in known or len(wanted) == len(job.positions):
            yield job
        else:
            yield from (replace(job, positions=(position,)) for position in wanted)


def _settle(outcome: Outcome, suite: Suite) -> tuple[list[Job], list[Record]]:
    """The jobs to be tried instead, or the records."""
    job, reply = outcome.job, outcome.reply
    if not outcome.failure:
        return [], reply.records
    if outcome.failure == "died" and job.deaths < SECOND_CHANCES:
        return [replace(job, deaths=job.deaths + 1)], []
    if reply.divisible and len(job.positions) > 1:
        return [Job(job.task, (position,), job.deaths) for position in job.positions], []
    verdict = "timeout" if outcome.failure == "timeout" else "error"
    share = reply.seconds / len(job.positions)
    records = [failure(job, position, verdict, reply.reason, share, suite.context) for position in job.positions]
    return [], records


def _wanted(record: Record | None, retry_timeouts: bool) -> bool:
    return record is None or record["verdict"] == "error" or (retry_timeouts and record["verdict"] == "timeout")
