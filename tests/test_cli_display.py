"""What commands print is what holds: distances with their ground cost, both ends of medians, accuracies with images."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from flowverify.cli import app
from flowverify.results import Certificate, Verdict
from flowverify.zoo import list_models

CERTIFIED, FALSIFIED, MISCLASSIFIED = Verdict.CERTIFIED, Verdict.FALSIFIED, Verdict.MISCLASSIFIED
UNLABELLED = re.compile(r"\d pixels(?! \(W| certified, .*\(W)")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def certify(monkeypatch):
    """`verify` on these images, with these outcomes: (verdict, radius, upper radius)."""

    def certify(outcomes, *options):
        plain = Certificate(CERTIFIED, 1, 1, "complete", "branch-and-bound", "l1", 0.0, None, 0.1)
        found = [
            replace(plain, verdict=verdict, radius=radius, upper_radius=upper, note="" if upper else "open")
            for verdict, radius, upper in outcomes
        ]
        records = [{"index": index, **one.to_json()} for index, one in enumerate(found)]
        monkeypatch.setattr("flowverify.cli.job.Job.run", lambda *_, **__: records)
        return run("verify", "digits-fc3", "--index", f"0:{len(found)}", "--method", "complete", *options)

    return certify


class TestVerify:
    def test_both_medians_and_how_many_brackets_are_closed(self, certify):
        outcomes = [(CERTIFIED, 0.1, 0.1006), (CERTIFIED, 0.2, 0.3), (CERTIFIED, 0.3, 0.5), (MISCLASSIFIED, 0.0, None)]
        text = certify(outcomes).stdout
        assert "median radius 0.1500 pixels certified, 0.2003 at most (W1, l1; 0 where none is certified)" in text
        assert "closed to 1%: 1 of 3 classified right" in text
        assert "note, 1 of 4: open" in text
        assert "exact" not in text

    def test_without_upper_ends_there_is_one_median(self, certify):
        text = certify([(CERTIFIED, 0.1, None), (CERTIFIED, 0.2, None)]).stdout
        assert "median radius 0.1500 pixels (W1, l1; 0 where none is certified)" in text
        assert "at most" not in text and "closed" not in text

    @pytest.mark.parametrize(
        ("options", "name"),
        [((), "W1, l1"), (("--ground", "l2"), "W1, l2"), (("--ground", "l2^2", "--cap", "1"), "W2, l2^2, cap 1")],
    )
    def test_radii_are_labelled(self, options, name):
        text = run("verify", "digits-fc3", "--index", "0:2", "--bound", "ibp", *options).stdout
        header = "\n".join(text.splitlines()[:4])
        assert "radius (pixels)" in header and name in header
        assert f"({name}; 0 where none" in text and not UNLABELLED.search(text)

    def test_no_picture_says_what_there_was(self, certify, tmp_path):
        outcomes = [(FALSIFIED, 0.2, 0.1), (FALSIFIED, 0.2, 0.1), (MISCLASSIFIED, 0.2, None)]
        result = certify(outcomes, "--radius", "0.2", "--picture", tmp_path / "a.png")
        (line,) = result.stderr.splitlines()
        assert line.endswith("no image is certified or unknown at a radius above 0 (2 falsified, 1 misclassified)")
        assert "right" not in line and not (tmp_path / "a.png").exists()

    def test_a_picture_names_its_images(self, tmp_path):
        result = run("verify", "digits-fc3", "--index", "7:10", "--bound", "ibp", "--picture", tmp_path / "a.png")
        assert result.stderr.endswith("a.png: images 7, 9\n")  # 8 is misclassified

    def test_help_of_pictures_says_first_order(self):
        for command in ("verify", "demo"):
            assert "first order" in " ".join(run(command, "--help").stdout.split())


class TestAttack:
    def test_distances_are_labelled(self, tmp_path):
        options = ("--index", "0:2", "--ground", "l2^2", "--attack", "frank-wolfe")
        text = run("attack", "digits-fc3", *options).stdout
        assert text.splitlines()[2].count("W2, l2^2") == 1 and not UNLABELLED.search(text)
        assert "pixels (W2, l2^2) over images classified right" in text

    def test_a_median_that_is_infinite_is_not_left_out_in_silence(self):
        text = run("attack", "digits-fc3", "--index", "0:2", "--radius", "0.001", "--attack", "frank-wolfe").stdout
        assert "no median radius: nothing found for half of the images classified right, or more" in text


def test_smoothed_radii_are_labelled_and_hold_with_a_probability():
    options = ("--sigma", "0.002", "--n", "200", "--n0", "50", "--index", "0:2", "--ground", "l2", "--alpha", "0.1")
    text = run("smooth", "certify", "digits-fc3", *options).stdout
    assert "certified, each with probability 0.9" in text and "W1, l2" in text and not UNLABELLED.search(text)


def test_demo_compares_the_medians_that_it_prints(tmp_path):
    text = run("demo", "--count", "8", "--bound", "ibp", "--picture", tmp_path / "demo.png").stdout
    vanilla, tuned = (float(one) for one in re.findall(r"median radius (\S+) pixels", text))
    assert float(re.search(r"ratio of the medians: (\S+)", text)[1]) == pytest.approx(tuned / vanilla, abs=0.01)
    assert "97.40% of 539 test images" in text and not UNLABELLED.search(text)


def test_models_say_on_how_many_images():
    text = run("models").stdout
    for card in list_models():
        (row,) = [line for line in text.splitlines() if line.startswith(f"│ {card.name} ")]
        assert f"{card.clean_accuracy:.2%} of {card.clean_images:,} test images" in row
        if card.certified:
            assert f"(W1, l1) of {card.certified['images']:,} test images" in row
    first = json.loads(run("models", "--json").stdout.splitlines()[0])
    assert first["clean_images"] == 539 and first["certified"]["images"] == 539


def test_training_on_a_file_of_ones_own_names_the_images_of_its_accuracy(tmp_path):
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz", images=generator.random((60, 4, 4), dtype=np.float32), labels=generator.integers(0, 3, 60)
    )
    recipe = {"name": "own", "dataset": str(tmp_path / "own.npz"), "architecture": "linear", "epochs": 1}
    (tmp_path / "own.json").write_text(json.dumps(recipe))
    text = run("train", "--recipe", tmp_path / "own.json", "--out", tmp_path).stdout
    card = json.loads((tmp_path / "own.json").read_text())
    assert f"of {card['clean_images']} held-out images" in text and 9 < card["clean_images"] <= 12
    assert "has no test split: the last fifth of every class was held out" in text
    (line,) = (tmp_path / "own.metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["test_split"] == "held-out"
