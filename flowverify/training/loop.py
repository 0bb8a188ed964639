"""Training by a recipe, the same for every training method.

One training in progress is the weights, all that decides how they go on, and the epochs so far. What a recipe trains
on, and the images that its clean accuracy is measured on, are never the same ones. A model that is kept is its weights
as ONNX and the card that describes them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.data import HELD_OUT, VALIDATION, Dataset, is_whole, load_dataset, without_validation
from flowverify.errors import DataError, InvalidInputError, ModelFileError
from flowverify.network import Network
from flowverify.registry import DATASETS
from flowverify.training.losses import BatchContext, BatchLoss, StatefulLoss, build_loss
from flowverify.training.recipe import RECIPES, Recipe, build_network, read_recipe
from flowverify.zoo import Card, check_model_name, save_model


@dataclass(frozen=True)
class EpochReport:
    """What one epoch measured.

    ``epoch`` counts from 1. ``loss`` and ``train_accuracy`` are means over the epoch's batches while the
    weights moved, so are ``metrics`` (the loss's own); ``test_accuracy`` is that of the clean images of
    ``test_split`` (``test`` or ``held-out``), on which nothing is trained, after the epoch. Accuracies are shares in
    [0, 1]. ``seconds`` and ``processor_seconds`` are those of the epoch's steps, without the test.
    """

    epoch: int
    epochs: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    test_split: str = "test"


class Session:
    """A training by a recipe, an epoch at a time; torch's global random state must be seeded before."""

    def __init__(self, recipe: Recipe, network: Network, training: Dataset, test: Dataset, loss: BatchLoss) -> None:
        self.recipe, self.network, self.loss = recipe, network.requires_grad_(True), loss
        place = next(network.parameters()).device
        self.images, self.labels = training.images.to(place), training.labels.to(place)
        self.test = replace(test, images=test.images.to(place), labels=test.labels.to(place))
        self.shuffling = torch.Generator().manual_seed(recipe.seed)
        self.noise = torch.Generator().manual_seed(recipe.seed + 1)
        self.optimizer = _build_optimizer(recipe, network)
        self.steps = math.ceil(len(training) / recipe.batch_size)
        self.history: list[EpochReport] = []

    def epoch(self, on_step: Callable[[int, int], None] | None = None) -> EpochReport:
        """Trains for one epoch; ``on_step`` is called with the steps done and their number.

        Raises:
            InvalidInputError: the loss became infinite or NaN.
        """
        recipe, number, count = self.recipe, len(self.history), len(self.images)
        begin, processor = time.perf_counter(), time.process_time()
        sums: defaultdict[str, float] = defaultdict(float)
        order = torch.randperm(count, generator=self.shuffling)
        for step in range(self.steps):
            positions = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            progress = (number * self.steps + step) / (recipe.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate_scale(progress, number)
            context = BatchContext(number, progress, self.noise, positions, count)
            chosen = positions.to(self.images.device)
            images, labels = self.images[chosen], self.labels[chosen]
            if recipe.shift:
                images = shifted(images, recipe.shift, self.noise)
            outcome = self.loss(self.network, images, labels, context)
            self.optimizer.zero_grad()
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            sums["loss"] += outcome.loss.item() * len(chosen)
            sums["train_accuracy"] += correct(outcome.logits, labels)
            for name, value in outcome.metrics.items():
                sums[name] += value * len(chosen)
            if on_step is not None:
                on_step(step + 1, self.steps)
        elapsed, used = time.perf_counter() - begin, time.process_time() - processor
        means = {name: total / count for name, total in sums.items()}
        if not math.isfinite(means["loss"]):
            raise InvalidInputError(
                f"recipe {recipe.name}: the loss is {means['loss']} in epoch {number + 1} with learning_rate "
                f"{recipe.learning_rate}, expected a finite loss (a lower rate usually helps)"
            )
        loss, train_accuracy = means.pop("loss"), means.pop("train_accuracy")
        test_accuracy = accuracy(self.network, self.test)
        report = EpochReport(
            number + 1, recipe.epochs, loss, train_accuracy, test_accuracy, means, elapsed, used, self.test.split
        )
        self.history.append(report)
        return report

    def state(self) -> dict[str, Any]:
        """All that the next epochs depend on, and the reports of the past ones."""
        return {
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, StatefulLoss) else {},
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "shuffling": self.shuffling.get_state(),
                "noise": self.noise.get_state(),
            },
            "history": [asdict(report) for report in self.history],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.loss, StatefulLoss):
            self.loss.load_state_dict(state["loss"])
        random = state["random"]
        torch.set_rng_state(random["torch"])
        if torch.cuda.is_available() and len(random["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(random["cuda"])
        self.shuffling.set_state(random["shuffling"])
        self.noise.set_state(random["noise"])
        self.history = [EpochReport(**values) for values in state["history"]]


def accuracy(model: nn.Module, data: Dataset, batch_size: int = 1000) -> float:
    """The share of ``data`` whose highest score is that of the label, in [0, 1]; 0 for no images."""
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            batch = slice(start, start + batch_size)
            right += correct(model(data.images[batch].to(place)), data.labels[batch].to(place))
    return right / max(len(data), 1)


def correct(logits: Tensor, labels: Tensor) -> int:
    """How many of the highest scores are those of the labels."""
    return int((logits.argmax(dim=1) == labels).sum())


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to ``most`` pixels along each axis, with zeros from outside."""
    count, _, height, width = images.shape
    by = torch.randint(0, 2 * most + 1, (2, count), generator=generator).to(images.device)
    padded = nn.functional.pad(images, (most, most, most, most)).permute(0, 2, 3, 1)
    rows = by[0][:, None] + torch.arange(height, device=images.device)
    columns = by[1][:, None] + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


SHARE = 5  # one image in so many of every class is held out


def load_splits(
    name: str | Path, data_dir: str | Path | None = None, *, validation: bool = False
) -> tuple[Dataset, Dataset]:
    """The images to train on, and those to measure the accuracy on, whose ``split`` says what they are.

    An ``.npz`` of one's own, a folder without splits, or a name that says which split, has no test split: the last
    fifth of every class is held out (one image at least, of the classes that have two), and its ``split`` is
    ``held-out``.

    Args:
        validation: train without the validation split, and measure the accuracy on it; the test split is not looked at.

    Raises:
        DataError: a split is empty, or no class of an ``.npz`` has two images; or see
            :func:`flowverify.data.load_dataset`.
    """
    training = load_dataset(name, "train", data_dir)
    other = VALIDATION if validation else "test"
    test = training if is_whole(name) else load_dataset(name, other, data_dir)
    if validation and name in DATASETS:
        training = without_validation(training)
    for data in (training, test):
        if not len(data):
            raise DataError(f"{data.name}: no images in the {data.split} split, expected at least one")
    return _hold_out(training) if is_whole(name) else (training, test)


def _hold_out(data: Dataset) -> tuple[Dataset, Dataset]:
    held = torch.zeros(len(data), dtype=torch.bool)
    for label in sorted(set(data.labels.tolist())):
        members = (data.labels == label).nonzero().flatten()
        kept = len(members) - max(1, len(members) // SHARE)
        if kept:
            held[members[kept:]] = True
    if not bool(held.any()):
        raise DataError(
            f"{data.name}: {len(data)} images of as many classes, expected two of some class at least: one to train "
            "on, one to measure the accuracy on"
        )
    return data[~held], Dataset(data.images[held], data.labels[held], data.name, HELD_OUT)


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
        DataError: see :func:`flowverify.training.loop.load_splits`.
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
        data_dir: see :func:`flowverify.training.loop.load_splits`.
        seed: replaces the recipe's.
        validation: as the recipe's field, where that does not say so already.
        on_epoch, on_step: see :func:`flowverify.training.train`.

    Raises:
        UnknownNameError: no recipe has this name.
        InvalidInputError: see :func:`flowverify.training.train`.
        DataError: see :func:`flowverify.training.loop.load_splits`.
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
