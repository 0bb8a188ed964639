"""Framework paper, Appendix A and Figure 4: vanilla, L2, and exact radii of a linear classifier.

    python -m benchmarks.linear_radii [--images 1000] [--programs 1000] [--picture benchmarks/figures/figure-4.png]

Also: the exact radius without a solver against cvxpy with HiGHS, same images in one run; certified just inside
and falsified just outside of it; and what fine-tuned CROWN finds on the same network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header, quartiles, stopwatch
from flowverify.ball import WassersteinBall
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.linear import (
    HalfSpaces,
    LinearCertifier,
    LinearProgram,
    LinearRadius,
    exact_radius,
    half_spaces,
    l2_radius,
    program_radius,
    vanilla_radius,
)


def part(spaces: HalfSpaces, chosen: slice) -> HalfSpaces:
    return HalfSpaces(*(getattr(spaces, name)[chosen] for name in ("images", "mass", "normals", "margins", "classes")))


def figure_four(radii: dict[str, LinearRadius]) -> None:
    medians = {name: float(found.radius.median()) for name, found in radii.items()}
    for name, found in radii.items():
        print(f"{name:12} radius {quartiles(found.radius)}")
    pairs = (("exact", "vanilla", "about 1.6 (one example)"), ("vanilla", "L2", "about 10 (one example)"))
    for upper, lower, claimed in pairs:
        by_image = float((radii[upper].radius / radii[lower].radius).median())
        print(
            f"{upper} over {lower}: ratio of medians {medians[upper] / medians[lower]:.2f}, median of ratios "
            f"{by_image:.2f}; paper: {claimed}"
        )


def programs(network: fv.Network, spaces: HalfSpaces, exact: LinearRadius, count: int) -> None:
    chosen = part(spaces, slice(count))
    exact_radius(part(spaces, slice(2)))
    everything = len(spaces.images)
    with stopwatch() as own:
        exact_radius(spaces)
    program = LinearProgram(network.grid)
    program_radius(part(spaces, slice(1)), program)
    with stopwatch() as taken:
        solved = program_radius(chosen, program)
    difference = (exact.by_class[:count] / solved.by_class - 1).abs()
    own_each, program_each = own[0] / everything, taken[0] / count
    print(
        f"without a solver {own_each * 1e3:.3f} ms an image (batch of {everything}), cvxpy with HiGHS "
        f"{program_each * 1e3:.1f} ms: {program_each / own_each:.0f} times; {count} images x {difference.shape[1]} "
        f"classes equal to {float(difference.max()):.1e} relative"
    )


def both_sides(network: fv.Network, images: Tensor, labels: Tensor, exact: Tensor) -> None:
    certifier = LinearCertifier(network)
    inside = outside = 0
    for index, radius in enumerate(exact.tolist()):
        one, label = images[index : index + 1], labels[index : index + 1]
        inside += certifier.certify(one, label, WassersteinBall(0.999 * radius))[0].verdict == "certified"
        outside += certifier.certify(one, label, WassersteinBall(1.001 * radius))[0].verdict == "falsified"
    print(f"certified at 0.999 of it: {inside} of {len(exact)}; witness replayed at 1.001 of it: {outside}")
    found = search_radius(Certifier(network, "fine-tuned", "crown"), images, labels, tolerance=1e-5)
    crown = torch.tensor([one.radius for one in found], dtype=torch.float64)
    print(
        f"auto_LiRPA's CROWN, fine-tuned, search to 1e-5: off the exact radius by at most "
        f"{float((1 - crown / exact).abs().max()):.1e} relative, never above it: {bool((crown <= exact).all())}"
    )


def draw(radii: dict[str, LinearRadius], spaces: HalfSpaces, path: Path) -> None:
    from matplotlib.figure import Figure

    digits = range(4)
    figure = Figure(figsize=(8, 8.2), layout="constrained")
    axes = figure.subplots(len(digits), 1 + len(radii))
    for row, index in zip(axes, digits, strict=True):
        row[0].imshow(spaces.images[index, 0], cmap="gray", vmin=0, vmax=1)
        row[0].set_title("image", fontsize=9)
        for axis, (name, found) in zip(row[1:], radii.items(), strict=True):
            assert found.nearest is not None
            nearest = found.nearest[index, 0]
            axis.imshow(nearest, cmap="gray", vmin=0, vmax=1)
            axis.set_title(
                f"{name}: {float(found.radius[index]):.4f}\npixels {float(nearest.min()):.2f} to "
                f"{float(nearest.max()):.2f}",
                fontsize=9,
            )
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(
        "Nearest images on the decision boundary of a linear classifier\n"
        "(radius in pixels: W1, l1; for L2 the L2 norm of the flow)",
        fontsize=10,
    )
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    network, data = fv.load_model("mnist-linear"), fv.load_dataset("mnist")[0 : options.images]
    header(f"Linear classifier mnist-linear, first {options.images} MNIST test images, those classified right")
    right = network(data.images).argmax(1) == data.labels
    images, labels = data.images[right], data.labels[right]
    spaces = half_spaces(network, images, labels)
    radii = {"vanilla": vanilla_radius(spaces), "L2": l2_radius(spaces), "exact": exact_radius(spaces)}
    figure_four(radii)
    both_sides(network, images[:100], labels[:100], radii["exact"].radius[:100])
    if options.picture is not None:
        draw(radii, spaces, options.picture)
    programs(network, spaces, radii["exact"], min(options.programs, len(images)))


if __name__ == "__main__":
    main()
