"""Jobs that hang, and the clock of the budgets, without a second that is waited for."""

import os
from multiprocessing.connection import wait

import pytest


class Late:
    """A clock that only jobs move, by an hour each time that one tells the file that it hangs."""

    def __init__(self, path):
        self.path = path
        path.touch()

    def __call__(self):
        return 3600.0 * self.path.stat().st_size


@pytest.fixture
def late(tmp_path):
    return Late(tmp_path / "late")


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
