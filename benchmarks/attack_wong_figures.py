"""Figures 4 and 7 of Wong et al. 2019: accuracy under projected Sinkhorn against the radius.

    python -m benchmarks.attack_wong_figures [--images 100] [--figure 4,7] [--picture FILE.png] [--epochs 3]

Figure 4: the standard model and one with binarised input. As in the authors' code, binarised means: trained on images
binarised at 0.5, attacked from binarised images. A second defence keeps the threshold in front of the network during
the attack as well. Figure 7: windows of 3, 5 and 7 pixels. Paper: the standard model falls to 50% at 0.5 and to 6%
at 1.0; the binarised one does only marginally better; 3 x 3 windows leave 2.8% at 1.83, the others 0.

Accuracies are given twice: by the schedule's radius, which the paper plots, and by the exact W1 of what was found.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.attack import Binarised, MinimalRadius, ProjectedSinkhorn, binarise
from flowverify.data import Dataset
from flowverify.training.recipe import build_architecture

RADII = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 1.83, 2.0)


def accuracies(radii: Tensor, at: tuple[float, ...] = RADII) -> str:
    return " ".join(f"{100 * float((radii > radius).double().mean()):5.1f}" for radius in at)


def attack(name: str, network: nn.Module, data: Dataset, window: int = 5) -> dict[str, Tensor]:
    search = ProjectedSinkhorn(network, window=window, shorten=False)
    with stopwatch() as taken:
        found = search.minimise(data.images, data.labels, "l2")
    scheduled = torch.tensor(
        [0.0 if word == "misclassified" else search.scheduled.get(k, torch.inf) for k, word in enumerate(found.outcome)]
    )
    scheduled = torch.where(found.found, scheduled, torch.inf)
    print(f"{name:40} by schedule {accuracies(scheduled)}   ({taken[0] / len(data):.2f} s an image)", flush=True)
    print(f"{'':40} by W1, l2   {accuracies(found.radius)}", flush=True)
    return {"schedule": scheduled, "exact": found.radius}


def trained_on_binarised(epochs: int) -> nn.Module:
    """The CNN of the paper, trained on training images binarised at 0.5."""
    torch.manual_seed(0)
    data = fv.load_dataset("mnist", split="train")
    network = build_architecture("wong-cnn", (1, 28, 28), 10)
    images, labels = binarise(data.images), data.labels
    network.requires_grad_(True)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
    return network.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--figure", default="4,7")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--picture")
    options = parser.parse_args()
    header(f"Wong et al. 2019, Figures {options.figure}: accuracy (%), first {options.images} test images")
    print("paper, standard model: 50 at 0.5, 6 at 1.0; 3 x 3 windows: 2.8 at 1.83, 5 x 5 and 7 x 7: 0")
    print(f"{'radius':40}             {' '.join(f'{radius:5.2f}' for radius in RADII)}")
    data, curves = fv.load_dataset("mnist")[: options.images], {}
    standard = fv.load_model("mnist-cnn")
    if "4" in options.figure:
        curves["standard"] = attack("standard, 5 x 5", standard, data)
        binarised = trained_on_binarised(options.epochs)
        binary = Dataset(binarise(data.images), data.labels, data.name, data.split)
        curves["binarised"] = attack("binarised images, as the authors' code", binarised, binary)
        curves["threshold"] = attack("threshold before the network", Binarised(binarised, steepness=10.0), data)
        with stopwatch() as taken:
            found = MinimalRadius(Binarised(binarised, steepness=10.0)).minimise(data.images, data.labels, "l2")
        print(f"{'threshold, minimal-radius attack':40} by W1, l2   {accuracies(found.radius)}   "
              f"({taken[0] / len(data):.2f} s an image)")  # fmt: skip
    if "7" in options.figure:
        for window in (3, 5, 7):
            curves[f"{window} x {window}"] = attack(f"standard, {window} x {window}", standard, data, window)
    if options.picture:
        draw(curves, options.picture)


def draw(curves: dict[str, dict[str, Tensor]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    grid = torch.linspace(0, 2, 201)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("schedule", "exact"), strict=True):
        for name, radii in curves.items():
            axes.plot(grid, [float((radii[kind] > radius).double().mean()) for radius in grid], label=name)
        axes.set_xlabel(f"radius (pixels), by {'the schedule' if kind == 'schedule' else 'exact distance: W1, l2'}")
        axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
