"""The training loop, the same for every training method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.data import Dataset, load_dataset
from flowverify.errors import DataError, InvalidInputError
from flowverify.network import Network
from flowverify.training.architectures import build_architecture
from flowverify.training.losses import BatchContext, BatchLoss, build_loss
from flowverify.training.recipe import Recipe


@dataclass(frozen=True)
class EpochReport:
    """What one epoch measured.

    ``epoch`` counts from 1. ``loss`` and ``train_accuracy`` are means over the epoch's batches while the
    weights moved, so are ``metrics`` (the loss's own); ``test_accuracy`` is that of the clean test images
    after the epoch. Accuracies are shares in [0, 1].
    """

    epoch: int
    epochs: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)


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
) -> TrainingResult:
    """Trains a network by a recipe.

    On the CPU of one machine the weights are a function of the recipe and ``threads`` alone, bit for bit.
    Torch's global random state and number of threads are as before afterwards.

    Args:
        data_dir: see :func:`flowverify.data.load_dataset`.
        on_epoch: called with the report of each epoch.
        threads: of torch during the training; sums are rounded differently for another number.
        batch_loss: replaces the recipe's loss.

    Raises:
        UnknownNameError: a name in the recipe is unknown.
        InvalidInputError: the device is not there, or the loss became infinite or NaN.
        DataError: a split is empty; or see :func:`flowverify.data.load_dataset`.
    """
    target = _check_device(device)
    loss = batch_loss if batch_loss is not None else build_loss(recipe.loss, recipe.loss_options)
    training = load_dataset(recipe.dataset, "train", data_dir)
    test = load_dataset(recipe.dataset, "test", data_dir)
    for data in (training, test):
        if not len(data):
            raise DataError(f"{data.name}: no images in the {data.split} split, expected at least one")
    classes = int(max(training.labels.max(), test.labels.max())) + 1
    with _isolated(recipe.seed, threads):
        layers = build_architecture(recipe.architecture, training.input_shape, classes, recipe.hidden)
        history = _fit(recipe, layers.to(target), training, test, loss, on_epoch)
    network = Network.sequential(training.input_shape, list(layers.cpu().eval()))
    return TrainingResult(recipe, network, history)


def accuracy(model: nn.Module, data: Dataset, batch_size: int = 1000) -> float:
    """The share of ``data`` whose highest score is that of the label, in [0, 1]; 0 for no images."""
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    correct = 0
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            batch = slice(start, start + batch_size)
            correct += _correct(model(data.images[batch].to(place)), data.labels[batch].to(place))
    return correct / max(len(data), 1)


def _fit(
    recipe: Recipe,
    model: nn.Module,
    training: Dataset,
    test: Dataset,
    loss: BatchLoss,
    on_epoch: Callable[[EpochReport], None] | None,
) -> tuple[EpochReport, ...]:
    place = next(model.parameters()).device
    images, labels = training.images.to(place), training.labels.to(place)
    on_device = replace(test, images=test.images.to(place), labels=test.labels.to(place))
    shuffling = torch.Generator().manual_seed(recipe.seed)
    noise = torch.Generator().manual_seed(recipe.seed + 1)
    optimizer = _build_optimizer(recipe, model)
    steps_per_epoch = math.ceil(len(training) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    history: list[EpochReport] = []
    for epoch in range(recipe.epochs):
        sums: defaultdict[str, float] = defaultdict(float)
        order = torch.randperm(len(training), generator=shuffling).to(place)
        for batch in range(steps_per_epoch):
            chosen = order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
            progress = (epoch * steps_per_epoch + batch) / steps
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _scale(recipe.schedule, progress)
            context = BatchContext(epoch, progress, noise)
            outcome = loss(model.train(), images[chosen], labels[chosen], context)
            optimizer.zero_grad()
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sums["loss"] += outcome.loss.item() * len(chosen)
            sums["train_accuracy"] += _correct(outcome.logits, labels[chosen])
            for name, value in outcome.metrics.items():
                sums[name] += value * len(chosen)
        means = {name: total / len(training) for name, total in sums.items()}
        if not math.isfinite(means["loss"]):
            raise InvalidInputError(
                f"recipe {recipe.name}: the loss is {means['loss']} in epoch {epoch + 1} with learning_rate "
                f"{recipe.learning_rate}, expected a finite loss (a lower rate usually helps)"
            )
        report = EpochReport(
            epoch + 1,
            recipe.epochs,
            means.pop("loss"),
            means.pop("train_accuracy"),
            accuracy(model.eval(), on_device),
            means,
        )
        history.append(report)
        if on_epoch is not None:
            on_epoch(report)
    return tuple(history)


def _build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def _scale(schedule: str, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def _correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())


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
