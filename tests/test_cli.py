"""The command line: JSON lines, tables, pictures, exit codes, and one line for everything a user can mend."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

import flowverify as fv
from flowverify.bounds.engine import DomainName
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.options import DOMAINS
from flowverify.cli import app
from flowverify.cli.common import json_line
from flowverify.zoo import models_folder

KEYS = {"index", "label", "prediction", "method", "bound", "ground", "cap", "radius", "verdict", "seconds", "margin"}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


class TestVerify:
    def test_json_lines(self):
        found = records(run("verify", "digits-fc3", "--index", "5:9", "--json"))
        assert [record["index"] for record in found] == [5, 6, 7, 8]
        assert all(set(record) >= KEYS for record in found)
        assert {record["verdict"] for record in found} == {"certified", "misclassified"}
        assert found[3]["verdict"] == "misclassified" and found[3]["radius"] == 0 and found[3]["margin"] is None
        assert found[0]["method"] == "fine-tuned" and found[0]["bound"] == "best" and found[0]["ground"] == "l1"

    def test_search_agrees_with_decision(self):
        options = ("--index", "3,5", "--method", "vanilla", "--bound", "crown", "--json")
        radii = {record["index"]: record["radius"] for record in records(run("verify", "digits-fc3", *options))}
        assert set(radii) == {3, 5}
        for index, radius in radii.items():
            for share, verdict in ((0.999, "certified"), (1.03, "unknown")):
                chosen = ("--index", index, "--method", "vanilla", "--bound", "crown", "--json")
                (record,) = records(run("verify", "digits-fc3", *chosen, "--radius", share * radius))
                assert record["verdict"] == verdict
                assert record["radius"] == share * radius

    def test_agrees_with_the_library(self):
        data, model = fv.load_dataset("digits"), fv.load_model("digits-fc3")
        radii = fv.certified_radius(model, data.images[:3], data.labels[:3], bound="ibp", ground="l2")
        found = records(run("verify", "digits-fc3", "--index", "0:3", "--bound", "ibp", "--ground", "l2", "--json"))
        assert [record["radius"] for record in found] == pytest.approx(radii.tolist(), rel=0.01)

    def test_table_and_summary(self):
        result = run("verify", "digits-fc3", "--index", "0:25", "--bound", "ibp")
        assert "radius (pixels)" in result.stdout
        assert "5 more images; --all prints them" in result.stdout
        assert "22 of 25 certified; 3 misclassified" in result.stdout.replace("\n", " ")
        assert "median radius" in result.stdout
        everything = run("verify", "digits-fc3", "--index", "0:25", "--bound", "ibp", "--radius", "0.01", "--all")
        assert "more images" not in everything.stdout and "median" not in everything.stdout

    def test_tables_are_not_broken_by_long_times(self, monkeypatch):
        clock = SimpleNamespace(perf_counter=count(step=12345678).__next__)
        monkeypatch.setattr("flowverify.certifiers.incomplete.time", clock)
        result = run("verify", "digits-fc3", "--index", "0:2", "--bound", "ibp", "--radius", "0.01")
        assert "radius (pixels)" in result.stdout and "6172839000.0" in result.stdout

    def test_onnx_file_and_saved_lines(self, tmp_path):
        path, saved = models_folder() / "digits-fc3.onnx", tmp_path / "lines.jsonl"
        options = ("--dataset", "digits", "--index", "0", "--bound", "ibp", "--save", saved)
        run("verify", path, *options)
        (record,) = [json.loads(line) for line in saved.read_text().splitlines()]
        assert record["index"] == 0 and record["verdict"] == "certified"

    def test_npz_of_ones_own(self, tmp_path):
        np.savez(tmp_path / "own.npz", images=np.full((3, 8, 8), 9, np.uint8), labels=np.array([1, 2, 3]))
        options = ("--dataset", tmp_path / "own.npz", "--bound", "ibp", "--json")
        assert [record["label"] for record in records(run("verify", "digits-fc3", *options))] == [1, 2, 3]

    def test_picture(self, tmp_path):
        picture = tmp_path / "worst.png"
        result = run("verify", "digits-fc3", "--index", "0:3", "--bound", "ibp", "--picture", picture, "--json")
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert len(records(result)) == 3 and "wrote" in result.stderr

    def test_a_picture_that_moves_names_the_network_and_the_image(self, tmp_path, monkeypatch):
        from flowverify.figures import files

        named = []
        monkeypatch.setattr(files, "head_lines", lambda certificate, name="": named.append(name) or name)
        picture = tmp_path / "worst.gif"
        run("verify", "digits-fc3", "--index", "3", "--bound", "ibp", "--picture", picture, "--json")
        assert picture.read_bytes()[:6] == b"GIF89a"
        assert named == ["digits-fc3, digits test, image 3"]

    def test_a_falsified_image_is_drawn_with_its_counterexample(self, tmp_path):
        picture = tmp_path / "worst.png"
        options = ("--method", "complete", "--radius", "0.3", "--index", "1")
        result = run("verify", "digits-fc3", *options, "--picture", picture, "--json")
        assert records(result)[0]["verdict"] == "falsified" and picture.read_bytes()[:4] == b"\x89PNG"

    def test_linear_method(self):
        options = ("--index", "0", "--dataset", "mnist", "--method", "linear", "--json")
        if not os.environ.get("FLOWVERIFY_DATA"):
            pytest.skip("needs the MNIST files in $FLOWVERIFY_DATA/mnist")
        (record,) = records(run("verify", "mnist-linear", *options))
        assert 0 < record["radius"] < record["upper_radius"]


class TestBrokenBatches:
    @pytest.fixture
    def broken(self, monkeypatch):
        """Certification breaks down at the second batch of two images."""
        real, calls = Certifier.certify, []

        def certify(self, images, labels, ball):
            calls.append(len(labels))
            if len(calls) == 2:
                raise RuntimeError("out of\nmemory")
            return real(self, images, labels, ball)

        monkeypatch.setattr(Certifier, "certify", certify)

    OPTIONS = ("verify", "digits-fc3", "--index", "0:5", "--radius", "0.01", "--bound", "ibp", "--batch-size", "2")

    def test_the_others_are_certified(self, broken):
        result = run(*self.OPTIONS, "--json", code=1)
        found = records(result)
        assert [record["verdict"] for record in found] == ["certified"] * 2 + ["error"] * 2 + ["certified"]
        assert found[2]["note"] == "RuntimeError: out of memory" and found[2]["prediction"] == 4
        assert result.stderr == "error: images 2 to 3: RuntimeError: out of memory\n"

    def test_the_summary_counts_them(self, broken):
        assert "3 of 5 certified; 2 error" in run(*self.OPTIONS, code=1).stdout

    def test_interruption_keeps_what_is_done(self, monkeypatch):
        real, calls = Certifier.certify, []

        def certify(self, images, labels, ball):
            calls.append(len(labels))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, images, labels, ball)

        monkeypatch.setattr(Certifier, "certify", certify)
        result = run(*self.OPTIONS, "--json", code=130)
        assert len(records(result)) == 2
        assert "interrupted after 2 of 5 images" in result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "corrupt.onnx").write_bytes(b"this is no network")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Round", ["f"], ["y"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", 1, 8, 8]), ("y", ["N", 64]))
    ]
    graph = helper.make_graph(nodes, "round", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), folder / "round.onnx"
    )
    images = np.full((2, 1, 8, 8), 0.5, np.float32)
    np.savez(folder / "label.npz", images=images, labels=np.array([3, 10]))
    np.savez(folder / "black.npz", images=images * np.array([1, 0], np.float32)[:, None, None, None], labels=[1, 2])
    for name, value in (("negative", -1.0), ("nan", np.nan)):
        wrong = images.copy()
        wrong[0, 0, 0, 0] = value
        np.savez(folder / f"{name}.npz", images=wrong, labels=np.array([1, 2]))
    np.savez(folder / "shape.npz", images=np.full((2, 1, 7, 8), 0.5, np.float32), labels=np.array([1, 2]))
    (folder / "corrupt.npz").write_bytes(b"PK")
    return folder


VERIFY = ("verify", "digits-fc3", "--index", "0")
BAD_INPUT = {
    "unknown model": (
        ("verify", "nonsense"),
        "unknown model 'nonsense': expected one of MODULE:FACTORY, PATH.onnx, PATH.pt",
    ),
    "missing model file": (("verify", "{files}/none.onnx", "--dataset", "digits"), "expected an existing ONNX file"),
    "corrupt model": (("verify", "{files}/corrupt.onnx", "--dataset", "digits"), "is not valid ONNX"),
    "unsupported operator": (("verify", "{files}/round.onnx", "--dataset", "digits"), "Round"),
    "no data set": (("verify", "{files}/corrupt.onnx"), "expected --dataset NAME"),
    "unknown data set": ((*VERIFY, "--dataset", "letters"), "unknown data set 'letters'"),
    "unknown split": ((*VERIFY, "--split", "half"), "unknown split 'half'"),
    "unknown method": (
        (*VERIFY, "--method", "magic"),
        "unknown method 'magic': expected one of MODULE:CLASS, complete, fine-tuned, linear",
    ),
    "unknown bound": ((*VERIFY, "--bound", "tight"), "unknown bound 'tight'"),
    "unknown ground": ((*VERIFY, "--ground", "l7"), "unknown ground cost 'l7'"),
    "unknown domain": ((*VERIFY, "--domain", "time"), "unknown domain 'time'"),
    "unknown device": ((*VERIFY, "--device", "abacus"), "unknown device 'abacus'"),
    "absent device": ((*VERIFY, "--device", "cuda:99"), "device cuda:99: torch finds"),
    "negative radius": ((*VERIFY, "--radius", "-0.1"), "radius: given -0.1, expected a finite number >= 0"),
    "infinite radius": ((*VERIFY, "--radius", "inf"), "radius: given inf"),
    "nan radius": ((*VERIFY, "--radius", "nan"), "radius: given nan"),
    "empty index": (("verify", "digits-fc3", "--index", "7:7"), "selects none of 539 images"),
    "index out of range": (("verify", "digits-fc3", "--index", "9999"), "9999 given, expected 0 to 538"),
    "index in words": (("verify", "digits-fc3", "--index", "all"), "expected a form like 0:100"),
    "missing data folder": ((*VERIFY, "--dataset", "mnist", "--data-dir", "{files}/none"), "no such folder"),
    "missing data files": (
        (*VERIFY, "--dataset", "mnist", "--data-dir", "{files}"),
        "expected the four files of mnist",
    ),
    "corrupt data": ((*VERIFY, "--dataset", "{files}/corrupt.npz"), "cannot be read as .npz"),
    "wrong shape": ((*VERIFY, "--dataset", "{files}/shape.npz"), "(1, 1, 7, 8): expected (..., 1, 8, 8)"),
    "label out of range": (("verify", "digits-fc3", "--dataset", "{files}/label.npz"), "label 10 (image 1)"),
    "negative pixel": ((*VERIFY, "--dataset", "{files}/negative.npz"), "expected values >= 0"),
    "nan pixel": ((*VERIFY, "--dataset", "{files}/nan.npz"), "NaN"),
    "zero mass": (("verify", "digits-fc3", "--dataset", "{files}/black.npz"), "mass"),
    "picture without folder": ((*VERIFY, "--picture", "{files}/none/a.png"), "is not a folder"),
    "picture of another kind": ((*VERIFY, "--picture", "{files}/a.pdf"), "ends in .png or .gif"),
    "lines into a folder": ((*VERIFY, "--save", "{files}"), "is a folder"),
    "not affine": ((*VERIFY, "--method", "linear"), "affine"),
    "unknown recipe": (("train", "--recipe", "nonsense"), "unknown recipe 'nonsense'"),
    "output is a file": (("train", "--recipe", "digits-fc3", "--out", "{files}/corrupt.npz"), "is a file"),
    "demo bound": (("demo", "--bound", "tight"), "unknown bound 'tight'"),
    "demo picture": (("demo", "--picture", "{files}/none/a.png"), "is not a folder"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_INPUT)
    def test_one_line_and_exit_code_2(self, case, files):
        arguments, expected = BAD_INPUT[case]
        result = run(*(argument.replace("{files}", str(files)) for argument in arguments), code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert expected in result.stderr

    @pytest.mark.parametrize("arguments", [("--references", "wide"), ("--nonsense",), ("--batch-size", "0")])
    def test_options_that_cannot_be_read(self, arguments):
        result = run(*VERIFY, *arguments, code=2)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

    def test_unknown_command(self):
        assert "No such command" in run("nonsense", code=2).stderr


def program(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowverify", *arguments],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder, check=False,
    )  # fmt: skip


class TestProgram:
    """In a process and a folder of its own."""

    def test_certifies(self, tmp_path):
        done = program("verify", "digits-fc3", "--index", "0:2", "--bound", "ibp", "--json", folder=tmp_path)
        assert done.returncode == 0
        assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == ["certified", "certified"]
        assert not list(tmp_path.iterdir())

    def test_bad_input(self, tmp_path):
        done = program("verify", "digits-fc3", "--radius", "-1", folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr == "error: radius: given -1.0, expected a finite number >= 0 (pixels)\n"

    def test_version_and_help(self, tmp_path):
        assert program("--version", folder=tmp_path).stdout == f"flowverify {fv.__version__}\n"
        assert "verify" in program("--help", folder=tmp_path).stdout


def test_models():
    text = run("models").stdout
    for name in ("digits-fc3", "mnist-linear", "mnist-fc3", "mnist-cnn"):
        assert name in text
    assert {"name", "sha256", "clean_accuracy", "command"} <= set(records(run("models", "--json"))[0])


def test_doctor():
    assert "certification works" in run("doctor").stdout
    assert {record["name"]: record["status"] for record in records(run("doctor", "--json"))}["auto_LiRPA"] == "ok"


def test_demo(tmp_path):
    picture = tmp_path / "demo.png"
    text = run("demo", "--picture", picture).stdout
    assert text.count("│ certified") == 21 and text.count("│ misclassified") == 3
    assert "vanilla: median radius" in text and "fine-tuned: median radius" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_train(tmp_path, monkeypatch):
    from dataclasses import replace

    from flowverify.training import RECIPES

    monkeypatch.setitem(RECIPES, "digits-fc3", replace(RECIPES["digits-fc3"], epochs=1))
    text = run("train", "--recipe", "digits-fc3", "--out", tmp_path / "new", "--seed", "3").stdout
    assert "clean accuracy" in text
    card = json.loads((tmp_path / "new" / "digits-fc3.json").read_text())
    assert card["seed"] == 3 and (tmp_path / "new" / card["file"]).is_file()


def test_json_has_no_infinity():
    assert json.loads(json_line({"a": float("-inf"), "b": float("nan"), "c": 1.5})) == {"a": None, "b": None, "c": 1.5}


def test_domains_are_those_of_the_library():
    assert get_args(DomainName) == DOMAINS
    assert torch.device("cpu") == fv.cli.common.check_device("cpu")  # type: ignore[attr-defined]


class TestReading:
    """A file that wants normalised images with channels last, as one softmax."""

    @pytest.fixture
    def module(self, tmp_path):
        class Last(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(60, 3)

            def forward(self, images):
                return torch.softmax(self.linear(images.flatten(1)), 1)

        torch.manual_seed(0)
        module = Last().eval()
        torch.onnx.export(
            module, (torch.zeros(1, 5, 4, 3),), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
        images = (torch.rand(3, 5, 4, 3) * 255).to(torch.uint8)
        normalised = (images / 255 - 0.25) / 0.5
        np.savez(tmp_path / "d.npz", images=images.numpy(), labels=module(normalised).argmax(1).numpy())
        return module

    def test_verify_reads_and_says_so(self, module, tmp_path):
        options = ("--layout", "nhwc", "--mean", "0.25", "--std", "0.5,0.5,0.5", "--method", "linear", "--json")
        result = run("verify", tmp_path / "m.onnx", "--dataset", tmp_path / "d.npz", *options)
        records = [json.loads(line) for line in result.stdout.splitlines()]
        assert [record["verdict"] for record in records] == ["certified"] * 3
        assert "input (N, 5, 4, 3): 3 x 5 x 4 images, channels last" in result.stderr
        assert "images of shape (3, 5, 4, 3), taken with channels last: 3 x 5 x 4 images" in result.stderr
        assert "final Softmax dropped: the order of classes is the claim" in result.stderr
        data = fv.load_dataset(tmp_path / "d.npz")
        plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 3))
        weight = module.linear.weight.data.reshape(3, 5, 4, 3).permute(0, 3, 1, 2)
        plain[1].weight.data = weight.reshape(3, -1) / 0.5
        plain[1].bias.data = module.linear.bias.data - weight.flatten(1).sum(1) * 0.25 / 0.5
        expected = fv.certified_radius(plain, data.images, data.labels, "linear")
        assert [record["radius"] for record in records] == pytest.approx(expected.tolist(), rel=1e-4)

    def test_levels_up_to_255_are_noticed(self, tmp_path):
        images, labels = (
            part.numpy() for part in (fv.load_dataset("digits").images[:2] * 255, fv.load_dataset("digits").labels[:2])
        )
        np.savez(tmp_path / "d.npz", images=images, labels=labels)
        result = run("verify", "digits-fc3", "--dataset", tmp_path / "d.npz", "--bound", "ibp", "--json")
        assert "d: pixels go up to 255; radii do not depend on that, but the network has to take" in result.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--mean", "a"), "mean 'a': expected numbers with commas between them"),
            (("--input-shape", "3,4"), "input-shape '3,4': expected C,H,W"),
            (("--layout", "chw"), "unknown layout 'chw'"),
            (("--std", "0"), "std (0.0,): expected finite numbers > 0"),
            (("--weights", "w.pt"), "expected with a factory"),
        ],
    )
    def test_bad_options(self, options, message, module, tmp_path):
        result = run("verify", tmp_path / "m.onnx", "--dataset", tmp_path / "d.npz", *options, code=2)
        assert not result.stdout
        assert message in result.stderr and result.stderr.count("\n") == 1
