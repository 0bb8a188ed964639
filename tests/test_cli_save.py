"""``--save``: one process at a time writes to a file, and the lock ends with whoever holds it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowverify.cli import app
from flowverify.cli.job import Records
from flowverify.errors import InvalidInputError

HOLD = """
import sys
from pathlib import Path
from flowverify.records import RecordFile
file = RecordFile(Path(sys.argv[1]), id)
print("held", flush=True)
sys.stdin.read()
"""
COMMANDS = {
    "verify": (("verify", "digits-fc3", "--bound", "ibp", "--index", "0"), "lines.jsonl"),
    "attack": (("attack", "digits-fc3", "--attack", "frank-wolfe", "--index", "8"), "attack.jsonl"),
    "smooth": (("smooth", "certify", "digits-fc3", "--sigma", "0.002", "--n0", "5", "--n", "5", "--index", "0"), "s"),
}  # fmt: skip


def run(command, path):
    return CliRunner().invoke(app, [*command, "--save", str(path)])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_process_is_refused_and_takes_nothing_away(name, tmp_path):
    command, file = COMMANDS[name]
    path = tmp_path / file
    assert run(command, path).exit_code == 0  # and lets go of the file
    (line,) = path.read_text().splitlines()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        before = path.read_text()
        refused = run(command, path)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
        assert f"save {path}: another run is writing to it, expected to be the only one" in refused.stderr
        assert path.read_text() == before == f"{line}\n"
        holder.kill()
    again = run(command, path)
    assert again.exit_code == 0, again.output
    left = path.read_text().splitlines()
    assert [json.loads(one)["index"] for one in left] == [json.loads(line)["index"]]


def test_devices_take_lines_from_everybody_and_folders_from_nobody(tmp_path):
    one, other = Records(Path("/dev/null"), {}), Records(Path("/dev/null"), {})
    assert one.add(0, {"a": 1}) == other.add(0, {"a": 1}) == '{"index": 0, "a": 1}'
    with pytest.raises(InvalidInputError, match="save .*: is a folder, expected a file"):
        Records(tmp_path, {})
