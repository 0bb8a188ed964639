"""The same records from a Ray cluster as from local workers; a worker that is killed loses nothing."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from suites import misbehaving, records, run_local, write_suite

from flowverify.bench.scheduler import run_suite
from flowverify.bench.store import Store
from flowverify.bench.suite import read_suite

pytest.importorskip("ray", reason="Ray is not installed: pip install 'flowverify[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine, for all tests here; the backends find it running, and leave it so."""
    import ray

    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def run_cluster(suite, folder, **options):
    from flowverify.bench.cluster import RayBackend

    with Store(folder, suite) as store:
        run_suite(suite, store, RayBackend(suite.context, 2, suite.budget.memory), **options)
        return {index: record for (_, index), record in store.records.items()}


def test_same_records_as_local_workers(cluster, tmp_path):
    text = """
        name: both
        chunk: 5
        data: {name: digits, index: "0:20"}
        models: digits-fc3
        runs:
          - {methods: fine-tuned, bounds: crown}
          - {methods: vanilla, bounds: ibp, radii: [0.01, 0.02], grounds: l2}
    """
    suite = read_suite(write_suite(tmp_path, text))
    run_local(suite, tmp_path / "local")
    run_cluster(suite, tmp_path / "cluster")
    assert len(records(tmp_path / "cluster")) == suite.size == 60
    assert records(tmp_path / "cluster") == records(tmp_path / "local")


def test_a_worker_killed_in_the_middle_loses_nothing(cluster, tmp_path):
    suite = misbehaving(tmp_path, chunk=4, count=40, seconds=0.05, pids=str(tmp_path))
    killed = []

    def kill_one():
        while not (found := [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]):
            time.sleep(0.01)
        time.sleep(0.3)
        killed.append((tmp_path / "out" / "records.jsonl").read_bytes().count(b"\n"))
        os.kill(found[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    found = run_cluster(suite, tmp_path / "out")
    thread.join()
    assert killed[0] < 40, "it was killed in the middle"
    assert sorted(found) == list(range(40)) and len(records(tmp_path / "out")) == 40
    assert {record["verdict"] for record in found.values()} == {"certified"}


def test_failures_are_of_their_images(cluster, tmp_path):
    suite = misbehaving(tmp_path, count=4, chunk=4, budget={"seconds": 5}, deeds={1: "raise", 3: "hang"})
    found = run_cluster(suite, tmp_path / "out")
    assert [found[position]["verdict"] for position in range(4)] == ["certified", "error", "certified", "timeout"]
    assert "image 1 is odd" in found[1]["note"] and "budget of 5 s" in found[3]["note"]
