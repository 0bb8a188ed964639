"""Jobs that run a script of their own and keep what it prints: for measurements that are no list of images."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from flowverify.bench import sources
from flowverify.bench.tasks import Context, Defaults, Kind, Prepared, Record, Run, Task
from flowverify.errors import BoundError
from flowverify.settings import Text, expected, settings, wrong

LAST_LINES = 3


@settings
class ScriptRun(Run):
    """``python -m MODULE ARGUMENTS`` in a folder."""

    kind: Literal["script"] = Field("script", description="One record, with everything that a script printed.")
    module: Text = Field(description="Of the script, such as benchmarks.linear_radii.")
    arguments: Annotated[list[str | int | float], expected("a list of text and numbers")] = Field(
        [], description="What it is given."
    )
    folder: Text = Field(".", description="Where it runs, relative to the suite.")


class Script(Kind[ScriptRun]):
    """One record, with everything that the script printed."""

    name = "script"
    settings = ScriptRun

    def expand(self, run: ScriptRun, defaults: Defaults) -> list[Task]:
        folder = sources.resolved(run.folder, defaults.folder)
        if not (folder / f"{run.module.replace('.', '/')}.py").is_file():
            raise wrong("module", run.module, f"a module in {folder}")
        arguments = [str(one) for one in run.arguments]
        settings = {"module": run.module, "arguments": arguments, "folder": str(folder)}
        return [Task(f"script/{run.label or run.module.rpartition('.')[2]}", self.name, settings, (0,), 1)]

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
