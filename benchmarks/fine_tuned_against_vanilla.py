"""Certified radii and wall time, fine-tuned against vanilla, on the same network and images in one run.

python -m benchmarks.fine_tuned_against_vanilla [--model mnist-fc3] [--images 100] [--bounds crown,best]
"""

from __future__ import annotations

import argparse

import torch

import flowverify as fv
from benchmarks.common import header, quartiles, stopwatch
from flowverify.certifiers.incomplete import Certifier, search_radius


def measure(model: str, count: int, bound: str, dataset: str) -> None:
    network, data = fv.load_model(model), fv.load_dataset(dataset)[0:count]
    radii, seconds = {}, {}
    for method in ("vanilla", "fine-tuned"):
        certifier = Certifier(network, method, bound)
        # Compiling and tracing are paid once a process and would blur the ratio.
        search_radius(certifier, data.images[:2], data.labels[:2])
        with stopwatch() as taken:
            found = search_radius(certifier, data.images, data.labels)
        seconds[method] = taken[0]
        radii[method] = torch.tensor([one.radius for one in found if one.verdict != "misclassified"])
        median = quartiles(radii[method])
        print(
            f"{model:12} {bound:10} {method:10} radius {median}, {len(radii[method])} images, "
            f"{seconds[method]:.2f} s, {seconds[method] / count * 1000:.1f} ms an image"
        )
    vanilla, fine_tuned = radii["vanilla"], radii["fine-tuned"]
    never_worse = int((fine_tuned >= vanilla).sum())
    print(
        f"{model:12} {bound:10} ratio of medians {float(fine_tuned.median() / vanilla.median()):.3f}, fine-tuned >= "
        f"vanilla on {never_worse} of {len(vanilla)}, time ratio {seconds['fine-tuned'] / seconds['vanilla']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--bounds", default="crown,best,ibp,crown-ibp")
    options = parser.parse_args()
    header(f"Fine-tuned against vanilla: {options.model}, first {options.images} test images of {options.dataset}")
    for bound in options.bounds.split(","):
        measure(options.model, options.images, bound, options.dataset)


if __name__ == "__main__":
    main()
