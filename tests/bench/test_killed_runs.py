"""A run that is killed at any moment, as often as one likes, ends with the store of an undisturbed one."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal

import pytest
from suites import misbehaving, records, run_local

from flowverify.bench import pool
from flowverify.bench.store import Store

KILLS = 20


def in_own_process(run):
    """Forked, since it computes nothing itself: a fresh interpreter would take seconds to load torch."""
    multiprocessing.forkserver.set_forkserver_preload(["flowverify.bench.preload"])
    multiprocessing.forkserver.ensure_running()  # here, and not in the fork

    def main():
        multiprocessing.forkserver.ensure_running = lambda: None  # it runs, but is no child of this process
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        run()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def start_until(suite, folder, wanted, most):
    """A run of its own that has added as many records as wanted; it adds little more than ``most``."""
    ours, theirs = os.pipe()

    def report(progress):
        if progress.added >= wanted:
            os.write(theirs, b".")
        while progress.added >= most:
            signal.pause()

    process = in_own_process(lambda: run_local(suite, folder, on_progress=report))
    os.close(theirs)
    assert os.read(ours, 1) == b".", "it ended"
    os.close(ours)
    return process


def test_killed_twenty_times_at_random_moments(tmp_path):
    suite = misbehaving(tmp_path, chunk=4, count=720)
    run_local(suite, tmp_path / "undisturbed")
    expected = records(tmp_path / "undisturbed")
    assert len(expected) == suite.size == 720
    moments = random.Random(7)
    out = tmp_path / "killed"
    for _ in range(KILLS):
        process = start_until(suite, out, wanted=moments.randrange(0, 24), most=32)
        for _ in range(moments.randrange(10**6)):  # any moment will do: nothing below depends on which it is
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (out / "records.jsonl").read_bytes().count(b"\n") < suite.size
    run_local(suite, out)
    assert records(out) == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run: its suite, and the content of its records."""
    folder = tmp_path_factory.mktemp("whole")
    suite = misbehaving(folder, chunk=3, count=6)
    run_local(suite, folder / "out", workers=1)
    return suite, (folder / "out" / "records.jsonl").read_bytes(), records(folder / "out")


@pytest.mark.parametrize("missing", range(1, 12))
def test_torn_in_the_middle_of_a_write(whole, tmp_path, missing):
    """What a kill, or the power, may leave of a write of three lines: any first part of it."""
    suite, content, expected = whole
    Store(tmp_path / "out", suite).close()
    tail = len(b"".join(content.splitlines(keepends=True)[-3:]))
    (tmp_path / "out" / "records.jsonl").write_bytes(content[: len(content) - tail * missing // 12])
    run_local(suite, tmp_path / "out", workers=1)
    assert records(tmp_path / "out") == expected


def test_impatient_interruptions_leave_no_worker(tmp_path, monkeypatch, hanging, interruptible):
    """The second one comes while the workers are being ended."""
    kill = pool._LocalWorker.kill
    (seen, said), (heard, told) = os.pipe(), os.pipe()

    def patient(worker):
        os.write(said, b"k")
        os.read(heard, 1)
        kill(worker)
        os.write(said, b"d")

    monkeypatch.setattr(pool._LocalWorker, "kill", patient)
    deeds = {0: "hang", 1: "hang"}
    suite = misbehaving(
        tmp_path, chunk=1, count=2, deeds=deeds, budget={"seconds": 1e6}, pids=str(tmp_path), tell=str(hanging.path)
    )

    def run():
        try:
            run_local(suite, tmp_path / "out")
        finally:
            os.write(said, b"e")

    process = in_own_process(run)
    os.close(said)
    assert all(hanging.wait(process.sentinel) for _ in deeds)
    os.kill(process.pid, signal.SIGINT)
    events = os.read(seen, 1)
    os.kill(process.pid, signal.SIGINT)
    os.write(told, b"..")
    while events[-1:] not in (b"e", b""):
        events += os.read(seen, 1)
    assert events == b"kdkde", "it ends before its workers, and so waits for them forever"
    process.join()
    workers = [int(mark.suffix[1:]) for mark in tmp_path.glob("worker.*")]
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for file in (seen, heard, told):
        os.close(file)
