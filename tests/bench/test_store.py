"""The store: nothing is lost, nothing doubled, and nothing of another suite is touched."""

import base64
import json
import multiprocessing
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from suites import misbehaving, records, run_local, write_suite

import flowverify as fv
from flowverify.bench.kinds import Certify
from flowverify.bench.report import write_report
from flowverify.bench.session import complete, environment
from flowverify.bench.store import Store, read_folder, read_witnesses
from flowverify.bench.suite import read_suite
from flowverify.bench.tasks import Context, packed, unpacked
from flowverify.errors import DataError, InvalidInputError


@pytest.fixture
def suite(tmp_path):
    return misbehaving(tmp_path, count=20)


def record(index, verdict="certified", **more):
    return {"task": "misbehaving", "index": index, "verdict": verdict, **more}


def test_what_is_appended_is_there_again(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0, value=float("inf")), record(1)])
        store.append([record(2)])
    with Store(tmp_path / "out", suite) as store:
        assert sorted(index for _, index in store.records) == [0, 1, 2]
        assert store.records["misbehaving", 0]["value"] is None


def test_a_record_is_not_doubled(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0)])
        with pytest.raises(InvalidInputError, match=r"\('misbehaving', 0\) is in .* already"):
            store.append([record(0)])
        store.append([record(1, "error")])
        store.append([record(1)])
    assert records(tmp_path / "out")["misbehaving", 1]["verdict"] == "certified"


def test_images_that_were_found_are_kept_beside_the_records(suite, tmp_path):
    first, second = np.random.default_rng(0).random((2, 3, 4, 5)), np.zeros((1, 2, 2))
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0, "falsified", witness=packed(first)), record(1)])
        store.append([record(2, "error", witness=packed(first[0, None]))])
        store.append([record(3, "error", witness=packed(first)), record(3, "falsified", witness=packed(second))])
        store.append([record(2, "falsified", witness=packed(second))])
        assert all("witness" not in one for one in store.records.values())
    assert "witness" not in (tmp_path / "out" / "records.jsonl").read_text()
    found = read_witnesses(tmp_path / "out")
    assert set(found) == {("misbehaving", 0), ("misbehaving", 2), ("misbehaving", 3)}
    np.testing.assert_array_equal(unpacked(found["misbehaving", 0]), first)
    np.testing.assert_array_equal(unpacked(found["misbehaving", 2]), second)
    assert read_witnesses(tmp_path) == {}


def test_counterexamples_of_complete_methods_are_on_the_page(tmp_path):
    run = {"methods": "complete", "radii": [0.005, 0.5]}
    text = {"name": "s", "data": {"name": "digits", "index": "0:2"}, "models": "digits-fc3", "runs": [run]}
    suite = read_suite(write_suite(tmp_path, text))
    own = {"environment": environment()}
    with Store(tmp_path / "out", suite) as store:
        for task in suite.tasks:
            for job in task.jobs():
                found = Certify().prepare(task, Context()).run(job.positions)
                store.append([complete(job, k, one | own, Context()) for k, one in enumerate(found)])
        verdicts = {key: one["verdict"] for key, one in store.records.items()}
    refuted = {(suite.tasks[1].name, 0), (suite.tasks[1].name, 1)}
    assert {key for key, verdict in verdicts.items() if verdict == "falsified"} == refuted
    witnesses = read_witnesses(tmp_path / "out")
    assert set(witnesses) == refuted
    network, data = fv.load_model("digits-fc3").double(), fv.load_dataset("digits")
    for (_, index), packed_image in witnesses.items():
        image = torch.from_numpy(unpacked(packed_image))
        assert int(network(image[None]).argmax()) != int(data.labels[index])
        assert float(image.sum()) == pytest.approx(float(data.images[index].double().sum()), rel=1e-9)
    page = write_report(tmp_path / "out")[0].read_text()
    cases = json.loads(page.split("<script", 2)[1].partition(">")[2].partition("</script>")[0])["cases"]
    assert {key: case["by"] for key, case in cases.items()} == {
        "0/0": "",
        "0/1": "",
        "1/0": "complete",
        "1/1": "complete",
    }


def test_images_take_little_room_and_damage_is_found():
    image = np.random.default_rng(0).random((1, 28, 28)).astype(np.float32).astype(np.float64)
    image[image < 0.8] = 0
    assert len(packed(image)) < 0.25 * len(base64.b64encode(image.tobytes()))
    for text in ("", "1x2:", "1x2x2:" + packed(image).partition(":")[2], packed(image)[:-5]):
        with pytest.raises(DataError, match="is damaged"):
            unpacked(text)


def test_an_error_superseded_before_a_kill(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(1, "error")])
    with (tmp_path / "out" / "records.jsonl").open("a") as file:
        file.write(json.dumps(record(1)) + "\n")
    assert len(read_folder(tmp_path / "out")[1]) == 1
    with Store(tmp_path / "out", suite):
        assert records(tmp_path / "out")["misbehaving", 1]["verdict"] == "certified"


def test_torn_at_every_byte(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0), record(1)])
    path = tmp_path / "out" / "records.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with Store(tmp_path / "out", suite) as store:
            assert len(store.records) == (length >= first)
        assert path.read_bytes() == (content[:first] if length >= first else b"")


def test_zeros_that_a_crash_of_the_machine_left(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0)])
    with (tmp_path / "out" / "records.jsonl").open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    with Store(tmp_path / "out", suite) as store:
        assert len(store.records) == 1
    assert len(records(tmp_path / "out")) == 1


def test_damage_in_the_middle_is_not_passed_over(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0), record(1), record(2)])
    path = tmp_path / "out" / "records.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"index": 1', b'"index" 1'))
    with pytest.raises(DataError, match=r"records\.jsonl: line 2 is no record"):
        Store(tmp_path / "out", suite)
    assert path.read_bytes().count(b"\n") == 3


def test_a_second_run_is_refused(suite, tmp_path):
    with Store(tmp_path / "out", suite), pytest.raises(InvalidInputError, match="another run is writing to it"):
        Store(tmp_path / "out", suite)
    Store(tmp_path / "out", suite).close()


def test_the_folder_of_another_suite(suite, tmp_path):
    with Store(tmp_path / "out", suite) as store:
        store.append([record(0)])
    other = misbehaving(tmp_path, count=21)
    with pytest.raises(InvalidInputError, match="holds results of another suite, 'test'"):
        Store(tmp_path / "out", other)
    assert len(records(tmp_path / "out")) == 1


def test_a_folder_of_something_else(suite, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InvalidInputError, match=r"holds thesis\.tex and no results, expected an empty or new folder"):
        Store(tmp_path / "out", suite)
    with pytest.raises(DataError, match=r"cannot be written to \((File exists|Not a directory)"):
        Store(tmp_path / "out" / "thesis.tex", suite)


@pytest.mark.parametrize("taken", [0, 30])
def test_a_full_disk(suite, tmp_path, monkeypatch, taken):
    """The file system may take a part of the last write before it is full."""
    write = os.write

    def full(file, content):
        if b"misbehaving" not in content or b'"index": 0' in content:
            return write(file, content)
        write(file, content[:taken])
        raise OSError(28, "No space left on device")

    with Store(tmp_path / "out", suite) as store:
        store.append([record(0)])
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DataError, match=r"\(No space left on device\); the 1 records before are kept"):
            store.append([record(1)])
        monkeypatch.undo()
        store.append([record(2)])
    assert sorted(index for _, index in records(tmp_path / "out")) == [0, 2]


def fill(store):
    for index in range(20):
        store.append([record(index, note="x" * 8000)])


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_file_system_that_is_really_full(suite, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with Store(place / "out", suite) as store:
            with pytest.raises(DataError, match="No space left on device"):
                fill(store)
            there = len(store.records)
        assert 1 <= there < 20 and len(records(place / "out")) == there
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_killed_run_holds_no_lock(suite, tmp_path):
    def run():
        Store(tmp_path / "out", suite)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run_local(suite, tmp_path / "out")
    assert len(records(tmp_path / "out")) == 20


def test_a_folder_of_an_earlier_version_is_gone_on_with(suite, tmp_path):
    """It had a file for the lock, and left errors beside what superseded them."""
    out = tmp_path / "out"
    with Store(out, suite) as store:
        store.append([record(0)])
    (out / "lock").touch()
    old = json.loads((out / "suite.json").read_text())
    assert list(old) == ["fingerprint", "name", "description", "context", "budget", "tasks", "comparisons"]
    assert old["budget"] == {"seconds": 300.0, "preparation": 600.0, "memory": None}
    with (out / "records.jsonl").open("a") as file:
        file.write(f"{json.dumps(record(1, 'error'))}\n{json.dumps(record(1))}\n")
    run_local(suite, out)
    assert len(records(out)) == 20
