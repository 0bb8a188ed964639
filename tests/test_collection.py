"""Every process collects the same tests, without which several of them cannot share the tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_no_name_rests_on_the_process(request):
    """What the ids of the tests of this run may hold: no bytes, as of files, and no addresses of objects."""
    wrong = re.compile(r"\\x[0-9a-f]{2}|0x[0-9a-f]{5,}|<.* object")
    names = [item.nodeid for item in request.session.items]
    assert not [name for name in names if wrong.search(name) or len(name) > 300]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_two_processes_collect_the_same():
    """In other seconds and with other hashes."""
    found = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider"],
            env={**os.environ, "PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[1],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append([line for line in done.stdout.splitlines() if "::" in line])
    assert len(found[0]) > 1000
    assert found[0] == found[1]
