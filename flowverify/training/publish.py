"""Training of a model that is kept: the weights as ONNX and the card that describes them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from flowverify.errors import InvalidInputError
from flowverify.training.loop import train, training_digest
from flowverify.training.recipe import RECIPES, Recipe, read_recipe
from flowverify.training.session import EpochReport, accuracy, load_splits
from flowverify.zoo import Card, check_model_name, save_model

_LICENSE = "Apache-2.0"


def train_and_save(
    recipe: str | Path | Recipe,
    out_dir: str | Path,
    data_dir: str | Path | None = None,
    seed: int | None = None,
    *,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
    device: str | torch.device = "cpu",
) -> Card:
    """Trains a model and writes ``NAME.onnx``, ``NAME.json`` and, as it goes, ``NAME.metrics.jsonl``.

    After each epoch all that the next one needs is in ``NAME.checkpoint.pt``: the same call goes on from
    there. The file is removed when the model is written. On the CPU of one machine, and from the same
    training images (the card has their digest), the ONNX file is the same, byte for byte, each time.

    Args:
        recipe: a recipe, the name of a shipped one, or a file (:func:`flowverify.training.read_recipe`).
        out_dir: created if need be; files of the same name in it are replaced.
        data_dir: see :func:`flowverify.training.session.load_splits`.
        seed: replaces the recipe's.
        on_epoch, on_step: see :func:`flowverify.training.train`.

    Raises:
        UnknownNameError: no recipe has this name.
        InvalidInputError: see :func:`flowverify.training.train`.
        DataError: see :func:`flowverify.training.session.load_splits`.
        ModelFileError: ``out_dir`` cannot be written to, or the checkpoint in it cannot be read.
    """
    shipped = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    chosen = shipped if seed is None else replace(shipped, seed=seed)
    check_model_name(chosen.name)
    _check_writable(out_dir)
    checkpoint = Path(out_dir) / f"{chosen.name}.checkpoint.pt"
    network = train(
        chosen,
        data_dir,
        on_epoch,
        device=device,
        checkpoint=checkpoint,
        metrics=Path(out_dir) / f"{chosen.name}.metrics.jsonl",
        on_step=on_step,
    ).network
    training, test = load_splits(chosen.dataset, data_dir)
    card = save_model(
        network,
        out_dir,
        name=chosen.name,
        description=_describe(chosen),
        architecture=chosen.architecture,
        dataset=chosen.dataset,
        input_shape=test.input_shape,
        classes=network.num_classes,
        clean_accuracy=accuracy(network, test),
        clean_images=len(test),
        clean_split=test.split,
        command=_command(chosen, recipe, shipped),
        seed=chosen.seed,
        recipe=chosen.to_dict(),
        trained_with={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": version("numpy"),
            "machine": platform.machine(),
            "training_data_sha256": training_digest(training),
        },
        license=_LICENSE,
    )
    checkpoint.unlink(missing_ok=True)
    return card


def _check_writable(out_dir: str | Path) -> None:
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise InvalidInputError(f"output folder {out_dir}: is a file, expected a folder")


def _command(chosen: Recipe, given: str | Path | Recipe, shipped: Recipe) -> str:
    seed = "" if chosen.seed == shipped.seed else f" --seed {chosen.seed}"
    source = chosen.name if RECIPES.get(shipped.name) == shipped or isinstance(given, Recipe) else Path(given).name
    return f"flowverify train --recipe {source}{seed}"


def _describe(recipe: Recipe) -> str:
    hidden = f" with {'-'.join(map(str, recipe.hidden))} hidden units" if recipe.hidden else ""
    return f"{recipe.architecture} network{hidden} for {recipe.dataset}, trained with {recipe.loss}"
