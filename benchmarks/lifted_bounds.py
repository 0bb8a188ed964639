"""Certified radii by lifted bounds beside those of CROWN and best, and what an attack finds.

python -m benchmarks.lifted_bounds [--models mnist-fc3,mnist-cnn,mnist-certified,digits-fc3] [--images 100] [--first 0]
    [--bounds crown,best,lifted,lifted+best,attack] [--steps 10]

One row a network and bound: the median radius over the images that are classified right, quartiles, and seconds an
image (processor time). Images from 1000 on are those that settings were chosen on.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.attack.base import make_attack
from flowverify.bounds.lifted.engine import Choice, LiftedBounds
from flowverify.certifiers.radius import Bracket
from flowverify.network import RoundingBound

TOLERANCE = 0.01  # relative, of radii; as the certifiers'
FIRST, SMALLEST = 0.02, 1e-7
GOAL = 0.05  # of the clean margin: far enough from the end of the search
NEAR = 0.1  # relative, how near rows alone lead to the radius


def lifted_radii(name: str, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Radii that are proven in float64, rounding included; searched in float32, without the mixture first."""
    network = fv.load_model(name)
    cheap, dear = (LiftedBounds(network, dtype=torch.float32, steps=count, goal=GOAL) for count in (0, steps))
    exact = LiftedBounds(network, steps=steps, goal=1e-4)  # positive is enough
    rounding = RoundingBound(exact.network)
    limit = float(network.grid.diameter)
    radii = []
    for image, label in zip(images[:, None], labels[:, None], strict=True):
        mass, warm = image.flatten(1).double().sum(1), dict[str, Choice]()

        def margin(
            engine: LiftedBounds,
            radius: float,
            image: Tensor = image,
            label: Tensor = label,
            mass: Tensor = mass,
            warm: dict[str, Choice] = warm,
        ) -> float:
            budget = radius * mass
            bound = engine.lower_bounds(image, label, budget, warm=warm).min()
            return float(bound - (rounding.margins(mass, budget)[0] if engine is exact else 0.0))

        low, at_low = 0.0, margin(cheap, 0.0)
        for engine, growth, near in ((cheap, 2.0, NEAR if steps else TOLERANCE), (dear, 1.1, TOLERANCE))[
            : 2 if steps else 1
        ]:
            bracket = Bracket(low, at_low, limit, near, FIRST, SMALLEST, growth)
            while not bracket.finished:
                trial = bracket.trial()
                bracket.update(trial, margin(engine, trial))
            low, at_low = bracket.low, bracket.low_margin
        step = TOLERANCE / 4
        while low > SMALLEST and not margin(exact, low) > 0:
            low, step = low * (1 - step), 2 * step
        radii.append(low if low > SMALLEST else 0.0)
    return torch.tensor(radii, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mnist-fc3,mnist-cnn,mnist-certified,digits-fc3")
    parser.add_argument("--bounds", default="crown,best,lifted,attack")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
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
            if bound == "lifted":
                radii = lifted_radii(name, images, labels, options.steps)
            elif bound == "attack":
                radii = make_attack("minimal", fv.load_model(name)).minimise(images, labels, "l1", None).radius
            else:
                radii = fv.certified_radius(fv.load_model(name), images, labels, bound=bound, tolerance=TOLERANCE)
            seconds = (time.process_time() - begin) / len(images)
            found[bound] = radii
            print(f"| {name} | {bound} | {quartiles(radii)} | {seconds:.3f} |", flush=True)
        if {"lifted", "best"} <= set(found):
            print(
                f"| {name} | larger of lifted and best | {quartiles(torch.maximum(found['lifted'], found['best']))} | |"
            )
        if {"lifted", "attack"} <= set(found):
            assert bool((found["lifted"] <= found["attack"]).all()), "a certified radius is above the attack's"


if __name__ == "__main__":
    main()
