"""Certified radii by lifted bounds for other ground costs than l1: by moves at their own prices, and by the l1 ball.

python -m benchmarks.lifted_grounds [--models digits-fc3,mnist-fc3] [--grounds l2,local:3,local:5] [--images 20]
    [--first 0]

One row a network and cost: median radii over the images that are classified right, by the l1 ball around the ball
(theory, section 9), by moves (section 22), by CROWN over the ball itself, and by ``lifted`` as users call it, which
keeps the largest of the balls that it knows. Images from 1000 on are those that settings were chosen on.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.ball import Threat
from flowverify.certifiers.incomplete import Certifier


class Native(Certifier):
    """Only the ball itself, not what covers it."""

    def covers(self, threat: Threat) -> list[Threat]:
        return [threat]


def native_radii(name: str, images: Tensor, labels: Tensor, ground: str) -> Tensor:
    found = Native(fv.load_model(name), bound="lifted").search(images, labels, Threat(ground))
    return torch.tensor([one.radius for one in found], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="digits-fc3,mnist-fc3")
    parser.add_argument("--grounds", default="l2,local:3,local:5")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    header(f"Lifted bounds of other ground costs: {options.images} test images from {options.first}, fine-tuned")
    print("| network | ground | l1 ball | moves (s an image) | CROWN | lifted, all covers |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.models.split(","):
        data = fv.load_dataset("digits" if name.startswith("digits") else "mnist")
        data = data[options.first : options.first + options.images]
        network = fv.load_model(name)
        right = network(data.images).argmax(1) == data.labels
        images, labels = data.images[right], data.labels[right]
        l1 = fv.certified_radius(network, images, labels, bound="lifted")
        for ground in options.grounds.split(","):
            cost = Threat(ground).cost
            covered = torch.tensor([cost.from_l1(radius) for radius in l1.tolist()], dtype=torch.float64)
            begin = time.process_time()
            own = native_radii(name, images, labels, ground)
            seconds = (time.process_time() - begin) / len(images)
            crown = fv.certified_radius(network, images, labels, bound="crown", ground=ground)
            best = fv.certified_radius(network, images, labels, bound="lifted", ground=ground)
            assert bool((best >= 0.98 * torch.maximum(own, covered)).all()), "a cover was not made use of"
            row = f"| {name} | {ground} | {quartiles(covered)} | {quartiles(own)} ({seconds:.2f}) "
            print(f"{row}| {quartiles(crown)} | {quartiles(best)} |", flush=True)


if __name__ == "__main__":
    main()
