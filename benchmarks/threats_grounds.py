"""Certified radii for ground costs other than l1, and with a cap, beside converted ones and attacks; and their time.

python -m benchmarks.threats_grounds [--model mnist-fc3] [--images 100] [--grounds l2,l2^2,local:5] [--capped l1]

"converted" is the largest radius whose ball lies in the certified l1 ball (for l2, l1 radius / sqrt 2), which is what
a certifier that knows l1 only can say. Radii are medians over the images that are classified right.
"""

from __future__ import annotations

import argparse
import time

import torch

import flowverify as fv
from benchmarks.common import header, quartiles
from flowverify.attack import make_attack
from flowverify.ball import Threat
from flowverify.certifiers.incomplete import Certifier
from flowverify.network import affine_rows
from flowverify.results import Verdict
from flowverify.transport.ground import parse_ground
from flowverify.transport.support import support


def radii(
    certifier: Certifier, images: torch.Tensor, labels: torch.Tensor, ground: str, cap: float | None
) -> torch.Tensor:
    """Certified radii of the images that are classified right, printed with their processor time."""
    certifier.prepare(Threat(ground, cap))
    certifier.search(images[:1], labels[:1], Threat(ground, cap))
    start = time.process_time()
    found = certifier.search(images, labels, Threat(ground, cap))
    milliseconds = 1000 * (time.process_time() - start) / len(images)
    result = torch.tensor([one.radius for one in found if one.verdict is not Verdict.MISCLASSIFIED])
    name = ground if cap is None else f"{ground}, pixels at most {cap:g}"
    print(
        f"{name}: {quartiles(result)}, {len(result)} images, processor time {milliseconds:.0f} ms an image", flush=True
    )
    return result


def first_layer(network: fv.Network, images: torch.Tensor, grounds: list[str], radius: float) -> None:
    """Processor time of the exact bounds of the first layer, a neuron and image."""
    name = min((node.name for node in network.nodes if node.name in network.affine_of_input()), key=len)
    weights, _ = affine_rows(network, name, torch.float32)
    rows = weights.reshape(-1, *network.input_shape)
    for ground in ["l1", *grounds]:
        budget = Threat(ground).budget(radius, images)
        support(rows[:16], images[:1], budget[:1], ground=ground)
        start = time.process_time()
        support(rows, images, budget, ground=ground)
        each = 1e6 * (time.process_time() - start) / (len(rows) * len(images))
        print(f"first layer, {len(rows)} neurons, radius {radius:g}, {ground}: {each:.1f} us a neuron and image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--grounds", default="l2,l2^2,local:5")
    parser.add_argument("--capped", default="l1", help="ground costs to certify with a cap of 1 too; none: -")
    options = parser.parse_args()
    header(f"Threat models: {options.model}, first {options.images} test images")
    network = fv.load_model(options.model)
    data = fv.load_dataset("mnist")[0 : options.images]
    grounds = options.grounds.split(",")
    first_layer(network, data.images, grounds, 0.05)
    certifier, attack = Certifier(network), make_attack("minimal", network)
    free = {ground: radii(certifier, data.images, data.labels, ground, None) for ground in ["l1", *grounds]}
    for ground in grounds:
        cost = parse_ground(ground)
        converted = torch.tensor([cost.from_l1(radius) for radius in free["l1"].tolist()])
        ratio = free[ground] / converted
        print(
            f"{ground}: converted from l1 {quartiles(converted)}; native over converted, median {ratio.median():.3f}, "
            f"least {ratio.min():.3f}"
        )
    for ground in ["l1", *grounds]:
        start = time.process_time()
        found = attack.minimise(data.images, data.labels, ground)
        milliseconds = 1000 * (time.process_time() - start) / len(data)
        nearest = found.radius[found.radius > 0]
        below = int((free[ground] <= nearest * (1 + 1e-9)).sum())
        print(
            f"{ground}: attack (minimal) {quartiles(nearest)}, {milliseconds:.0f} ms an image; certified <= attacked "
            f"on {below} of {len(nearest)}, certified over attacked, median {(free[ground] / nearest).median():.3f}"
        )
    for ground in [] if options.capped == "-" else options.capped.split(","):
        capped = radii(certifier, data.images, data.labels, ground, 1.0)
        gain = capped / free[ground]
        found = attack.minimise(data.images, data.labels, ground, 1.0)
        nearest = found.radius[found.radius > 0]
        print(
            f"{ground}, cap of 1: gain median {gain.median():.3f}, least {gain.min():.4f}, largest {gain.max():.3f}; "
            f"attack {quartiles(nearest)}, certified <= attacked on {int((capped <= nearest).sum())} of {len(nearest)}"
        )


if __name__ == "__main__":
    main()
