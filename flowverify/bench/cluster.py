"""Workers as actors of a Ray cluster: one machine or many, with the same sessions as the local ones.

Every node needs flowverify installed and the data and model files at the same paths (a shared file system), or
data sets that it can download. A worker that dies is replaced, on whatever node has room, by the pool.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

from flowverify.bench.pool import Backend, Worker, WorkerDiedError
from flowverify.bench.session import Reply, Session, Setup, thread_environment
from flowverify.bench.tasks import Context, Job
from flowverify.errors import BoundError, DependencyError

PASSED_ON = ("FLOWVERIFY_DATA",)
KNOCKING = 10.0  # seconds in which whoever is behind an address must answer; Ray itself tries for minutes


def check_reachable(address: str | None) -> None:
    """Refuses an address [SCHEME://]HOST:PORT at which nobody listens; what has another form is left to Ray.

    Raises:
        BoundError: nobody answers, with the reason.
    """
    given = address or ""
    where = urlsplit(given if "://" in given else f"//{given}")
    try:
        host, port = where.hostname, where.port
    except ValueError as error:
        raise BoundError(f"Ray cluster {address}: {error}, expected HOST:PORT or ray://HOST:PORT") from error
    if host is None or port is None:
        return
    try:
        socket.create_connection((host, port), KNOCKING).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise BoundError(f"Ray cluster {address}: nobody answers ({reason}), expected a running cluster") from error


class RayBackend(Backend):
    """Actors of a Ray cluster, each on one processor (or one GPU, where the suite's device is CUDA).

    Args:
        context: seed and device of the suite.
        workers: how many actors; None for one a processor (or GPU) of the cluster.
        memory: MiB for each worker; None for no limit but Ray's own.
        address: of a running cluster; None starts one on this machine, which ends with the backend.

    Raises:
        DependencyError: Ray is not installed.
        BoundError: the cluster cannot be reached.
    """

    def __init__(
        self,
        context: Context,
        workers: int | None = None,
        memory: float | None = None,
        address: str | None = None,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise DependencyError("runner ray: Ray is not installed: pip install 'flowverify[ray]'") from error
        self._ray = ray
        self._owner = not ray.is_initialized()
        on_gpu = context.device != "cpu"
        if self._owner:
            check_reachable(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            # Without an address Ray would look for one in the environment, and for a cluster left running here.
            where = {"address": address} if address else {"address": "local", "num_cpus": None if on_gpu else workers}
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leaves CUDA_VISIBLE_DEVICES alone
            try:
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise BoundError(f"Ray cluster {address or 'on this machine'}: {reason}") from error
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call, unused-ignore]
        there = int(resources.get("GPU" if on_gpu else "CPU", 0))
        if there < 1:
            raise BoundError(f"Ray cluster {address or 'on this machine'}: has no {'GPU' if on_gpu else 'processor'}")
        self.workers = min(workers or there, there)  # more would wait for room and be taken for dead
        variables = thread_environment(1)
        variables |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        setup = Setup(context, 1, None if on_gpu else memory, variables)
        self._actor = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        )
        self._setup = setup

    def launch(self) -> Worker:
        return _RayWorker(self._ray, self._actor.remote(self._setup))

    def wait(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        pending = {worker.pending: worker for worker in workers if isinstance(worker, _RayWorker)}
        if not pending:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=seconds)
        if ready:  # and whoever else is ready by now
            ready, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [pending[one] for one in ready]

    def close(self) -> None:
        if self._owner:
            self._ray.shutdown()


class _Actor:
    """A session in a process of the cluster."""

    def __init__(self, setup: Setup) -> None:
        self._session = Session(setup)

    def ready(self) -> Reply:
        return Reply()

    def handle(self, action: Literal["prepare", "run"], job: Job) -> Reply:
        return self._session.handle(action, job)


class _RayWorker(Worker):
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.pending = actor.ready.remote()

    def send(self, action: Literal["prepare", "run"], job: Job) -> None:
        self.pending = self._actor.handle.remote(action, job)

    def receive(self) -> Reply:
        try:
            reply: Reply = self._ray.get(self.pending)
        except self._ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()
            raise WorkerDiedError(
                f"its worker in the cluster is gone: {text[0] if text else type(error).__name__}"
            ) from None
        return reply

    def kill(self) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(self._actor)
