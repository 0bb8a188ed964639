"""What readers of README.md and of docs/ paste, run as they would."""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from flowverify.cli import app

ROOT = Path(__file__).parents[1]
HAS_MNIST = bool(os.environ.get("FLOWVERIFY_DATA"))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of the blocks of commands, all of which run in an empty folder."""
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line]


def on_mnist(command: str) -> bool:
    return "mnist" in command


def run(command: str) -> None:
    """Runs a command; one on MNIST with its first image alone."""
    if on_mnist(command):
        assert "0:100" in command
        command = command.split(">")[0].replace("0:100", "0:1")
    program, *arguments = shlex.split(command)
    assert program == "flowverify"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def run_python(block: str, name: str) -> None:
    """Runs a block in this process, which has loaded what takes long."""
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, name, "exec"), {"__name__": "__main__"})
