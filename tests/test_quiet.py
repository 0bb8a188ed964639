"""Native output: solvers that print past Python, and a command line whose standard output is JSON and nothing else."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.network import Network, write_onnx
from flowverify.quiet import quiet


def native(text: str) -> None:
    """Prints as a C library does: into its own buffer."""
    ctypes.CDLL(None).printf(text.encode())


class TestQuiet:
    def test_only_what_is_printed_inside_is_lost(self, capfd: pytest.CaptureFixture[str]) -> None:
        native("native before\n")
        with quiet():
            native("native inside\n")
            os.write(1, b"raw inside\n")
            with quiet():
                native("nested\n")
            native("after nested\n")
            print("errors are heard", file=sys.stderr)
        native("native after\n")
        ctypes.CDLL(None).fflush(None)
        seen = capfd.readouterr()
        assert seen.out == "native before\nnative after\n"
        assert seen.err == "errors are heard\n"

    def test_the_last_of_several_threads_restores_the_output(self, capfd: pytest.CaptureFixture[str]) -> None:
        inside, one_left = Barrier(2), Barrier(2)

        def first() -> None:
            with quiet():
                inside.wait()
            one_left.wait()

        def second() -> None:
            with quiet():
                inside.wait()
                one_left.wait()
                native("still quiet\n")

        threads = [Thread(target=first), Thread(target=second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        native("heard\n")
        ctypes.CDLL(None).fflush(None)
        assert capfd.readouterr().out == "heard\n"

    def test_restores_the_output_after_an_error(self, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match="inside"), quiet():
            raise ValueError("inside")
        os.write(1, b"heard\n")
        assert capfd.readouterr().out == "heard\n"

    def test_what_native_code_has_in_its_buffer(self) -> None:
        code = (
            "import ctypes\nfrom flowverify.quiet import quiet\nprint_native = ctypes.CDLL(None).printf\n"
            "print_native(b'before|')\nwith quiet(): print_native(b'inside|')\nprint_native(b'after')"
        )
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run([sys.executable, "-c", code], env=buffered, capture_output=True, text=True, check=False)
        assert done.stdout == "before|after", done.stderr

    def test_without_a_standard_output(self) -> None:
        code = "import os; os.close(1)\nfrom flowverify.quiet import quiet\nwith quiet(): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_json_and_nothing_else(tmp_path: Path) -> None:
    data = fv.load_dataset("digits")
    means = torch.stack([data.images[data.labels == label].mean(0).flatten() for label in range(10)])
    linear = Network.sequential((1, 8, 8), [nn.Flatten(), nn.Linear(64, 10)])
    with torch.no_grad():
        linear.nodes[1].operation.weight.copy_(means)
        linear.nodes[1].operation.bias.copy_(-means.pow(2).sum(1) / 2)
    path = tmp_path / "linear.onnx"
    write_onnx(linear, path)
    ways = [(str(path), "linear"), (str(path), "linear-lp"), (str(path), "milp"), ("digits-fc3", "fine-tuned"),
            ("digits-fc3", "complete"), ("digits-fc3", "milp")]  # fmt: skip
    which = ["--dataset", "digits", "--index", "0", "--radius", "0.02", "--json"]
    calls = [[model, *which, "--method", way] for model, way in ways]
    code = (
        "import sys, json\nfrom flowverify.cli import app\n"
        f"for call in {calls!r}:\n    app(['verify', *call], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["method"] for record in records] == [way for _, way in ways]
    assert {record["verdict"] for record in records} == {"certified"}
