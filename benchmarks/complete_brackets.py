"""Exact radii by branch and bound: how narrow the bracket is after a given time, image by image.

python -m benchmarks.complete_brackets [--model mnist-fc3] [--images 50] [--seconds 60] [--clock wall]

``--model mnist-256x2`` is no shipped network: two hidden layers of 256, the sizes of VNN-COMP's, trained here with a
fixed seed on the first 20,000 training images, written as ONNX to ``--file``, and read again, so that `flowverify
verify FILE --dataset mnist --method complete` gives the same table.

With ``--clock processor`` seconds are those of the processor, of all threads together, for a machine that does other
work: 60 seconds on two cores are then 120.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn

import flowverify as fv
from benchmarks.cifar_sizes import fitted
from benchmarks.common import CLOCKS, header
from flowverify.attack import make_attack
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.options import CompleteOptions
from flowverify.network import Network, write_onnx
from flowverify.zoo import load_card

TWO_LAYERS = "mnist-256x2"


def two_layers(path: Path, epochs: int = 5) -> Network:
    """Two hidden layers of 256, from the file if it is there."""
    if not path.exists():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        model = fitted(nn.Sequential(*layers), fv.load_dataset("mnist", split="train")[:20_000], epochs, 100)
        write_onnx(Network.sequential((1, 28, 28), list(model)), path)
    return fv.load_model(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=50, help="so many that are classified right")
    parser.add_argument("--first", type=int, default=0, help="the first image of the test split that is looked at")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--file", type=Path, default=Path(f"{TWO_LAYERS}.onnx"), help=f"of {TWO_LAYERS}")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    ours = options.model == TWO_LAYERS
    network = two_layers(options.file) if ours else fv.load_model(options.model)
    data = fv.load_dataset("mnist" if ours else load_card(options.model).dataset)
    near = slice(options.first, options.first + 2 * options.images + 100)
    right = (network(data.images[near].to(network.dtype)).argmax(1) == data.labels[near]).nonzero().flatten()
    chosen = options.first + right[: options.images]
    header(
        f"Brackets: {options.model}, {len(chosen)} images classified right, {options.seconds:g} s each "
        f"({options.clock} time)"
    )
    attack = make_attack("minimal", network)
    certifier = CompleteCertifier(
        network,
        options=CompleteOptions(timeout=options.seconds, clock=CLOCKS[options.clock], adversary=attack),
    )
    certifier.prepare()
    attacked = attack.minimise(data.images[chosen], data.labels[chosen]).radius
    bounded = search_radius(Certifier(network), data.images[chosen], data.labels[chosen])
    gaps, seconds, nearer = [], [], 0
    for position, index in enumerate(chosen.tolist()):
        part = slice(index, index + 1)
        found = certifier.search(data.images[part], data.labels[part])[0]
        assert found.upper_radius is not None
        assert found.radius <= float(attacked[position])
        assert found.upper_radius >= bounded[position].radius
        gap = found.upper_radius / found.radius - 1 if found.radius > 0 else float("inf")
        nearer += found.upper_radius < float(attacked[position]) * 0.999
        gaps.append(gap)
        seconds.append(found.seconds)
        print(
            f"image {index}: bounds {bounded[position].radius:.4f}, proven {found.radius:.4f}, counterexample "
            f"{found.upper_radius:.4f} (attack {float(attacked[position]):.4f}), gap {100 * gap:.2f}%, "
            f"{found.seconds:.1f} s {found.note}",
            flush=True,
        )
    count = len(gaps)
    closed = {limit: sum(gap <= limit * 1.0001 for gap in gaps) for limit in (0.01, 0.05)}
    open_gaps = [gap for gap in gaps if gap > 0.0501]
    print(
        f"closed to 1%: {closed[0.01]} of {count}; to 5%: {closed[0.05]} of {count}; median gap of the rest "
        f"{100 * statistics.median(open_gaps) if open_gaps else 0:.1f}%; median time "
        f"{statistics.median(seconds):.1f} s, mean {statistics.mean(seconds):.1f} s; "
        f"a nearer counterexample than the attack's on {nearer}"
    )
    shares = [min(1.0, 1 / (1 + gap)) for gap in gaps]
    print(f"certified / nearest counterexample: median {statistics.median(shares):.3f}, least {min(shares):.3f}")


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
