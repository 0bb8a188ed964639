"""Jobs that hang, and the clock of the budgets, without a second that is waited for."""

import os
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest

from flowverify.bench import pool


@pytest.fixture
def late(tmp_path, monkeypatch):
    """The file that jobs tell when they hang; budgets see a clock that only this moves, by an hour each time."""
    path = tmp_path / "late"
    path.touch()
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: 3600.0 * path.stat().st_size))
    return path


class Hanging:
    """A pipe with a name, which jobs tell when they hang."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self._file = os.open(path, os.O_RDWR)  # so that it opens at once, here and there

    def wait(self, *ends):
        """Waits for the next job that hangs; False if one of ``ends`` is ready first."""
        return self._file in wait([self._file, *ends]) and len(os.read(self._file, 1)) == 1

    def close(self):
        os.close(self._file)


@pytest.fixture
def hanging(tmp_path):
    pipe = Hanging(tmp_path / "hanging")
    yield pipe
    pipe.close()
