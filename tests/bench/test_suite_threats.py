"""Ground costs and caps in suites: in the names of tasks, in their settings, in their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suites import write_suite

from flowverify.bench.kinds import Certify
from flowverify.bench.suite import Suite, read_suite
from flowverify.bench.tasks import Context
from flowverify.errors import InvalidInputError


def read(folder: Path, **run: Any) -> Suite:
    data = {"name": "digits", "index": "0:2"}
    return read_suite(write_suite(folder, {"name": "s", "data": data, "models": "digits-fc3", "runs": [run]}))


def test_a_task_for_every_ground_cost(tmp_path: Path) -> None:
    suite = read(tmp_path, bounds="ibp", grounds=["l2^2.0", "local:5", "l1"], cap=1)
    assert [task.name for task in suite.tasks] == [
        f"certify/digits-fc3/fine-tuned/ibp/{ground}/cap 1/search" for ground in ("l2^2", "local:5", "l1")
    ]
    records = Certify().prepare(suite.tasks[1], Context()).run([0, 1])
    assert {(record["ground"], record["cap"]) for record in records} == {("local:5", 1.0)}
    assert all(record["radius"] > 0 for record in records)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"grounds": "l2^0.5"}, r"runs\[0\]\.grounds: given 'l2\^0.5', .*the power 0.5, expected"),
        ({"grounds": ["l2", "local:4"]}, r"runs\[0\]\.grounds\[1\]: given 'local:4', .*an odd number >= 1"),
        ({"grounds": ["l2", "l2^1"]}, r"runs\[0\]\.grounds: given .*, expected values that differ"),
        ({"cap": 0}, r"runs\[0\]\.cap: given 0, expected a number > 0"),
        ({"cap": "none"}, r"runs\[0\]\.cap: given 'none', expected a number > 0"),
    ],
)
def test_errors_name_the_key(run: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(tmp_path, **run)
