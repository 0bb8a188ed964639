"""Data sets of Hugging Face by name: with a stand-in for the library, and with the library itself where it is there."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flowverify.data import is_whole, load_dataset
from flowverify.errors import DataError, DependencyError, InvalidInputError
from flowverify.training.loop import load_splits

pictures = pytest.importorskip("PIL.Image")
LEVELS = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
CLASSES = [1, 0, 1, 0]


class Image: ...


class ClassLabel: ...


class Value: ...


class Table:
    """What ``datasets.load_dataset`` returns: features by name, and rows as dictionaries."""

    def __init__(self, columns: dict[str, tuple[object, list[Any]]]) -> None:
        self.columns = columns
        self.features = {name: kind for name, (kind, _) in columns.items()}

    def select_columns(self, names: list[str]) -> "Table":
        return Table({name: self.columns[name] for name in names})

    def __iter__(self) -> Any:
        values = [values for _, values in self.columns.values()]
        return (dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True))


def table(mode: str = "RGB", **more: tuple[object, list[Any]]) -> Table:
    images = [pictures.fromarray(one).convert(mode) for one in LEVELS]
    return Table({"idx": (Value(), [0, 1, 2, 3]), "img": (Image(), images), "answer": (ClassLabel(), CLASSES), **more})


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Table]:
    """The data sets that the stand-in knows, by path and split."""
    known: dict[tuple[str, str], Table] = {}
    module: Any = ModuleType("datasets")
    module.Image, module.ClassLabel = Image, ClassLabel
    module.load_dataset = lambda path, split: known[path, split]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_columns_are_found_by_their_types(library: dict[tuple[str, str], Table]) -> None:
    library["owner/name", "test"] = library["plain", "validation"] = table()
    for name in ("hf:owner/name", "hf:owner/name:test", "hf:plain:validation"):
        data = load_dataset(name)
        torch.testing.assert_close(data.images, torch.from_numpy(LEVELS).permute(0, 3, 1, 2) / 255)
        assert data.labels.tolist() == CLASSES
    assert (data.name, data.split) == ("hf:plain", "validation")
    library["grey", "train"] = table("L")
    assert load_dataset("hf:grey", "train").input_shape == (1, 2, 3)


def test_one_of_several_columns_is_named(library: dict[tuple[str, str], Table]) -> None:
    library["two", "test"] = table(coarse=(ClassLabel(), [0, 0, 1, 1]))
    with pytest.raises(
        DataError, match=r"columns answer, coarse hold labels .*expected one to be named: hf:OWNER/NAME"
    ):
        load_dataset("hf:two")
    assert load_dataset("hf:two::coarse").labels.tolist() == [0, 0, 1, 1]
    assert load_dataset("hf:two:test:answer,img").labels.tolist() == CLASSES
    with pytest.raises(DataError, match="no column 'fine', expected one of idx, img, answer, coarse"):
        load_dataset("hf:two:test:fine")


def test_what_is_refused(library: dict[tuple[str, str], Table]) -> None:
    library["words", "test"] = Table({"text": (Value(), ["a"]), "label": (ClassLabel(), [0])})
    with pytest.raises(DataError, match="hf:words: columns text, label, expected one that holds images of type Image"):
        load_dataset("hf:words")
    with pytest.raises(DataError, match=r"hf:words: split 'train' cannot be loaded \(KeyError"):
        load_dataset("hf:words", "train")
    library["palette", "test"] = table("P")
    with pytest.raises(DataError, match="mode P, whose pixels are places in a palette"):
        load_dataset("hf:palette")
    library["unlabelled", "test"] = Table(table().columns | {"answer": (ClassLabel(), [-1] * 4)})
    with pytest.raises(DataError, match="labels go down to -1"):
        load_dataset("hf:unlabelled")
    for name in ("hf:", "hf:a/b/c", "hf:a b", "hf:a:b:"):
        with pytest.raises(InvalidInputError, match=r"expected hf:OWNER/NAME\[:SPLIT"):
            load_dataset(name)


def test_a_name_with_its_split_has_no_other(library: dict[tuple[str, str], Table]) -> None:
    library["o/n", "train"], library["o/n", "test"] = table(), table()
    assert [part.split for part in load_splits("hf:o/n")] == ["train", "test"]
    assert [part.split for part in load_splits("hf:o/n:train")] == ["train", "held-out"]
    assert is_whole("hf:o/n:train") and not is_whole("hf:o/n")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"needs datasets: pip install 'flowverify\[huggingface\]'"):
        load_dataset("hf:owner/name")


def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of images by class, which it reads as one of its own data sets, with the types of the columns."""
    pytest.importorskip("datasets")
    folder = tmp_path / "owner" / "name" / "test"
    for k, label in enumerate(CLASSES):
        (folder / "ab"[label]).mkdir(parents=True, exist_ok=True)
        pictures.fromarray(LEVELS[k]).save(folder / "ab"[label] / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    data = load_dataset("hf:owner/name")
    in_order = torch.from_numpy(LEVELS[[1, 3, 0, 2]])
    torch.testing.assert_close(data.images, in_order.permute(0, 3, 1, 2) / 255)
    assert data.labels.tolist() == [0, 0, 1, 1]
