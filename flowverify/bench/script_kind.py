"""Jobs that run a script of their own and keep what it prints: for measurements that are no list of images."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from flowverify.bench import sources
from flowverify.bench.fields import Fields
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Task
from flowverify.errors import BoundError

LAST_LINES = 3


class Script(Kind):
    """``python -m MODULE ARGUMENTS`` in a folder; one record, with everything that it printed."""

    name = "script"

    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        module = fields.text("module")
        label = fields.text("label", module.rpartition(".")[2])
        arguments = fields.take("arguments", [])
        if not isinstance(arguments, list) or not all(isinstance(one, str | int | float) for one in arguments):
            raise fields.wrong("arguments", arguments, "a list of text and numbers")
        folder = sources.resolved(fields.text("folder", "."), defaults.folder)
        fields.finish()
        if not (folder / f"{module.replace('.', '/')}.py").is_file():
            raise fields.wrong("module", module, f"a module in {folder}")
        settings = {"module": module, "arguments": [str(one) for one in arguments], "folder": str(folder)}
        return [Task(f"script/{label}", self.name, settings, (0,), 1)]

    def prepare(self, task: Task, context: Context) -> Prepared:
        return _Script(task)


class _Script(Prepared):
    def __init__(self, task: Task) -> None:
        self._settings = task.settings

    def run(self, positions: Sequence[int]) -> list[Record]:
        start = time.perf_counter()
        command = [sys.executable, "-m", self._settings["module"], *self._settings["arguments"]]
        # Its own errors come with what it printed before, in the order in which it did.
        done = subprocess.run(
            command,
            cwd=self._settings["folder"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout.decode(errors="replace").strip()
        if done.returncode:
            last = " / ".join(output.splitlines()[-LAST_LINES:])
            raise BoundError(f"{self._settings['module']} ended with exit code {done.returncode}: {last}")
        seconds = round(time.perf_counter() - start, 6)
        return [{"verdict": "done", "output": output, "seconds": seconds} for _ in positions]
