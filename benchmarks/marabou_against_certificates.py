"""Marabou's verdicts on exported networks, between our certificates and replayed images.

    python -m benchmarks.marabou_against_certificates [--images 10] [--mnist]

By default digits-fc3 at five radii. With --mnist one image of mnist-fc3: at 0.9 times its CROWN radius, and where
Marabou finds a counterexample. A verdict that contradicts a certificate (falsified at or below it) is counted.
"""

from __future__ import annotations

import argparse
import time

import flowverify as fv
from benchmarks.common import header
from flowverify.export.marabou import MarabouCertifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--mnist", action="store_true")
    parser.add_argument("--encoding", default="linear", choices=["linear", "outputs", "penalty"])
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    name = "mnist-fc3" if options.mnist else "digits-fc3"
    count = 1 if options.mnist else options.images
    factors = (0.9, 6.0) if options.mnist else (0.5, 0.9, 1.5, 3.0, 6.0)
    network, data = fv.load_model(name), fv.load_dataset(name.split("-")[0])[:count]
    header(
        f"Marabou on {name}: {count} images at {', '.join(map(str, factors))} times the CROWN radius, "
        f"{options.encoding}"
    )
    radii = fv.certified_radius(network, data.images, data.labels, bound="crown").tolist()
    engine = MarabouCertifier(network, encoding=options.encoding, timeout=options.timeout)
    contradictions = 0
    for factor in factors:
        found = []
        start = time.perf_counter()
        for image, label, radius in zip(data.images, data.labels, radii, strict=True):
            if radius > 0:
                found += engine.certify(image[None], label[None], fv.WassersteinBall(factor * radius))
        contradictions += sum(one.verdict == "falsified" and factor <= 1 for one in found)
        words = [str(one.verdict) for one in found]
        counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
        reach = ", ".join(f"{one.radius:.4f}" for one in found[:3])
        print(f"{factor:4} x: {counts}; {time.perf_counter() - start:.1f} s; radii {reach} ...", flush=True)
        for one in found:
            if one.note:
                print(f"      {one.verdict}: {one.note}")
    print(f"contradictions with certificates: {contradictions}")
    engine.close()


if __name__ == "__main__":
    main()
