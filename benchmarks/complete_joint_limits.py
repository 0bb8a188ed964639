"""What joint limits of neurons add to branch and bound: bounds at the root, and nodes and time to the end.

python -m benchmarks.complete_joint_limits [--model mnist-fc3] [--images 10] [--share 0.8] [--seconds 60]

Each image is decided at a share of its attack's radius, by one tree without joint limits and by one with them, from the
same bounds of the neurons. Seconds are those of the processor; a tree out of time counts at its limit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

import flowverify as fv
from benchmarks.common import header
from flowverify.attack import make_attack
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.neuron_bounds import neuron_bounds, refine
from flowverify.certifiers.complete.tree import Tree
from flowverify.deadline import Deadline
from flowverify.zoo import load_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=10, help="so many that are classified right")
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    network = fv.load_model(options.model)
    data = fv.load_dataset(load_card(options.model).dataset)
    right = (network(data.images[:1000].to(network.dtype)).argmax(1) == data.labels[:1000]).nonzero().flatten()
    chosen = right[: options.images]
    header(f"Joint limits: {options.model}, {len(chosen)} images at {options.share:g} of the attack's radius")
    certifier = CompleteCertifier(network)
    attacked = make_attack("minimal", network).minimise(data.images[chosen], data.labels[chosen]).radius
    taken: dict[bool, list[float]] = {False: [], True: []}
    opened: dict[bool, list[int]] = {False: [], True: []}
    for position, index in enumerate(chosen.tolist()):
        radius = options.share * float(attacked[position])
        parts = []
        for limited in (False, True):
            search = certifier.start(data.images[index], int(data.labels[index]))
            late, problem = Deadline(options.seconds, clock=time.process_time), search.problem(search.budget(radius))
            tree = Tree(problem, refine(problem, neuron_bounds(problem), late), search.nearest)
            if limited:
                tree.limit(late)
            left = tree.open.bound
            tree.grow(late)
            taken[limited].append(min(late.elapsed, options.seconds))
            opened[limited].append(len(left))
            state = "proven" if tree.proven else "open"
            worst = f", least bound {float(left.min()):.2f}" if len(left) else ""
            parts.append(
                f"{'with' if limited else 'without'}: {len(left)} classes open at the root{worst}, {state} after "
                f"{tree.counts.nodes} nodes, {taken[limited][-1]:.1f} s"
            )
        print(f"image {index}, radius {radius:.4f}: {'; '.join(parts)}", flush=True)
    ratios = [without / joint for without, joint in zip(taken[False], taken[True], strict=True)]
    print(
        f"classes open at the root: {sum(opened[False])} without, {sum(opened[True])} with; time: "
        f"{sum(taken[False]):.0f} s and {sum(taken[True]):.0f} s, {sum(taken[False]) / sum(taken[True]):.1f} times, "
        f"geometric mean of ratios {math.exp(statistics.mean(map(math.log, ratios))):.2f}"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
