"""How commands are called: help, options, completion, words on standard error, lists of names, interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.incomplete import Certifier
from flowverify.cli import app
from flowverify.cli.common import output
from flowverify.registry import ATTACKS, DATASETS, ENGINES, METHODS
from flowverify.training import RECIPES
from flowverify.transport.ground import ground_forms

PROGRAM: Any = get_command(app)
SMOOTH = [["smooth"], *(["smooth", name] for name in PROGRAM.commands["smooth"].commands)]
COMMANDS = [[], *([name] for name in PROGRAM.commands if name != "smooth"), *SMOOTH]
VERIFY = ("verify", "digits-fc3", "--index", "0:2", "--bound", "ibp", "--radius", "0.01")


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_h_is_help_and_nothing_is_cut_short(self, command: list[str]) -> None:
        text = run(*command, "-h").stdout
        assert text == run(*command, "--help").stdout and "-h, --help" in text
        assert not re.search(r"\w\.\.\.( |$)", text.replace("[ARGS]...", "").replace("FILE...", ""), re.MULTILINE)

    @pytest.mark.parametrize("command", [one for one in COMMANDS if one not in ([], ["smooth"])], ids=" ".join)
    def test_every_command_can_be_told_how_much_to_say(self, command: list[str]) -> None:
        text = run(*command, "-h").stdout
        assert "-v, --verbose" in text and "-q, --quiet" in text

    def test_lists_have_whole_sentences(self) -> None:
        text = " ".join(run("--help").stdout.split())
        assert "Write networks and properties that a verifier which knows nothing of Wasserstein can decide." in text

    def test_no_command_shows_the_help(self) -> None:
        result = CliRunner().invoke(app, [])
        assert "Commands:" in result.output and result.exit_code in (0, 2)  # of typer's click, older and newer


class TestCalls:
    @pytest.mark.parametrize("option", [("--index", "0"), ("--radius", "0.1"), ("--bound", "ibp"), ("--split", "test")])
    def test_an_option_that_counts_once_is_refused_twice(self, option: tuple[str, str]) -> None:
        result = run("verify", "digits-fc3", *option, *option, code=2)
        expected = f"error: {option[0]}: given 2 times, expected once; see `"
        assert result.stdout == "" and result.stderr.startswith(expected) and result.stderr.count("\n") == 1
        assert "--data-dir: given 2" in run("bench", "a", "--out", "b", "--data-dir=x", "--data-dir=x", code=2).stderr

    def test_options_that_add_up_may_be_repeated(self) -> None:
        more = ("--option", "tolerance=0.1", "--option", "batch_size=1", "--json", "--json")
        assert len(run(*VERIFY[:-2], *more).stdout.splitlines()) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("verify",), "Missing argument"),
            (("verify", "a", "b"), "unexpected extra argument"),
            (("verify", "a", "--nonsense"), "No such option: --nonsense"),
            (("verify", "a", "--batch-size", "many"), "'--batch-size'"),
            (("nonsense",), "No such command 'nonsense'"),
            (("smooth", "nonsense"), "No such command 'nonsense'"),
            (("plot", "a"), "Missing option '--out'"),
        ],
    )
    def test_calls_that_cannot_be_read_are_one_line(self, arguments: tuple[str, ...], message: str) -> None:
        result = run(*arguments, code=2)
        assert result.stdout == "" and result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ") and message in result.stderr and "--help`" in result.stderr


def program(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowverify", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **variables}, stdin=subprocess.DEVNULL
    )


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_scripts(self, shell: str) -> None:
        done = program(_FLOWVERIFY_COMPLETE=f"source_{shell}")
        assert done.returncode == 0 and "_FLOWVERIFY_COMPLETE" in done.stdout and "flowverify" in done.stdout

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("flowverify ver", ["verify"]),
            ("flowverify verify x --method fine", ["fine-tuned"]),
            ("flowverify verify x --bound crown", ["crown-ibp", "crown"]),
            ("flowverify attack x --attack f", ["flow-pgd", "frank-wolfe"]),
            ("flowverify smooth certify x --dataset kmn", ["kmnist"]),
        ],
    )
    def test_names(self, words: str, expected: list[str]) -> None:
        where = str(len(words.split()) - 1)
        done = program(_FLOWVERIFY_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=where)
        assert done.stdout.split() == expected, done.stderr

    def test_installed_into_the_home_folder(self, tmp_path: Path) -> None:
        environment = {**os.environ, "HOME": str(tmp_path)}
        for option in ("--show-completion", "--install-completion"):  # of the shell that is nearest above
            command = f'"{sys.executable}" -m flowverify {option}; exit $?'
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr
        assert any("_FLOWVERIFY_COMPLETE" in path.read_text() for path in tmp_path.rglob("*.sh"))


class TestWords:
    def test_quiet_leaves_results_and_errors(self, tmp_path: Path) -> None:
        options = (*VERIFY, "--picture", tmp_path / "a.png")
        assert "wrote" in run(*options).stderr
        result = run(*options, "-q")
        assert result.stderr == "" and "2 of 2 certified" in result.stdout
        assert run("verify", "nonsense", "--quiet", code=2).stderr.startswith("error: unknown model")

    def test_verbose_says_versions_files_and_what_is_asked(self) -> None:
        result = run(*VERIFY, "-v", "--json")
        assert len(result.stdout.splitlines()) == 2
        assert re.search(r"^python \S+, flowverify \S+, torch ", result.stderr)
        assert "model digits-fc3: 1 x 8 x 8 images, 10 classes, on cpu; SHA-256 " in result.stderr
        assert "data digits test: 2 of 539 images" in result.stderr and '"asked": 0.01' in result.stderr

    def test_verbose_says_where_an_error_arises(self) -> None:
        assert "Traceback" in run("verify", "nonsense", "-v", code=2).stderr
        assert "Traceback" not in run("verify", "nonsense", code=2).stderr

    def test_not_both(self) -> None:
        assert "verbose and quiet: given both" in run("models", "-v", "-q", code=2).stderr

    def test_long_runs_say_how_far_they_are_where_there_is_no_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options = (*VERIFY, "--batch-size", "1")
        assert run(*options).stderr == ""
        monkeypatch.setattr("flowverify.cli.common.LOG_EVERY", 0.0)
        first, second = run(*options).stderr.splitlines()
        assert re.fullmatch(r"digits-fc3 on digits: 1 of 2 images, \d+ s left", first)
        assert second == "digits-fc3 on digits: 2 of 2 images, 0 s left"
        assert run(*options, "-q").stderr == ""

    def test_no_colour_where_none_is_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert not output().no_color
        monkeypatch.setenv("NO_COLOR", "1")
        assert output().no_color


LISTED = {
    "methods": list(METHODS),
    "engines": list(ENGINES),
    "bounds": list(BOUNDS),
    "grounds": list(ground_forms()),
    "attacks": list(ATTACKS),
    "datasets": list(DATASETS),
    "recipes": list(RECIPES),
}


class TestLists:
    @pytest.mark.parametrize("name", LISTED)
    def test_hold_every_name_with_what_it_is(self, name: str) -> None:
        found = [json.loads(line) for line in run(name, "--json").stdout.splitlines()]
        assert [one["name"] for one in found] == LISTED[name]
        assert all(one["description"] and set(one) == {"name", "description", "options"} for one in found)
        text = run(name).stdout
        assert all(re.search(rf"^{re.escape(one)} +\S", text, re.MULTILINE) for one in LISTED[name])

    def test_hold_options_that_commands_take(self) -> None:
        assert "--option tolerance=0.01: Of a searched radius" in run("methods").stdout
        (complete,) = [one for line in run("methods", "--json").stdout.splitlines() if (one := json.loads(line))["name"] == "complete"]  # fmt: skip # noqa: E501
        assert {"name": "timeout", "default": 60.0, "help": "Seconds for an image, and radius; none for no limit."} in complete["options"]  # fmt: skip # noqa: E501
        options = {one["name"] for one in complete["options"]}
        assert "timeout" in options and "progress" not in options


def test_termination_ends_like_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = Certifier.certify, []

    def certify(self: Certifier, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given)

    monkeypatch.setattr(Certifier, "certify", certify)
    before = signal.getsignal(signal.SIGTERM)
    saved = tmp_path / "lines.jsonl"
    result = run(*VERIFY, "--batch-size", "1", "--save", saved, code=130)
    assert "interrupted after 1 of 2 images" in result.stderr
    assert [json.loads(line)["index"] for line in saved.read_text().splitlines()] == [0]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(Certifier, "certify", real)
    assert "1 were in the file" in run(*VERIFY, "--batch-size", "1", "--save", saved).stdout
