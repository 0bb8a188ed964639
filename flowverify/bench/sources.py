"""Models and data sets as suites name them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowverify.bench.fields import Fields
from flowverify.bench.tasks import Defaults
from flowverify.data import SPLITS, load_dataset, parse_index
from flowverify.errors import FlowverifyError, InvalidInputError, ModelFileError
from flowverify.registry import DATASETS
from flowverify.zoo import list_models, load_card, load_model

if TYPE_CHECKING:
    from flowverify.data import Dataset
    from flowverify.network import Network


def read_data(fields: Fields, folder: str) -> dict[str, Any]:
    """The values of ``data``: name, split, index, folder of the files; paths are made absolute."""
    name = fields.text("name")
    if name.endswith(".npz"):
        name = str(resolved(name, folder))
    elif name not in DATASETS and not DATASETS.is_outside(name):
        raise fields.wrong("name", name, f"one of {', '.join(DATASETS)} or a path that ends in .npz")
    split = fields.one_of("split", SPLITS, "test")
    index = fields.take("index", ":")
    if isinstance(index, int) and not isinstance(index, bool):
        index = str(index)
    if not isinstance(index, str):
        raise fields.wrong("index", index, "text such as 0:100, :50 or 3,7,9")
    own = fields.text("folder", "")
    fields.finish()
    return {"name": name, "split": split, "index": index, "folder": str(resolved(own, folder)) if own else None}


def read_models(fields: Fields, folder: str, default: Any = ...) -> list[str]:
    """The values of ``models``: names of shipped models, or paths of ONNX files, which are made absolute."""
    return [_model(fields, "models", name, folder) for name in fields.names("models", default=default)]


def read_model(fields: Fields, key: str, folder: str) -> str:
    """The value of a key that names one model, as :func:`read_models` has it."""
    return _model(fields, key, fields.text(key), folder)


def _model(fields: Fields, key: str, name: str, folder: str) -> str:
    if name.endswith(".onnx"):
        path = resolved(name, folder)
        if not path.is_file():
            raise fields.wrong(key, name, "an ONNX file that exists")
        return str(path)
    shipped = [card.name for card in list_models()]
    if name not in shipped:
        raise fields.wrong(key, name, f"one of {', '.join(shipped)} or a path that ends in .onnx")
    return name


def positions_of(fields: Fields, data: Mapping[str, Any], defaults: Defaults) -> tuple[int, ...]:
    """The positions that ``data.index`` selects.

    Raises:
        InvalidInputError, DataError: they are not in the data set, or it cannot be loaded.
    """
    key = repr(sorted((name, value) for name, value in data.items() if name != "index"))
    try:
        if key not in defaults.lengths:
            defaults.lengths[key] = len(dataset(data))
        chosen = tuple(parse_index(data["index"], defaults.lengths[key]))
    except FlowverifyError as error:
        raise type(error)(f"{fields.name('data')}: {error}") from error
    if len(set(chosen)) < len(chosen):
        raise InvalidInputError(f"{fields.name('data')}: index {data['index']!r} selects an image twice")
    return chosen


def dataset(data: Mapping[str, Any]) -> Dataset:
    """The whole data set of these values."""
    return load_dataset(data["name"], data["split"], data["folder"])


def network(model: str, input_shape: tuple[int, int, int]) -> Network:
    """The model of this name or path, for images of this shape (C, H, W)."""
    return load_model(model, input_shape if model.endswith(".onnx") else None)


def digest(model: str) -> str:
    """SHA-256 of the model's file."""
    if model.endswith(".onnx"):
        return hashlib.sha256(Path(model).read_bytes()).hexdigest()
    return load_card(model).sha256


def short(model: str) -> str:
    """The name of a model in tables."""
    return Path(model).stem if model.endswith(".onnx") else model


def short_data(data: Mapping[str, Any]) -> str:
    """The name of a data set in pictures, as long as it takes to tell it from others, such as "mnist test"."""
    whole = data["name"].endswith(".npz")  # whatever the split
    return " ".join(filter(None, [data["name"], None if whole else data["split"], data["folder"]]))


def resolved(path: str, folder: str) -> Path:
    return (Path(folder) / path).resolve()


def check_digest(settings: Mapping[str, Any]) -> None:
    """Raises ModelFileError if the model's file is not the one that the suite was read with."""
    found = digest(settings["model"])
    if found != settings["sha256"]:
        raise ModelFileError(
            f"model {settings['model']}: SHA-256 is {found}, expected {settings['sha256']}, that of the suite's start"
        )
