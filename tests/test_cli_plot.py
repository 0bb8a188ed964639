"""`flowverify plot`: files and folders of records as a picture, and one line for what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowverify import curves
from flowverify.cli import app

SUITE = """
name: two
models: [digits-fc3]
data: {name: digits, index: ":4"}
runs:
  - {bounds: ibp}
  - {kind: attack, attacks: frank-wolfe}
  - {bounds: ibp, radii: [0.005, 0.01], grounds: l2}
"""


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands write, and a folder of bench."""
    folder = tmp_path_factory.mktemp("saved")
    first = ("digits-fc3", "--index", "0:5")
    run("verify", *first, "--bound", "ibp", "--save", folder / "verify.jsonl")
    run("verify", *first, "--bound", "ibp", "--radius", "0.01", "--save", folder / "decided.jsonl")
    run("verify", *first, "--bound", "ibp", "--ground", "l2", "--save", folder / "l2.jsonl")
    run("attack", *first, "--attack", "frank-wolfe", "--save", folder / "attack.jsonl")
    run("smooth", "certify", *first, "--sigma", "0.002", "--n", "50", "--n0", "5", "--save", folder / "smooth.jsonl")
    run("smooth", "predict", *first, "--sigma", "0.002", "--n", "50", "--save", folder / "predict.jsonl")
    (folder / "suite.yaml").write_text(SUITE)
    run("bench", folder / "suite.yaml", "--out", folder / "bench", "--workers", "1")
    (folder / "none.jsonl").write_text("")
    (folder / "foreign.jsonl").write_text(json.dumps({"name": "somebody", "value": 3}) + "\n")
    (folder / "text.jsonl").write_text("index,radius\n0,0.1\n")
    return folder


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_the_ending_says_what_is_written(ending: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / f"curve.{ending}"
    text = run("plot", saved / "verify.jsonl", saved / "attack.jsonl", "-o", path).stdout
    assert text == f"wrote {path}: 2 curves for W1, l1; digits test\n"
    start = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}[ending]
    first = path.read_bytes()
    assert first.startswith(start)
    run("plot", saved / "verify.jsonl", saved / "attack.jsonl", "-o", path)
    assert path.read_bytes() == first


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[curves.Curve]]:
    """What is drawn, by the titles of axes."""
    found: dict[str, list[curves.Curve]] = {}
    real = curves.figure_of

    def figure_of(given: dict[str, list[curves.Curve]], *more: Any, **options: Any) -> Any:
        found.update(given)
        return real(given, *more, **options)

    monkeypatch.setattr(curves, "figure_of", figure_of)
    return found


def test_every_kind_of_file_on_axes_of_its_ground_cost(
    drawn: dict[str, list[curves.Curve]], saved: Path, tmp_path: Path
) -> None:
    names = ("verify", "decided", "attack", "smooth", "l2")
    run("plot", *(saved / f"{name}.jsonl" for name in names), "--out", tmp_path / "a.svg")
    assert [one.label for one in drawn["W1, l1; digits test"]] == [
        "digits-fc3, fine-tuned, ibp (5 images)",
        "digits-fc3, attack frank-wolfe: at most (5 images)",
        "digits-fc3, wasserstein-smoothing, tight, alpha 0.05 (5 images)",
        "digits-fc3, fine-tuned, ibp, decided (5 images)",
    ]
    assert [one.label for one in drawn["W1, l2; digits test"]] == ["digits-fc3, fine-tuned, ibp (5 images)"]
    text = (tmp_path / "a.svg").read_text()
    assert text.count("bands: 95%, Clopper-Pearson") == 2


def test_a_folder_of_bench_beside_a_file(drawn: dict[str, list[curves.Curve]], saved: Path, tmp_path: Path) -> None:
    run("plot", saved / "bench", saved / "verify.jsonl", "-o", tmp_path / "a.svg", "--confidence", "0")
    first, second, file = drawn["W1, l1; digits test"]
    assert first.label == "digits-fc3: fine-tuned, ibp (W1, l1) (4 images)"
    assert second.at_most and second.label.startswith("digits-fc3: attack frank-wolfe (W1, l1)")
    assert file.radii[1:5] != first.radii[1:5] and file.images == 5
    (decided,) = drawn["W1, l2; digits test"]
    assert decided.radii == (0.005, 0.01) and not decided.steps
    assert "bands" not in (tmp_path / "a.svg").read_text()


BAD = {
    "another ending": (("verify.jsonl", "-o", "{out}/a.gif"), "a.gif: expected a file name that ends in .svg, .pdf"),
    "no folder": (("verify.jsonl", "-o", "{out}/none/a.svg"), "is not a folder"),
    "no file": (("nothing.jsonl", "-o", "{out}/a.svg"), "nothing.jsonl: no such file"),
    "no record": (("none.jsonl", "-o", "{out}/a.svg"), "none.jsonl: holds no record, expected at least one"),
    "foreign": (("foreign.jsonl", "-o", "{out}/a.svg"), "foreign.jsonl: record of name, value: expected one of"),
    "text": (("text.jsonl", "-o", "{out}/a.svg"), "text.jsonl: line 1 is no record"),
    "predictions": (("predict.jsonl", "-o", "{out}/a.svg"), "expected one of a certificate or an attack"),
    "folder of another kind": ((".", "-o", "{out}/a.svg"), "holds no suite.json"),
    "confidence": (("verify.jsonl", "-o", "{out}/a.svg", "--confidence", "1"), "confidence 1: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, saved: Path, tmp_path: Path) -> None:
    (file, *more), message = BAD[case]
    result = run("plot", saved / file, *(one.replace("{out}", str(tmp_path)) for one in more), code=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert not list(tmp_path.iterdir())
