"""Attacks against fine-tuned certificates: no adversarial image may be nearer than a certified radius.

    python -m benchmarks.attack_against_certificates [--models mnist-fc3] [--images 1000] [--attacks minimal]
        [--slow-images 50]

Flow descent and projected Sinkhorn, which take up to a second an image, attack the first ``--slow-images`` only.
Exits with 1 if there is a contradiction.
"""

from __future__ import annotations

import argparse
import sys

import torch

import flowverify as fv
from benchmarks.common import header, quartiles, stopwatch
from flowverify.attack import make_attack
from flowverify.certifiers.incomplete import Certifier, search_radius

OPTIONS = {"minimal": {"effort": "normal"}, "sinkhorn": {"shorten": True}}
SLOW = ("flow-pgd", "sinkhorn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mnist-fc3")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--slow-images", type=int, default=50)
    parser.add_argument("--attacks", default="minimal,frank-wolfe,flow-pgd,sinkhorn")
    parser.add_argument("--bound", default="best")
    parser.add_argument("--grounds", default="l1,l2")
    options = parser.parse_args()
    header("Attacks against fine-tuned certificates")
    contradictions = 0
    data = fv.load_dataset("mnist")[: options.images]
    for model in options.models.split(","):
        network = fv.load_model(model)
        for ground in options.grounds.split(","):
            with stopwatch() as taken:
                certified = search_radius(
                    Certifier(network, "fine-tuned", options.bound), data.images, data.labels, ground
                )
            radii = [one.radius for one in certified]
            print(f"{model} {ground} certified ({options.bound}): {len(radii)} images, {taken[0]:.1f} s", flush=True)
            for name in options.attacks.split(","):
                part = data[: options.slow_images] if name in SLOW else data
                with stopwatch() as taken:
                    attack = make_attack(name, network, **OPTIONS.get(name, {}))
                    found = attack.minimise(part.images, part.labels, ground)
                right = found.found & (found.radius > 0)
                wrong = [k for k in range(len(part)) if radii[k] > 0 and float(found.radius[k]) <= radii[k]]
                contradictions += len(wrong)
                ratio = found.radius[right].cpu() / torch.tensor(radii, dtype=torch.float64)[: len(part)][right.cpu()]
                print(
                    f"{model} {ground} {name:12} median {quartiles(found.radius[right])}, "
                    f"found {int(right.sum())} of {len(part)}, contradictions {len(wrong)} {wrong[:5]}, "
                    f"least attack / certificate {float(ratio.min()):.3f}, median {float(ratio.median()):.2f}; "
                    f"{taken[0]:.1f} s",
                    flush=True,
                )
    print(f"contradictions: {contradictions}")
    sys.exit(1 if contradictions else 0)


if __name__ == "__main__":
    main()
