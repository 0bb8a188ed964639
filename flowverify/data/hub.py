"""Data sets of Hugging Face by name, through the library ``datasets``, which knows their files and keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from flowverify.data import Dataset, as_dataset
from flowverify.errors import DataError, DependencyError, InvalidInputError

PREFIX = "hf:"
FORM = "hf:OWNER/NAME[:SPLIT[:COLUMN,...]]"


@dataclass(frozen=True)
class HubName:
    """A data set of Hugging Face.

    Attributes:
        path: OWNER/NAME, or NAME alone.
        split: as the data set calls it; empty to take the one that is asked for otherwise.
        columns: those to choose the images and the labels from; empty for all.
    """

    path: str
    split: str = ""
    columns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes :data:`FORM` apart.

        Raises:
            InvalidInputError: another form.
        """
        match = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]*)(?::(.+))?)?", text)
        if match is None:
            raise InvalidInputError(f"data set {text!r}: expected {FORM}")
        columns = tuple(part.strip() for part in (match[3] or "").split(",") if part.strip())
        return cls(match[1], match[2] or "", columns)


def read_hub(name: str, split: str = "test") -> Dataset:
    """A split of a data set of Hugging Face, as :data:`FORM` names it; it is downloaded once.

    Images are in the one column of type ``Image`` (modes L and RGB), labels in the one of type ``ClassLabel``; where
    there are several, those that are meant are named.

    Args:
        split: what is taken where the name has no split.

    Raises:
        InvalidInputError: a name of another form.
        DataError: there is no such data set, split or column, or none or several columns that fit; or what
            :func:`flowverify.data.as_dataset` refuses.
        DependencyError: ``datasets`` is not installed.
    """
    chosen = HubName.parse(name)
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(f"data set {name!r} needs datasets: pip install 'flowverify[huggingface]'") from error
    split = chosen.split or split
    try:
        found = datasets.load_dataset(chosen.path, split=split)
        features: Mapping[str, Any] = dict(found.features)
    except Exception as error:  # of the network, of the files, of the library
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: split {split!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    missing = [column for column in chosen.columns if column not in features]
    if missing:
        raise DataError(f"{name}: no column {missing[0]!r}, expected one of {', '.join(features)}")
    pictures = _column(name, features, chosen.columns, datasets.Image, "images of type Image")
    classes = _column(name, features, chosen.columns, datasets.ClassLabel, "labels of type ClassLabel")

    def rows() -> Iterator[tuple[Any, Any]]:
        for row in found.select_columns([pictures, classes]):
            yield row[pictures], row[classes]

    return as_dataset(rows(), f"{PREFIX}{chosen.path}", split)


def _column(name: str, features: Mapping[str, Any], columns: Sequence[str], kind: type, what: str) -> str:
    """The one column of this type, among those that are named if any of them is."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    named = [column for column in fitting if column in columns]
    if len(named or fitting) == 1:
        return (named or fitting)[0]
    if not fitting:
        raise DataError(f"{name}: columns {', '.join(features)}, expected one that holds {what}")
    raise DataError(f"{name}: columns {', '.join(named or fitting)} hold {what}, expected one to be named: {FORM}")
