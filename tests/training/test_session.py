"""The images of an accuracy are not those of the training."""

from pathlib import Path

import numpy as np
import pytest
import torch

import flowverify as fv
from flowverify.data import Dataset, load_dataset
from flowverify.errors import DataError
from flowverify.training import Recipe, accuracy, session, train_and_save
from flowverify.training.session import load_splits


def write(path: Path, labels: list[int]) -> Path:
    """Images of noise: what is learned of them is learned by heart."""
    images = np.random.default_rng(0).random((len(labels), 6, 6), dtype=np.float32)
    np.savez(path, images=images, labels=np.array(labels))
    return path


@pytest.mark.parametrize("counts", [(10, 10), (23, 4, 1), (2,), (1, 5, 3)])
def test_the_last_fifth_of_every_class_is_held_out(tmp_path: Path, counts: tuple[int, ...]) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    data = load_dataset(write(tmp_path / "own.npz", labels))
    training, test = load_splits(tmp_path / "own.npz")
    assert len(training) + len(test) == len(data) and (training.split, test.split) == ("train", "held-out")
    for label, count in enumerate(counts):
        kept, held = (part.images[part.labels == label] for part in (training, test))
        assert len(held) == (0 if count == 1 else max(1, count // 5))
        torch.testing.assert_close(torch.cat([kept, held]), data.images[data.labels == label])


def test_data_with_splits_keep_them() -> None:
    training, test = load_splits("digits")
    assert torch.equal(test.images, load_dataset("digits", "test").images) and test.split == "test"
    assert torch.equal(training.images, load_dataset("digits", "train").images)


def test_settings_are_chosen_without_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, split: str = "test", data_dir: Path | None = None) -> Dataset:
        asked.append(split)
        return load_dataset(name, split, data_dir)

    monkeypatch.setattr(session, "load_dataset", load)
    training, validation = load_splits("digits", validation=True)
    assert asked == ["train", "validation"]
    whole = load_dataset("digits", "train")
    assert torch.equal(torch.cat([training.images, validation.images]), whole.images)
    recipe = Recipe("own", "digits", "mlp", epochs=1, hidden=(8,))
    card = train_and_save(recipe, tmp_path, validation=True)
    assert (card.clean_split, card.clean_images) == ("validation", len(validation))
    assert card.recipe["validation"] and card.command == "flowverify train --recipe own --validation"
    assert "test" not in asked


def test_a_folder_without_splits_is_held_out_from(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(5):
            image.new("L", (4, 4), 20 * number + 1).save(tmp_path / label / f"{number}.png")
    training, test = load_splits(tmp_path)
    assert (len(training), len(test), test.split) == (8, 2, "held-out")


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="own: 3 images of as many classes, expected two of some class"):
        load_splits(write(tmp_path / "own.npz", [0, 1, 2]))


def test_accuracy_on_the_card_is_not_that_of_the_training(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz", [0, 1, 2, 3] * 25)
    recipe = Recipe("own", str(path), "mlp", epochs=60, batch_size=20, learning_rate=1e-2, hidden=(64,))
    card = train_and_save(recipe, tmp_path)
    network = fv.load_model(tmp_path / card.file)
    training, test = load_splits(path)
    assert accuracy(network, training) > 0.9  # by heart
    assert card.clean_accuracy == accuracy(network, test) < 0.6
    assert (card.clean_images, card.clean_split) == (20, "held-out")
