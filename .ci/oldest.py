"""Prints the oldest releases that pyproject.toml allows, as constraints for pip: what `make test-oldest` installs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

EXTRAS = ("plot", "solvers", "runtime", "pandas")  # what goes with `pip install 'flowverify[all]'`


def constraints(project: dict) -> Iterator[str]:
    """A line for each requirement, each of which names its lower bound."""
    optional = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *(one for extra in EXTRAS for one in optional[extra])):
        name, _, oldest = requirement.partition(">=")
        if not re.fullmatch(r"[0-9.]+", oldest):
            raise SystemExit(f"{requirement}: expected NAME>=VERSION")
        yield f"{name}=={oldest}"


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(constraints(tomllib.loads(text)["project"])))
