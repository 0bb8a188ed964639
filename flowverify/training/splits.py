"""What a recipe trains on, and the images that its clean accuracy is measured on: never the same ones."""

from __future__ import annotations

from pathlib import Path

import torch

from flowverify.data import HELD_OUT, Dataset, is_npz, load_dataset
from flowverify.errors import DataError

SHARE = 5  # one image in so many of every class is held out


def load_splits(name: str | Path, data_dir: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """The images to train on, and those to measure the accuracy on, whose ``split`` says what they are.

    An ``.npz`` of one's own has no test split: the last fifth of every class is held out (one image at least, of the
    classes that have two), and its ``split`` is ``held-out``.

    Raises:
        DataError: a split is empty, or no class of an ``.npz`` has two images; or see
            :func:`flowverify.data.load_dataset`.
    """
    training = load_dataset(name, "train", data_dir)
    test = training if is_npz(name) else load_dataset(name, "test", data_dir)
    for data in (training, test):
        if not len(data):
            raise DataError(f"{data.name}: no images in the {data.split} split, expected at least one")
    return _hold_out(training) if is_npz(name) else (training, test)


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
