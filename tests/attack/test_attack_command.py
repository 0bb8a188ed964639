"""``flowverify attack``: JSON lines, pictures and images on disk, exit codes, and one line for what a user can mend."""

import json

import numpy as np
import pytest
import torch
from problems import digits, exact_radius
from typer.testing import CliRunner

from flowverify.cli import app
from flowverify.errors import InvalidInputError
from flowverify.figures import draw_adversarial

KEYS = {"index", "label", "prediction", "attack", "ground", "cap", "outcome", "radius", "seconds"}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("name", ["minimal", "frank-wolfe", "flow-pgd"])
def test_json_lines(name):
    lines = run("digits-fc3", "--attack", name, "--index", "5:9", "--ground", "l2", "--json").stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == [5, 6, 7, 8]
    assert all(set(record) >= KEYS and record["attack"] == name for record in records)
    assert [record["outcome"] for record in records] == ["found", "found", "found", "misclassified"]
    assert records[3]["radius"] == 0 and all(0 < record["radius"] < 0.5 for record in records[:3])


def test_a_radius_that_is_too_small():
    lines = run("digits-fc3", "--radius", 1e-4, "--index", "0:2", "--json").stdout.splitlines()
    assert [json.loads(line)["radius"] for line in lines] == [None, None]
    assert {json.loads(line)["outcome"] for line in lines} == {"not found"}


def test_sinkhorn_within_a_radius():
    (line,) = run("digits-fc3", "--attack", "sinkhorn", "--radius", 0.5, "--index", 0, "--json").stdout.splitlines()
    assert json.loads(line)["radius"] <= 0.5


def test_table_and_summary():
    result = run("digits-fc3", "--index", "0:3", "--binarise", 0.5)
    assert "2 of 3 found; 1 misclassified" in result.stdout and "median radius" in result.stdout


def test_saved_files(tmp_path):
    folder = tmp_path / "new"
    lines = tmp_path / "attack.jsonl"
    run("digits-fc3", "--index", "7:9", "--cap", 1.0, "--save", lines, "--images", folder)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["index"] for record in records] == [7, 8]
    assert {path.name for path in folder.iterdir()} == {"00007.npz", "00007.png"}
    assert (folder / "00007.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "00007.npz") as stored:
        image = torch.from_numpy(stored["images"][0])
    assert image.dtype == torch.float64 and float(image.max()) <= 1
    _, images, _ = digits(8)
    assert exact_radius(images[7], image, "l1") == pytest.approx(records[0]["radius"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("digits-fc3", "--attack", "pgd"),
            "unknown attack 'pgd': expected one of MODULE:CLASS, flow-pgd",
        ),
        (("digits-fc3", "--ground", "l3"), "unknown ground cost 'l3'"),
        (("digits-fc3", "--radius", "-1"), "radius: given -1.0"),
        (("digits-fc3", "--cap", "0"), "cap: given 0.0"),
        (("digits-fc3", "--cap", "0.3"), "expected at most the cap, 0.3"),
        (("digits-fc3", "--index", "0:2", "--device", "tpu"), "unknown device 'tpu'"),
        (("no-such-model",), "unknown model 'no-such-model'"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run(*arguments, code=2)
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_pictures_need_a_path_each():
    _, images, _ = digits(2)
    with pytest.raises(InvalidInputError, match="given 2 images, 2 adversarial, 1 paths"):
        draw_adversarial(images.double(), images.double(), ["a", "b"], ["a.png"])


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file, expected a folder" in run("digits-fc3", "--images", tmp_path / "file", code=2).stderr
