"""Certified radii of a convolutional network on colour images, 3 x 32 x 32, beside an attack on the same images.

python -m benchmarks.threats_colour [--images 100] [--ground l1] [--cap 1.0] [--epochs 60]

The network is trained for a few seconds on the 100 images of ``cifar10-sample`` themselves: it is there to be bounded,
and its accuracy on them says nothing. Mass moves within each channel, and the channels share the radius.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.attack import make_attack
from flowverify.ball import Threat
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.results import Verdict


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Sequential:
    """Two convolutions and two affine layers, fitted by AdamW."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(epochs):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--ground", default="l1")
    parser.add_argument("--cap", type=float)
    parser.add_argument("--method", default="fine-tuned")
    parser.add_argument("--bound", default="best")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    data = fv.load_dataset("cifar10-sample")
    header(f"Colour network, {options.ground}, cap {options.cap}, {options.method}, {options.bound}")
    network = train(data.images, data.labels, options.epochs)
    chosen = data[0 : options.images]
    certifier = Certifier(network, options.method, options.bound, input_shape=(3, 32, 32))
    certifier.prepare(Threat(options.ground, options.cap))
    start, processor = time.perf_counter(), time.process_time()
    found = search_radius(certifier, chosen.images, chosen.labels, options.ground, cap=options.cap, batch_size=20)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    right = torch.tensor([one.verdict is not Verdict.MISCLASSIFIED for one in found])
    radii = torch.tensor([one.radius for one in found])
    print(f"{int(right.sum())} of {len(found)} classified right, certified radius {quartiles(radii[right])}")
    print(f"{seconds:.0f} s, processor time {processor:.0f} s, for {len(found)} images", flush=True)
    attacked = make_attack("minimal", network).minimise(chosen.images, chosen.labels, options.ground, options.cap)
    nearest = attacked.radius.cpu()
    print(
        f"attack (minimal) {quartiles(nearest[right])}; certified <= attacked on "
        f"{int((radii <= nearest)[right].sum())} of {int(right.sum())}"
    )


if __name__ == "__main__":
    main()
