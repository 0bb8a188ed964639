"""``flowverify smooth``: its output, going on with a file, and errors of one line."""

import json

import pytest
from typer.testing import CliRunner

from flowverify.cli import app

FEW = ("--n0", "20", "--n", "60", "--index", "0:5")


def run(*arguments):
    return CliRunner().invoke(app, ["smooth", *map(str, arguments)])


def lines(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_certify_prints_one_record_an_image():
    found = lines(run("certify", "digits-fc3", "--sigma", "0.002", *FEW, "--ground", "l2", "--json"))
    assert [record["index"] for record in found] == list(range(5))
    first = found[0]
    assert {
        "index", "label", "prediction", "method", "bound", "ground", "radius", "verdict", "seconds", "probability"
    } <= set(first)  # fmt: skip
    assert (first["method"], first["bound"], first["ground"]) == ("wasserstein-smoothing", "tight", "l2")
    assert first["verdict"] == "certified" and 0 < first["radius"] < 0.002 * 5
    paper = lines(
        run("certify", "digits-fc3", "--sigma", "0.002", *FEW, "--ground", "l2", "--certificate", "paper", "--json")
    )
    assert [one["successes"] for one in paper] == [one["successes"] for one in found]
    assert all(one["radius"] <= other["radius"] for one, other in zip(paper, found, strict=True))


@pytest.mark.parametrize("noise", ["laplace", "uniform"])
def test_other_noise(noise):
    found = lines(run("certify", "digits-fc3", "--noise", noise, "--sigma", "0.002", *FEW, "--json"))
    assert {record["method"] for record in found} == {f"{noise}-smoothing"}


def test_splitting():
    options = ("certify", "digits-fc3", "--noise", "splitting", "--step", "0.05", "--block", "1", "--index", "0:3")
    found = lines(run(*options, "--json"))
    assert {record["bound"] for record in found} == {"exact"} and {record["alpha"] for record in found} == {0.0}


def test_tables_end_with_a_summary():
    result = run("certify", "digits-fc3", "--sigma", "0.002", *FEW)
    assert result.exit_code == 0 and "of 5 certified" in result.stdout and "median radius" in result.stdout
    result = run("predict", "digits-fc3", "--sigma", "0.002", "--n", "60", "--index", "0:25")
    assert result.exit_code == 0 and "of 25 correct" in result.stdout and "5 more images" in result.stdout


def test_predict_may_abstain():
    found = lines(run("predict", "digits-fc3", "--sigma", "0.5", "--n", "20", "--index", "0:10", "--json"))
    assert {"abstained"} <= {record["outcome"] for record in found}
    assert all((record["prediction"] is None) == (record["outcome"] == "abstained") for record in found)


def test_goes_on_with_a_file(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ("certify", "digits-fc3", "--sigma", "0.002", *FEW)
    printed = lines(run(*options, "--save", whole, "--json"))
    text = whole.read_text()
    assert [json.loads(line) for line in text.splitlines()] == printed
    cut.write_text(text[: text.index("\n", len(text) // 2) + 30])  # as a kill in the middle of a line leaves it
    kept = cut.read_text().count("\n")
    again = lines(run(*options, "--save", cut, "--json"))
    assert 0 < kept < 5 and without_time(again) == without_time(printed)
    assert cut.read_text().splitlines()[:kept] == text.splitlines()[:kept]
    assert without_time(map(json.loads, cut.read_text().splitlines())) == without_time(printed)
    finished = run(*options, "--save", cut)
    assert "5 were in the file" in finished.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sigma", "0.003"), "was computed with sigma 0.002, given 0.003"),
        (("--n", "70"), "was computed with n 60, given 70"),
        (("--certificate", "paper"), "was computed with bound 'tight', given 'paper'"),
        (("--noise", "laplace"), "was computed with method 'wasserstein-smoothing', given 'laplace-smoothing'"),
        (("--seed", "1"), "was computed with seed 0, given 1"),
    ],
)
def test_a_file_of_other_settings_is_refused(tmp_path, change, message):
    options = {"--sigma": "0.002", **dict(zip(FEW[::2], FEW[1::2], strict=True)), "--save": tmp_path / "records.jsonl"}

    def certify(**changed):
        return run("certify", "digits-fc3", *(part for pair in {**options, **changed}.items() for part in pair))

    assert certify().exit_code == 0
    before = (tmp_path / "records.jsonl").read_text()
    result = certify(**dict([change]))
    assert result.exit_code == 2 and message in result.output
    assert (tmp_path / "records.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("certify", "digits-fc3"), "sigma: none given, and digits-fc3 was trained with no wasserstein noise"),
        (("certify", "digits-fc3", "--sigma", "0"), "noise sigma: given 0.0, expected a finite number > 0"),
        (("certify", "digits-fc3", "--sigma", "0.1", "--n", "0"), "n: given 0 samples"),
        (("certify", "digits-fc3", "--sigma", "0.1", "--n0", "0"), "n0: given 0 samples"),
        (("certify", "digits-fc3", "--sigma", "0.1", "--alpha", "1"), "alpha: given 1.0"),
        (("certify", "digits-fc3", "--sigma", "0.1", "--certificate", "x"), "unknown certificate 'x'"),
        (("certify", "digits-fc3", "--sigma", "0.1", "--ground", "x"), "ground"),
        (("certify", "digits-fc3", "--noise", "gauss", "--sigma", "1"), "unknown noise 'gauss'"),
        (("certify", "digits-fc3", "--noise", "uniform", "--sigma", "1", "--certificate", "paper"), "given uniform"),
        (("certify", "digits-fc3", "--noise", "splitting"), "step: none given"),
        (("certify", "digits-fc3", "--noise", "splitting", "--sigma", "1"), "sigma: splitting has none"),
        (("certify", "digits-fc3", "--sigma", "1", "--step", "1"), "step, block: given with wasserstein noise"),
        (("certify", "digits-fc3", "--sigma", "1", "--device", "tpu"), "unknown device 'tpu'"),
        (("predict", "digits-fc3", "--noise", "splitting"), "noise splitting: has no samples to predict from"),
        (("predict", "digits-fc3", "--sigma", "-1"), "noise sigma: given -1.0"),
        (("predict", "digits-fc3", "--sigma", "1", "--n", "5"), "n 5: even if all samples agree"),
        (("predict", "nothing", "--sigma", "1"), "unknown model 'nothing'"),
        (("predict", "digits-fc3", "--sigma", "1", "--index", "x"), "index"),
        (("predict", "digits-fc3", "--sigma", "1", "--save", "no/folder/file"), "save no/folder/file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output
    errors = [line for line in result.output.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    result = run("predict", "digits-fc3", "--sigma", "0.1", "--save", path)
    assert result.exit_code == 2 and "line 1 is no record" in result.output
    assert path.read_text() == "my notes\n"
