"""A kind of jobs that does what it is told for each image: return, raise, hang, die, or take all memory."""

import os
import signal
import time
from pathlib import Path

from flowverify.bench.tasks import Kind, Prepared, Task
from flowverify.errors import InvalidInputError


class Misbehaving(Kind):
    """``deeds`` maps positions to deeds; ``seconds`` is what each image takes; ``once`` is done a single time.

    Who hangs adds a byte to the file ``tell`` just before.
    """

    name = "misbehaving"

    def expand(self, fields, defaults):
        settings = {
            "deeds": {str(position): deed for position, deed in fields.take("deeds", {}).items()},
            "pause": fields.number("seconds", 0.0),
            "setup": fields.text("setup", ""),
            "marks": fields.text("marks", ""),
            "pids": fields.text("pids", ""),
            "tell": fields.text("tell", ""),
        }
        count = fields.integer("count", 10)
        fields.finish()
        return [Task("misbehaving", f"{__name__}:Misbehaving", settings, tuple(range(count)), defaults.chunk)]

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
            time.sleep(self._settings["pause"])
            act(self._settings["deeds"].get(str(position), ""), self._settings, position)
            found.append({"verdict": "certified", "radius": position / 7, "seconds": self._settings["pause"]})
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
