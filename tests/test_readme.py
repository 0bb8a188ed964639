"""What the README shows runs as pasted, and what it counts is what there is."""

import re
import subprocess
import sys

import pytest
from pasted import HAS_MNIST, ROOT, blocks, commands, on_mnist, run

from flowverify.bounds.recipes import BOUNDS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = commands(TEXT)


@pytest.mark.parametrize("number", range(len(blocks(TEXT, "python"))))
def test_python_runs_as_pasted(number, tmp_path):
    command = [sys.executable, "-c", blocks(TEXT, "python")[number]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if not on_mnist(line)])
def test_commands_run_as_pasted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(command)


@pytest.mark.skipif(not HAS_MNIST, reason="needs the MNIST files in $FLOWVERIFY_DATA/mnist")
@pytest.mark.parametrize("command", [line for line in COMMANDS if on_mnist(line)])
def test_commands_on_mnist_name_what_there_is(command):
    run(command)


def test_the_table_names_every_bound():
    rows = set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE))
    assert set(BOUNDS) <= rows


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file()
    assert (ROOT / "docs" / "worst-case.png").stat().st_size < 200_000


def test_the_picture_is_said_to_be_first_order_with_its_distance():
    before, _, after = TEXT.partition("(docs/worst-case.png)")
    assert "first order" in before.splitlines()[-1]
    caption = " ".join(after.strip().split("\n\n")[0].split())
    assert "to first order; the worst of the ball may be another" in caption and "W1 with l1 ground cost" in caption
