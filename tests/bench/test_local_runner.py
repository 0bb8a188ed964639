"""Local workers: what one image does costs no other its result."""

import itertools
import os
import subprocess

import pytest
from suites import misbehaving, records, run_local

from flowverify.bench.session import thread_environment
from flowverify.errors import BoundError


def others(found, *failed):
    return all(found[index]["verdict"] == "certified" for index in found if index not in failed)


class TestIsolation:
    def test_an_exception_is_an_error_of_its_image(self, tmp_path):
        found = run_local(misbehaving(tmp_path, deeds={3: "raise"}), tmp_path / "out")
        assert found[3]["verdict"] == "error" and found[3]["note"] == "ValueError: image 3 is odd"
        assert len(found) == 10 and others(found, 3)

    def test_a_worker_that_dies(self, tmp_path):
        found = run_local(misbehaving(tmp_path, deeds={2: "die", 8: "exit"}), tmp_path / "out")
        assert found[2]["verdict"] == "error" and "signal 11 (SIGSEGV)" in found[2]["note"]
        assert found[8]["verdict"] == "error" and "exit code 3" in found[8]["note"]
        assert len(found) == 10 and others(found, 2, 8)

    def test_a_worker_that_dies_once_costs_nothing(self, tmp_path):
        found = run_local(misbehaving(tmp_path, deeds={2: "die once"}, marks=str(tmp_path)), tmp_path / "out")
        assert len(found) == 10 and others(found)

    def test_a_hang_is_a_timeout_of_its_image(self, tmp_path, late):
        suite = misbehaving(tmp_path, chunk=2, budget={"seconds": 1}, deeds={4: "hang"}, tell=str(late.path))
        found = run_local(suite, tmp_path / "out", workers=1, clock=late)
        assert found[4]["verdict"] == "timeout" and "budget of 1 s" in found[4]["note"]
        assert len(found) == 10 and others(found, 4)

    def test_memory_beyond_the_budget(self, tmp_path):
        suite = misbehaving(tmp_path, budget={"memory": 512}, deeds={1: "hog"})
        found = run_local(suite, tmp_path / "out")
        assert found[1]["verdict"] == "error" and found[1]["note"].startswith("out of memory")
        assert len(found) == 10 and others(found, 1)

    def test_a_model_that_cannot_be_prepared_is_told_once_a_job(self, tmp_path):
        found = run_local(misbehaving(tmp_path, setup="refuse"), tmp_path / "out")
        assert {record["note"] for record in found.values()} == {"this model cannot be had"}
        assert {record["verdict"] for record in found.values()} == {"error"}

    def test_preparation_has_a_budget_of_its_own(self, tmp_path, late):
        budget = {"preparation": 0.3, "seconds": 1e6}
        suite = misbehaving(tmp_path, count=2, budget=budget, setup="hang", tell=str(late.path))
        found = run_local(suite, tmp_path / "out", workers=1, clock=late)
        assert {record["verdict"] for record in found.values()} == {"timeout"}
        assert "not prepared after 0.3 s" in found[0]["note"]


class TestResume:
    def test_skips_what_is_there_and_retries_errors(self, tmp_path):
        suite = misbehaving(tmp_path, deeds={3: "raise once", 4: "raise"}, marks=str(tmp_path))
        first = run_local(suite, tmp_path / "out")
        assert first[4]["verdict"] == "error"
        before = records(tmp_path / "out")
        second = run_local(suite, tmp_path / "out")
        assert second[4]["verdict"] == "error" and second[3]["verdict"] == "certified"
        assert second[4]["finished"] > first[4]["finished"]
        assert [second[k]["finished"] for k in (0, 9)] == [first[k]["finished"] for k in (0, 9)]
        assert set(records(tmp_path / "out")) == set(before)

    def test_timeouts_are_tried_again_when_asked_for(self, tmp_path, late):
        suite = misbehaving(tmp_path, count=2, budget={"seconds": 0.3}, deeds={1: "hang"}, tell=str(late.path))
        first = run_local(suite, tmp_path / "out", workers=1, clock=late)
        assert run_local(suite, tmp_path / "out", workers=1, clock=late)[1] == first[1]
        again = run_local(suite, tmp_path / "out", workers=1, clock=late, retry_timeouts=True)[1]
        assert again["verdict"] == "timeout" and again["finished"] > first[1]["finished"]
        assert len(records(tmp_path / "out")) == 2


def test_records_say_what_they_were_made_with(tmp_path):
    record = run_local(misbehaving(tmp_path, count=1), tmp_path / "out", workers=1)[0]
    assert record["seed"] == 0 and record["peak_memory_mib"] > 10
    own = record["environment"]
    assert own["versions"]["torch"] and own["processor"] and own["threads"] >= 1


def test_progress(tmp_path):
    seen = []
    clock = itertools.count(0.0).__next__
    run_local(misbehaving(tmp_path, deeds={3: "raise"}), tmp_path / "out", on_progress=seen.append, clock=clock)
    assert [seen[0].done, seen[-1].done, seen[-1].total, seen[-1].failed] == [0, 10, 10, 1]
    assert seen[-1].remaining == 0 and seen[-1].rate > 0
    run_local(misbehaving(tmp_path, deeds={3: "raise"}), tmp_path / "out", on_progress=seen.append)
    assert [seen[-1].done, seen[-1].total, seen[-1].added] == [10, 10, 1]


def test_threads_are_shared_by_the_workers():
    assert set(thread_environment(2).values()) == {"2"}


def test_workers_that_cannot_start(tmp_path, monkeypatch):
    from flowverify.bench import pool

    monkeypatch.setattr(pool.LocalBackend, "launch", lambda self: _Stillborn())
    monkeypatch.setattr(pool.LocalBackend, "wait", lambda self, workers, seconds: list(workers))
    with pytest.raises(BoundError, match="workers do not start: no such luck"):
        run_local(misbehaving(tmp_path), tmp_path / "out")


class _Stillborn:
    def receive(self):
        from flowverify.bench.session import Reply

        return Reply(reason="no such luck")

    def kill(self):
        pass


def test_nothing_is_left_running(tmp_path, late):
    suite = misbehaving(tmp_path, budget={"seconds": 0.3}, count=3, deeds={1: "hang"}, tell=str(late.path))
    run_local(suite, tmp_path / "out", workers=1, clock=late)
    shown = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    )
    assert "_serve" not in shown.stdout
