"""What proving rounding costs in certified radius: the same searches with the allowance and with none.

python -m benchmarks.rounding_price [--images 10]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header
from flowverify.ball import Threat
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.incomplete import Certifier, search_radius

CASES = (
    ("digits-fc3", "fine-tuned", "best"), ("digits-certified", "fine-tuned", "best"),
    ("mnist-linear", "linear", "best"), ("mnist-fc3", "vanilla", "crown"), ("mnist-fc3", "fine-tuned", "best"),
    ("mnist-certified", "fine-tuned", "ibp"), ("mnist-cnn", "fine-tuned", "crown-ibp"),
)  # fmt: skip
TOLERANCE = 1e-5  # of the searches: below what is measured for by far


def radii(certifier: BaseCertifier, images: Tensor, labels: Tensor) -> Tensor:
    if isinstance(certifier, Certifier):
        found = search_radius(certifier, images, labels, tolerance=TOLERANCE)
    else:
        found = certifier.search(images, labels)
    return torch.tensor([one.radius for one in found], dtype=torch.float64)


def free(certifier: BaseCertifier) -> None:
    """Takes its allowances away."""

    def allowance(images: Tensor, budget: Tensor | float | None = None) -> Tensor:
        return torch.zeros(len(images), dtype=torch.float64)

    certifier.allowance = allowance  # type: ignore[method-assign]
    if isinstance(certifier, Certifier):
        made = certifier.engine

        def engine(threat: Threat, dtype: torch.dtype = torch.float64) -> MarginBounds:
            found = made(threat, dtype)
            found.terms = None
            return found

        certifier.engine = engine  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10)
    count = parser.parse_args().images
    header(f"Certified radii with and without an allowance for rounding, first {count} test images")
    print("| model | method, bound | median with | without | relative | most, of an image | allowance / margin |")
    for name, method, bound in CASES:
        data = fv.load_dataset(name.split("-")[0])[0 : min(count, 2) if name == "mnist-cnn" else count]
        certifier = fv.make_certifier(fv.load_model(name), method, bound)
        images = data.images.double()
        logits = certifier.precise(images)
        top = logits.topk(2, 1).values
        share = certifier.allowance(images) / (top[:, 0] - top[:, 1])
        proven = radii(certifier, images, data.labels)
        free(certifier)
        trusted = radii(certifier, images, data.labels)
        lost = 1 - proven[trusted > 0] / trusted[trusted > 0]
        print(
            f"| {name} | {method}, {bound} | {proven.median():.6f} | {trusted.median():.6f} | "
            f"{1 - float(proven.median() / trusted.median()):.1e} | {lost.max():.1e} | {share.median():.1e} |"
        )


if __name__ == "__main__":
    main()
