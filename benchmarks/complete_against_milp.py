"""Branch and bound against the mixed-integer program at fixed radii between CROWN's radius and the attack's.

python -m benchmarks.complete_against_milp [--model mnist-fc3] [--images 3] [--seconds 120] [--shares 0.3,0.6,0.9]

Each image is decided at radii that divide the way from CROWN's radius to the counterexample's, with the same limit of
time for both methods. A run out of time counts at its limit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import flowverify as fv
from benchmarks.common import header
from flowverify.attack import make_attack
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.milp import MilpCertifier
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.options import CompleteOptions
from flowverify.zoo import load_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=3, help="so many that are classified right")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--shares", default="0.3,0.6,0.9,1.05")
    options = parser.parse_args()
    network = fv.load_model(options.model)
    data = fv.load_dataset(load_card(options.model).dataset)
    right = (network(data.images[:500].to(network.dtype)).argmax(1) == data.labels[:500]).nonzero().flatten()
    chosen = right[: options.images]
    header(f"Branch and bound against HiGHS: {options.model}, {len(chosen)} images, {options.seconds:g} s at most")
    limits = CompleteOptions(timeout=options.seconds, clock=time.process_time)
    methods = {"complete": CompleteCertifier(network, options=limits), "milp": MilpCertifier(network, options=limits)}
    attacked = make_attack("minimal", network).minimise(data.images[chosen], data.labels[chosen]).radius
    crown = search_radius(Certifier(network), data.images[chosen], data.labels[chosen])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    disagreements = 0
    for position, index in enumerate(chosen.tolist()):
        for share in map(float, options.shares.split(",")):
            low, high = crown[position].radius, float(attacked[position])
            ball = fv.WassersteinBall(low + share * (high - low))
            verdicts = {}
            for name, certifier in methods.items():
                part = slice(index, index + 1)
                begin = time.process_time()
                found = certifier.certify(data.images[part], data.labels[part], ball)[0]
                taken = time.process_time() - begin
                verdicts[name] = str(found.verdict)
                seconds[name].append(options.seconds if found.verdict == "timeout" else taken)
            decided = set(verdicts.values()) & {"certified", "falsified"}
            disagreements += len(decided) == 2
            print(
                f"image {index}, radius {ball.radius:.4f} ({share:g}): "
                + ", ".join(f"{name} {verdicts[name]} in {seconds[name][-1]:.2f} s" for name in methods),
                flush=True,
            )
    total = {name: sum(values) for name, values in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["milp"], seconds["complete"], strict=True)]
    print(
        f"processor time: complete {total['complete']:.1f} s, milp {total['milp']:.1f} s, "
        f"{total['milp'] / total['complete']:.0f} times; geometric mean of the ratios "
        f"{math.exp(statistics.mean(map(math.log, ratios))):.0f}, median {statistics.median(ratios):.0f}; "
        f"verdicts that contradict each other: {disagreements}"
    )


if __name__ == "__main__":
    main()
