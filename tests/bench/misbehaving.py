"""A kind of jobs that does what it is told for each image: return, raise, hang, die, or take all memory."""

import os
import signal
from pathlib import Path

from pydantic import Field

from flowverify.bench.tasks import Kind, Prepared, Run, Task
from flowverify.errors import InvalidInputError
from flowverify.settings import Natural, settings


@settings
class Deeds(Run):
    """``deeds`` maps positions to deeds; ``once`` is done a single time.

    Who hangs adds a byte to the file ``tell`` just before.
    """

    deeds: dict[int, str] = Field({})
    setup: str = Field("")
    marks: str = Field("")
    pids: str = Field("")
    tell: str = Field("")
    count: Natural = Field(10)


class Misbehaving(Kind):
    name = "misbehaving"
    settings = Deeds

    def expand(self, run, defaults):
        own = {"deeds": {str(position): deed for position, deed in run.deeds.items()}}
        own |= {"setup": run.setup, "marks": run.marks, "pids": run.pids, "tell": run.tell}
        return [Task("misbehaving", f"{__name__}:Misbehaving", own, tuple(range(run.count)), defaults.chunk)]

    def prepare(self, task, context):
        if task.settings["pids"]:
            (Path(task.settings["pids"]) / f"worker.{os.getpid()}").touch()
        act(task.settings["setup"], task.settings, -1)
        return _Prepared(task.settings)


class _Prepared(Prepared):
    def __init__(self, settings):
        self._settings = settings

    def run(self, positions):
        found = []
        for position in positions:
            act(self._settings["deeds"].get(str(position), ""), self._settings, position)
            found.append({"verdict": "certified", "radius": position / 7, "seconds": 0.0})
        return found


def act(deed, settings, position):
    first = deed.removesuffix(" once")
    if first != deed:
        mark = Path(settings["marks"]) / f"{position}"
        if mark.exists():
            return
        mark.touch()
    if first == "raise":
        raise ValueError(f"image {position} is odd")
    if first == "refuse":
        raise InvalidInputError("this model cannot be had")
    if first == "hang":
        if settings["tell"]:
            with open(settings["tell"], "ab", buffering=0) as file:
                file.write(b".")
        while True:
            signal.pause()
    if first == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if first == "exit":
        os._exit(3)
    if first == "hog":
        hoard = [bytearray(os.urandom(1 << 20)) * 64 for _ in range(200)]
        raise AssertionError(f"{len(hoard)} blocks of 64 MiB were there")
