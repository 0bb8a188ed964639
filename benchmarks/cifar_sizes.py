"""Time and memory of a certified radius on networks of the sizes of VNN-COMP's cifar_base and resnet_2b.

python -m benchmarks.cifar_sizes [--networks cifar_base,resnet_2b] [--bounds best] [--images 3] [--epochs 60]

Weights of a fixed seed, briefly trained on the sample of CIFAR-10 but for its first ten images, of which those that are
classified right are certified. A process a row, so that each has its own peak of memory; seconds by the clock.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.attack.base import make_attack
from flowverify.data import Dataset

HELD_OUT = 10


class Block(nn.Module):
    """Two convolutions beside a shortcut, without batch norm."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, wider, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(wider, wider, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, wider, 1, stride=stride) if stride != 1 else nn.Identity()

    def forward(self, value: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(value))) + self.shortcut(value))


def untrained(name: str) -> nn.Module:
    """cifar_base: two convolutions, two dense layers (oval's "base"); resnet_2b: two residual blocks."""
    torch.manual_seed(0)
    if name == "cifar_base":
        return nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), Block(8, 16, 2), Block(16, 16, 1), nn.Flatten(),
        nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def fitted(model: nn.Module, data: Dataset, epochs: int, batch: int) -> nn.Module:
    """The network after so many epochs on a data set, by Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()
    return model.eval()


def trained(name: str, epochs: int) -> nn.Module:
    """The network after so many epochs on the sample."""
    return fitted(untrained(name), fv.load_dataset("cifar10-sample")[HELD_OUT:], epochs, 30)


def row(question: tuple[str, str, int, int]) -> dict[str, Any]:
    """Radii, seconds and peak memory (GiB) of one network and bound, in this process."""
    name, bound, count, epochs = question
    model, data = trained(name, epochs), fv.load_dataset("cifar10-sample")[:HELD_OUT]
    with torch.no_grad():
        answers = model(data.images).argmax(1)
    images, labels = data.images[:count], answers[:count]  # what it answers: few of them are right
    radii, seconds = [], []
    for image, label in zip(images, labels, strict=True):
        with stopwatch() as taken:
            radii += fv.certified_radius(model, image[None], label[None], bound=bound).tolist()
        seconds.append(taken[0])
    found = make_attack("minimal", model).minimise(images, labels).radius.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"radii": radii, "attack": found, "seconds": seconds, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="cifar_base,resnet_2b")
    parser.add_argument("--bounds", default="crown,best")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    header(f"CIFAR sizes, fine-tuned, l1, the answers at the first {options.images} images of the sample")
    print(
        "| network | bound | radii | attack | s an image | largest | GiB |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in options.networks.split(","):
        for bound in options.bounds.split(","):
            with get_context("spawn").Pool(1) as pool:
                found = pool.apply(row, ((name, bound, options.images, options.epochs),))
            radii, attack = (" ".join(f"{radius:.4f}" for radius in found[key]) for key in ("radii", "attack"))
            middle, largest = statistics.median(found["seconds"]), max(found["seconds"])
            print(f"| {name} | {bound} | {radii} | {attack} | {middle:.1f} | {largest:.1f} | {found['peak']:.2f} |")


if __name__ == "__main__":
    main()
