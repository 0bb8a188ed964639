"""``--save``: one process at a time writes to a file, and the lock ends with whoever holds it."""

import json
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowverify.cli import app
from flowverify.cli.job import Records
from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.zoo import models_folder, source_digest

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


class TestRecords:
    OPTIONS = ("--dataset", "digits", "--index", "0:2", "--bound", "ibp", "--radius", "0.01")

    @pytest.fixture
    def saved(self, tmp_path):
        """A model of one's own, and records of it."""
        (tmp_path / "net.onnx").write_bytes((models_folder() / "digits-fc3.onnx").read_bytes())
        assert self.verify(tmp_path).exit_code == 0
        return tmp_path

    def verify(self, folder):
        return run(("verify", str(folder / "net.onnx"), *self.OPTIONS), folder / "lines.jsonl")

    def change(self, folder, **changes):
        """Writes the records again with these values; None takes a key away."""
        path = folder / "lines.jsonl"
        records = [{**json.loads(line), **changes} for line in path.read_text().splitlines()]
        lines = [json.dumps({key: value for key, value in one.items() if value is not None}) for one in records]
        path.write_text("".join(f"{line}\n" for line in lines))

    def test_say_what_was_asked_of_which_file_by_which_versions(self, saved):
        records = [json.loads(line) for line in (saved / "lines.jsonl").read_text().splitlines()]
        digest = sha256((saved / "net.onnx").read_bytes()).hexdigest()
        for record in records:
            assert (record["sha256"], record["asked"], record["dataset"]) == (digest, 0.01, "digits")
            assert record["model"] == str(saved / "net.onnx") and record["split"] == "test"
            assert record["versions"]["flowverify"] == version("flowverify") and "torch" in record["versions"]

    def test_of_another_file_of_the_same_name_are_not_gone_on_with(self, saved):
        (saved / "net.onnx").write_bytes((models_folder() / "digits-certified.onnx").read_bytes())
        refused = self.verify(saved)
        assert refused.exit_code == 2 and "line 1 was computed with sha256 '" in refused.stderr

    def test_of_earlier_versions_are_gone_on_with(self, saved):
        self.change(saved, sha256=None, versions=None)
        (saved / "lines.jsonl").write_text((saved / "lines.jsonl").read_text().splitlines()[0] + "\n")
        done = self.verify(saved)
        assert done.exit_code == 0 and "1 were in the file" in done.stdout
        assert "1 records of an earlier version do not say of which model file" in done.stderr

    def test_of_other_versions_are_gone_on_with(self, saved):
        self.change(saved, versions={"flowverify": "0.0.1"})
        assert "2 were in the file" in self.verify(saved).stdout

    def test_of_another_question_are_refused(self, saved):
        self.change(saved, asked=0.02)
        assert "line 1 was computed with asked 0.02, given 0.01" in self.verify(saved).stderr


class TestDigests:
    def test_of_factories_are_of_their_file_and_weights(self, tmp_path):
        (tmp_path / "net.py").write_text("code")
        (tmp_path / "w.pt").write_bytes(b"weights")
        factory = f"{tmp_path / 'net.py'}:make"
        assert source_digest(factory) == sha256(b"code").hexdigest()
        assert source_digest(factory, tmp_path / "w.pt") == sha256(b"codeweights").hexdigest()
        assert source_digest("package.module:make") is None
        assert source_digest("digits-fc3") == source_digest(models_folder() / "digits-fc3.onnx")

    def test_of_missing_files(self, tmp_path):
        with pytest.raises(ModelFileError, match=r"none.onnx: No such file"):
            source_digest(tmp_path / "none.onnx")
