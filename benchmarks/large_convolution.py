"""Memory and time of certifying a CNN with 65,536 neurons in its first layer.

python -m benchmarks.large_convolution [--method fine-tuned] [--bound crown]
"""

from __future__ import annotations

import argparse
import resource

import torch
from torch import nn

from benchmarks.common import header, stopwatch
from flowverify.ball import WassersteinBall
from flowverify.certifiers.incomplete import Certifier
from flowverify.network import Network
from flowverify.results import Verdict


def network() -> Network:
    """64 filters at 32x32, then two layers of stride 2; weights of a fixed seed."""
    torch.manual_seed(0)
    return Network.sequential(
        (1, 32, 32),
        [
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 16, 4, stride=4), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 10),
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="fine-tuned")
    parser.add_argument("--bound", default="crown")
    options = parser.parse_args()
    header(f"65,536 neurons in the first layer: {options.method}, {options.bound}, one 32x32 image")
    model = network()
    images = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    with stopwatch() as taken:
        certifier = Certifier(model, options.method, options.bound)
        certificate = certifier.certify(images, labels, WassersteinBall(1e-3))[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert certificate.verdict in (Verdict.CERTIFIED, Verdict.UNKNOWN)
    print(
        f"verdict {certificate.verdict}, margin {certificate.margin:.4f}, {taken[0]:.1f} s, peak memory {peak:.2f} "
        f"GiB, note {certificate.note!r}"
    )


if __name__ == "__main__":
    main()
