"""Marabou's verdicts between fine-tuned certificates and attacks: none may contradict either.

    python -m benchmarks.marabou_against_certificates [--images 10] [--encoding cuts] [--model mnist-fc3 --images 1]

For digits-fc3 five radii an image: 0.9 times the certified one, three in between, 1.05 times that of the attack. For
another model 0.9 and 1 times the certified radius, then 1.02, 1.05 and 1.1 times that of the attack. Exits with 1 if
something below a certificate is falsified, or above an attack's radius certified.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import flowverify as fv
from benchmarks.common import header
from flowverify.attack import make_attack
from flowverify.certifiers.options import MARABOU_ENCODINGS
from flowverify.export.marabou import MarabouCertifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits-fc3")
    parser.add_argument("--images", type=int, default=10, help="so many of those that are classified right")
    parser.add_argument("--first", type=int, default=0, help="test image to begin with")
    parser.add_argument("--encoding", default="cuts", choices=MARABOU_ENCODINGS)
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    network = fv.load_model(options.model)
    every = fv.load_dataset(options.model.split("-")[0])[options.first :]
    right = (network(every.images).argmax(1) == every.labels).nonzero().flatten()[: options.images]
    data, places = every[right], (right + options.first).tolist()
    header(f"Marabou on {options.model}: {options.images} images, encoding {options.encoding}")
    certified = fv.certified_radius(network, data.images, data.labels, bound="best").tolist()
    attacked = make_attack("minimal", network, effort="normal").minimise(data.images, data.labels, "l1").radius.tolist()
    engine = MarabouCertifier(network, encoding=options.encoding, timeout=options.timeout)
    contradictions, counts, start = 0, Counter[str](), time.perf_counter()
    for k, (low, high) in enumerate(zip(certified, attacked, strict=True)):
        if low == 0:
            print(f"image {places[k]}: nothing certified")
            continue
        if options.model == "digits-fc3":
            radii = [0.9 * low, *(low + (high - low) * part for part in (0.25, 0.5, 0.75)), 1.05 * high]
        else:
            radii = [0.9 * low, low, 1.02 * high, 1.05 * high, 1.1 * high]
        words = []
        for radius in radii:
            ball = fv.WassersteinBall(radius)
            found = engine.certify(data.images[k : k + 1], data.labels[k : k + 1], ball)[0]
            wrong = found.verdict == ("falsified" if radius <= low else "certified" if radius >= high else "")
            contradictions += wrong
            counts[str(found.verdict)] += 1
            words.append(f"{radius:.4f} {found.verdict} {found.seconds:.1f} s" + (" CONTRADICTION" if wrong else ""))
        print(f"image {places[k]}: certified {low:.4f}, attack {high:.4f}; Marabou: {', '.join(words)}", flush=True)
    engine.close()
    total = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    print(f"{total}; contradictions: {contradictions}; {time.perf_counter() - start:.0f} s")
    sys.exit(1 if contradictions else 0)


if __name__ == "__main__":
    main()
