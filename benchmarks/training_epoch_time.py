"""Time of an epoch of certified training over that of a plain one: same network, same batches, in one run.

    python -m benchmarks.training_epoch_time [--recipes mnist-certified] [--epochs 2]

Epochs of the two alternate; the least processor time of each counts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import flowverify as fv
from benchmarks.common import header
from flowverify.network import Network
from flowverify.training import Recipe, build_architecture, read_recipe
from flowverify.training.loop import Session
from flowverify.training.losses import build_loss


def session(recipe: Recipe, training: fv.Dataset, test: fv.Dataset) -> Session:
    torch.manual_seed(recipe.seed)
    layers = build_architecture(recipe.architecture, training.input_shape, 10, recipe.hidden)
    network = Network.sequential(training.input_shape, list(layers))
    return Session(recipe, network, training, test, build_loss(recipe.loss, recipe.loss_options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="mnist-certified,mnist-certified-small")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    header("Epochs of certified and of plain training")
    torch.set_num_threads(1)
    for name in options.recipes.split(","):
        recipe = read_recipe(name)
        training = fv.load_dataset(recipe.dataset, split="train")
        test = fv.load_dataset(recipe.dataset)[:1000]
        plain = replace(recipe, loss="cross-entropy", loss_options={})
        certified, ordinary = session(recipe, training, test), session(plain, training, test)
        # Compiled kernels and the first allocations belong to no epoch.
        for trained in (certified, ordinary):
            session(trained.recipe, training[: 2 * recipe.batch_size], test).epoch()
        taken: dict[str, list[float]] = {"certified": [], "plain": []}
        for _ in range(options.epochs):
            taken["plain"].append(ordinary.epoch().processor_seconds)
            taken["certified"].append(certified.epoch().processor_seconds)
        least = {kind: min(seconds) for kind, seconds in taken.items()}
        print(
            f"{name}: plain {least['plain']:.2f} s, certified {least['certified']:.2f} s an epoch, ratio "
            f"{least['certified'] / least['plain']:.2f} (processor time, {len(training)} images, batches of "
            f"{recipe.batch_size})",
            flush=True,
        )


if __name__ == "__main__":
    main()
