"""Suites, runs and comparisons of records, as several tests here need them."""

import json

import yaml

from flowverify.bench.pool import LocalBackend
from flowverify.bench.scheduler import run_suite
from flowverify.bench.store import Store
from flowverify.bench.suite import read_suite

VOLATILE = {"seconds", "peak_memory_mib", "finished", "environment"}


def write_suite(folder, text, name="suite.yaml"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return path


def misbehaving(folder, chunk=5, budget=None, **settings):
    run = {"kind": "misbehaving:Misbehaving", **settings}
    return read_suite(write_suite(folder, {"name": "test", "chunk": chunk, "budget": budget or {}, "runs": [run]}))


def standing():
    """A clock by which no budget ends: what a test waits for is there sooner or later."""
    return 0.0


def run_local(suite, folder, workers=2, processors=None, clock=standing, **options):
    """Runs a suite on this machine; the records by position (of suites with one task)."""
    with Store(folder, suite) as store:
        backend = LocalBackend(suite.context, workers, suite.budget.memory, processors)
        run_suite(suite, store, backend, clock=clock, **options)
        return {index: record for (_, index), record in store.records.items()}


def records(folder):
    """The records on disk without what varies from run to run; each key must be there once."""
    found = {}
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = (record["task"], record["index"])
        assert key not in found, f"{key} is there twice"
        found[key] = {name: value for name, value in record.items() if name not in VOLATILE}
    return found
