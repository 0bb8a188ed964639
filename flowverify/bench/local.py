"""Workers as processes of this machine.

Workers come from a process that has loaded the libraries and computed nothing (multiprocessing's fork server):
one costs milliseconds, so that ending those that hang is cheap. Where there is none they are spawned.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal

from flowverify.bench.limits import available_processors, physical_memory, thread_environment
from flowverify.bench.pool import Backend, Worker, WorkerDiedError
from flowverify.bench.session import Reply, Session, Setup
from flowverify.bench.tasks import Context, Job

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
