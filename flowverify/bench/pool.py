"""Workers and their jobs: who is free, who is late, who has died. The same for every kind of runner."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from flowverify.bench.session import Reply
from flowverify.bench.suite import Budget
from flowverify.bench.tasks import Job
from flowverify.errors import BoundError

STARTING = 600.0  # seconds in which a worker must be there; one that dies is missed at once
FAILED_STARTS = 3


class WorkerDiedError(Exception):
    """The process behind a worker is gone; the message says how."""


class Worker(ABC):
    """One process that handles one request at a time; it says when it is ready for the first."""

    @abstractmethod
    def send(self, action: Literal["prepare", "run"], job: Job) -> None:
        """Hands over a request; a worker that is gone says so at :meth:`receive`."""

    @abstractmethod
    def receive(self) -> Reply:
        """The answer, of a worker that :meth:`Backend.wait` has named.

        Raises:
            WorkerDiedError: there will be none.
        """

    @abstractmethod
    def kill(self) -> None:
        """Ends the process, whatever it is doing."""

    def dismiss(self) -> None:
        """Ends the process, which has nothing to do."""
        self.kill()


class Backend(ABC):
    """Where workers run."""

    workers: int

    @abstractmethod
    def launch(self) -> Worker:
        """Starts a worker; its first answer says that it is ready."""

    @abstractmethod
    def wait(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        """Those of the workers that have an answer or have died, after so many seconds at most."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the backend holds, the workers excepted."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its records, or ``failure`` ("error", "timeout" or "died") with the reason."""

    job: Job
    reply: Reply
    failure: Literal["", "error", "timeout", "died"] = ""


@dataclass
class _Slot:
    worker: Worker
    state: Literal["starting", "ready", "prepare", "run"]
    since: float
    deadline: float
    job: Job | None = None


@dataclass
class Times:
    """Seconds, summed over workers: starting, computing (with preparation), and there in total after the start."""

    starting: float = 0.0
    computing: float = 0.0
    present: float = 0.0

    @property
    def overhead(self) -> float:
        """The share that workers spend on anything but jobs, relative to the jobs' own time."""
        return (self.present - self.computing) / self.computing if self.computing else 0.0


class Pool:
    """Runs jobs on the workers of a backend, each within its budget.

    Args:
        clock: of the budgets, in seconds.

    Raises:
        BoundError: workers do not start.
    """

    def __init__(self, backend: Backend, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend, self._budget, self._clock = backend, budget, clock
        self._slots: list[_Slot] = []
        self._failed_starts = 0
        self.times = Times()

    @property
    def busy(self) -> bool:
        return any(slot.job is not None for slot in self._slots)

    def room(self) -> bool:
        """Whether a job would be taken up at once; starts workers while there may be more of them."""
        if any(slot.state == "ready" for slot in self._slots):
            return True
        if len(self._slots) < self._backend.workers:
            now = self._clock()
            self._slots.append(_Slot(self._backend.launch(), "starting", now, now + STARTING))
        return False

    def start(self, job: Job) -> None:
        """Gives a job to a free worker, one that knows its task if there is one."""
        slot = next(slot for slot in self._slots if slot.state == "ready")
        slot.job = job
        self._request(slot, "prepare", self._budget.preparation)

    def wait(self) -> list[Outcome]:
        """Waits until something has happened, and returns what it did to jobs."""
        now = self._clock()
        pending = [slot for slot in self._slots if slot.state != "ready"]
        nearest = min((slot.deadline for slot in pending), default=now)
        ready = self._backend.wait([slot.worker for slot in pending], max(0.0, min(nearest - now, 1.0)))
        outcomes = [self._answer(slot) for slot in pending if slot.worker in ready]
        now = self._clock()
        outcomes += [self._late(slot) for slot in pending if slot.worker not in ready and now >= slot.deadline]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        end = self._clock()
        for slot in list(self._slots):
            self._drop(slot, end)
        self._backend.close()

    def _request(self, slot: _Slot, action: Literal["prepare", "run"], seconds: float) -> None:
        assert slot.job is not None
        slot.state = action
        slot.deadline = self._clock() + seconds
        slot.worker.send(action, slot.job)

    def _answer(self, slot: _Slot) -> Outcome | None:
        state, job = slot.state, slot.job
        try:
            reply = slot.worker.receive()
        except WorkerDiedError as error:
            reason = str(error)
            self._drop(slot)
            if job is None:
                self._broken_start(reason)
                return None
            return Outcome(job, Reply(reason=reason), "died")
        if state == "starting":
            self._started(slot, reply)
            return None
        assert job is not None
        self.times.computing += reply.seconds
        if state == "prepare" and not reply.reason:
            self._request(slot, "run", self._budget.seconds * len(job.positions))
            return None
        slot.state, slot.job = "ready", None
        return Outcome(job, reply, "error" if reply.reason else "")

    def _started(self, slot: _Slot, reply: Reply) -> None:
        if reply.reason:
            self._drop(slot)
            self._broken_start(reply.reason)
            return
        now = self._clock()
        self.times.starting += now - slot.since
        self._failed_starts = 0
        slot.since, slot.state = now, "ready"

    def _late(self, slot: _Slot) -> Outcome | None:
        state, job = slot.state, slot.job
        self._drop(slot)
        if job is None:
            self._broken_start(f"not there after {STARTING:g} s")
            return None
        if state == "prepare":
            limit = self._budget.preparation
            return Outcome(
                job, Reply(reason=f"not prepared after {limit:g} s", divisible=False, seconds=limit), "timeout"
            )
        limit = self._budget.seconds * len(job.positions)
        self.times.computing += limit
        return Outcome(job, Reply(reason=f"stopped after its budget of {limit:g} s", seconds=limit), "timeout")

    def _drop(self, slot: _Slot, end: float | None = None) -> None:
        if slot.state == "ready":
            slot.worker.dismiss()
        else:
            slot.worker.kill()
        self._slots.remove(slot)
        if slot.state != "starting":
            self.times.present += (self._clock() if end is None else end) - slot.since

    def _broken_start(self, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            raise BoundError(f"workers do not start: {reason}")
