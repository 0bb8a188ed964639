"""Workers and their jobs: who is free, who is late, who has died. The same for every kind of runner.

On this machine workers come from a process that has loaded the libraries and computed nothing (multiprocessing's fork
server): one costs milliseconds, so that ending those that hang is cheap. Where there is none they are spawned.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal

from flowverify.bench.session import Reply, Session, Setup, available_processors, physical_memory, thread_environment
from flowverify.bench.suite import Budget
from flowverify.bench.tasks import Context, Job
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


SHARE = 0.9  # of the machine's memory that all workers together may take
ENDING = 5.0  # seconds in which a process that was killed must be gone


class LocalBackend(Backend):
    """Processes on this machine, by default one a processor, with the processors' threads shared among them.

    Args:
        context: seed and device of the suite.
        workers: how many processes; None for one a processor.
        memory: MiB for each worker; None for an equal share of the machine. Not enforced on CUDA, whose driver
            reserves more addresses than there is memory.
        processors: whose threads are shared; None for all that there are.
    """

    def __init__(
        self,
        context: Context,
        workers: int | None = None,
        memory: float | None = None,
        processors: int | None = None,
    ) -> None:
        processors = processors or available_processors()
        self.workers = workers or processors
        threads = max(1, processors // self.workers)
        if context.device != "cpu":
            memory = None
        elif memory is None:
            memory = SHARE * physical_memory() / self.workers
        self._setup = Setup(context, threads, memory, thread_environment(threads))
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["flowverify.bench.preload"])
        self._launched: list[_LocalWorker] = []

    def launch(self) -> Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._setup), daemon=False)
        with _surroundings(self._setup.variables):
            process.start()
        theirs.close()
        worker = _LocalWorker(process, ours)
        self._launched = [*(one for one in self._launched if one.alive), worker]
        return worker

    def wait(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        by_connection = {worker.connection: worker for worker in workers if isinstance(worker, _LocalWorker)}
        ready = multiprocessing.connection.wait(list(by_connection), seconds)
        return [by_connection[one] for one in ready]  # type: ignore[index]

    def close(self) -> None:
        """Ends what is left, such as a worker that an interruption kept from whoever launched it."""
        for worker in self._launched:
            if worker.alive:
                worker.kill()


@contextmanager
def _surroundings(variables: dict[str, str]) -> Iterator[None]:
    """What a new process starts in: its variables, and no main module, which it would load for nothing."""
    main = sys.modules["__main__"]
    before = {name: os.environ.get(name) for name in variables}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(variables)  # the libraries read them when the new process loads them
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _LocalWorker(Worker):
    def __init__(self, process: Any, connection: Connection) -> None:
        self._process, self.connection = process, connection

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, action: Literal["prepare", "run"], job: Job) -> None:
        with suppress(OSError):
            self.connection.send((action, job))

    def receive(self) -> Reply:
        try:
            reply: Reply = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(ENDING)
            raise WorkerDiedError(_cause(self._process.exitcode)) from None
        return reply

    def kill(self) -> None:
        """The worker leads a group of its own, with whatever it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(ENDING)
        self.connection.close()

    def dismiss(self) -> None:
        self.connection.close()
        self._process.join(ENDING)
        if self._process.is_alive():
            self.kill()


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by signal {-code} ({name}){hint}"


def _serve(connection: Connection, setup: Setup) -> None:
    """The life of a worker: it ends with the connection, or with the process that started the run."""
    os.setpgid(0, 0)  # Ctrl-C in the terminal is for the parent, which ends us in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        session = Session(setup)
    except Exception as error:
        connection.send(Reply(reason=f"{type(error).__name__}: {' '.join(str(error).split())}"))
        return
    connection.send(Reply())
    while True:
        try:
            action, job = connection.recv()
            connection.send(session.handle(action, job))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
