"""Folders for outside verifiers: layout, dialect, what is refused, and answers read back."""

import csv
import gzip
import json
import os
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flowverify as fv
from flowverify.ball import WassersteinBall
from flowverify.cli import app
from flowverify.errors import InvalidInputError
from flowverify.export import folder as folder_module
from flowverify.export.folder import Layout, Source, read_contents, write_folder
from flowverify.export.plan import Request, plan
from flowverify.export.results import collect, read_results, read_witness, repaired, replay
from flowverify.network import write_onnx
from flowverify.network.subject import Subject
from flowverify.transport.references import flow_by_transport, flow_by_tree
from tests.contracts import descend
from tests.export.exact import small_image, small_network

ENCODINGS = ("linear", "outputs", "penalty", "l1-penalty")


def batch(seed=1, count=2):
    network = small_network(seed, "linear")
    images = torch.stack([small_image(seed + k) for k in range(count)])
    return network, images, network(images).argmax(1)


def source(count=2):
    return Source("small", "random", "test", tuple(range(10, 10 + count)))


def write(folder, encoding="linear", radii=(0.1, 0.2), layout=None, **options):
    network, images, labels = batch()
    request = Request(encoding, radii, **options)
    return network, write_folder(folder, network, images, labels, request, source(), layout)


DECIMAL = r"-?[0-9]+\.[0-9]+"
TERM = r"(?:[XY]_[0-9]+|\(- [XY]_[0-9]+\))"
COMPARISON = rf"\((?:<=|>=) (?:[XY]_[0-9]+|\(\+ {TERM}(?: {TERM})+\)) (?:[XY]_[0-9]+|{DECIMAL})\)"
STATEMENT = re.compile(
    rf"; [ -~]*|\(declare-const [XY]_[0-9]+ Real\)|\(assert {COMPARISON}\)|"
    rf"\(assert \(or \(and {COMPARISON}(?: {COMPARISON})*\)(?: \(and {COMPARISON}(?: {COMPARISON})*\))*\)\)"
)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("positivity", [True, False])
def test_layout_and_dialect(encoding, positivity, tmp_path):
    _, manifest = write(tmp_path / "out", encoding, positivity=positivity, reference="uniform")
    with (tmp_path / "out" / "instances.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(manifest["instances"]) == 4
    for (onnx, vnnlib, timeout), one in zip(rows, manifest["instances"], strict=True):
        assert (onnx, vnnlib, timeout) == (one["onnx"], one["vnnlib"], "300")
        assert (tmp_path / "out" / onnx).is_file()
        lines = (tmp_path / "out" / vnnlib).read_text().splitlines()
        assert all(STATEMENT.fullmatch(line) for line in lines)
        assert f"Encoding {encoding}" in lines[2]
        assert ("misread it" in lines[2]) == (encoding == "linear")
        bounds = [line for line in lines if re.match(r"\(assert \([<>]= X_[0-9]+ ", line)]
        declared = sum(line.startswith("(declare-const X_") for line in lines)
        assert len(bounds) == 2 * declared
    assert (tmp_path / "out" / "config").is_dir() == (encoding == "l1-penalty")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_version_2_is_read_by_the_package_vnnlib(encoding, tmp_path):
    vnnlib = pytest.importorskip("vnnlib", reason="the package vnnlib 1.0 is not installed")
    _, manifest = write(tmp_path / "out", encoding, layout=Layout("2.0"))
    for one in manifest["instances"]:
        text = (tmp_path / "out" / one["vnnlib"]).read_text()
        query = vnnlib.parse_query_string(text)
        assert len(query.assertions) == text.count("(assert")


def test_compressed_files_hold_the_same(tmp_path):
    write(tmp_path / "plain")
    _, manifest = write(tmp_path / "packed", layout=Layout(compress=True))
    for one in manifest["instances"]:
        for path in (one["onnx"], one["vnnlib"]):
            data = gzip.decompress((tmp_path / "packed" / f"{path}.gz").read_bytes())
            assert data == (tmp_path / "plain" / path).read_bytes() == read_contents(tmp_path / "packed", path)


def test_misclassified_images_are_listed_and_left_out(tmp_path):
    network, images, labels = batch()
    labels[0] = (labels[0] + 1) % 3
    manifest = write_folder(tmp_path / "out", network, images, labels, Request("linear", (0.1,)), source())
    assert [one["index"] for one in manifest["misclassified"]] == [10]
    assert [one["index"] for one in manifest["instances"]] == [11]
    with pytest.raises(InvalidInputError, match="all 1 are misclassified"):
        write_folder(tmp_path / "none", network, images[:1], labels[:1], Request("linear", (0.1,)), source(1))
    assert not (tmp_path / "none").exists()


class TestRefused:
    def test_folders(self, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("keep")
        with pytest.raises(InvalidInputError, match="is not empty; --force replaces"):
            write(tmp_path / "full")
        network, images, labels = batch()
        with pytest.raises(InvalidInputError, match=r"has no manifest\.json, expected an earlier export"):
            write_folder(tmp_path / "full", network, images, labels, Request("linear", (0.1,)), source(), force=True)
        with pytest.raises(InvalidInputError, match="is a file"):
            write(tmp_path / "full" / "mine.txt")
        with pytest.raises(InvalidInputError, match="is not a folder"):
            write(tmp_path / "nowhere" / "out")
        assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_unwritable_folder(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(InvalidInputError, match="cannot be written to"):
            write(tmp_path / "out")

    def test_force_replaces_an_export_and_a_failure_leaves_it(self, tmp_path, monkeypatch):
        write(tmp_path / "out")
        network, images, labels = batch()
        before = (tmp_path / "out" / "instances.csv").read_text()

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        original = folder_module.write_property
        monkeypatch.setattr(folder_module, "write_property", fail)
        with pytest.raises(OSError, match="No space"):
            write_folder(tmp_path / "out", network, images, labels, Request("outputs", (0.1,)), source(), force=True)
        assert (tmp_path / "out" / "instances.csv").read_text() == before
        monkeypatch.setattr(folder_module, "write_property", original)
        write_folder(tmp_path / "out", network, images, labels, Request("outputs", (0.1,)), source(), force=True)
        assert (tmp_path / "out" / "instances.csv").read_text() != before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"radii": ()}, "radii: given none"),
            ({"radii": (0.0,)}, "radius: given 0.0, expected a finite number > 0"),
            ({"radii": (float("nan"),)}, "radius: given nan"),
            ({"encoding": "smt"}, "unknown encoding 'smt'"),
            ({"reference": "somewhere"}, "unknown reference 'somewhere'"),
            ({"reference": "point:4,0"}, "expected a row in 0..3"),
            ({"ground": "l3"}, "unknown ground"),
            ({"penalty_weight": -1.0}, "penalty weight: given -1.0"),
            ({"layout": lambda: Layout("3.0")}, "VNN-LIB version '3.0'"),
            ({"layout": lambda: Layout(timeout=0)}, "timeout: given 0"),
        ],
    )
    def test_requests(self, options, message, tmp_path):
        with pytest.raises((InvalidInputError, fv.FlowverifyError), match=message):
            write(tmp_path / "out", **{k: v() if callable(v) else v for k, v in options.items()})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.ones((3, 3)), r"of shape \(3, 3\): expected \(1, 4, 4\)"),
            (np.ones((4, 4)), r"of mass \[16\.0\]: expected"),
            (-np.ones((4, 4)), "expected finite and >= 0"),
            (np.array(["a"]), "expected one array of numbers"),
        ],
    )
    def test_references(self, array, message, tmp_path):
        np.save(tmp_path / "reference.npy", array)
        with pytest.raises(InvalidInputError, match=message):
            write(tmp_path / "out", reference=str(tmp_path / "reference.npy"))
        (tmp_path / "broken.npy").write_text("?")
        with pytest.raises(InvalidInputError, match=r"broken\.npy: cannot be read"):
            write(tmp_path / "out", reference=str(tmp_path / "broken.npy"))


def test_repaired_witnesses_are_images_of_the_ball():
    image = small_image(3).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        witness = image + 0.3 * torch.randn(image.shape, generator=generator, dtype=torch.float64)
        ball = WassersteinBall(0.1)
        assert ball.contains(image[None], repaired(witness, image, ball)[None], tolerance=0.0).all()


def test_a_witness_for_the_file_alone_falsifies_nothing(tmp_path):
    """The exported network confirms it, the original network keeps the label: rounding, or another network."""
    pytest.importorskip("onnxruntime")
    network, images, labels = batch(count=1)
    label = int(labels[0])
    (export,) = plan(network, images, labels, Request("linear", (2.0,)))
    write_onnx(export.network.graph, tmp_path / "network.onnx")
    point = TestAnswers().witness(network, images[0], label, 2.0)
    move = flow_by_transport(images.double(), point[None], mass_tolerance=1e-6)[0]
    values = torch.cat([move.clamp(min=0), (-move).clamp(min=0)]).numpy()
    firm = small_network(1, "linear")
    firm.nodes[-1].operation.bias[label] += 1000
    for certified, expected in ((network, ""), (firm, "replay: the original network keeps the label")):
        found = replay(
            Subject(certified), images[0], label, WassersteinBall(2.0), values,
            export.network.inputs, export.network.encoding, tmp_path / "network.onnx",
        )  # fmt: skip
        assert found.falsified == (not expected)
        assert found.reason.startswith(expected)


class TestAnswers:
    def witness(self, network, image, label, radius):
        """A misclassified image of the ball, by Frank-Wolfe, or None."""
        budget = radius * image.double().sum()
        points = descend(network.double(), image[None], torch.tensor([label]), budget[None], steps=10)[0]
        wrong = points[network(points).argmax(1) != label]
        network.float()
        return wrong[0] if len(wrong) else None

    @pytest.mark.parametrize("encoding", ["linear", "outputs", "penalty"])
    def test_sat_counts_with_a_witness_that_is_replayed(self, encoding, tmp_path):
        pytest.importorskip("onnxruntime")
        network, manifest = write(tmp_path / "out", encoding, radii=(2.0,), reference="uniform")
        _, images, labels = batch()
        one = manifest["instances"][0]
        image = images[0]
        point = self.witness(network, image, int(labels[0]), 2.0)
        assert point is not None
        reference = torch.full((1, 1, 4, 4), 1 / 16, dtype=torch.float64) * image.double().sum()
        base = flow_by_tree(reference, image[None].double())[0]
        move = flow_by_transport(image[None].double(), point[None], mass_tolerance=1e-6)[0]
        parts = [base.clamp(min=0) + move.clamp(min=0), (-base).clamp(min=0) + (-move).clamp(min=0)]
        info = manifest["networks"][one["onnx"]]
        if info["mass_inputs"]:
            parts.append(image.double().sum()[None])
        if info["budget_input"]:
            parts.append((base.abs().sum() + 2.0 * image.double().sum())[None])
        values = torch.cat(parts).tolist()
        results = tmp_path / "results.csv"
        rows = [
            f"./b,./{x['onnx']},./{x['vnnlib']},0.1,{'sat' if x is one else 'unsat'},1.5" for x in manifest["instances"]
        ]
        results.write_text("\n".join(rows) + "\n")
        found = dict(collect(network, tmp_path / "out", results))
        assert found[10].verdict == "unknown" and "without a witness" in found[10].note
        assert found[11].verdict == "certified" and found[11].seconds == 1.5
        name = f"{one['vnnlib'].removeprefix('vnnlib/').removesuffix('.vnnlib')}.counterexample"
        text = "sat\n(" + "\n".join(f"(X_{k} {value!r})" for k, value in enumerate(values)) + "\n(Y_0 1.0))"
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        shown = dict(collect(network, tmp_path / "out", results))[10]
        assert shown.verdict == "falsified", shown.note
        assert 0 < shown.upper_radius <= 2.0
        harmless = [*base.clamp(min=0).tolist(), *(-base).clamp(min=0).tolist(), *values[48:]]
        text = " ".join(f"(X_{k} {value!r})" for k, value in enumerate(harmless))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        refused = dict(collect(network, tmp_path / "out", results))[10]
        assert refused.verdict == "unknown" and "does not confirm" in refused.note

    def test_what_counts_and_what_does_not(self, tmp_path):
        network, manifest = write(tmp_path / "out")
        names = [(one["onnx"], one["vnnlib"]) for one in manifest["instances"]]
        words = ["unsat", "timeout", "unknown"]
        rows = ["onnx,vnnlib,result,time"] + [f"{a},{b},{w},2" for (a, b), w in zip(names, words, strict=False)]
        (tmp_path / "results.csv").write_text("\n".join(rows))
        found = [one.verdict for _, one in collect(network, tmp_path / "out", tmp_path / "results.csv")]
        assert found == ["certified", "timeout", "unknown", "unknown"]
        (tmp_path / "results.csv").write_text("\n".join([*rows, f"{names[0][0]},{names[0][1]},sat,1"]))
        first = next(collect(network, tmp_path / "out", tmp_path / "results.csv"))[1]
        assert first.verdict == "error" and "both sat and unsat" in first.note

    def test_changed_files_are_no_proof(self, tmp_path):
        network, manifest = write(tmp_path / "out")
        one = manifest["instances"][0]
        (tmp_path / "results.csv").write_text(f"{one['onnx']},{one['vnnlib']},unsat,2\n")
        path = tmp_path / "out" / one["vnnlib"]
        path.write_text(path.read_text() + "(assert (<= X_0 0.0))\n")
        found = next(collect(network, tmp_path / "out", tmp_path / "results.csv"))[1]
        assert found.verdict == "error" and "has changed since it was exported" in found.note

    def test_bad_results(self, tmp_path):
        network, manifest = write(tmp_path / "out")
        path = tmp_path / "results.csv"
        cases = {
            "a,b,c\n": "no row names an .onnx and a .vnnlib file",
            "onnx/x.onnx,vnnlib/y.vnnlib,unsat,1\n": "which is no instance of",
            "onnx/x.onnx,vnnlib/y.vnnlib,perhaps,1\n": "line 1: 0 verdicts",
        }
        for text, message in cases.items():
            path.write_text(text)
            with pytest.raises(InvalidInputError, match=message):
                list(collect(network, tmp_path / "out", path))
        with pytest.raises(InvalidInputError, match="cannot be read"):
            read_results(tmp_path / "nowhere.csv")
        one = manifest["instances"][0]
        path.write_text(f"{one['onnx']},{one['vnnlib']},unsat,2\n")
        with pytest.raises(InvalidInputError, match="was exported from another network"):
            list(collect(small_network(9, "linear"), tmp_path / "out", path))
        with pytest.raises(InvalidInputError, match=r"no readable manifest\.json"):
            list(collect(network, tmp_path, path))
        (tmp_path / "w").write_text("(X_0 1.0) (X_2 1.0)")
        with pytest.raises(InvalidInputError, match="2 inputs, expected X_0 to X_2"):
            read_witness(tmp_path / "w", 3)


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    def test_writes_and_collects(self, tmp_path):
        out = tmp_path / "out"
        done = self.run("digits-fc3", "--out", out, "--index", "0:2", "--radius", 0.02, "--radius", 0.05, "--json")
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["index"], row["radius"]) for row in rows] == [(0, 0.02), (0, 0.05), (1, 0.02), (1, 0.05)]
        (tmp_path / "results.csv").write_text(f"{rows[0]['onnx']},{rows[0]['vnnlib']},unsat,2\n")
        read = self.run("digits-fc3", "--out", out, "--collect", tmp_path / "results.csv", "--json")
        assert read.exit_code == 0, read.output
        first = json.loads(read.stdout.splitlines()[0])
        assert (first["index"], first["verdict"], first["bound"]) == (0, "certified", "export-linear")

    def test_own_model_needs_a_data_set(self, tmp_path):
        write_onnx(small_network(1, "linear"), tmp_path / "own.onnx")
        found = self.run(tmp_path / "own.onnx", "--out", tmp_path / "out", "--radius", 0.1)
        assert found.exit_code == 2 and "expected --dataset NAME" in found.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "radius: given none"),
            (["--radius", "0"], "expected a finite number > 0"),
            (["--radius", "1", "--encoding", "smt"], "unknown encoding"),
            (["--radius", "1", "--index", "9999"], "expected 0 to"),
            (["--radius", "1", "--vnnlib", "1.5"], "VNN-LIB version '1.5'"),
        ],
    )
    def test_one_line_and_exit_code_2(self, arguments, message, tmp_path):
        found = self.run("digits-fc3", "--out", tmp_path / "out", *arguments)
        assert found.exit_code == 2
        assert message in found.output and len(found.output.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
