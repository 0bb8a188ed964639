"""Framework paper, Section 3.2.2 and Figure 1: certified radii by reference, and their maximum.

python -m benchmarks.reference_maximum [--images 100] [--method vanilla] [--picture benchmarks/figures/figure-1.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.references import Reference, ReferenceMaximum, maximum_over_references, sample_references


def spread_of_margins(
    certifier: Certifier, data: fv.Dataset, references: list[Reference], radius: float, dtype: torch.dtype
) -> str:
    ball = fv.WassersteinBall(radius).around(data.images)
    margins = torch.stack(
        [certifier.margins(ball, data.labels, dtype=dtype, references=one.images) for one in references]
    )
    relative = (margins.amax(0) - margins.amin(0)) / margins.abs().amax(0)
    return f"median {float(relative.median()):.1e}, largest {float(relative.max()):.1e}"


def draw(found: ReferenceMaximum, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    boxes, points = figure.subplots(1, 2, width_ratios=(1, 1.6))
    maximum = found.radii.amax(0)
    boxes.boxplot([*found.radii.numpy(), maximum.numpy()], tick_labels=[f"R{k + 1}" for k in range(6)] + ["max"])
    boxes.set_ylabel("certified radius (pixels; W1, l1)")
    order = maximum.argsort()
    for name, row in zip(found.names, found.radii, strict=True):
        points.plot(row[order], ".", markersize=5, label=name)
    points.plot(maximum[order], color="tab:orange", linewidth=1, label="max")
    points.set_xlabel("image, by radius")
    points.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--method", default="vanilla")
    parser.add_argument("--bound", default="crown")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    network, data = fv.load_model("mnist-fc3"), fv.load_dataset("mnist")[0 : options.images]
    header(f"Six references, mnist-fc3, {options.method} {options.bound}, first {options.images} MNIST test images")
    pool = fv.load_dataset("mnist")[1000:2000].images
    references = sample_references(6, data.images, pool=pool)
    certifier = Certifier(network, options.method, options.bound, domain="flow")
    for dtype in (torch.float32, torch.float64):
        spread = spread_of_margins(certifier, data, references, 0.02, dtype)
        print(f"margins at radius 0.02 in {str(dtype)[6:]}: spread over references, relative: {spread}")
    found = maximum_over_references(certifier, data.images, data.labels, references, tolerance=options.tolerance)
    certified = found.radii.amax(0) > 0
    for name, row in zip(found.names, found.radii, strict=True):
        print(f"{name:22} radius {quartiles(row[certified])}")
    maximum, mean = found.radii.amax(0)[certified], found.radii.mean(0)[certified]
    print(f"{'max over references':22} radius {quartiles(maximum)}")
    print(
        f"gain of the maximum over the mean of the references: median {float((maximum / mean).median()):.5f} times, "
        f"largest {float((maximum / mean).max()):.5f} (search to {options.tolerance}); paper: substantial (Figure 1)"
    )
    if options.picture is not None:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
