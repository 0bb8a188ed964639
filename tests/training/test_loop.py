"""The training loop: reproducible, honest in its reports, open to other losses.

The images of an accuracy are not those of the training.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowverify as fv
from flowverify.data import Dataset, load_dataset
from flowverify.errors import DataError, InvalidInputError, UnknownNameError
from flowverify.training import (
    RECIPES,
    BatchContext,
    BatchOutcome,
    EpochReport,
    Recipe,
    accuracy,
    loop,
    train,
    train_and_save,
)
from flowverify.training.loop import load_splits, shifted
from flowverify.zoo import Card

SHORT = replace(RECIPES["digits-fc3"], epochs=2)


def weights(recipe=SHORT, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    return [tensor.detach().clone() for tensor in train(recipe, **options).network.parameters()]


def test_same_seed_gives_the_same_bits() -> None:
    first = weights()
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(), strict=True))


def test_other_seed_gives_other_weights() -> None:
    assert not torch.equal(weights()[0], weights(replace(SHORT, seed=1))[0])


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1}, {"schedule": "constant"}, {}],
    ids=["sgd", "constant", "adam"],
)
def test_every_optimizer_and_schedule_learns(change: dict[str, object]) -> None:
    assert train(replace(SHORT, epochs=4, **change)).history[-1].test_accuracy > 0.85  # type: ignore[arg-type]


def test_leaves_random_state_and_threads_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(replace(SHORT, epochs=1), threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_reports_every_epoch() -> None:
    reports: list[EpochReport] = []
    result = train(SHORT, on_epoch=reports.append)
    assert result.history == tuple(reports) and [report.epoch for report in reports] == [1, 2]
    assert reports[1].loss < reports[0].loss and reports[1].train_accuracy > reports[0].train_accuracy
    assert reports[1].test_accuracy == accuracy(result.network, load_dataset("digits"))


def test_batch_loss_sees_progress_its_own_randomness_and_reports_metrics() -> None:
    """A loss on noisy images whose noise grows: the shape of the noise-augmented recipes."""
    contexts: list[BatchContext] = []
    draws: list[float] = []

    def noisy(model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        noise = torch.randn(images.shape, generator=context.generator)
        contexts.append(context)
        draws.append(float(noise.flatten()[0]))
        logits = model(images + 0.1 * context.progress * noise)
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits, {"scale": context.progress})

    state = torch.get_rng_state()
    result = train(SHORT, batch_loss=noisy)
    first, draws = draws, []
    train(SHORT, batch_loss=noisy)
    assert draws == first and torch.equal(torch.get_rng_state(), state)
    progress = [context.progress for context in contexts[: len(first)]]
    assert progress == [step / len(first) for step in range(len(first))]
    assert {context.epoch for context in contexts} == {0, 1}
    assert 0 < result.history[0].metrics["scale"] < 0.5 < result.history[1].metrics["scale"] < 1


def test_shifted_images_are_moved_and_keep_their_shape() -> None:
    images = torch.zeros(200, 2, 5, 6)
    images[:, :, 2, 3] = torch.tensor([1.0, 2.0])
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and torch.equal(moved.sum((2, 3)), images.sum((2, 3)))
    places = moved[:, 0].flatten(1).argmax(1)
    assert {divmod(int(place), 6) for place in places} == {(r, c) for r in (1, 2, 3) for c in (2, 3, 4)}
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    images = torch.zeros(50, 1, 3, 3)
    images[:, :, 0, 0] = 1.0
    lost = shifted(images, 2, torch.Generator().manual_seed(0)).sum((1, 2, 3))
    assert set(lost.tolist()) == {0.0, 1.0}


def test_shift_changes_the_weights_and_is_reproducible() -> None:
    first, again, plain = (weights(replace(SHORT, epochs=1, shift=shift)) for shift in (1, 1, 0))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], plain[0])


def test_diverging_loss_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match=r"the loss is (nan|inf) in epoch 1 with learning_rate 1e\+30"):
        train(replace(SHORT, optimizer="sgd", learning_rate=1e30))


def test_unknown_device_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="device 'tpu9'"):
        train(SHORT, device="tpu9")


def test_unknown_data_set_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="unknown data set"):
        train(replace(SHORT, dataset="minst"))


def test_npz_without_images_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.npz"
    np.savez(path, images=np.zeros((0, 4, 4), dtype=np.uint8), labels=np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="no images"):
        train(replace(SHORT, dataset=str(path)))


def test_published_file_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "digits-fc3", SHORT)

    def publish(folder: str, seed: int | None = None) -> Card:
        return train_and_save("digits-fc3", tmp_path / folder, seed=seed)

    first = publish("one")
    assert first == publish("two")
    assert first.command == "flowverify train --recipe digits-fc3" and first.seed == 0
    other = publish("three", seed=5)
    assert other.sha256 != first.sha256
    assert other.command == "flowverify train --recipe digits-fc3 --seed 5" and other.recipe["seed"] == 5


def test_publishing_into_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InvalidInputError, match="taken: is a file, expected a folder"):
        train_and_save("digits-fc3", tmp_path / "taken")


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

    monkeypatch.setattr(loop, "load_dataset", load)
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
