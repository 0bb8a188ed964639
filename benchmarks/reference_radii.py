"""A table of certified radii, recorded once: what a change of the code's shape must not change.

    python -m benchmarks.reference_radii              # compares with reference_radii.json; exit code 1 on a difference
    python -m benchmarks.reference_radii --record     # writes reference_radii.json

One row is a model, a method, a bound, a ground cost and a cap, with the radii of a few images, and for two radii the
verdict and the margin of each of them. Complete methods see images whose brackets close long before their limit of
time, so that every row is reproducible; torch runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flowverify as fv

TABLE = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-9
GROUNDS = ("l1", "l2", "l2^2", "local:5")
BOUNDS = ("best", "ibp", "crown-ibp", "crown", "alpha-crown")


@dataclass(frozen=True)
class Row:
    """What is computed; ``images`` from the beginning of the test split."""

    model: str
    method: str
    bound: str
    ground: str
    cap: float | None
    images: int


def rows() -> Iterator[Row]:
    """Every row of the table, in order."""
    for model in ("digits-fc3", "digits-certified"):
        for ground in GROUNDS:
            for cap in (None, 1.0):
                yield from (Row(model, "fine-tuned", bound, ground, cap, 4) for bound in BOUNDS)
            yield from (Row(model, "vanilla", bound, ground, None, 4) for bound in BOUNDS)
    for model in ("mnist-fc3", "mnist-certified"):
        for ground, cap in (("l1", None), ("l1", 1.0), ("l2", None)):
            yield from (Row(model, "fine-tuned", bound, ground, cap, 2) for bound in ("best", "ibp", "crown"))
        yield from (Row(model, "vanilla", bound, ground, None, 2) for bound in BOUNDS for ground in ("l1", "l2"))
    for ground in ("l1", "l2"):
        yield from (Row("mnist-cnn", "fine-tuned", bound, ground, None, 1) for bound in ("best", "ibp"))
        yield Row("mnist-cnn", "vanilla", "ibp", ground, None, 1)
    for ground in GROUNDS:
        yield from (Row("mnist-linear", "linear", "best", ground, cap, 4) for cap in (None, 1.0))
    yield Row("mnist-linear", "linear-lp", "best", "l1", None, 2)
    for ground in ("l1", "l2"):
        yield Row("digits-fc3", "vanilla-complete", "best", ground, None, 2)
        yield Row("digits-fc3", "complete", "best", ground, None, 2)


def computed(row: Row) -> dict[str, Any]:
    """The row with its results, in plain JSON values."""
    data = fv.load_dataset(row.model.split("-")[0], split="test")
    images, labels = data.images[: row.images], data.labels[: row.images]
    model = fv.load_model(row.model)
    exact = row.method.endswith("complete")
    alone = {"adversary": None} if exact else {}
    radii = fv.certified_radius(model, images, labels, row.method, row.bound, row.ground, cap=row.cap, **alone)
    result: dict[str, Any] = {**asdict(row), "radii": radii.tolist()}
    if not exact:
        for radius in (0.01, 0.05):
            ball = fv.WassersteinBall(radius, row.ground, row.cap)
            found = fv.certify_batch(model, images, labels, ball, row.method, row.bound)
            result[f"at {radius}"] = [[str(one.verdict), one.margin] for one in found]
    return result


def differences(before: Any, after: Any) -> bool:
    """Whether two values differ by more than the tolerance, relative to 1 and to the value before."""
    if isinstance(before, float) and isinstance(after, float):
        return not (before == after or math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=TOLERANCE))
    if isinstance(before, list) and isinstance(after, list):
        return len(before) != len(after) or any(map(differences, before, after))
    return bool(before != after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", help="rows whose names contain this, such as 'mnist-fc3 vanilla'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = [] if arguments.record else json.loads(TABLE.read_text(encoding="utf-8"))
    after, wrong = [], 0
    for number, row in enumerate(rows()):
        name = f"{row.model} {row.method} {row.bound} {row.ground} cap={row.cap}"
        if arguments.only not in name:
            continue
        after.append(computed(row))
        if arguments.record:
            print(name, after[-1]["radii"], flush=True)
            continue
        differs = [key for key, value in before[number].items() if differences(value, after[-1].get(key))]
        wrong += bool(differs)
        for key in differs:
            print(f"{name}: {key} was {before[number][key]}, is {after[-1].get(key)}", flush=True)
    if arguments.record:
        TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in after) + "\n]\n", encoding="utf-8")
    print(f"{len(after)} rows, {wrong} of them differ by more than {TOLERANCE:g}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
