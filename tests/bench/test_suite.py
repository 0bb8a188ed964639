"""Suite files: what they stand for, and one line with the key for everything that is wrong with them."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from suites import write_suite

import flowverify as fv
from flowverify.attack.base import Schedule
from flowverify.bench.kinds import Attack
from flowverify.bench.store import read_folder
from flowverify.bench.suite import Suite, read_suite
from flowverify.bench.tasks import Context
from flowverify.errors import FlowverifyError, InvalidInputError
from flowverify.network import from_torch

GOOD = {"name": "s", "data": {"name": "digits", "index": "0:7"}, "models": "digits-fc3", "runs": [{"bounds": "crown"}]}


def read(folder, **changes):
    return read_suite(write_suite(folder, {**GOOD, **changes}))


class TestExpansion:
    def test_every_combination_once(self, tmp_path):
        run = {
            "methods": ["vanilla", "fine-tuned"],
            "bounds": ["ibp", "crown"],
            "grounds": ["l1", "l2"],
            "radii": [0.1, 0.2],
        }
        suite = read(tmp_path, runs=[run], chunk=3)
        assert len(suite.tasks) == 16 and suite.size == 16 * 7
        assert suite.tasks[0].name == "certify/digits-fc3/vanilla/ibp/l1/radius 0.1"
        jobs = list(suite.jobs())
        assert [job.positions for job in jobs[:3]] == [(0, 1, 2), (3, 4, 5), (6,)]
        assert len({key for job in jobs for key in job.keys}) == suite.size

    def test_linear_methods_take_no_bound(self, tmp_path):
        flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        fv.write_onnx(from_torch(flat, (1, 8, 8)), tmp_path / "flat.onnx")
        suite = read(tmp_path, models="flat.onnx", runs=[{"methods": ["linear"], "bounds": ["ibp", "crown"]}])
        assert [task.name for task in suite.tasks] == ["certify/flat/linear/exact/l1/search"]

    @pytest.mark.parametrize(
        ("method", "activation"),
        [("linear", torch.nn.ReLU()), ("linear-lp", torch.nn.ReLU()), ("complete", torch.nn.Sigmoid()),
         ("milp", torch.nn.Tanh())],
    )  # fmt: skip
    def test_networks_that_a_method_does_not_take_are_found_before_anything_starts(self, method, activation, tmp_path):
        deep = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), activation, torch.nn.Linear(5, 10))
        fv.write_onnx(from_torch(deep, (1, 8, 8)), tmp_path / "deep.onnx")
        expected = rf"runs\[1\]\.methods: {method} for deep: .*{type(activation).__name__}"
        with pytest.raises(InvalidInputError, match=expected):
            read(tmp_path, models="deep.onnx", runs=[{"bounds": "ibp"}, {"methods": ["fine-tuned", method]}])

    def test_attacks_with_options(self, tmp_path):
        suite = read(tmp_path, runs=[{"kind": "attack", "attacks": ["minimal"], "options": {"effort": "fast"}}])
        assert suite.tasks[0].name == "attack/digits-fc3/minimal/l1/effort fast/search"

    def test_a_schedule_is_given_by_its_values(self, tmp_path):
        options = {"schedule": {"first": 0.1, "factor": 1.2, "every": 2, "iterations": 6}}
        suite = read(tmp_path, runs=[{"kind": "attack", "attacks": ["flow-pgd", "sinkhorn"], "options": options}])
        assert suite.tasks[0].name == "attack/digits-fc3/flow-pgd/l1/schedule 0.1 1.2 2 6/search"
        prepared = Attack().prepare(suite.tasks[0], Context())
        assert prepared._attack.schedule == Schedule(0.1, 1.2, 2, 6)
        options["schedule"]["factor"] = 0.5
        with pytest.raises(InvalidInputError, match=r"runs\[0\]\.options: Schedule.*expected first > 0, factor >= 1"):
            read(tmp_path, runs=[{"kind": "attack", "attacks": "sinkhorn", "options": options}])

    def test_numbers_with_an_exponent(self, tmp_path):
        path = write_suite(tmp_path, yaml.safe_dump(GOOD) + "\nbudget: {seconds: 1e3}\n")
        assert read_suite(path).budget.seconds == 1000

    def test_survives_json(self, tmp_path):
        suite = read(tmp_path)
        again = Suite.from_json(json.loads(json.dumps(suite.to_json())))
        assert again == suite and again.fingerprint == suite.fingerprint

    def test_fingerprint(self, tmp_path):
        plain = read(tmp_path).fingerprint
        assert read(tmp_path, budget={"seconds": 9}, name="other").fingerprint == plain
        changes = (
            {"seed": 1},
            {"chunk": 3},
            {"runs": [{"bounds": "ibp"}]},
            {"data": {"name": "digits", "index": "0:8"}},
        )
        assert len({plain, *(read(tmp_path, **change).fingerprint for change in changes)}) == 5

    def test_results_of_earlier_versions_belong_to_their_suites(self):
        """Of a suite without paths; what its tasks are made of may not change by accident."""
        path = next(path for path in SUITES if path.stem == "quick")
        assert read_suite(path).fingerprint == "c62728952b604c84206e40a51c092e9cc7ba884278b58b156b07aacea54f1133"


WRONG = [
    ({"runs": [{"bonds": "crown"}]}, r"unknown key 'runs\[0\]\.bonds': expected one of bounds, cap, chunk"),
    ({"budgets": {}}, "unknown key 'budgets': expected one of budget"),
    ({"budget": {"minutes": 3}}, r"unknown key 'budget\.minutes': expected one of memory, preparation, seconds"),
    ({"budget": {"seconds": 0}}, r"budget\.seconds: given 0, expected a number > 0"),
    ({"budget": {"memory": "much"}}, r"budget\.memory: given 'much', expected a number > 0"),
    ({"budget": 3}, "budget: given 3, expected keys with values"),
    ({"models": ["nonsense"]}, r"models\[0\]: given 'nonsense', expected one of .*digits-fc3.* or a path that ends"),
    ({"models": "gone.onnx"}, "models: given 'gone.onnx', expected an ONNX file that exists"),
    ({"models": ["digits-fc3", "digits-fc3"]}, "models: given .* expected values that differ"),
    ({"data": {"name": "nonsense"}}, r"suite\.yaml: data\.name: given 'nonsense', expected one of digits, mnist"),
    ({"data": {"name": "gone.npz"}}, r"suite\.yaml: runs\[0\]\.data: .*gone\.npz: no such file"),
    ({"data": {"name": "digits", "index": "0:99999"}}, r"runs\[0\]\.data: index '0:99999': ends at 99999"),
    ({"data": {"name": "digits", "index": "1,1"}}, "selects an image twice"),
    ({"data": {"name": "digits", "split": "both"}}, r"unknown data\.split 'both': expected one of test, train"),
    ({"runs": [{"methods": ["vanila"]}]}, r"unknown runs\[0\]\.methods\[0\] 'vanila': expected one of .*fine-tuned"),
    ({"runs": [{"bounds": "tight"}]}, r"unknown runs\[0\]\.bounds 'tight': expected one of .*ibp"),
    ({"runs": [{"grounds": "l3"}]}, r"runs\[0\]\.grounds: given 'l3'"),
    ({"runs": [{"radii": [-1]}]}, r"runs\[0\]\.radii\[0\]: given -1, expected a number >= 0"),
    ({"runs": [{"radii": [0.1, 0.1]}]}, "radii: given .*, expected values that differ"),
    ({"runs": [{"radii": []}]}, r"radii: given \[\], expected one or more"),
    ({"runs": [{"references": -1}]}, r"references: given -1, expected an integer >= 0"),
    ({"runs": [{"methods": "linear", "references": 3}]}, "expected none for methods that are exact"),
    ({"runs": [{"kind": "dance"}]}, r"runs\[0\]: unknown kind 'dance': expected one of .*attack, certify"),
    ({"runs": [{"kind": "misbehaving:Gone"}]}, "has no attribute 'Gone', expected a class MODULE:CLASS"),
    ({"runs": [{"kind": "attack", "attacks": "nonsense"}]}, r"unknown runs\[0\]\.attacks 'nonsense': "),
    ({"runs": [{"kind": "attack", "attacks": "minimal", "options": {"ten": 10}}]}, r"runs\[0\]\.options: .*ten"),
    ({"runs": [{"kind": "script", "module": "gone"}]}, r"runs\[0\]\.module: given 'gone', expected a module in"),
    ({"runs": [{"kind": "instances", "file": "gone.csv", "command": ["a"]}]}, r"gone\.csv: cannot be read"),
    ({"runs": [{"kind": "instances", "file": "a", "command": ["a {b}"]}]}, "expected no other places than onnx"),
    ({"runs": [{"bounds": "ibp"}, {"bounds": "ibp"}]}, "is there twice, expected runs that differ, or a label"),
    ({"runs": []}, r"runs: given \[\], expected at least one"),
    ({"runs": 3}, "runs: given 3, expected a list"),
    ({"runs": [3]}, r"runs\[0\]: given 3, expected keys with values"),
    ({"runs": [{"kind": [3]}]}, r"runs\[0\]: unknown kind '\[3\]': expected one of .*certify"),
    ({"runs": [{"kind": "misbehaving:Misbehaving", "deed": 1}]}, r"key 'runs\[0\]\.deed': expected one of .*deeds"),
    ({"runs": [{"kind": "script", "module": "a", "arguments": [[1]]}]}, "expected a list of text and numbers"),
    ({"runs": [{"radii": "wide"}]}, r"runs\[0\]\.radii: given 'wide', expected a number >= 0"),
    ({"models": None}, r"runs\[0\]\.models: given \[\], expected one or more, here or in the suite"),
    ({"data": None}, r"runs\[0\]\.data: missing, expected this key here or in the suite"),
    ({"seed": -1}, "seed: given -1, expected an integer >= 0"),
    ({"seed": True}, "seed: given True, expected an integer >= 0"),
    ({"device": "tpu"}, "device: given 'tpu', expected cpu, cuda or cuda:N"),
    ({"name": ""}, "name: given '', expected text"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_errors_name_the_key(tmp_path, change, message):
    with pytest.raises(FlowverifyError, match=message) as caught:
        read(tmp_path, **change)
    assert str(caught.value).startswith("suite ") and "\n" not in str(caught.value)


COMPARISON = {"claim": "c", "source": "s", "paper": 1, "measure": "ratio of seconds", "of": "*", "over": "*"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "*linear*"}, r"comparisons\[0\]\.of: given '\*linear\*', expected the name of one task, it fits 0"),
        ({"measure": "beauty"}, r"unknown comparisons\[0\]\.measure 'beauty': expected one of .*median radius"),
        (
            {"measure": "median radius"},
            r"comparisons\[0\]\.over: given '\*', expected nothing for the measure 'median radius'",
        ),
        ({"measure": "median radius over number", "over": 0}, r"over: given 0.0, expected a number > 0"),
    ],
)
def test_errors_of_comparisons(tmp_path, change, message):
    with pytest.raises(InvalidInputError, match=message):
        read(tmp_path, comparisons=[{**COMPARISON, **change}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "line 1.* expected YAML or JSON"),
        ("name: a\nname: b\n", "line 2 key 'name' is given twice"),
        ("- 1\n- 2\n", r"suite: given \[1, 2\], expected keys with values"),
        ("", "suite: given None, expected keys with values"),
        ("runs: []\n", "name: missing, expected this key"),
        ("name: !!python/object/apply:os.system [ls]\n", "expected YAML"),
    ],
)
def test_files_that_are_no_suite(tmp_path, text, message):
    with pytest.raises(InvalidInputError, match=message):
        read_suite(write_suite(tmp_path, text))


def test_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match=r"gone\.yaml: cannot be read \(No such file"):
        read_suite(tmp_path / "gone.yaml")
    with pytest.raises(InvalidInputError, match="holds no suite.json, expected the folder of a run"):
        read_folder(tmp_path)


SUITES = sorted((Path(__file__).parents[2] / "benchmarks" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_of_the_benchmarks(path):
    if "name: mnist" in path.read_text() and not os.environ.get("FLOWVERIFY_DATA"):
        pytest.skip("FLOWVERIFY_DATA is not set: no MNIST")
    suite = read_suite(path)
    assert suite.description and suite.comparisons
