"""What all tests share: threads that fit the machine, and examples that are the same in every run of CI."""

import os
import signal

# One thread for each of the processes that run tests side by side; read when torch and numba are loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")

if os.environ.get("FLOWVERIFY_DATA"):  # tests run in folders of their own
    os.environ["FLOWVERIFY_DATA"] = os.path.abspath(os.environ["FLOWVERIFY_DATA"])

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def interruptible():
    """SIGINT interrupts what the test starts, even where the shell that started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


TOGETHER = {"test_bench_command.py", "test_cluster.py"}  # what these build takes longer than most of their tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Side by side, the tests of one such file go to one process, so that what they share is built once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if os.path.basename(path) in TOGETHER else nodeid

    return Scheduling(config, log)
