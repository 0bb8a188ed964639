"""The shipped models: an ONNX file and a card (JSON) each, found from a checkout or an installed wheel."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from flowverify.data import HELD_OUT, VALIDATION
from flowverify.errors import InvalidInputError, ModelFileError, UnknownNameError
from flowverify.network import Network, load_network, write_onnx
from flowverify.network.load import FORMS, is_source
from flowverify.network.reading import Reading

_CARD_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "tuple[int, int, int]": list,
    "Mapping[str, Any]": dict,
    "Mapping[str, str]": dict,
}


@dataclass(frozen=True)
class Card:
    """What a shipped model is, and how to make it again.

    Attributes:
        name: what :func:`load_model` takes.
        input_shape: (C, H, W) of the unnormalised images in [0, 1] that the network takes.
        parameters: how many weights and biases there are.
        clean_accuracy: the share of ``clean_images`` images of ``dataset`` that are classified right, in [0, 1]; none
            of them was trained on.
        clean_split: ``test`` or ``validation`` for those of this split, ``held-out`` for those that
            :func:`flowverify.training.loop.load_splits` kept back of data without one.
        file: the ONNX file, beside the card; ``sha256`` is the hexadecimal digest of its bytes.
        command: the command that trains it.
        recipe: the full recipe, with the ``seed``.
        trained_with: versions of what trained it.
        certified: radii certified on the test split, for models that were trained for them: ``method``,
            ``bound``, ``ground``, ``images`` (how many, from the first; never missing), ``clean_accuracy`` and
            ``median_radius`` on them, ``certified_at`` (shares of them by radius), and the ``command``.
    """

    name: str
    description: str
    architecture: str
    dataset: str
    input_shape: tuple[int, int, int]
    classes: int
    parameters: int
    clean_accuracy: float
    clean_images: int
    clean_split: str
    file: str
    sha256: str
    command: str
    seed: int
    recipe: Mapping[str, Any]
    trained_with: Mapping[str, str]
    license: str
    certified: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy_text(self) -> str:
        """The clean accuracy with what it was measured on, such as "97.40% of 539 test images"."""
        return f"{self.clean_accuracy:.2%} of {self.clean_images:,} {self.clean_split} images"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def load_model(
    source: str | Path | nn.Module,
    input_shape: tuple[int, int, int] | None = None,
    *,
    layout: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: str | None = None,
    weights: str | Path | None = None,
) -> Network:
    """Loads a network: a shipped model by name, a file, a factory, or a torch module.

    What a reader took for granted (where channels lie, a softmax that was dropped) is in the ``notes`` of the network.

    Args:
        source: see :func:`flowverify.network.load.load_network` for files and factories.
        input_shape: (C, H, W). A torch module needs it; where the source states its own it must agree.
        layout, mean, std, output, weights: see :class:`flowverify.network.reading.Reading`.

    Raises:
        UnknownNameError: neither the name of a shipped model nor a file or factory; an unknown layout.
        ModelFileError: the file is missing, unreadable, or its SHA-256 is not the card's.
        InvalidInputError: ``input_shape`` is missing or differs from the model's, or says too little; bad numbers.
        UnsupportedOperationError: the network holds an operation that has no canonical form.
    """
    reading = Reading(layout, _several(mean), _several(std), output, None if weights is None else str(weights))
    if isinstance(source, nn.Module) or is_source(str(source)):
        return load_network(source, input_shape, reading)
    folder = models_folder()
    if str(source) not in _names(folder):
        raise UnknownNameError("model", str(source), [*_names(folder), *FORMS])
    if reading != Reading():
        raise InvalidInputError(f"model {source}: says itself how it is read, expected no {reading}")
    card = load_card(str(source))
    if input_shape is not None and tuple(input_shape) != card.input_shape:
        raise InvalidInputError(
            f"model {card.name}: given input shape {tuple(input_shape)}, expected {card.input_shape}"
        )
    return load_network(_checked_file(card, folder), card.input_shape)


def _several(numbers: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if numbers is None:
        return None
    return (float(numbers),) if isinstance(numbers, int | float) else tuple(float(one) for one in numbers)


def list_models() -> list[Card]:
    """The cards of all shipped models, by name; raises ModelFileError if one is malformed."""
    return [load_card(name) for name in _names(models_folder())]


def load_card(name: str) -> Card:
    """The card of a shipped model.

    Raises:
        UnknownNameError: no model has this name.
        ModelFileError: the card is malformed.
    """
    folder = models_folder()
    if name not in _names(folder):
        raise UnknownNameError("model", name, _names(folder))
    return _read_card(folder / f"{name}.json")


def save_model(network: Network, directory: str | Path, **card: Any) -> Card:
    """Writes ``NAME.onnx`` and ``NAME.json`` into ``directory`` (created if need be) and returns the card.

    ``card`` gives the fields of :class:`Card` except ``file``, ``sha256`` and ``parameters``, which are
    taken from the network. Each file is replaced in one step, the card last: an interrupted call leaves
    no half-written file, and a card that does not fit its file fails the check at load.

    Raises:
        InvalidInputError: the name is not usable as a file name, or fields of the card are missing,
            unknown or of the wrong type.
        ModelFileError: the folder cannot be written to.
    """
    name = check_model_name(str(card.get("name", "")))
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=f".{name}-") as scratch:
            model_file, card_file = Path(scratch) / f"{name}.onnx", Path(scratch) / f"{name}.json"
            write_onnx(network, model_file)
            complete = _parse_card(
                {
                    **card,
                    "input_shape": list(card.get("input_shape", ())),
                    "parameters": sum(tensor.numel() for tensor in network.parameters()),
                    "file": model_file.name,
                    "sha256": _sha256(model_file),
                }
            )
            card_file.write_text(complete.to_json(), encoding="utf-8")
            model_file.replace(target / model_file.name)
            card_file.replace(target / card_file.name)
    except OSError as error:
        raise ModelFileError(f"{target}: cannot be written to ({error}), expected a writable folder") from error
    return complete


def record_certified(name: str, directory: str | Path, certified: Mapping[str, Any]) -> Card:
    """Replaces the field ``certified`` of the card ``NAME.json`` in ``directory`` and returns the card.

    Raises:
        InvalidInputError: ``certified`` does not say on how many images it was measured.
        ModelFileError: there is no such card, or it cannot be written.
    """
    path = Path(directory) / f"{name}.json"
    _check_certified(certified)
    card = dataclasses.replace(_read_card(path), certified=dict(certified))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as scratch:
            part = Path(scratch) / path.name
            part.write_text(card.to_json(), encoding="utf-8")
            part.replace(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written ({error}), expected a writable folder") from error
    return card


def check_model_name(name: str) -> str:
    """Returns the name of a model if it can be that of a file, or raises InvalidInputError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InvalidInputError(f"model name {name!r}: expected letters, digits, '.', '_' and '-' only")
    return name


def models_folder() -> Path:
    """Where the shipped models lie: in the installed package, or beside it in a checkout."""
    package = Path(str(files("flowverify")))
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


def _read_card(path: Path) -> Card:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as a JSON card ({error})") from error
    try:
        if not isinstance(values, dict):
            raise InvalidInputError(f"card holds {type(values).__name__}, expected an object")
        card = _parse_card(values)
        if card.name != path.stem:
            raise InvalidInputError(f"card name is {card.name!r}, expected {path.stem!r} as the file's")
    except InvalidInputError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return card


def _parse_card(values: Mapping[str, Any]) -> Card:
    expected = {entry.name: str(entry.type) for entry in dataclasses.fields(Card)}
    required = {entry.name for entry in dataclasses.fields(Card) if entry.default_factory is MISSING}
    if not required <= set(values) <= set(expected):
        missing, unknown = sorted(required - set(values)), sorted(set(values) - set(expected))
        raise InvalidInputError(f"card lacks {missing} and has unknown {unknown}, expected {sorted(expected)}")
    for key, kind in expected.items():
        if key in values and not isinstance(values[key], _CARD_TYPES[kind]):
            raise InvalidInputError(f"card field {key} is {values[key]!r}, expected {kind}")
    shape = values["input_shape"]
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidInputError(f"card field input_shape is {shape}, expected three integers >= 1")
    if isinstance(values["clean_images"], bool) or values["clean_images"] < 1:
        raise InvalidInputError(f"card field clean_images is {values['clean_images']}, expected an integer >= 1")
    if values["clean_split"] not in ("test", VALIDATION, HELD_OUT):
        expected_splits = f"test, {VALIDATION} or {HELD_OUT}"
        raise InvalidInputError(f"card field clean_split is {values['clean_split']!r}, expected {expected_splits}")
    _check_certified(values.get("certified", {}))
    if Path(values["file"]).name != values["file"]:
        raise InvalidInputError(f"card field file is {values['file']!r}, expected a file beside the card")
    return Card(**{**values, "input_shape": tuple(shape)})


def _check_certified(certified: Mapping[str, Any]) -> None:
    images = certified.get("images")
    if certified and (not isinstance(images, int) or isinstance(images, bool) or images < 1):
        raise InvalidInputError(f"card field certified has images {images!r}, expected how many, an integer >= 1")


def _checked_file(card: Card, folder: Path) -> Path:
    path = folder / card.file
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file, expected the weights of model {card.name}")
    digest = _sha256(path)
    if digest != card.sha256:
        raise ModelFileError(f"{path}: SHA-256 is {digest}, expected {card.sha256} by the model's card")
    return path


def source_digest(source: str | Path, weights: str | Path | None = None) -> str | None:
    """SHA-256 of the files that a model is read from: of its own, or of a factory's and its weights.

    Returns:
        None for a factory of a module, MODULE:FACTORY, which names no file.

    Raises:
        UnknownNameError, ModelFileError: no shipped model has this name, or a file is not there.
    """
    text = str(source)
    if not is_source(text):
        return load_card(text).sha256
    path = Path(text)
    if ":" in text and not path.exists():
        path = Path(text.rpartition(":")[0])
        if path.suffix != ".py":
            return None
    digest = hashlib.sha256()
    for one in [path] if weights is None else [path, Path(weights)]:
        try:
            digest.update(one.read_bytes())
        except OSError as error:
            raise ModelFileError(f"{one}: {error.strerror}, expected the file of a model") from error
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
