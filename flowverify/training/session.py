"""One training in progress: the weights, all that decides how they go on, and the epochs so far.

What a recipe trains on, and the images that its clean accuracy is measured on: never the same ones.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.data import HELD_OUT, VALIDATION, Dataset, is_whole, load_dataset, without_validation
from flowverify.errors import DataError, InvalidInputError
from flowverify.network import Network
from flowverify.registry import DATASETS
from flowverify.training.losses import BatchContext, BatchLoss, StatefulLoss
from flowverify.training.recipe import Recipe


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
