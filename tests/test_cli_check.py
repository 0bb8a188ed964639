"""`flowverify check`: one question, one answer in words, and the exit code that a script goes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flowverify as fv
from flowverify import figures
from flowverify.attack.frank_wolfe import MinimalRadius
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.incomplete import Certifier
from flowverify.cli import app
from flowverify.results import Verdict
from flowverify.zoo import models_folder

NETWORK = str(models_folder() / "digits-fc3.onnx")
SIGMOID = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3))
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def record(*arguments, code=0):
    (line,) = run(*arguments, "--json", code=code).stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The first test image of digits, a 0, as a grey picture and in colour; and files that cannot be used."""
    folder, image = tmp_path_factory.mktemp("files"), pytest.importorskip("PIL.Image")
    levels = (fv.load_dataset("digits").images[0, 0] * 255).round().to(torch.uint8).numpy()
    image.fromarray(levels).save(folder / "zero.png")
    image.fromarray(np.stack([levels] * 3, 2)).save(folder / "colour.png")
    image.fromarray(levels[:7]).save(folder / "small.png")
    image.fromarray(0 * levels).save(folder / "black.png")
    (folder / "broken.png").write_bytes(b"nothing")
    np.save(folder / "zero.npy", levels)
    np.save(folder / "negative.npy", levels / 255.0 - 0.5)
    np.savez(folder / "three.npz", images=np.stack([levels] * 2), labels=np.array([0, 3]))
    (folder / "net.py").write_text(SIGMOID)
    return folder


class TestVerdicts:
    def test_certified_from_a_file_and_a_picture_with_a_drawing(self, files, tmp_path):
        drawn = tmp_path / "worst.png"
        result = run(NETWORK, "--image", files / "zero.png", "--radius", 0.02, "--picture", drawn)
        assert result.stdout.startswith("certified: no image within 0.02 pixels (W1, l1) of ")
        assert "is classified otherwise than 0\nlabel 0, from the network's own prediction\n" in result.stdout
        assert "decided by fine-tuned with bound best, margin at least " in result.stdout
        assert drawn.read_bytes()[:4] == b"\x89PNG" and f"wrote {drawn}" in result.stderr

    def test_falsified_with_a_drawing_of_the_counterexample(self, files, tmp_path, monkeypatch):
        drawn, pairs = tmp_path / "found.png", []
        real = figures.draw_adversarial
        monkeypatch.setattr(figures, "draw_adversarial", lambda *given: (pairs.append(given), real(*given)))
        options = ("--image", files / "zero.png", "--radius", 0.3, "--ground", "l2", "--picture", drawn)
        result = run(NETWORK, *options, code=1)
        assert result.stdout.startswith("falsified: an image within 0.3 pixels (W1, l2) of ")
        assert "decided by attack minimal" in result.stdout
        assert drawn.read_bytes()[:4] == b"\x89PNG"
        ((images, found, titles, _),) = pairs
        network = fv.load_model(NETWORK)
        assert int(network(images.float()).argmax()) == 0 != int(network(found.float()).argmax())
        assert bool(fv.WassersteinBall(0.3, "l2").contains(images, found, tolerance=1e-9)[0])
        assert "label 0, now " in titles[0] and "W1, l2 = " in titles[0]

    def test_falsified_says_where(self, files):
        found = record(NETWORK, "--image", files / "zero.png", "--radius", 0.3, code=1)
        assert found["verdict"] == "falsified" and found["label"] == found["prediction"] == 0 != found["classified_as"]
        assert 0 < found["upper_radius"] <= found["radius"] == 0.3
        assert found["decided_by"] == "attack minimal" and len(found["steps"]) == 1

    def test_misclassified(self, tmp_path):
        found = record("digits-fc3", "--index", 8, "--radius", 0.01, code=1)
        assert (found["verdict"], found["label_from"], found["steps"]) == ("misclassified", "the data set", [])
        assert found["image"] == "image 8 of digits" and found["prediction"] != found["label"]
        text = run("digits-fc3", "--index", 8, "--radius", 0.01, "--picture", tmp_path / "a.png", code=1).stdout
        assert text.startswith("misclassified: image 8 of digits itself is not classified as ")
        assert (tmp_path / "a.png").is_file()

    def test_unknown(self):
        options = ("--index", 0, "--radius", 0.05, "--method", "vanilla", "--bound", "ibp")
        text = run("digits-fc3", *options, code=3).stdout
        assert text.startswith(
            "unknown: whether an image within 0.05 pixels (W1, l1) of image 0 of digits is classified"
        )
        assert "was not decided" in text and "vanilla with bound ibp: unknown" in text
        found = record("digits-fc3", *options, code=3)
        assert found["verdict"] == "unknown" and found["decided_by"] is None
        assert [step["name"] for step in found["steps"]] == ["attack minimal", "vanilla with bound ibp"]

    def test_timeout(self):
        options = ("--index", 0, "--radius", 0.05, "--method", "complete", "--timeout", 1e-9)
        assert run("digits-fc3", *options, code=3).stdout.startswith("timeout: time ran out before it was decided")
        found = record("digits-fc3", *options, code=3)
        assert found["verdict"] == "timeout" and found["steps"][1] == {
            "name": "complete", "verdict": None, "seconds": 0.0, "note": "no time is left"
        }  # fmt: skip

    def test_what_breaks_down_is_not_taken_for_a_counterexample(self, monkeypatch):
        def dies(*_):
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr(Certifier, "certify", dies)
        options = ("--index", 0, "--radius", 0.01, "--method", "fine-tuned")
        assert record("digits-fc3", *options, code=3)["note"] == "RuntimeError: out of memory"
        assert run("digits-fc3", *options, code=3).stdout.startswith("error: the computation broke down before")
        monkeypatch.setattr(MinimalRadius, "run", dies)
        found = record("digits-fc3", "--index", 0, "--radius", 0.01, "--method", "complete")
        assert [step["verdict"] for step in found["steps"]] == ["error", "certified"]

    def test_complete_decides_what_bounds_cannot(self):
        options = ("--index", 0, "--radius", 0.05, "--bound", "ibp")
        found = record("digits-fc3", *options)
        assert (found["verdict"], found["method"], found["decided_by"]) == ("certified", "complete", "complete")
        assert [step["verdict"] for step in found["steps"]] == ["unknown", "unknown", "certified"]


class TestWhatIsTried:
    def test_complete_only_where_the_network_allows_it(self, files):
        network = f"{files / 'net.py'}:make"
        options = (network, "--image", files / "zero.png", "--bound", "ibp", "--radius")
        steps = record(*options, 0.2, code=3)["steps"]
        assert steps[2]["verdict"] is None and "Sigmoid" in steps[2]["note"]
        assert "complete was not tried: " in run(*options, 0.2, code=3).stdout
        assert "Sigmoid" in run(*options, 0.2, "--method", "complete", code=2).stderr
        assert record(*options, 0.1)["verdict"] == "certified"

    def test_a_target_alone_counts(self, files):
        options = (NETWORK, "--image", files / "zero.png", "--radius", 0.3)
        other = record(*options, code=1)["classified_as"]
        target = next(one for one in range(1, 10) if one != other)
        found = record(*options[:-1], 0.05, "--target", target)
        assert found["verdict"] == "certified"
        found = record(*options[:-1], 3.0, "--target", target, code=1)
        assert (found["verdict"], found["classified_as"]) == ("falsified", target)

    def test_nothing_that_an_attack_says_is_believed(self, monkeypatch):
        real = MinimalRadius.run

        def lies(self, images, labels, ball):
            found = real(self, images, labels, ball)
            return replace(found, outcome=("found",), prediction=found.label + 1, radius=found.radius * 0)

        monkeypatch.setattr(MinimalRadius, "run", lies)
        found = record("digits-fc3", "--index", 0, "--radius", 0.01)
        assert [step["verdict"] for step in found["steps"]] == ["unknown", "certified"]

    def test_nothing_that_a_method_says_is_believed(self, monkeypatch):
        real = Certifier.certify
        far = fv.load_dataset("digits").images[1]

        def lies(self, images, labels, ball):
            (one,) = real(self, images, labels, ball)
            return [replace(one, verdict=Verdict.FALSIFIED, witness=far, upper_radius=0.001)]

        monkeypatch.setattr(Certifier, "certify", lies)
        found = record("digits-fc3", "--index", 0, "--radius", 0.01, "--method", "fine-tuned", code=3)
        assert found["verdict"] == "unknown" and found["note"] == "what it offered as a counterexample was none"

    def test_a_method_of_ones_own_finds_counterexamples_that_hold(self, monkeypatch, files):
        network, image = fv.load_model("digits-fc3"), fv.load_dataset("digits").images[:1]
        witness = fv.find_adversarial(network, image, torch.tensor([0])).images[0]
        real = Certifier.certify
        monkeypatch.setattr(
            Certifier,
            "certify",
            lambda *given: [replace(real(*given)[0], verdict=Verdict.FALSIFIED, witness=witness, upper_radius=None)],
        )
        monkeypatch.setattr(MinimalRadius, "search", lambda self, batch: batch.images)
        found = record("digits-fc3", "--index", 0, "--radius", 0.5, "--method", "fine-tuned", code=1)
        assert found["decided_by"] == "fine-tuned with bound best" and found["classified_as"] != 0
        assert 0 < found["upper_radius"] < 0.5

    def test_interruption(self, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(BaseCertifier, "prepare", interrupted)
        assert "interrupted" in run("digits-fc3", "--index", 0, "--radius", 0.01, code=130).stderr


def test_verbose_and_quiet(files, tmp_path):
    options = (NETWORK, "--image", files / "colour.png", "--radius", 0.01, "--method", "fine-tuned", "--picture")
    said = run(*options, tmp_path / "a.png", "-v").stderr
    assert "1 x 8 x 8 images, 10 classes, on cpu; SHA-256 " in said and "colour.png: turned into grey values" in said
    assert run(*options, tmp_path / "a.png", "-q").stderr == ""


class TestImages:
    def test_where_the_label_comes_from(self, files):
        options = ("--radius", 0.001, "--bound", "ibp")
        assert "label 0, as given" in run(NETWORK, "--image", files / "zero.png", "--label", 0, *options).stdout
        assert record("digits-fc3", "--index", 1, *options)["label_from"] == "the data set"
        found = record(NETWORK, "--image", files / "three.npz", "--index", 1, *options, code=1)
        assert (found["label"], found["label_from"], found["verdict"]) == (3, "the file", "misclassified")
        assert record(NETWORK, "--image", files / "three.npz", "--index", 1, "--label", 0, *options)["label"] == 0

    @pytest.mark.parametrize("name", ["colour.png", "zero.npy"])
    def test_the_same_image_in_another_form(self, name, files):
        options = ("--radius", 0.01, "--method", "fine-tuned", "--bound", "ibp")
        same = record(NETWORK, "--image", files / "zero.png", *options)
        result = run(NETWORK, "--image", files / name, *options, "--json")
        assert json.loads(result.stdout)["margin"] == pytest.approx(same["margin"], rel=1e-6)
        assert ("turned into grey values" in result.stderr) == (name == "colour.png")

    def test_grey_pictures_for_networks_of_colours(self, files, tmp_path):
        (tmp_path / "colour.py").write_text(SIGMOID.replace("64", "192"))
        options = ("--radius", 1e-6, "--bound", "ibp", "--input-shape", "3,8,8")
        result = run(f"{tmp_path / 'colour.py'}:make", "--image", files / "zero.png", *options)
        assert "turned into colour" in result.stderr and result.stdout.startswith("certified")


VALID = ("{network}", "--image", "{files}/zero.png", "--radius", "0.01")
BAD_INPUT = {
    "no image": (("{network}", "--radius", "0.01"), "image: none given, expected --image FILE, or --index N"),
    "no data set": (("{network}", "--index", "0", "--radius", "0.01"), "expected --dataset NAME"),
    "both": ((*VALID, "--dataset", "digits"), "dataset digits: given with --image"),
    "index of a picture": ((*VALID, "--index", "1"), "index 1: given with the picture"),
    "missing picture": (("{network}", "--image", "{files}/none.png", "--radius", "1"), "no such file"),
    "broken picture": (("{network}", "--image", "{files}/broken.png", "--radius", "1"), "cannot be read as an image"),
    "picture of another size": (("{network}", "--image", "{files}/small.png", "--radius", "1"), "(1, 7, 8)"),
    "black picture": (("{network}", "--image", "{files}/black.png", "--radius", "1"), "mass"),
    "negative pixels": (("{network}", "--image", "{files}/negative.npy", "--radius", "1"), "expected finite and >= 0"),
    "index beyond the data": (("digits-fc3", "--index", "539", "--radius", "1"), "539: given, expected 0 to 538"),
    "unknown network": (("nonsense", "--image", "{files}/zero.png", "--radius", "1"), "unknown model 'nonsense'"),
    "negative radius": ((*VALID[:-1], "-1"), "radius: given -1.0, expected a finite number >= 0"),
    "label that is no class": ((*VALID, "--label", "10"), "expected a class of the model, 0 to 9"),
    "target that is the label": ((*VALID, "--target", "0"), "target 0: is the label"),
    "unknown method": ((*VALID, "--method", "magic"), "unknown method 'magic'"),
    "unknown bound": ((*VALID, "--bound", "tight"), "unknown bound 'tight'"),
    "unknown attack": ((*VALID, "--attack", "magic"), "unknown attack 'magic'"),
    "unknown ground": ((*VALID, "--ground", "l7"), "unknown ground cost 'l7'"),
    "no time": ((*VALID, "--timeout", "0"), "timeout: given 0.0, expected seconds > 0"),
    "a pixel above the cap": ((*VALID, "--cap", "0.1"), "expected at most the cap, 0.1"),
    "picture without folder": ((*VALID, "--picture", "{files}/none/a.png"), "is not a folder"),
    "method for affine networks": ((*VALID, "--method", "linear"), "affine"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case, files):
    arguments, expected = BAD_INPUT[case]
    result = run(*(one.replace("{files}", str(files)).replace("{network}", NETWORK) for one in arguments), code=2)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith(NETWORK)]  # what was read
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]


class TestVerifyFailsOn:
    OPTIONS = ("verify", "digits-fc3", "--index", "7:9", "--bound", "ibp", "--radius", "0.008", "--json")

    @pytest.mark.parametrize(
        ("verdicts", "code"),
        [((), 0), (("falsified", "unknown"), 0), (("misclassified",), 1), (("unknown", "certified"), 1)],
    )
    def test_exit_code(self, verdicts, code):
        result = CliRunner().invoke(app, [*self.OPTIONS, *(f"--fail-on={verdict}" for verdict in verdicts)])
        assert result.exit_code == code
        assert [json.loads(line)["verdict"] for line in result.stdout.splitlines()] == ["certified", "misclassified"]
        assert ("--fail-on: 1 of 2 images " in result.stderr) == bool(code)

    def test_unknown_verdict(self):
        result = CliRunner().invoke(app, [*self.OPTIONS, "--fail-on", "wrong"])
        assert result.exit_code == 2 and "unknown verdict 'wrong': expected one of certified" in result.stderr
