"""Training by a recipe, the same for every training method.

A model that is kept is its weights as ONNX and the card that describes them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flowverify.data import Dataset
from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network import Network
from flowverify.training.losses import BatchLoss, build_loss
from flowverify.training.recipe import RECIPES, Recipe, build_network, read_recipe
from flowverify.training.session import EpochReport, Session, accuracy, load_splits
from flowverify.zoo import Card, check_model_name, save_model


@dataclass(frozen=True)
class TrainingResult:
    """The network after the last epoch (no epoch is selected by its test accuracy) and all reports."""

    recipe: Recipe
    network: Network
    history: tuple[EpochReport, ...]


def train(
    recipe: Recipe,
    data_dir: str | Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    *,
    device: str | torch.device = "cpu",
    threads: int = 1,
    batch_loss: BatchLoss | None = None,
    network: Network | None = None,
    checkpoint: str | Path | None = None,
    metrics: str | Path | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> TrainingResult:
    """Trains a network by a recipe.

    On the CPU of one machine the weights are a function of the recipe and ``threads`` alone, bit for bit,
    however often the training was interrupted and gone on with. Torch's global random state and number of
    threads are as before afterwards.

    Args:
        data_dir: see :func:`flowverify.data.load_dataset`.
        on_epoch: called with the report of each epoch that is trained now.
        threads: of torch during the training; sums are rounded differently for another number.
        batch_loss: replaces the recipe's loss.
        network: a copy of it is trained, instead of a new one of the recipe's architecture: any network that
            :func:`flowverify.network.load_network` converts.
        checkpoint: a file, replaced after each epoch; where it is there, the training goes on from it.
        metrics: a file of JSON lines, the reports of all epochs so far.
        on_step: called with the epoch (from 1), the steps done in it and their number.

    Raises:
        UnknownNameError: a name in the recipe is unknown.
        InvalidInputError: the device is not there, the loss became infinite or NaN, the network does not fit
            the data, or the checkpoint is that of another recipe or of other data.
        ModelFileError: the checkpoint cannot be read or written.
        DataError: see :func:`flowverify.training.session.load_splits`.
    """
    target = _check_device(device)
    loss = batch_loss if batch_loss is not None else build_loss(recipe.loss, recipe.loss_options)
    training, test = load_splits(recipe.dataset, data_dir, validation=recipe.validation)
    classes = int(max(training.labels.max(), test.labels.max())) + 1
    digest = training_digest(training) if checkpoint is not None else ""
    saved = None if checkpoint is None else load_checkpoint(Path(checkpoint), recipe, digest)
    with _isolated(recipe.seed, threads):
        if network is None:
            own = build_network(recipe.architecture, training.input_shape, classes, recipe.hidden)
        else:
            own = _check_network(network, training.input_shape, classes)
        session = Session(recipe, own.to(target), training, test, loss)
        if saved is not None:
            session.restore(saved)
        while len(session.history) < recipe.epochs:
            report = session.epoch(None if on_step is None else partial(on_step, len(session.history) + 1))
            if checkpoint is not None:
                save_checkpoint(Path(checkpoint), recipe, digest, session.state())
            if metrics is not None:
                write_metrics(Path(metrics), session.history)
            if on_epoch is not None:
                on_epoch(report)
    return TrainingResult(recipe, own.cpu().requires_grad_(False), tuple(session.history))


def training_digest(data: Dataset) -> str:
    """SHA-256 of the pixels (float32, little-endian) and the labels (int64)."""
    digest = hashlib.sha256(data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _check_network(network: Network, input_shape: tuple[int, int, int], classes: int) -> Network:
    if network.input_shape != input_shape or network.num_classes < classes:
        raise InvalidInputError(
            f"network from {network.input_shape} to {network.num_classes} classes: expected from {input_shape} to at "
            f"least {classes}, as the data"
        )
    return copy.deepcopy(network)


def _check_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.zeros(1, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"device {str(device)!r}: {reason}, expected cpu or a cuda device") from error
    return target


@contextmanager
def _isolated(seed: int, threads: int) -> Iterator[None]:
    """Seeds torch and sets its threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


FORMAT = 1


def save_checkpoint(path: Path, recipe: Recipe, training_data: str, state: Mapping[str, Any]) -> None:
    """Replaces the file in one step, so that an interruption leaves the last one whole.

    Args:
        training_data: a digest of what the network is trained on.
        state: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        ModelFileError: the folder cannot be written to.
    """
    content = {"format": FORMAT, "recipe": recipe.to_dict(), "training_data": training_data, "state": dict(state)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            part = Path(scratch) / path.name
            torch.save(content, part)
            part.replace(path)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"{path}: cannot be written ({error}), expected a writable folder") from error


def load_checkpoint(path: Path, recipe: Recipe, training_data: str) -> dict[str, Any] | None:
    """The state saved for this recipe and these training images; None where there is no file.

    Raises:
        ModelFileError: not a checkpoint.
        InvalidInputError: the checkpoint of another recipe, or of other training images.
    """
    if not path.exists():
        return None
    advice = "expected a checkpoint of this training (remove it to start afresh)"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content["format"] != FORMAT:
            raise ModelFileError(f"{path}: another format, {advice}")
        saved, data, state = content["recipe"], content["training_data"], content["state"]
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"{path}: cannot be read ({reason}), {advice}") from error
    given = recipe.to_dict()
    for key in given:
        if saved.get(key) != given[key]:
            raise InvalidInputError(f"{path}: saved with {key} {saved.get(key)!r}, given {given[key]!r}, {advice}")
    if data != training_data:
        raise InvalidInputError(f"{path}: saved with other training images, {advice}")
    return dict(state)


def write_metrics(path: Path, reports: Sequence[Any]) -> None:
    """One JSON object a line for each report, replacing the file in one step.

    Raises:
        ModelFileError: the folder cannot be written to.
    """
    text = "".join(json.dumps(dataclasses.asdict(report)) + "\n" for report in reports)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}-{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written ({error}), expected a writable folder") from error


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
    validation: bool = False,
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
        validation: as the recipe's field, where that does not say so already.
        on_epoch, on_step: see :func:`flowverify.training.train`.

    Raises:
        UnknownNameError: no recipe has this name.
        InvalidInputError: see :func:`flowverify.training.train`.
        DataError: see :func:`flowverify.training.session.load_splits`.
        ModelFileError: ``out_dir`` cannot be written to, or the checkpoint in it cannot be read.
    """
    shipped = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    chosen = replace(shipped, seed=shipped.seed if seed is None else seed, validation=validation or shipped.validation)
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
    training, test = load_splits(chosen.dataset, data_dir, validation=chosen.validation)
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
    validation = " --validation" if chosen.validation and not shipped.validation else ""
    return f"flowverify train --recipe {source}{seed}{validation}"


def _describe(recipe: Recipe) -> str:
    hidden = f" with {'-'.join(map(str, recipe.hidden))} hidden units" if recipe.hidden else ""
    return f"{recipe.architecture} network{hidden} for {recipe.dataset}, trained with {recipe.loss}"
