"""A run that is killed at any moment, as often as one likes, ends with the store of an undisturbed one."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from suites import misbehaving, records, run_local, write_suite

from flowverify.bench.suite import read_suite

KILLS = 20


def run_in_own_process(suite, folder):
    """Forked, since it computes nothing itself: a fresh interpreter would take seconds to load torch."""

    def run():
        multiprocessing.forkserver.ensure_running = lambda: None  # it runs, but is no child of this process
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        run_local(suite, folder)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def lines(folder):
    path = folder / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_killed_twenty_times_at_random_moments(tmp_path):
    suite = misbehaving(tmp_path, chunk=4, count=720, seconds=0.001)
    run_local(suite, tmp_path / "undisturbed")
    expected = records(tmp_path / "undisturbed")
    assert len(expected) == suite.size == 720
    moments = random.Random(7)
    out = tmp_path / "killed"
    unfinished = []
    for _ in range(KILLS):
        before = lines(out)
        process = run_in_own_process(suite, out)
        deadline = time.monotonic() + 30
        wanted = before + moments.randrange(0, 40)  # a few records each time, and then a moment more
        while lines(out) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        unfinished.append(lines(out) < suite.size)
    assert sum(unfinished) >= KILLS // 2, "most kills should have come before the end"
    run_local(suite, out)
    assert records(out) == expected


@pytest.mark.parametrize("missing", range(1, 12))
def test_torn_in_the_middle_of_a_write(tmp_path, missing):
    """What a kill, or the power, may leave of a write of three lines: any first part of it."""
    suite = misbehaving(tmp_path, chunk=3, count=6)
    run_local(suite, tmp_path / "out")
    expected = records(tmp_path / "out")
    path = tmp_path / "out" / "records.jsonl"
    content = path.read_bytes()
    whole = content.splitlines(keepends=True)
    tail = len(b"".join(whole[-3:]))
    path.write_bytes(content[: len(content) - tail * missing // 12])
    run_local(suite, tmp_path / "out")
    assert records(tmp_path / "out") == expected


def test_command_killed_and_started_again(tmp_path):
    """The same with the command itself; its workers go with it."""
    path = write_suite(
        tmp_path,
        "{name: command, chunk: 2, data: {name: digits, index: '0:20'}, models: digits-fc3, runs: "
        "[{methods: vanilla, bounds: ibp, radii: [0.01, 0.02, 0.03, 0.04]}]}",
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flowverify", "bench", str(path), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while lines(out) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert 4 <= lines(out) < 80
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    suite = read_suite(path)
    run_local(suite, tmp_path / "undisturbed")
    assert records(out) == records(tmp_path / "undisturbed")
