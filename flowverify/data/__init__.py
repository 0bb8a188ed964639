"""Labelled images, and how they are named: data sets known by name, ``.npz`` files, folders, somebody else's objects.

Images are unnormalised: 0 is black, 1 is the brightest level of an 8-bit pixel. No mean or scale is
ever taken out of them, since the Wasserstein radius is counted in the mass of these very pixels.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowverify.conventions import check_channels_first, check_labels, has_channels_last
from flowverify.errors import DataError, InvalidInputError, UnknownNameError
from flowverify.notebook import by, counted, data_address, html_images
from flowverify.registry import DATASETS

VALIDATION = "validation"
SPLITS = ("train", VALIDATION, "test")
VALIDATION_IMAGES, VALIDATION_SHARE = 5000, 10  # at most so many, and at most one in so many
THUMBNAILS = 16  # that a notebook shows
HELD_OUT = "held-out"  # what training keeps back of data without splits

UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Dataset:
    """``images`` float32 (N, C, H, W), finite and >= 0, with ``labels`` int64 (N,), >= 0.

    Images stored as 8-bit levels lie in [0, 1]; float images of an ``.npz`` are taken as they are.
    ``dataset[2:5]``, ``dataset[[3, 7]]`` and ``dataset[mask]`` are data sets; ``dataset[2]`` is a pair. ``note`` says
    what was made of a file that leaves a choice, such as channels that come last.

    Raises:
        DataError: shapes or types other than these, images that look as if their channels came last
            (:func:`flowverify.conventions.check_channels_first`), NaN, infinite or negative values.
    """

    images: Tensor
    labels: Tensor
    name: str
    split: str
    note: str = ""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.float32 or 0 in images.shape[1:]:
            raise DataError(
                f"{self.name}: images of shape {tuple(images.shape)} and type {images.dtype}, expected "
                "float32 of shape (number, channels, height, width)"
            )
        try:
            check_channels_first(images.shape[1:], f"{self.name}: images of shape {tuple(images.shape)}")
        except InvalidInputError as error:
            raise DataError(str(error)) from None
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"{self.name}: labels of shape {tuple(labels.shape)} and type {labels.dtype}, expected "
                f"int64 of shape ({len(images)},), one for each image"
            )
        if not bool(torch.isfinite(images).all()):
            raise DataError(f"{self.name}: images contain NaN or infinite values, expected finite ones")
        if bool((images < 0).any()):
            raise DataError(
                f"{self.name}: images go down to {images.min():g}, expected values >= 0 "
                "(images as they are: what normalises them belongs into the network)"
            )
        if bool((labels < 0).any()):
            raise DataError(f"{self.name}: labels go down to {int(labels.min())}, expected labels >= 0")

    def __repr__(self) -> str:
        parts = [counted(len(self), "image") + f" of {by(self.images.shape[1:])}"]
        if len(self):
            parts.append(f"labels {int(self.labels.min())} to {int(self.labels.max())}")
        return f"Dataset({self.name}, {self.split}: {', '.join([*parts, *filter(None, [self.note])])})"

    def _repr_html_(self) -> str:
        shown = [
            (data_address(image.numpy(), max(1.0, float(image.max()))), f"image {k}, label {int(label)}")
            for k, (image, label) in enumerate(zip(self.images[:THUMBNAILS], self.labels, strict=False))
        ]
        return html_images(repr(self), shown)

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Dataset: ...
    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> tuple[Tensor, int] | Dataset:
        if isinstance(index, int):
            return self.images[index], int(self.labels[index])
        everything = torch.arange(len(self))
        chosen = everything[index] if isinstance(index, slice | Tensor) else everything[list(index)]
        return Dataset(self.images[chosen], self.labels[chosen], self.name, self.split, self.note)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(len(self)))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return (channels, height, width)


def load_dataset(name: str | Path, split: str = "test", data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name (``digits``, ``mnist``, ``cifar10``, ...), by the path of an ``.npz`` or of a folder of
    images by class, from Hugging Face (:func:`flowverify.data.files.read_hub`), or MODULE:NAME.

    Somebody else's ``MODULE:NAME`` is called with the split and the folder, and returns a :class:`Dataset`.

    Args:
        name: for a path, the file holds ``images`` (N, H, W), (N, C, H, W) or (N, H, W, C), either uint8 (divided by
            255) or float >= 0, and integer ``labels`` (N,); it is taken whole, whatever the split. Channels come
            last where :func:`flowverify.conventions.has_channels_last` says so. A folder holds a folder a class, in
            the order of their names, of PNG or JPEG images of one size.
        split: ``train``, ``validation`` or ``test``. The last 5,000 training images (a tenth of them, where these are
            fewer than 50,000) are the validation split of a data set that has none of its own: settings are chosen on
            it (:func:`without_validation`). ``train`` holds them too.
        data_dir: the folder of the files, or of the subfolder that is called as the data set (``-`` as ``_``). Without
            it, that subfolder of ``$FLOWVERIFY_DATA`` is used if it exists. Otherwise the files are downloaded once
            from their authors, checked by their sums, into the user's cache.

    Raises:
        UnknownNameError: the name or the split is not one of those above.
        DataError: a file is missing, corrupt or malformed, or could not be downloaded.
        DependencyError: scikit-learn (for digits), pooch (to download), Pillow (for images) or datasets (for Hugging
            Face) is not installed.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if is_hub(name):
        from flowverify.data.files import read_hub

        return read_hub(str(name), split)
    if is_folder(name):
        from flowverify.data.files import read_folder

        return read_folder(Path(name), split)
    if is_npz(name):
        return read_npz(Path(name), Path(name).stem, split)
    divided = split == VALIDATION and name in DATASETS
    found = DATASETS.find(str(name))("train" if divided else split, data_dir)
    if not isinstance(found, Dataset):
        raise DataError(f"data set {name!r}: returned {type(found).__name__}, expected a Dataset")
    return _validation(found) if divided else found


def without_validation(training: Dataset) -> Dataset:
    """The training images of a data set but for its validation split, as :func:`load_dataset` has it."""
    return training[: len(training) - _validation_size(training)]


def _validation(training: Dataset) -> Dataset:
    part = training[len(training) - _validation_size(training) :]
    return replace(part, split=VALIDATION)


def _validation_size(training: Dataset) -> int:
    return min(VALIDATION_IMAGES, len(training) // VALIDATION_SHARE)


def is_npz(name: str | Path) -> bool:
    """Whether :func:`load_dataset` takes this for the path of a file, which has no splits."""
    return not is_hub(name) and not is_folder(name) and (isinstance(name, Path) or name.endswith(".npz"))


def is_hub(name: str | Path) -> bool:
    """Whether :func:`load_dataset` takes this for a data set of Hugging Face."""
    return isinstance(name, str) and name.startswith("hf:")


def is_whole(name: str | Path) -> bool:
    """Whether :func:`load_dataset` gives the same images for every split: of a file, say, or a name that says it."""
    if is_folder(name):
        from flowverify.data.files import splits_of

        return not splits_of(Path(name))
    return is_npz(name) or (is_hub(name) and str(name).count(":") > 1)


def is_folder(name: str | Path) -> bool:
    """Whether :func:`load_dataset` takes this for a folder of images by class: a path that is one."""
    return (isinstance(name, Path) or "/" in name or os.sep in name) and Path(name).is_dir()


def as_dataset(source: Any, name: str = "own", split: str = "test", limit: int | None = None) -> Dataset:
    """Somebody else's images as a :class:`Dataset`: a torch data set or loader, or a ``datasets`` one of Hugging Face.

    Args:
        source: what iterates over pairs of an image and a label, over batches of them, or over mappings with ``image``
            (or ``img``) and ``label``. Images are arrays or tensors (C, H, W) or (H, W), or PIL images; integers are
            levels of 8 bits, other numbers are taken as they are.
        limit: how many images to take at most.

    Raises:
        DataError: an entry of another form, or images that :class:`Dataset` refuses.
    """
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        kind = type(source).__name__
        raise DataError(f"{name}: given {kind}, expected a data set or a loader, which gives images with labels")
    images: list[Tensor] = []
    labels: list[int] = []
    for entry in source:
        if limit is not None and len(images) >= limit:
            break
        image, label = _pair(entry, name)
        batch = image if image.ndim == 4 else image[None]
        images.extend(batch)
        labels.extend(int(one) for one in np.asarray(label).reshape(-1))
    if not images:
        raise DataError(f"{name}: no images, expected at least one")
    if len({tuple(image.shape) for image in images}) > 1:
        shapes = sorted({tuple(image.shape) for image in images})
        raise DataError(f"{name}: images of shapes {shapes}, expected one shape")
    data = Dataset(torch.stack(images), torch.tensor(labels, dtype=torch.int64), name, split)
    return data if limit is None else data[:limit]


def _pair(entry: Any, name: str) -> tuple[Tensor, Any]:
    if isinstance(entry, Mapping):
        entry = [entry.get("image", entry.get("img")), entry.get("label", entry.get("labels"))]
    if not isinstance(entry, Sequence) or len(entry) != 2 or any(part is None for part in entry):
        raise DataError(f"{name}: an entry of type {type(entry).__name__}, expected an image and a label")
    return _pixels(entry[0]), entry[1]


def _pixels(image: Any) -> Tensor:
    """(C, H, W), or a batch (B, C, H, W), float32."""
    if getattr(image, "mode", None) in ("P", "PA"):
        raise DataError(f"an image of mode {image.mode}, whose pixels are places in a palette: expected L or RGB")
    array = np.asarray(image)
    if not isinstance(image, Tensor | np.ndarray) and array.ndim == 3:
        array = array.transpose(2, 0, 1)  # PIL has channels last
    elif array.ndim == 3 and has_channels_last(array.shape):
        array = array.transpose(2, 0, 1)
    pixels = levels(array.astype(np.uint8)) if array.dtype == np.uint8 else torch.from_numpy(array.astype(np.float32))
    return pixels[None] if pixels.ndim == 2 else pixels


def parse_index(text: str, length: int) -> range | list[int]:
    """The positions that ``0:100``, ``:50``, ``0:100:10``, ``5`` or ``3,7,9`` selects out of ``length``.

    A slice gives a range (a missing end is an end of the data set), anything else the list in the order
    given.

    Raises:
        InvalidInputError: another form, no position at all, or a position that is not in the data set.
    """
    chosen: range | list[int]
    if match := re.fullmatch(r"([0-9]*):([0-9]*)(?::([0-9]+))?", text.strip()):
        start, stop = int(match[1] or 0), int(match[2] or length)
        step = int(match[3] or 1)
        if step == 0:
            raise InvalidInputError(f"index {text!r}: the step is 0, expected a step >= 1")
        if stop > length:
            raise InvalidInputError(f"index {text!r}: ends at {stop}, expected at most {length}")
        chosen = range(start, stop, step)
    elif re.fullmatch(r"[0-9]+(?:\s*,\s*[0-9]+)*", text.strip()):
        chosen = [int(part) for part in re.findall("[0-9]+", text)]
        if max(chosen) >= length:
            raise InvalidInputError(f"index {text!r}: {max(chosen)} given, expected 0 to {length - 1}")
    else:
        raise InvalidInputError(f"index {text!r}: expected a form like 0:100, :50, 5 or 3,7,9")
    if not chosen:
        raise InvalidInputError(f"index {text!r}: selects none of {length} images, expected at least one")
    return chosen


def data_folder(subfolder: str, data_dir: str | Path | None) -> Path | None:
    """Where the files of a data set lie: in ``data_dir``, or in ``$FLOWVERIFY_DATA``; None if nobody says.

    Raises:
        DataError: there is no folder ``data_dir``.
    """
    if data_dir is not None:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder, expected the folder of the data files")
        return folder / subfolder if (folder / subfolder).is_dir() else folder
    root = os.environ.get("FLOWVERIFY_DATA")
    if root and (Path(root) / subfolder).is_dir():
        return Path(root) / subfolder
    return None


def read_npz(path: Path, name: str, split: str) -> Dataset:
    """The whole data set of an .npz file; see :func:`load_dataset`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected an .npz with images and labels")
    try:
        bundle = np.load(path, allow_pickle=False)
        if not isinstance(bundle, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with bundle:
            arrays = {key: bundle[key] for key in ("images", "labels") if key in bundle}
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as .npz of plain arrays ({reason})") from error
    for key in ("images", "labels"):
        if key not in arrays:
            raise DataError(f"{path}: no array {key!r}, expected images and labels")
    labels = arrays["labels"]
    try:
        pixels, note = stacked(arrays["images"])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        return Dataset(pixels, check_labels(labels, labels.size).reshape(labels.shape), name, split, note)
    except (DataError, InvalidInputError) as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{name}: ')}") from None


def stacked(images: npt.NDArray[Any]) -> tuple[Tensor, str]:
    """Images (N, H, W), (N, C, H, W) or (N, H, W, C) as float32 (N, C, H, W), and a note where a choice was made.

    Raises:
        DataError: neither uint8, which is divided by 255, nor float.
    """
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"images of type {images.dtype}, expected uint8 or float")
    with np.errstate(over="ignore"):
        pixels = levels(images) if images.dtype == np.uint8 else torch.from_numpy(images.astype(np.float32))
    if pixels.ndim == 3:
        return pixels[:, None], ""
    if pixels.ndim == 4 and has_channels_last(pixels.shape[1:]):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        shape = " x ".join(map(str, pixels.shape[1:]))
        return pixels, f"images of shape {tuple(images.shape)}, taken with channels last: {shape} images"
    return pixels, ""


def levels(stored: npt.NDArray[np.uint8]) -> Tensor:
    """8-bit levels as pixels in [0, 1], float32."""
    return torch.from_numpy(stored.astype(np.float32)) / 255
