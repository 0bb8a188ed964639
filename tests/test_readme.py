"""What the README shows runs as pasted, and what it counts is what there is."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowverify.bounds.recipes import BOUNDS
from flowverify.cli import app
from flowverify.registry import METHODS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line]


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "flowverify"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_pasted(number, tmp_path):
    command = [sys.executable, "-c", blocks("python")[number]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if "mnist" not in line])
def test_commands_run_as_pasted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(command)


@pytest.mark.skipif(not os.environ.get("FLOWVERIFY_DATA"), reason="needs the MNIST files in $FLOWVERIFY_DATA/mnist")
@pytest.mark.parametrize("command", [line for line in COMMANDS if "mnist" in line])
def test_commands_on_mnist_name_what_there_is(command):
    assert "0:100" in command
    run(command.split(">")[0].replace("0:100", "0:1"))


def test_tables_name_every_method_and_bound():
    rows = set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE))
    assert set(BOUNDS) | set(METHODS) <= rows


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file()
    assert (ROOT / "docs" / "worst-case.png").stat().st_size < 200_000


def test_the_picture_is_said_to_be_first_order_with_its_distance():
    before, _, after = TEXT.partition("(docs/worst-case.png)")
    assert "first order" in before.splitlines()[-1]
    caption = " ".join(after.strip().split("\n\n")[0].split())
    assert "to first order; the worst of the ball may be another" in caption and "W1 with l1 ground cost" in caption


def test_an_own_network_gets_its_curve_in_a_dozen_lines(tmp_path):
    """Imports, data, network, three lines of training, certification, and the curve."""
    (block,) = [text for text in blocks("python") if "pyplot" in text]
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 12
    assert len([line for line in lines if "optimiser" not in line and "loss" not in line and "for " not in line]) <= 10
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "50/50" in done.stderr and done.stdout == ""
    assert (tmp_path / "certified-accuracy.png").read_bytes()[:4] == b"\x89PNG"
