"""Certified radii by lifted bounds beside those of the other bounds, and what an attack finds.

python -m benchmarks.lifted_bounds [--models mnist-fc3,mnist-cnn,mnist-certified,digits-fc3,mnist-residual]
    [--images 100] [--first 0] [--bounds crown,alpha-crown,lifted,best,attack] [--alpha-images 20]

One row a network and bound, by what `flowverify verify` calls: the median radius over the images that are classified
right, quartiles, and seconds an image (processor time). Images from 1000 on are those that settings were chosen on.
alpha-crown bounds the first of them only. mnist-residual is no shipped network: two residual blocks, trained here with
a fixed seed on the first 10,000 training images.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import flowverify as fv
from benchmarks.cifar_sizes import Block, fitted
from benchmarks.common import header, quartiles
from flowverify.attack.base import make_attack


def residual(epochs: int = 3) -> nn.Module:
    """A convolution, two residual blocks and two affine layers, trained by Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), Block(8, 16, 2), Block(16, 16, 1), nn.Flatten(),
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return fitted(model, fv.load_dataset("mnist", split="train")[:10_000], epochs, 100)


def radii_by(bound: str, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Certified radii, or those at which an attack succeeds."""
    if bound == "attack":
        return make_attack("minimal", model).minimise(images, labels, "l1", None).radius
    return fv.certified_radius(model, images, labels, bound=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mnist-fc3,mnist-cnn,mnist-certified,digits-fc3,mnist-residual")
    parser.add_argument("--bounds", default="crown,alpha-crown,lifted,best,attack")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--alpha-images", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    header(f"Lifted bounds: {options.images} test images from {options.first}, fine-tuned, l1")
    print("| network | bound | images | median radius (quartiles) | s an image |\n| --- | --- | --- | --- | --- |")
    for name in options.models.split(","):
        data = fv.load_dataset("digits" if name.startswith("digits") else "mnist")
        data = data[options.first : options.first + options.images]
        model = residual() if name == "mnist-residual" else fv.load_model(name)
        with torch.no_grad():
            right = model(data.images).argmax(1) == data.labels
        images, labels = data.images[right], data.labels[right]
        found: dict[str, Tensor] = {}
        for bound in options.bounds.split(","):
            count = min(options.alpha_images, len(images)) if bound == "alpha-crown" else len(images)
            begin = time.process_time()
            found[bound] = radii_by(bound, model, images[:count], labels[:count])
            seconds = (time.process_time() - begin) / count
            print(f"| {name} | {bound} | {count} | {quartiles(found[bound])} | {seconds:.3f} |", flush=True)
        if "attack" in found:
            for bound, radii in found.items():
                below = radii <= found["attack"][: len(radii)]
                assert bool(below.all()), f"a radius of {bound} is above the attack's"


if __name__ == "__main__":
    main()
