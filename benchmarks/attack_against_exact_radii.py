"""The minimal-radius attack on a linear classifier, against the exact radius of every image.

python -m benchmarks.attack_against_exact_radii [--model mnist-linear] [--images 1000]
"""

from __future__ import annotations

import argparse
import copy

import torch

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.attack import MinimalRadius
from flowverify.certifiers.linear import LinearCertifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-linear")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    header(f"Minimal-radius attack against exact radii: {options.model}, l1 ground cost")
    network, data = fv.load_model(options.model), fv.load_dataset("mnist")[: options.images]
    exact = LinearCertifier(network).radii(data.images, data.labels).radius
    double = copy.deepcopy(network).double()  # float32 rounding keeps images off boundaries that are very near
    for effort, attacked in (("fast", network), ("normal", network), ("normal", double)):
        with stopwatch() as taken:
            found = MinimalRadius(attacked, effort=effort).minimise(data.images, data.labels)
        right = found.radius > 0
        excess = found.radius[right] / exact[right] - 1
        print(
            f"{effort:7} {attacked.dtype} {int(right.sum())} classified right, found "
            f"{int(found.found[right].sum())}: excess over the exact radius "
            f"{float(excess.median()):.2e} (median), {float(excess.max()):.2e} (largest), "
            f"least {float(excess.min()):.2e}; wanted at most 1e-3 and never below 0; within 1e-3 on "
            f"{int((excess <= 1e-3).sum())}; {1000 * taken[0] / len(data):.2f} ms an image"
        )
    torch.testing.assert_close(exact[~right], torch.zeros_like(exact[~right]))


if __name__ == "__main__":
    main()
