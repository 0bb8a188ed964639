"""The same certificate in image and in flow coordinates, and for every reference (theory, section 7).

python -m benchmarks.domains_and_references [--images 20]
"""

from __future__ import annotations

import argparse

import torch

import flowverify as fv
from benchmarks.common import header
from flowverify.ball import Threat
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.transport.references import make_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--radius", type=float, default=0.05)
    options = parser.parse_args()
    data = fv.load_dataset("mnist")[0 : options.images]
    header(f"Margins by domain and by reference: first {options.images} test images, radius {options.radius}")
    mass = data.images.flatten(1).double().sum(1)
    budget = options.radius * mass
    grid = fv.load_model("mnist-fc3").grid
    references = {
        "uniform-random": make_reference("uniform-random", grid, mass, seed=1),
        "point": make_reference("point", grid, mass, seed=1),
        "image": make_reference("image", grid, mass, images=fv.load_dataset("mnist")[100:101].images[0]),
        "flat": make_reference("flat", grid, mass),
    }
    for model in ("mnist-fc3", "mnist-cnn"):
        network, images, labels = fv.load_model(model), data.images, data.labels
        if model == "mnist-cnn":
            images, labels, budget = images[:2], labels[:2], budget[:2] / 5
        for dtype in (torch.float32, torch.float64):
            ball = Threat().ball(images, budget)
            image, flow = (
                MarginBounds(network, Threat(), "crown", dtype=dtype, options=EngineOptions(domain=domain))
                for domain in ("image", "flow")
            )
            expected = image.margins(ball, labels)
            scale = float(expected.abs().max())
            own = flow.margins(ball, labels)
            row = [f"R = mu {float((own - expected).abs().max()) / scale:.1e}"]
            for name, reference in references.items():
                bounds = flow.margins(ball, labels, references=reference[: len(images)])
                row.append(f"{name} {float((bounds - expected).abs().max()) / scale:.1e}")
            print(f"{model:10} {str(dtype)[6:]:8} flow against image domain, relative to {scale:.3g}: {', '.join(row)}")


if __name__ == "__main__":
    main()
