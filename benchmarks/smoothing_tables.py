"""Tables 1 and 2 of Levine & Feizi 2020: accuracy and median certified robustness of smoothing, by sigma.

    python -m benchmarks.smoothing_tables [--sigmas 0.005,0.01,0.02] [--noises wasserstein,laplace] [--images 500]
                                          [--n 10000] [--cache FOLDER] [--epochs 40] [--paper-training]
    python -m benchmarks.smoothing_tables --table 2 --models 0.0001=NET.onnx,0.0002=NET2.onnx [--dataset FILE.npz]

The paper trains one network for each sigma. For Table 1 the shipped ones are used where they were trained with the
sigma; others are trained here by the same recipe with fewer epochs (--epochs; --paper-training: 200 at 0.001), and
kept in --cache (by default a temporary folder) with the counts, so that a second call goes on. Table 2 takes the base
classifiers of --models: there are no CIFAR-10 training images among our data, so none is shipped, and only 100 test
images of it are.

Images are every 20th of the test set (--images 10000: all). Radii are medians for the l2 ground cost, from the
same samples for both certificates; N/A: more than half of the images have another class.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
from torch import nn

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.data import Dataset
from flowverify.smoothing import Noise, SmoothedClassifier, wasserstein_radius
from flowverify.smoothing.classifier import BOUND, PREDICT, SELECT
from flowverify.smoothing.noise import top_two_p_values, upper_bound_of_failure
from flowverify.training import find_recipe, train

# Of the paper: accuracy, percent abstained, median certified robustness (None: N/A), base accuracy.
PAPER = {
    "wasserstein": {
        0.005: (98.71, 0.04, 0.0101, 97.94), 0.01: (97.98, 0.19, 0.0132, 94.95), 0.02: (93.99, 0.58, 0.0095, 79.72),
        0.05: (74.22, 3.95, 0.0, 43.67), 0.1: (49.41, 1.29, 0.0, 30.26), 0.2: (31.80, 8.40, None, 25.13),
        0.5: (22.58, 0.84, None, 22.67),
    },
    "laplace": {
        0.005: (98.87, 0.06, 0.0062, 97.47), 0.01: (97.44, 0.19, 0.0053, 89.32), 0.02: (91.11, 1.29, 0.0030, 67.08),
        0.05: (61.44, 7.45, 0.0, 33.80), 0.1: (34.92, 9.36, None, 25.56), 0.2: (24.02, 5.67, None, 22.85),
        0.5: (22.57, 1.05, None, 22.70),
    },
}  # fmt: skip
PAPER_COLOUR = {
    0.00005: (87.01, 0.24, 0.000101, 86.02), 0.0001: (83.39, 0.42, 0.000179, 82.08),
    0.0002: (77.57, 0.66, 0.000223, 75.46), 0.0005: (68.75, 1.01, 0.000209, 65.12),
    0.001: (61.65, 1.77, 0.000127, 57.03),
}  # fmt: skip
KINDS = {"wasserstein": ("flow", "laplace"), "laplace": ("pixels", "laplace"), "uniform": ("flow", "uniform")}
RECIPES = {"wasserstein": "mnist-smooth", "laplace": "mnist-laplace", "uniform": "mnist-smooth"}
PEAK = 0.01  # learning rate of short trainings, with a cosine schedule


def base_classifier(kind: str, sigma: float, options: argparse.Namespace) -> tuple[nn.Module, str]:
    """A network trained with this noise, and how it was trained."""
    recipe, name = find_recipe(RECIPES[kind]), RECIPES[kind]
    if kind != "uniform" and sigma == recipe.loss_options["sigma"] and not options.paper_training:
        return fv.load_model(name), "shipped"
    loss = {"wasserstein": "wasserstein-noise", "laplace": "laplace-noise", "uniform": "uniform-noise"}[kind]
    recipe = replace(recipe, name=f"{kind}-{sigma:g}", loss=loss, loss_options={"sigma": sigma})
    if options.paper_training:
        recipe = replace(recipe, epochs=200, learning_rate=1e-3, schedule="constant")
    else:
        recipe = replace(recipe, epochs=options.epochs, learning_rate=PEAK, schedule="cosine")
    checkpoint = options.cache / f"{recipe.name}-{recipe.epochs}.pt"
    print(f"training {recipe.name}, {recipe.epochs} epochs ...", flush=True)
    return train(recipe, checkpoint=checkpoint).network, f"{recipe.epochs} epochs"


def counts_of(
    network: nn.Module, noise: Noise, data: Dataset, positions: list[int], options: argparse.Namespace, tag: str
) -> list[dict[str, list[int]]]:
    """Counts of the classes for each image and stage; kept in a file, image by image."""
    path = options.cache / f"{tag}-{options.n}-{options.seed}.jsonl"
    known = {}
    if path.exists():
        lines = path.read_text().split("\n")[:-1]
        known = {record["index"]: record for record in map(json.loads, lines)}
    sampler = SmoothedClassifier(network, noise, seed=options.seed).sampler
    plan = ((SELECT, options.n0), (BOUND, options.n), (PREDICT, options.n))
    with path.open("a") as file:
        for position in positions:
            if position not in known:
                image = data.images[position : position + 1]
                drawn = {str(stage): sampler.counts(image, n, stage, [position])[0].tolist() for stage, n in plan}
                known[position] = {"index": position, "label": int(data.labels[position]), **drawn}
                file.write(json.dumps(known[position]) + "\n")
                file.flush()
    return [known[position] for position in positions]


def row(records: list[dict[str, list[int]]], noise: Noise, options: argparse.Namespace) -> list[str]:
    """Accuracy (abstained), base accuracy, and the median radius by each certificate."""
    labels = np.array([record["label"] for record in records])
    select, bound, predict = (
        np.array([record[str(stage)] for record in records]) for stage in (SELECT, BOUND, PREDICT)
    )
    order = np.sort(predict, axis=1)[:, ::-1]
    settled = top_two_p_values(order[:, 0], order[:, 1]) <= options.alpha
    accuracy = 100 * np.mean(settled & (predict.argmax(1) == labels))
    base = 100 * np.mean(predict[np.arange(len(labels)), labels] / options.n)
    guess = select.argmax(1)
    failure = upper_bound_of_failure(bound[np.arange(len(labels)), guess], options.n, options.alpha)
    cells = [f"{accuracy:.2f} ({100 * np.mean(~settled):.2f})", f"{base:.2f}"]
    for certificate in ("paper", "tight"):
        if certificate == "paper" and noise.distribution != "laplace":
            cells.append("")
            continue
        radii = wasserstein_radius(noise, failure, certificate, "l2")
        right = np.sort(radii[guess == labels])[::-1]
        needed = (len(labels) + 1) // 2
        cells.append("N/A" if len(right) < needed else f"{right[needed - 1]:.4g}")
    return cells


def measure(
    title: str, rows: list[tuple[str, Noise, Callable[[], tuple[nn.Module, str]], tuple[float, ...] | None]],
    data: Dataset, options: argparse.Namespace,
) -> None:  # fmt: skip
    step = max(1, len(data) // options.images)
    positions = list(range(0, len(data), step))[: options.images]
    header(f"{title}: {len(positions)} test images, n0 {options.n0}, n {options.n}, alpha {options.alpha}")
    print("| noise, sigma | base classifier | accuracy (abstained) | base accuracy | radius, their certificate | "
          "radius, tight | paper: accuracy (abstained), base, radius | minutes |")  # fmt: skip
    print("| --- " * 8 + "|", flush=True)
    for name, noise, make, paper in rows:
        network, how = make()
        with stopwatch() as taken:
            tag = f"{'-'.join(name.split())}-{how.replace(' ', '-')}"
            cells = row(counts_of(network, noise, data, positions, options, tag), noise, options)
        stated = ""
        if paper is not None:
            radius = "N/A" if paper[2] is None else f"{paper[2]:g}"
            stated = f"{paper[0]:.2f} ({paper[1]:.2f}), {paper[3]:.2f}, {radius}"
        print(f"| {name} | {how} | {' | '.join(cells)} | {stated} | {taken[0] / 60:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=(1, 2), default=1)
    parser.add_argument("--sigmas", default="0.01")
    parser.add_argument("--noises", default="wasserstein,laplace")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--n0", type=int, default=1_000)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--paper-training", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "flowverify-smoothing")
    parser.add_argument("--models", default="", help="of Table 2: SIGMA=FILE.onnx, separated by commas")
    parser.add_argument("--dataset", default="cifar10-sample", help="of Table 2")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if options.table == 1:
        pairs = [(kind, float(sigma)) for sigma in options.sigmas.split(",") for kind in options.noises.split(",")]
        measure(
            "Table 1, MNIST",
            [
                (
                    f"{kind} {sigma:g}",
                    Noise(sigma, *KINDS[kind]),
                    lambda kind=kind, sigma=sigma: base_classifier(kind, sigma, options),
                    PAPER.get(kind, {}).get(sigma),
                )
                for kind, sigma in pairs
            ],
            fv.load_dataset("mnist"),
            options,
        )
        return
    data = fv.load_dataset(options.dataset)
    given = dict(pair.split("=", 1) for pair in options.models.split(",") if pair)
    if not given:
        print("Table 2, CIFAR-10: no base classifier given (--models); the paper's numbers are:")
        for sigma, paper in PAPER_COLOUR.items():
            print(f"sigma {sigma:g}: accuracy {paper[0]} ({paper[1]}), base {paper[3]}, radius {paper[2]:g}")
        return
    measure(
        "Table 2, CIFAR-10",
        [
            (
                f"wasserstein {float(sigma):g}",
                Noise(float(sigma)),
                lambda path=path: (fv.load_model(path, data.input_shape), Path(path).stem),
                PAPER_COLOUR.get(float(sigma)),
            )
            for sigma, path in given.items()
        ],
        data,
        options,
    )


if __name__ == "__main__":
    main()
