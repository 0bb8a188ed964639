"""``flowverify train``: from a recipe file to a model that can be loaded, and one line for what is wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flowverify as fv
from flowverify.cli import app

RECIPE = """
name: mine
base: digits-certified
epochs: 2
"""


def run(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def test_writes_model_card_and_metrics(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    result = run("--recipe", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), "--seed", "7")
    assert result.exit_code == 0, result.output
    assert "clean accuracy" in result.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["mine.json", "mine.metrics.jsonl", "mine.onnx"]
    card = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert card["command"] == "flowverify train --recipe mine.yaml --seed 7" and card["recipe"]["seed"] == 7
    assert fv.load_model(tmp_path / "out" / "mine.onnx").num_classes == 10
    lines = [json.loads(line) for line in (tmp_path / "out" / "mine.metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and {"certified", "radius"} == set(lines[0]["metrics"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("digits-fc4", "unknown recipe 'digits-fc4': expected one of digits-certified"),
        ("absent.yaml", "absent.yaml: cannot be read (No such file"),
        ("wrong.yaml", "wrong.yaml: unknown key 'epoch': expected one of architecture"),
    ],
)
def test_what_is_wrong_is_one_line(recipe: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(RECIPE + "epoch: 3\n")
    result = run("--recipe", recipe)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
