"""Flowverify as a tool of VNN-COMP, on its own exports: what it answers is so, and everybody can check it."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flowverify.ball import WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.cli import app
from flowverify.deadline import Deadline
from flowverify.errors import DependencyError
from flowverify.export import vnncomp
from flowverify.export.folder import Source, write_folder
from flowverify.export.plan import Request
from flowverify.export.results import read_witness
from flowverify.export.vnncomp import NotExportedError, decide, identify, lowered, requirement
from flowverify.network import write_onnx
from flowverify.zoo import load_model
from tests.export.exact import least_margin, least_misclassifying_budget, small_image, small_network

ROOT = Path(__file__).parents[2]
ENCODINGS = ("linear", "outputs", "penalty", "l1-penalty")
SECONDS = 300.0  # no question here takes a tenth of it
LINE = re.compile(r"\((X|Y)_([0-9]+) (-?[0-9]+\.[0-9]+)\)")


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def export(out, *arguments):
    """Rows of instances.csv as paths, of the exported images and radii in turn."""
    call("export", "digits-fc3", "--out", out, *arguments)
    lines = (out / "instances.csv").read_text().splitlines()
    return [tuple(out / part for part in line.split(",")[:2]) for line in lines]


def answer(row, results, timeout=SECONDS):
    done = call("vnncomp", "v1", "digits", *row, results, timeout)
    return results.read_text().splitlines()[0], done


def evaluate(text, values):
    """Whether values of X and Y fulfil every assertion of a VNN-LIB file of either version."""
    text = re.sub(r";.*", "", text)
    tokens = re.findall(r"[()]|[^\s()]+", text)
    place = 0

    def read():
        nonlocal place
        token = tokens[place]
        place += 1
        if token != "(":
            return token
        found = []
        while tokens[place] != ")":
            found.append(read())
        place += 1
        return found

    def value(one):
        if isinstance(one, list):
            assert one[0] in "+-"
            rest = [value(part) for part in one[1:]]
            return sum(rest) if one[0] == "+" else -rest[0]
        name = re.fullmatch(r"([XY])(?:_|\[0,)([0-9]+)\]?", one)
        return values[name[1]][int(name[2])] if name else float(one)

    def true(one):
        kind, *rest = one
        if kind in ("and", "or"):
            return (all if kind == "and" else any)(map(true, rest))
        left, right = map(value, rest)
        return left <= right if kind == "<=" else left >= right

    statements = []
    while place < len(tokens):
        statements.append(read())
    asserted = [one[1] for one in statements if one[0] == "assert"]
    assert asserted
    return all(map(true, asserted))


def counterexample(results):
    """X and Y of a results file in the form of VNN-COMP."""
    first, *rest = results.read_text().splitlines()
    assert first == "sat" and rest[0].startswith("((X_0 ") and rest[-1].endswith("))")
    found = {"X": [], "Y": []}
    for line in rest:
        name, number, value = LINE.fullmatch(
            line.strip().removeprefix("(" if line is rest[0] else "").removesuffix(")" if line is rest[-1] else "")
        ).groups()
        assert int(number) == len(found[name])
        found[name].append(float(value))
    return found


def check_counterexample(row, results):
    """It is read by this package, the file's network computes its Y, and it fulfils the property's text."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    found = counterexample(results)
    assert np.array_equal(read_witness(results, len(found["X"])), found["X"])
    session = onnxruntime.InferenceSession(str(row[0]), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: np.array([found["X"]], dtype=np.float32)})
    np.testing.assert_allclose(outputs[0], found["Y"], rtol=1e-5, atol=1e-5)
    assert np.array_equal(np.array(found["X"], dtype=np.float32).astype(np.float64), found["X"])
    assert evaluate(row[1].read_text(), found)
    changed = {**found, "X": [found["X"][0] + 1e3, *found["X"][1:]]}
    assert not evaluate(row[1].read_text(), changed)


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [
        *((encoding, ()) for encoding in ENCODINGS),
        ("linear", ("--reference", "uniform", "--index", "0:2")),
        ("outputs", ("--reference", "uniform", "--index", "0:2")),
        ("penalty", ("--reference", "uniform", "--index", "0:2")),
        ("linear", ("--vanilla",)),
        ("penalty", ("--vanilla",)),
        ("outputs", ("--ground", "l2", "--vnnlib", "2.0")),
    ],
)
def test_small_radii_are_unsat_and_large_ones_sat(encoding, arguments, tmp_path):
    """And the package's own reading of outside verifiers' results agrees."""
    small = 0.0002 if encoding == "l1-penalty" else 0.01  # of the whole box, of 112 flows, there
    rows = export(
        tmp_path / "out", "--encoding", encoding, "--radius", small, "--radius", 0.5, "--timeout", SECONDS, *arguments
    )
    lines = []
    for number, row in enumerate(rows):
        expected = ("unsat", "sat")[number % 2]
        results = tmp_path / f"{row[1].stem}.counterexample"
        word, done = answer(row, results)
        assert word == expected and done.stderr == "" and done.stdout.startswith(f"{word} (by "), done.output
        if word == "sat":
            check_counterexample(row, results)
        lines.append(f"{row[0].name},{row[1].name},{word},1\n")
    (tmp_path / "results.csv").write_text("".join(lines))
    collected = call("export", "digits-fc3", "--out", tmp_path / "out", "--collect", tmp_path / "results.csv", "--json")
    verdicts = [json.loads(line)["verdict"] for line in collected.stdout.splitlines()]
    assert verdicts == ["certified", "falsified"] * (len(rows) // 2)


def question(folder, network, image, encoding, radius, **options):
    label = network(image[None]).argmax(1)
    write_folder(
        folder,
        network,
        image[None],
        label,
        Request(encoding, (radius,), **options),
        Source("small", "none", "test", (3,)),
    )
    onnx, vnnlib = (next((folder / name).iterdir()) for name in ("onnx", "vnnlib"))
    return identify(onnx, vnnlib, lambda *_: network)


@cache
def case(seed):
    """A network and an image, the label, and the exact budget at which some class ties with it."""
    network, image = small_network(seed, "linear"), small_image(seed + 100)
    label = int(network(image[None]).argmax())
    least = least_misclassifying_budget(network, image, label)
    network.float()
    return network, image, label, least


CASES = list(product(("linear", "outputs", "penalty"), ("image", "uniform"), (7, 8)))


@pytest.mark.parametrize(("encoding", "reference", "seed"), CASES)
def test_just_below_the_exact_radius_a_property_is_not_unsat(encoding, reference, seed, tmp_path):
    """There the ball is certified, by margins that are smaller than what the property allows for rounding."""
    network, image, label, least = case(seed)
    mass = float(image.sum())
    asked = question(tmp_path / "out", network, image, encoding, least / mass * (1 - 2e-7), reference=reference)
    ball = WassersteinBall(asked.instance.budget / mass)
    (own,) = CompleteCertifier(network).certify(image[None], torch.tensor([label]), ball)
    assert own.verdict == "certified" and asked.instance.budget < least
    assert decide(asked, Deadline(SECONDS)).word == "unknown"
    below = question(tmp_path / "below", network, image, encoding, least / mass * (1 - 1e-4), reference=reference)
    assert decide(below, Deadline(SECONDS)).word == "unsat"


@pytest.mark.parametrize("positivity", [True, False])
@pytest.mark.parametrize(("encoding", "reference", "seed"), [*CASES, ("l1-penalty", "image", 7)])
def test_no_input_of_a_property_has_less_than_the_margin_of_the_ball(encoding, reference, seed, positivity, tmp_path):
    """The claim of ``requirement``, at inputs that spend all on few edges, within the constraints and beyond."""
    network, image, label, least = case(seed)
    asked = question(
        tmp_path / "out", network, image, encoding, 0.8 * least / float(image.sum()), positivity=positivity,
        reference=reference,
    )  # fmt: skip
    needed = requirement(asked)
    assert not needed.impossible and 0 < needed.margin < 1e-2
    budget = needed.radius * float(image.sum())
    if encoding != "l1-penalty":
        assert budget == pytest.approx(asked.instance.budget, rel=1e-5) and budget >= asked.instance.budget
    targets = [t for t in range(3) if t != label]
    if positivity:
        ball = min(least_margin(network, image, label, t, budget) for t in targets)
    else:
        search = CompleteCertifier(network, "vanilla-complete")
        ball = search.least_margin(image, label, WassersteinBall(needed.radius)).lower
    network.float()
    prop, flows = asked.instance.property, asked.export.inputs.flows
    generator = np.random.default_rng(seed)
    penalised = asked.export.encoding.penalised
    graph, seen = asked.export.graph, 0
    for _ in range(3000):
        values = prop.lower.copy()
        few = generator.choice(flows, generator.integers(1, 5), replace=False)
        room = prop.upper[few] - prop.lower[few]
        share = (
            generator.dirichlet(np.ones(len(few)))
            if not penalised or generator.random() < 0.7
            else generator.random(len(few))
        )
        values[few] += room * share
        low = generator.random(len(values) - flows) < 0.5
        values[flows:] = np.where(low, prop.lower[flows:], prop.upper[flows:])
        outputs = graph(torch.from_numpy(values)[None])[0].numpy()
        mapping = {"X": values, "Y": outputs}
        inside = [one for one in prop.constraints if not one.holds(values)]
        beyond = [one for one in prop.unsafe[0][1:] if not one.holds(mapping[one.variable])]
        if inside or beyond:
            continue
        seen += 1
        if penalised:
            margin = outputs.min()
        else:
            margin = min(outputs[label] - outputs[t if encoding == "linear" else 3 + t] for t in targets)
        assert margin >= ball - needed.margin
    assert seen > 100


@pytest.mark.parametrize("encoding", ["linear", "outputs", "penalty"])
def test_counterexamples_that_are_no_images(encoding, tmp_path):
    """Without positivity there are some nearer than any image, and they answer the property too."""
    found = 0
    for seed in (5, 6, 7, 8):
        network, image = small_network(seed, "linear"), small_image(seed + 100)
        label = int(network(image[None]).argmax())
        flows, images = (least_misclassifying_budget(network, image, label, positive) for positive in (False, True))
        network.float()
        if flows < 0.9 * images:
            radius = (flows + min(images, 2 * flows)) / 2 / float(image.sum())
            asked = question(tmp_path / str(seed), network, image, encoding, radius, positivity=False)
            answer = decide(asked, Deadline(SECONDS))
            assert answer.word == "sat" and asked.instance.property.holds(answer.inputs, answer.outputs)
            assert bool((asked.export.inputs.image(answer.inputs) < 0).any())
            found += 1
    assert found


def test_a_weight_that_makes_more_unsafe_than_the_ball(tmp_path):
    network, image, _, least = case(7)
    radius = 0.5 * least / float(image.sum())
    asked = question(tmp_path / "out", network, image, "penalty", radius, penalty_weight=0.01)
    found = decide(asked, Deadline(SECONDS))
    assert found.word in ("sat", "unknown")
    if found.word == "unknown":
        assert "the penalty's weight 0.01 is less than" in found.note


def test_lowered_networks():
    for network in (small_network(1, "linear"), small_network(2, "conv")):
        images = torch.stack([small_image(k) for k in range(4)]).double()
        before, after = network.double()(images), lowered(network, 1, 0.25)(images)
        change = torch.tensor([0.0, -0.25, 0.0], dtype=torch.float64).expand(4, 3)
        torch.testing.assert_close(after - before, change, rtol=0, atol=1e-12)


class TestWhatIsNoInstance:
    @pytest.fixture
    def row(self, tmp_path):
        (row,) = export(tmp_path / "out", "--radius", 0.01)
        return row

    def unknown(self, row, tmp_path, expected):
        word, done = answer(row, tmp_path / "results.txt")
        assert (word, (tmp_path / "results.txt").read_text()) == ("unknown", "unknown\n")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr
        call("vnncomp", "v1", "digits", *row, code=1)

    @pytest.mark.parametrize("which", [0, 1])
    def test_changed_files(self, which, row, tmp_path):
        path = row[which]
        path.write_bytes(
            path.read_bytes().replace(b"flowverify", b"flowverifx", 1)
            if which == 0
            else path.read_bytes() + b"; more\n"
        )
        self.unknown(row, tmp_path, f"{path.name}: expected a file with a SHA-256 that ")

    def test_changed_with_the_manifest(self, row, tmp_path):
        """Digests that fit are not enough."""
        manifest = tmp_path / "out" / "manifest.json"
        content = json.loads(manifest.read_text())
        text = row[1].read_text().replace("(assert (<= X_0 ", "(assert (<= X_0 0", 1).replace("00.", "0.", 1)
        text = re.sub(r"\(<= X_3 [0-9.]+\)", "(<= X_3 1.0)", text)
        row[1].write_text(text)
        content["instances"][0]["sha256"] = vnncomp._digest(text.encode())
        manifest.write_text(json.dumps(content))
        self.unknown(row, tmp_path, "built again from digits-fc3, the files are not the same")

    def test_another_radius_in_the_manifest(self, row, tmp_path):
        manifest = tmp_path / "out" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("0.01", "0.001"))
        self.unknown(row, tmp_path, "the files are not the same")

    def test_another_model(self, row, tmp_path):
        manifest = tmp_path / "out" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"digits-fc3"', '"digits-certified"'))
        self.unknown(row, tmp_path, "was exported from another network than digits-certified is")
        manifest.write_text(manifest.read_text().replace('"digits-certified"', '"nowhere.onnx"'))
        self.unknown(row, tmp_path, "cannot be built again from nowhere.onnx")

    def test_no_manifest(self, row, tmp_path):
        (tmp_path / "out" / "manifest.json").unlink()
        self.unknown(row, tmp_path, "no readable manifest.json, expected an export")

    def test_identify_says_so(self, row):
        with pytest.raises(NotExportedError, match="cannot be built again from digits-fc3"):
            identify(*row, lambda *_: vnncomp.Network.sequential((1, 4, 4), []))


def test_compressed_files_and_a_model_beside_the_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_onnx(load_model("digits-fc3"), "own.onnx")
    call("export", "own.onnx", "--dataset", "digits", "--out", "out", "--radius", 0.01, "--gzip", "--timeout", 60)
    (tmp_path / "own.onnx").rename(tmp_path / "out" / "own.onnx")
    onnx, vnnlib, _ = (tmp_path / "out" / "instances.csv").read_text().strip().split(",")
    for end in ("", ".gz"):
        word, done = answer((tmp_path / "out" / f"{onnx}{end}", tmp_path / "out" / f"{vnnlib}{end}"), tmp_path / "r")
        assert word == "unsat", done.output


def test_without_onnxruntime_counterexamples_are_computed_all_the_same(tmp_path, monkeypatch):
    def missing(*_):
        raise DependencyError("missing")

    monkeypatch.setattr(vnncomp, "run_onnx", missing)
    (row,) = export(tmp_path / "out", "--radius", 0.5)
    assert answer(row, tmp_path / "results.txt")[0] == "sat"
    monkeypatch.undo()
    check_counterexample(row, tmp_path / "results.txt")


@pytest.mark.parametrize("timeout", [1e-3, 1.0, 4.0])
def test_tiny_timeouts(timeout, tmp_path):
    """In a process of its own, which ends by itself."""
    (row,) = export(tmp_path / "out", "--radius", 0.05)
    command = [sys.executable, "-m", "flowverify", "vnncomp", "v1", "c", *map(str, row), str(tmp_path / "r.txt")]
    done = subprocess.run([*command, str(timeout)], capture_output=True, text=True, check=False)
    word = (tmp_path / "r.txt").read_text().splitlines()[0]
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(word)
    assert word == "timeout" if timeout < 0.1 else word in ("timeout", "unsat", "sat", "unknown")


def test_a_deadline_that_is_over(tmp_path):
    network, image, _, least = case(7)
    asked = question(tmp_path / "out", network, image, "linear", 0.9 * least / float(image.sum()))
    assert decide(asked, Deadline(1e-9)).word in ("timeout", "unsat")
    stopped = Deadline(60.0, clock=iter(range(0, 10**9, 100)).__next__)
    assert decide(asked, stopped).word in ("timeout", "unsat")


class TestCalls:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("v2", "c", "a.onnx", "b.vnnlib", "r.txt", "1"), "version 'v2': expected v1"),
            (("v1", "c", "a.onnx", "b.vnnlib", "r.txt"), "timeout: given None, expected seconds > 0"),
            (("v1", "c", "a.onnx", "b.vnnlib", "r.txt", "0"), "timeout: given 0.0, expected seconds > 0"),
            (("v1", "c", "a.onnx", "b.vnnlib", "nowhere/r.txt", "1"), "results nowhere/r.txt: nowhere is not a folder"),
            (("v1", "c", "a.onnx"), "Missing argument"),
        ],
    )
    def test_bad_usage_is_one_line(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = call("vnncomp", *arguments, code=2)
        assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_is_not_there_is_an_error(self, tmp_path):
        done = call("vnncomp", "v1", "c", tmp_path / "a.onnx", "b", tmp_path / "r.txt", 60, code=2)
        assert "a.onnx: cannot be read" in done.stderr and (tmp_path / "r.txt").read_text() == "error\n"

    def test_what_breaks_down_is_an_error(self, tmp_path, monkeypatch):
        def broken(*_):
            raise RuntimeError("broken")

        (row,) = export(tmp_path / "out", "--radius", 0.05)
        monkeypatch.setattr(vnncomp, "decide", broken)
        CliRunner().invoke(app, ["vnncomp", "v1", "c", *map(str, row), str(tmp_path / "r.txt"), "60"])
        assert (tmp_path / "r.txt").read_text() == "error\n"


class TestScripts:
    def run(self, name, *arguments, **variables):
        environment = {**os.environ, "FLOWVERIFY": f"{sys.executable} -m flowverify", **variables}
        command = ["sh", str(ROOT / "vnncomp" / f"{name}.sh"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    def test_an_instance_is_prepared_and_answered(self, tmp_path):
        (row,) = export(tmp_path / "out", "--radius", 0.01)
        prepared = self.run("prepare_instance", "v1", "digits", *row)
        assert (prepared.returncode, prepared.stderr) == (0, "")
        assert prepared.stdout == "label 0 within radius 0.01 pixels, encoding linear\n"
        done = self.run("run_instance", "v1", "digits", *row, tmp_path / "results.txt", 120)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "results.txt").read_text() == "unsat\n"

    @pytest.mark.parametrize("name", ["prepare_instance", "run_instance", "install_tool"])
    def test_bad_usage_is_one_line_and_exit_code_2(self, name):
        done = self.run(name, "v2")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "expected v1" in done.stderr
        assert os.access(ROOT / "vnncomp" / f"{name}.sh", os.X_OK)

    def test_installing_is_making_the_environment(self, tmp_path):
        (tmp_path / "make").write_text('#!/bin/sh\necho "$@" "$(cd "$2" && pwd)"\n')
        (tmp_path / "make").chmod(0o755)
        done = self.run("install_tool", "v1", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert done.returncode == 0 and done.stdout.split()[2:] == ["install", str(ROOT)]
