"""Certified accuracy against radius, for the shipped models, beside Levine & Feizi and what the data allow.

    python -m benchmarks.training_certified_accuracy [--models mnist-certified,mnist-fc3] [--images 10000]
        [--bound best] [--out results/training] [--figure training.png] [--cards]

Fine-tuned certificates, l1 ground, normalised images. Radii are appended to OUT/MODEL.BOUND.jsonl a chunk at a time,
and a further run goes on from there. Radii of smoothed classifiers and of nearest neighbours are drawn where they lie
in OUT: smoothed-*.jsonl, what `flowverify smooth certify mnist-smooth --index 0:500 --save` writes, and nearest.jsonl
of benchmarks.training_nearest_images. With --cards the cards of the models get the numbers. Convolutional networks take
seconds an image: --models mnist-cnn --images 20, and then all the others; what is in OUT is drawn again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.training import accuracy
from flowverify.zoo import load_card, models_folder, record_certified

# Levine & Feizi 2020, Table 1: sigma, clean accuracy, median certified radius (l2 ground; sqrt 2 times that for l1).
PAPER = ((0.005, 0.9871, 0.0101), (0.01, 0.9798, 0.0132), (0.02, 0.9399, 0.0095))
RADII = (0.1, 0.2, 0.3, 0.4, 0.5)
CHUNK = 100


def certified_radii(model: str, count: int, bound: str, out: Path) -> Tensor:
    """Radii of the first images of the test split, at least ``count``; 0 where misclassified."""
    path = out / f"{model}.{bound}.jsonl"
    card, network = load_card(model), fv.load_model(model)
    data = fv.load_dataset(card.dataset)[:count]
    radii: list[float] = []
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if lines and lines[0]["model"] != card.sha256:
            path.unlink()
        else:
            radii = [line["radius"] for line in lines]
    if len(radii) < len(data):
        certifier = Certifier(network, "fine-tuned", bound)
        certifier.prepare()
    for start in range(len(radii), len(data), CHUNK):
        part = data[start : start + CHUNK]
        found = search_radius(certifier, part.images, part.labels)
        with path.open("a") as file:
            for index, certificate in enumerate(found, start):
                line = {"index": index, "label": certificate.label, "radius": certificate.radius, "model": card.sha256}
                file.write(json.dumps(line) + "\n")
        radii += [certificate.radius for certificate in found]
    return torch.tensor(radii, dtype=torch.float64)


def summary(radii: Tensor) -> str:
    shares = " | ".join(f"{float((radii >= radius).double().mean()):.4f}" for radius in RADII)
    return f"{float((radii > 0).double().mean()):.4f} | {float(radii.quantile(0.5)):.4f} | {shares}"


def read(path: Path, key: str = "radius") -> Tensor:
    """The numbers of a file of JSON lines; 0 where there is a verdict, and it is not "certified"."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line[key] if line.get("verdict", "certified") == "certified" else 0.0 for line in lines]
    return torch.tensor(kept, dtype=torch.float64)


def draw(curves: dict[str, Tensor], figure: Path) -> None:
    from matplotlib import pyplot

    pyplot.figure(figsize=(7, 4.5))
    for name, radii in curves.items():
        ordered = radii.sort().values
        share = 1 - torch.arange(len(ordered)) / len(ordered)
        style = ":" if name.startswith("limit") else "--" if "neighbour" in name else "-"
        pyplot.step(ordered, share, style, where="pre", label=f"{name} ({len(radii):,} images)")
    for sigma, clean, median in PAPER:
        label = "Levine & Feizi, Table 1: clean, median" if sigma == PAPER[0][0] else None
        pyplot.plot([0, median * 2**0.5], [clean, 0.5], "k.-", linewidth=0.7, label=label)
    pyplot.xlim(0, 0.8)
    pyplot.ylim(0, 1)
    pyplot.xlabel("radius (pixels; W1, l1)")
    pyplot.ylabel("certified accuracy")
    pyplot.legend(fontsize=7)
    pyplot.grid(alpha=0.3)
    pyplot.tight_layout()
    pyplot.savefig(figure, dpi=110)
    print(f"wrote {figure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mnist-certified,mnist-certified-wide,mnist-adversarial,mnist-fc3")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--bound", default="best")
    parser.add_argument("--out", type=Path, default=Path("results/training"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--cards", action="store_true")
    options = parser.parse_args()
    header(f"Certified accuracy, fine-tuned, bound {options.bound}, l1 ground")
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Tensor] = {}
    print(f"model | images | above 0 | median radius | {' | '.join(f'at {radius}' for radius in RADII)}")
    for model in options.models.split(","):
        with stopwatch() as taken:
            radii = certified_radii(model, options.images, options.bound, options.out)
        curves[model] = radii
        print(f"{model} | {len(radii)} | {summary(radii)} ({taken[0]:.0f} s)", flush=True)
        if options.cards:
            data = fv.load_dataset(load_card(model).dataset)
            record_certified(
                model,
                models_folder(),
                {
                    "method": "fine-tuned",
                    "bound": options.bound,
                    "ground": "l1",
                    "images": len(radii),
                    "clean_accuracy": accuracy(fv.load_model(model), data[: len(radii)]),
                    "median_radius": round(float(radii.quantile(0.5)), 4),
                    "certified_at": {str(radius): float((radii >= radius).double().mean()) for radius in RADII},
                    "command": f"flowverify verify {model} --dataset {load_card(model).dataset} "
                    f"--index 0:{len(radii)} --method fine-tuned --bound {options.bound}",
                },
            )
    for path in sorted(options.out.glob("smoothed-*.jsonl")):
        curves[path.stem] = read(path)
        print(f"{path.stem} | {len(curves[path.stem])} | {summary(curves[path.stem])}")
    if (options.out / "nearest.jsonl").exists():
        same, other = (read(options.out / "nearest.jsonl", key) for key in ("same", "other"))
        curves["1-nearest-neighbour"], curves["limit: half the distance"] = ((other - same) / 2).clamp(min=0), other / 2
        for name in ("1-nearest-neighbour", "limit: half the distance"):
            print(f"{name} | {len(same)} | {summary(curves[name])}")
    for sigma, clean, median in PAPER:
        print(f"Levine & Feizi, sigma {sigma} | 10000 | {clean:.4f} | {median * 2**0.5:.4f} | 0 from radius 0.1 on")
    if options.figure is not None:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
