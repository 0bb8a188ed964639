"""Certified radii by lifted bounds beside those of the other bounds, and what an attack finds.

python -m benchmarks.lifted_bounds [--models mnist-fc3,mnist-cnn,mnist-certified,digits-fc3] [--images 100] [--first 0]
    [--bounds crown,lifted,best,attack]

One row a network and bound, by what `flowverify verify` calls: the median radius over the images that are classified
right, quartiles, and seconds an image (processor time). Images from 1000 on are those that settings were chosen on.
"""

from __future__ import annotations

import argparse
import time

from torch import Tensor

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.attack.base import make_attack


def radii_by(bound: str, name: str, images: Tensor, labels: Tensor) -> Tensor:
    """Certified radii, or those at which an attack succeeds."""
    model = fv.load_model(name)
    if bound == "attack":
        return make_attack("minimal", model).minimise(images, labels, "l1", None).radius
    return fv.certified_radius(model, images, labels, bound=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mnist-fc3,mnist-cnn,mnist-certified,digits-fc3")
    parser.add_argument("--bounds", default="crown,lifted,best,attack")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    header(f"Lifted bounds: {options.images} test images from {options.first}, fine-tuned, l1")
    print("| network | bound | median radius (quartiles) | s an image |\n| --- | --- | --- | --- |")
    for name in options.models.split(","):
        data = fv.load_dataset("digits" if name.startswith("digits") else "mnist")
        data = data[options.first : options.first + options.images]
        right = fv.load_model(name)(data.images).argmax(1) == data.labels
        images, labels = data.images[right], data.labels[right]
        found: dict[str, Tensor] = {}
        for bound in options.bounds.split(","):
            begin = time.process_time()
            found[bound] = radii_by(bound, name, images, labels)
            seconds = (time.process_time() - begin) / len(images)
            print(f"| {name} | {bound} | {quartiles(found[bound])} | {seconds:.3f} |", flush=True)
        if "attack" in found:
            for bound, radii in found.items():
                assert bool((radii <= found["attack"]).all()), f"a radius of {bound} is above the attack's"


if __name__ == "__main__":
    main()
