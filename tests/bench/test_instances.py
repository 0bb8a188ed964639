"""Outside verifiers over exported instances: what their answers count for."""

import json
import shutil

import pytest
import torch
from contracts import descend
from suites import write_suite

import flowverify as fv
from flowverify.bench.kinds import Instances
from flowverify.bench.report import summary
from flowverify.bench.statistics import by_task
from flowverify.bench.suite import read_suite
from flowverify.bench.tasks import Context
from flowverify.errors import BoundError, InvalidInputError
from flowverify.export.folder import Source, write_folder
from flowverify.export.plan import Request
from flowverify.network import write_onnx
from flowverify.transport.references import flow_by_transport
from flowverify.zoo import models_folder

RADIUS = 0.5
ANSWER = 'cp "answers/$(basename "$1" .vnnlib)" "$2"'  # what the test has prepared


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two images of digits at a radius where both can be attacked, and a witness for the first."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'flowverify[runtime]'")
    folder = tmp_path_factory.mktemp("export") / "digits"
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:2]
    source = Source("digits-fc3", "digits", "test", (0, 1))
    manifest = write_folder(folder, network, data.images, data.labels, Request("linear", (RADIUS,)), source)
    image = data.images[:1].double()
    points = descend(network.double(), image, data.labels[:1], RADIUS * image.flatten(1).sum(1), steps=10)[0]
    point = points[network(points).argmax(1) != data.labels[0]][:1]
    network.float()
    move = flow_by_transport(image, point, mass_tolerance=1e-6)[0]
    values = [*move.clamp(min=0).tolist(), *(-move).clamp(min=0).tolist()]
    return folder, manifest, values


def run(exported, answers, **settings):
    """The records of both instances, with these texts in the verifier's results file."""
    folder, manifest, _ = exported
    given = folder.parent / "answers"
    given.mkdir(exist_ok=True)
    for one, text in zip(manifest["instances"], answers, strict=True):
        (given / one["vnnlib"].removeprefix("vnnlib/").removesuffix(".vnnlib")).write_text(text)
    command = ["sh", "-c", f'cd "{folder.parent}"; {ANSWER}', "verifier", "{vnnlib}", "{results}"]
    own = {"kind": "instances", "file": "digits/instances.csv", "command": command, **settings}
    suite = read_suite(write_suite(folder.parent, {"name": "outside", "runs": [own]}))
    (task,) = suite.tasks
    found = Instances().prepare(task, Context()).run(task.positions)
    return task, [{"task": task.name, "index": index, **record} for index, record in enumerate(found)]


def witness(values):
    return "sat\n(" + "\n".join(f"(X_{k} {value!r})" for k, value in enumerate(values)) + "\n(Y_0 1.0))"


def test_unsat_is_certified_on_the_verifiers_word_and_counted_apart(exported):
    task, found = run(exported, ["unsat\n", "timeout\n"])
    assert found[0]["verdict"] == "certified" and found[0]["radius"] == RADIUS and found[0]["image"] == 0
    assert found[0]["evidence"] == found[0]["note"] == "on the verifier's word"
    assert found[1]["verdict"] == "timeout" and "evidence" not in found[1]
    (counted,) = by_task([task], found)
    assert dict(counted.counts()) == {"certified on the verifier's word": 1, "timeout": 1}
    assert counted.share_certified() == 0
    table = summary([counted])
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert (shown["certified"], shown["certified on the verifier's word"], shown["timeout"]) == ("0", "1", "1")


def test_sat_falsifies_once_its_witness_was_replayed(exported):
    _, found = run(exported, [witness(exported[2]), "sat\n"])
    assert found[0]["verdict"] == "falsified" and 0 < found[0]["upper_radius"] <= RADIUS
    assert found[0]["answer"] == "sat" and found[0]["seconds"] > 0
    assert found[1]["verdict"] == "unknown" and "without a witness" in found[1]["note"]
    _, found = run(exported, [witness([0.0] * len(exported[2])), "unknown"])
    assert found[0]["verdict"] == "unknown" and "does not confirm it" in found[0]["note"]


def test_a_network_of_ones_own(exported):
    folder = exported[0]
    shutil.copy(models_folder() / "digits-fc3.onnx", folder.parent / "own.onnx")
    _, found = run(exported, [witness(exported[2]), "unsat"], model="own.onnx")
    assert [record["verdict"] for record in found] == ["falsified", "certified"]
    other = fv.load_model("digits-fc3")
    next(other.parameters()).mul_(2)
    write_onnx(other, folder.parent / "other.onnx")
    with pytest.raises(InvalidInputError, match=r"exported from another network than .*other\.onnx"):
        run(exported, ["unsat", "unsat"], model="other.onnx")


def test_without_the_original_network_sat_is_kept_and_proves_nothing(exported):
    manifest = exported[0] / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(before), "model": "elsewhere.onnx"}))
    try:
        _, found = run(exported, [witness(exported[2]), "unsat"])
    finally:
        manifest.write_text(before)
    assert found[0]["verdict"] == "unknown" and "not replayed" in found[0]["note"]
    assert found[1]["evidence"] == "on the verifier's word"


def test_files_that_changed_since_they_were_exported(exported):
    folder, manifest, _ = exported
    path = folder / manifest["instances"][0]["vnnlib"]
    before = path.read_text()
    path.write_text(before + "; changed\n")
    try:
        _, found = run(exported, ["unsat", "unsat"])
    finally:
        path.write_text(before)
    assert found[0]["verdict"] == "error" and "has changed since it was exported" in found[0]["note"]
    assert found[1]["verdict"] == "certified"


def test_wrong_input(exported, tmp_path):
    with pytest.raises(InvalidInputError, match=r"runs\[0\]\.model: given 'nonsense', expected one of .*digits-fc3"):
        run(exported, ["unsat", "unsat"], model="nonsense")
    with pytest.raises(BoundError, match="the answer 'error'"):
        run(exported, ["error", "unsat"])
    (tmp_path / "instances.csv").write_text("a.onnx,b.vnnlib,5\n")
    own = {"kind": "instances", "file": "instances.csv", "command": ["true"], "model": "digits-fc3"}
    with pytest.raises(InvalidInputError, match=r"model: given 'digits-fc3', expected instances of an export"):
        read_suite(write_suite(tmp_path, {"name": "s", "runs": [own]}))


def test_the_witness_is_one(exported):
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:1]
    values = torch.tensor(exported[2], dtype=torch.float64)
    flow = values[: len(values) // 2] - values[len(values) // 2 :]
    moved = data.images.double() + network.grid.divergence(flow[None]).reshape(data.images.shape)
    assert int(network(moved.float()).argmax()) != int(data.labels[0])
