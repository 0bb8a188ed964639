"""Figure 5 of Levine & Feizi 2020: accuracy under the projected Sinkhorn attack, smoothed and standard networks.

    python -m benchmarks.smoothing_attacked [--images 20] [--n 1000] [--picture FILE.png]

The smoothed classifier (mnist-smooth, sigma 0.01) is attacked by the gradient of its soft version with 128 samples a
step, and asked with n samples a step (paper: 10,000, --n 10000); an abstention counts as misclassified. The standard
network is mnist-cnn; mnist-adversarial is attacked too if it is there. The paper's figure has no table: what its text
says is that smoothing beats the standard network at all radii, that adversarial training beats smoothing at large ones,
and that the median radius of the attack is two orders of magnitude above the certified one (0.0132).

Radii are those of the attack's schedule, as the paper plots them; the exact W1 of what was found stands below.
Figure 6 does the same on CIFAR-10, for which no base classifier can be trained from our 100 images.
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import median

import torch

import flowverify as fv
from benchmarks.common import header
from flowverify.attack import ProjectedSinkhorn
from flowverify.data import Dataset
from flowverify.errors import UnknownNameError
from flowverify.smoothing import Noise, SmoothedClassifier
from flowverify.smoothing.attack import attack_smoothed

RADII = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 1.83)
Curves = dict[str, tuple[list[float], list[float]]]  # by the schedule and by exact W1, l2


def plain(name: str, data: Dataset) -> tuple[list[float], list[float]]:
    """The radii at which an unsmoothed network falls."""
    search = ProjectedSinkhorn(fv.load_model(name), shorten=False)
    found = search.minimise(data.images, data.labels, "l2")
    scheduled = [
        0.0 if word == "misclassified" else search.scheduled.get(row, math.inf) if word == "found" else math.inf
        for row, word in enumerate(found.outcome)
    ]
    return scheduled, found.radius.tolist()


def smoothed(data: Dataset, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The radii at which the smoothed classifier falls."""
    classifier = SmoothedClassifier(fv.load_model("mnist-smooth"), Noise(0.01))
    found = attack_smoothed(classifier, data.images, data.labels, n=options.n)
    radii = [math.inf if one.scheduled is None else one.scheduled for one in found]
    return radii, [math.inf if one.distance is None else one.distance for one in found]


def line(radii: list[float]) -> str:
    cells = [f"{100 * sum(radius > at for radius in radii) / len(radii):5.1f}" for at in RADII]
    return f"{' '.join(cells)}   median {median(radii):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--picture")
    options = parser.parse_args()
    data = fv.load_dataset("mnist")
    data = data[list(range(0, len(data), len(data) // options.images))[: options.images]]
    header(f"Figure 5: accuracy (%) under projected Sinkhorn, {len(data)} test images, n {options.n}")
    print(f"{'radius':40} {' '.join(f'{radius:5.2f}' for radius in RADII)}", flush=True)
    curves: Curves = {}
    for name, attack in (
        ("standard (mnist-cnn)", lambda: plain("mnist-cnn", data)),
        ("adversarially trained", lambda: plain("mnist-adversarial", data)),
        ("Wasserstein smoothing", lambda: smoothed(data, options)),
    ):
        begin = time.perf_counter()
        try:
            curves[name] = attack()
        except UnknownNameError:
            print(f"{name:24} no such model here")
            continue
        print(f"{name:24} by schedule     {line(curves[name][0])}   ({time.perf_counter() - begin:.0f} s)")
        print(f"{'':24} by W1, l2       {line(curves[name][1])}", flush=True)
    if options.picture:
        draw(curves, options.picture)


def draw(curves: Curves, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, grid = figure.subplots(), torch.linspace(0, 2, 201).tolist()
    for name, (scheduled, _) in curves.items():
        axes.plot(grid, [sum(radius > at for radius in scheduled) / len(scheduled) for at in grid], label=name)
    axes.set_xlabel("radius of the attack's schedule (pixels)")
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
