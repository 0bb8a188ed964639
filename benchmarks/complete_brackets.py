"""Exact radii by branch and bound: how narrow the bracket is after a given time, image by image.

python -m benchmarks.complete_brackets [--model mnist-fc3] [--images 50] [--seconds 60] [--clock wall]

With ``--clock processor`` seconds are those of the processor, of all threads together, for a machine that does other
work: 60 seconds on two cores are then 120.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import flowverify as fv
from benchmarks.common import CLOCKS, header
from flowverify.attack import make_attack
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.options import CompleteOptions
from flowverify.zoo import load_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=50, help="so many that are classified right")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    network = fv.load_model(options.model)
    data = fv.load_dataset(load_card(options.model).dataset)
    right = (network(data.images[:1000].to(network.dtype)).argmax(1) == data.labels[:1000]).nonzero().flatten()
    chosen = right[options.skip : options.skip + options.images]
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
    crown = search_radius(Certifier(network), data.images[chosen], data.labels[chosen])
    gaps, seconds, nearer = [], [], 0
    for position, index in enumerate(chosen.tolist()):
        part = slice(index, index + 1)
        found = certifier.search(data.images[part], data.labels[part])[0]
        assert found.upper_radius is not None
        assert found.radius <= float(attacked[position])
        assert found.upper_radius >= crown[position].radius
        gap = found.upper_radius / found.radius - 1 if found.radius > 0 else float("inf")
        nearer += found.upper_radius < float(attacked[position]) * 0.999
        gaps.append(gap)
        seconds.append(found.seconds)
        print(
            f"image {index}: CROWN {crown[position].radius:.4f}, proven {found.radius:.4f}, counterexample "
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


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
