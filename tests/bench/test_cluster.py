"""The same records from a Ray cluster as from local workers; a worker that is killed loses nothing."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from suites import misbehaving, records, run_local, standing, write_suite

from flowverify.bench.cluster import RayBackend, check_reachable
from flowverify.bench.scheduler import run_suite
from flowverify.bench.store import Store
from flowverify.bench.suite import read_suite
from flowverify.bench.tasks import Context
from flowverify.errors import BoundError

pytest.importorskip("ray", reason="Ray is not installed: pip install 'flowverify[ray]'")
FIRST = 40
SUITE = """
name: both
chunk: 5
data: {{name: digits, index: "0:10"}}
models: digits-fc3
runs:
  - {{kind: "misbehaving:Misbehaving", count: 40, pids: "{pids}"}}
  - {{bounds: ibp}}
  - {{kind: attack, attacks: flow-pgd, radii: 0.5}}
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine; the backends find it running, and leave it so."""
    import ray

    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def run_cluster(suite, folder, workers=2, clock=standing, on_progress=None):
    with Store(folder, suite) as store:
        backend = RayBackend(suite.context, workers, suite.budget.memory)
        run_suite(suite, store, backend, clock=clock, on_progress=on_progress)
        return {index: record for (_, index), record in store.records.items()}


@pytest.fixture(scope="module")
def disturbed(cluster, tmp_path_factory):
    """The suite above from the cluster, with one of its two workers killed in the middle of the first task."""
    folder = tmp_path_factory.mktemp("cluster")
    suite = read_suite(write_suite(folder, SUITE.format(pids=folder)))
    killed = []

    def kill_one(progress):
        if progress.added and not killed:
            victim = min(folder.glob("worker.*"), key=lambda mark: mark.stat().st_mtime)
            os.kill(int(victim.suffix[1:]), signal.SIGKILL)
            killed.append(progress.added)

    run_cluster(suite, folder / "cluster", on_progress=kill_one)
    return suite, folder, killed


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(disturbed):
    suite, folder, killed = disturbed
    assert 0 < killed[0] < FIRST, "it was killed in the middle"
    found = records(folder / "cluster")
    assert len(found) == suite.size == FIRST + 2 * 10
    assert not {"error", "timeout"} & {record["verdict"] for record in found.values()}


@pytest.mark.slow
def test_same_records_as_local_workers(disturbed):
    suite, folder, _ = disturbed
    run_local(suite, folder / "local", processors=2)  # one thread a worker, as in the cluster
    ours, theirs = records(folder / "local"), records(folder / "cluster")
    assert sum(record["verdict"] == "falsified" for record in ours.values()) > 5
    assert theirs == ours


def test_failures_are_of_their_images(cluster, tmp_path, late):
    deeds = {1: "raise", 2: "hang"}
    suite = misbehaving(tmp_path, count=3, chunk=3, budget={"seconds": 1}, deeds=deeds, tell=str(late.path))
    found = run_cluster(suite, tmp_path / "out", workers=1, clock=late)
    assert [found[position]["verdict"] for position in range(3)] == ["certified", "error", "timeout"]
    assert "image 1 is odd" in found[1]["note"] and "budget of 1 s" in found[2]["note"]


@pytest.fixture
def silent():
    """A port at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


class TestAddresses:
    @pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
    def test_nobody_behind_one_is_one_line_at_once(self, form, silent, tmp_path):
        address, suite = form.format(port=silent), write_suite(tmp_path, SUITE.format(pids=tmp_path))
        options = ["--out", str(tmp_path / "out"), "--runner", "ray", "--address", address]
        command = [sys.executable, "-m", "flowverify", "bench", str(suite), *options, "-q"]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2 and done.stdout == ""
        expected = f"error: Ray cluster {address}: nobody answers (Connection refused), expected a running cluster\n"
        assert done.stderr == expected

    def test_the_environment_says_where_auto_is(self, silent, monkeypatch):
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent}")
        with pytest.raises(BoundError, match=f"127.0.0.1:{silent}: nobody answers"):
            RayBackend(Context(), address="auto")

    @pytest.mark.parametrize("address", [None, "auto", "local", "somewhere"])
    def test_of_another_form_are_left_to_ray(self, address):
        check_reachable(address)

    def test_somebody_may_answer(self, silent):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen()
            check_reachable(f"127.0.0.1:{one.getsockname()[1]}")

    def test_ports_that_are_none(self):
        with pytest.raises(BoundError, match="expected HOST:PORT or ray://HOST:PORT"):
            check_reachable("ray://127.0.0.1:far")
