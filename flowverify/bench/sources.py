"""Models and data sets as suites name them, and what these and tasks are called where people read them.

Tasks have names that are made to be unique, and to be matched by patterns; titles say the same in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from flowverify.bench.statistics import distance_of
from flowverify.bench.tasks import Defaults, Task
from flowverify.data import SPLITS, is_hub, is_whole, load_dataset, parse_index
from flowverify.errors import FlowverifyError, ModelFileError
from flowverify.registry import DATASETS
from flowverify.settings import OneOf, SettingError, Settings, expected, settings, several, unexpected
from flowverify.zoo import list_models, load_model, source_digest

if TYPE_CHECKING:
    from flowverify.data import Dataset
    from flowverify.network import Network


def _data_name(name: str, info: ValidationInfo) -> str:
    if name.endswith(".npz"):
        return str(resolved(name, info.context["folder"])) if info.context else name
    if name not in DATASETS and not is_hub(name) and not DATASETS.is_outside(name):
        raise unexpected(f"one of {', '.join(DATASETS)}, hf:OWNER/NAME or a path that ends in .npz")
    return name


def _data_folder(folder: str | None, info: ValidationInfo) -> str | None:
    return str(resolved(folder, info.context["folder"])) if folder and info.context else folder or None


def _index(index: object) -> object:
    return str(index) if type(index) is int else index


@settings
class Data(Settings):
    """Images of a data set."""

    name: Annotated[str, AfterValidator(_data_name), expected("a name")] = Field(
        description=f"{', '.join(DATASETS)}, hf:OWNER/NAME, or an .npz file relative to the suite."
    )
    split: Annotated[str, OneOf(SPLITS)] = Field("test", description="train, validation (the last of train) or test.")
    index: Annotated[
        str, expected("text such as 0:100, :50 or 3,7,9"), BeforeValidator(_index, json_schema_input_type=str | int)
    ] = Field(":", description="Which images: 0:100, :50, 5 or 3,7,9.")
    folder: Annotated[str | None, AfterValidator(_data_folder), expected("a folder")] = Field(
        None, description="Of the data files, relative to the suite."
    )


def _model(name: str, info: ValidationInfo) -> str:
    if name.endswith(".onnx"):
        path = resolved(name, info.context["folder"]) if info.context else Path(name)
        if not path.is_file():
            raise unexpected("an ONNX file that exists")
        return str(path)
    shipped = [card.name for card in list_models()]
    if name not in shipped:
        raise unexpected(f"one of {', '.join(shipped)} or a path that ends in .onnx")
    return name


Model = Annotated[str, AfterValidator(_model), expected("the name of a model")]
"""A shipped model, or the path of an ONNX file, which is made absolute."""
Models = Annotated[list[Model], several(Model)]


def positions_of(data: Data, defaults: Defaults) -> tuple[int, ...]:
    """The positions that ``data.index`` selects.

    Raises:
        SettingError: they are not in the data set, or it cannot be loaded.
    """
    values = asdict(data)
    key = repr(sorted((name, value) for name, value in values.items() if name != "index"))
    try:
        if key not in defaults.lengths:
            defaults.lengths[key] = len(dataset(values))
        chosen = tuple(parse_index(data.index, defaults.lengths[key]))
    except FlowverifyError as error:
        raise SettingError("data", str(error)) from error
    if len(set(chosen)) < len(chosen):
        raise SettingError("data", f"index {data.index!r} selects an image twice")
    return chosen


def dataset(data: Mapping[str, Any]) -> Dataset:
    """The whole data set of these values."""
    return load_dataset(data["name"], data["split"], data["folder"])


def network(model: str, input_shape: tuple[int, int, int]) -> Network:
    """The model of this name or path, for images of this shape (C, H, W)."""
    return load_model(model, input_shape if model.endswith(".onnx") else None)


def digest(model: str) -> str:
    """SHA-256 of the model's file."""
    found = source_digest(model)
    assert found is not None  # suites name files and shipped models alone
    return found


def short(model: str) -> str:
    """The name of a model in tables."""
    return Path(model).stem if model.endswith(".onnx") else model


def short_data(data: Mapping[str, Any]) -> str:
    """The name of a data set in pictures, as long as it takes to tell it from others, such as "mnist test"."""
    split = None if is_whole(data["name"]) else data["split"]
    return " ".join(filter(None, [data["name"], split, data["folder"]]))


def resolved(path: str, folder: str) -> Path:
    return (Path(folder) / path).resolve()


def check_digest(settings: Mapping[str, Any]) -> None:
    """Raises ModelFileError if the model's file is not the one that the suite was read with."""
    found = digest(settings["model"])
    if found != settings["sha256"]:
        raise ModelFileError(
            f"model {settings['model']}: SHA-256 is {found}, expected {settings['sha256']}, that of the suite's start"
        )


LARGEST, NEAREST = "largest radius", "nearest image"  # what a search is for, of certificates and of attacks


def title_of(task: Task, *, radius: bool = True) -> str:
    """A task in words: its model, its method and bound or attack, the distance, and what was asked.

    Args:
        radius: whether the title says what was asked: a radius, or a search.
    """
    settings = task.settings
    model = short(str(settings.get("model", "")))
    label, found, rest = task.name.partition(f"{task.kind}/{model}/")
    if not found or not distance_of(settings):
        name = task.name if radius else task.name.rpartition("/")[0] or task.name
        return name.replace("/", ", ")
    *parts, asked = rest.split("/")
    cap = settings.get("cap")
    parts = [part for part in parts if part not in (settings["ground"], None if cap is None else f"cap {cap:g}")]
    if asked == "search":
        asked = NEAREST if task.kind == "attack" else LARGEST
    way = f"{'attack ' if task.kind == 'attack' else ''}{', '.join(parts)} ({distance_of(settings)})"
    words = f"{label.rstrip('/') + ', ' if label else ''}{model}: {way}"
    return f"{words}, {asked}" if radius else words


def titles(tasks: Iterable[Task]) -> dict[str, str]:
    """The title of each task by its name; names that share a title keep theirs beside it."""
    found = {task.name: title_of(task) for task in tasks}
    counts = Counter(found.values())
    return {name: title if counts[title] == 1 else f"{title} [{name}]" for name, title in found.items()}
