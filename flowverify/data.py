"""Labelled images: the data sets known by name, and any ``.npz`` file.

Images are unnormalised: 0 is black, 1 is the brightest level of an 8-bit pixel. No mean or scale is
ever taken out of them, since the Wasserstein radius is counted in the mass of these very pixels.

Sources: digits is scikit-learn's copy of the UCI optical digits (Alpaydin and Kaynak 1998); mnist is
LeCun, Cortes and Burges (1998), in the IDX format described on their page.
"""

from __future__ import annotations

import gzip
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowverify.conventions import check_channels_first, check_labels, has_channels_last
from flowverify.errors import DataError, DependencyError, InvalidInputError, UnknownNameError
from flowverify.registry import DATASETS

SPLITS = ("train", "test")
HELD_OUT = "held-out"  # what training keeps back of data without splits

_MNIST_KINDS = {"images": ("images-idx3-ubyte", 3), "labels": ("labels-idx1-ubyte", 1)}
_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Dataset:
    """``images`` float32 (N, C, H, W), finite and >= 0, with ``labels`` int64 (N,), >= 0.

    Images stored as 8-bit levels lie in [0, 1]; float images of an ``.npz`` are taken as they are.
    ``dataset[2:5]``, ``dataset[[3, 7]]`` and ``dataset[mask]`` are data sets; ``dataset[2]`` is a pair.

    Raises:
        DataError: shapes or types other than these, images that look as if their channels came last
            (:func:`flowverify.conventions.check_channels_first`), NaN, infinite or negative values.
    """

    images: Tensor
    labels: Tensor
    name: str
    split: str

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
            raise DataError(f"{self.name}: images go down to {images.min():g}, expected values >= 0")
        if bool((labels < 0).any()):
            raise DataError(f"{self.name}: labels go down to {int(labels.min())}, expected labels >= 0")

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
        return Dataset(self.images[chosen], self.labels[chosen], self.name, self.split)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(len(self)))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return (channels, height, width)


def load_dataset(name: str | Path, split: str = "test", data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name (``digits``, ``mnist``, ``cifar10-sample``), by the path of an ``.npz``, or MODULE:NAME.

    Somebody else's ``MODULE:NAME`` is called with the split and the folder, and returns a :class:`Dataset`.

    Args:
        name: for a path, the file holds ``images`` (N, H, W), (N, C, H, W) or (N, H, W, C), either uint8 (divided by
            255) or float >= 0, and integer ``labels`` (N,); it is taken whole, whatever the split. Channels come
            last where :func:`flowverify.conventions.has_channels_last` says so.
        split: ``train`` or ``test``.
        data_dir: the folder of the files, or of the subfolder ``mnist`` or ``cifar10_sample``. Without
            it, that subfolder of ``$FLOWVERIFY_DATA`` is used if it exists. Otherwise mnist is
            downloaded once, checked by its SHA-256 sums, into the user's cache.

    Raises:
        UnknownNameError: the name or the split is not one of those above.
        DataError: a file is missing, corrupt or malformed, or could not be downloaded.
        DependencyError: scikit-learn (for digits) or pooch (to download) is not installed.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if is_npz(name):
        return _read_npz(Path(name), Path(name).stem, split)
    found = DATASETS.find(str(name))(split, data_dir)
    if not isinstance(found, Dataset):
        raise DataError(f"data set {name!r}: returned {type(found).__name__}, expected a Dataset")
    return found


def is_npz(name: str | Path) -> bool:
    """Whether :func:`load_dataset` takes this for the path of a file, which has no splits."""
    return isinstance(name, Path) or name.endswith(".npz")


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
        chosen = [int(part) for part in text.split(",")]
        if max(chosen) >= length:
            raise InvalidInputError(f"index {text!r}: {max(chosen)} given, expected 0 to {length - 1}")
    else:
        raise InvalidInputError(f"index {text!r}: expected a form like 0:100, :50, 5 or 3,7,9")
    if not chosen:
        raise InvalidInputError(f"index {text!r}: selects none of {length} images, expected at least one")
    return chosen


def _data_folder(subfolder: str, data_dir: str | Path | None) -> Path | None:
    if data_dir is not None:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder, expected the folder of the data files")
        return folder / subfolder if (folder / subfolder).is_dir() else folder
    root = os.environ.get("FLOWVERIFY_DATA")
    if root and (Path(root) / subfolder).is_dir():
        return Path(root) / subfolder
    return None


@cache
def _digits_arrays() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DependencyError("the data set digits needs scikit-learn: pip install scikit-learn") from error
    bundle = load_digits()
    return (bundle.images / 16).astype(np.float32), bundle.target.astype(np.int64)


def read_digits(split: str, data_dir: str | Path | None = None) -> Dataset:
    """The test split is 30% of every class, drawn by a fixed seed, in the order of the source."""
    images, labels = _digits_arrays()
    random = np.random.RandomState(0)  # unlike Generator, its stream never changes between releases
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        in_test[members[round(0.7 * len(members)) :]] = True
    chosen = in_test if split == "test" else ~in_test
    return Dataset(torch.from_numpy(images[chosen])[:, None], torch.from_numpy(labels[chosen]), "digits", split)


def read_mnist(split: str, data_dir: str | Path | None = None) -> Dataset:
    """28x28 digits from the four IDX files, which are downloaded where no folder is known."""
    folder, arrays = _data_folder("mnist", data_dir), {}
    for kind, (ending, dimensions) in _MNIST_KINDS.items():
        stem = f"{'train' if split == 'train' else 't10k'}-{ending}"
        path = _download_mnist(f"{stem}.gz") if folder is None else _find_mnist(folder, stem)
        arrays[kind] = (path, _read_idx(path, dimensions))
    (path, images), (labels_path, labels) = arrays["images"], arrays["labels"]
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels, expected {len(images)} as in {path}")
    return Dataset(_levels(images[:, None]), torch.from_numpy(labels.astype(np.int64)), "mnist", split)


def _find_mnist(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise DataError(f"{folder}: no file {stem}.gz or {stem}, expected the four MNIST files in IDX format")


def _download_mnist(file: str) -> Path:
    try:
        import pooch
    except ImportError as error:
        raise DependencyError("downloading mnist needs pooch: pip install pooch") from error
    reasons = []
    for url in _MNIST_URLS:
        try:
            return Path(pooch.retrieve(url + file, _MNIST_SHA256[file], file, pooch.os_cache("flowverify")))
        except (OSError, ValueError) as error:
            reasons.append(f"{url}: {' '.join(str(error).split())}")
    raise DataError(
        f"mnist: {file} is neither in a data folder (--data-dir, $FLOWVERIFY_DATA/mnist) nor could it be "
        f"downloaded ({'; '.join(reasons)})"
    )


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Reads unsigned bytes in IDX format: 0, 0, type 8, dimensions, the sizes (big-endian), the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as gzip data ({error})") from error
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(f"{path}: starts with {content[:4].hex() or 'nothing'}, expected {magic.hex()} (IDX)")
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes, expected at least the {header} of the IDX header")
    sizes = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    if len(content) != header + prod(sizes):
        raise DataError(f"{path}: {len(content)} bytes, expected {header + prod(sizes)} for sizes {sizes}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes)


def read_cifar10_sample(split: str, data_dir: str | Path | None = None) -> Dataset:
    """Some test images of CIFAR-10, from an ``.npz`` in the data folder."""
    folder = _data_folder("cifar10_sample", data_dir)
    if split != "test":
        raise DataError("cifar10-sample: has no train split, expected split='test'")
    paths = [] if folder is None else sorted(folder.glob("cifar10_test_*.npz"))
    if not paths:
        raise DataError(
            f"cifar10-sample: no cifar10_test_*.npz in {folder or '$FLOWVERIFY_DATA/cifar10_sample'}, "
            "expected it there or in the data folder"
        )
    return _read_npz(paths[0], "cifar10-sample", split)


def _read_npz(path: Path, name: str, split: str) -> Dataset:
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected an .npz with images and labels")
    try:
        bundle = np.load(path, allow_pickle=False)
        if not isinstance(bundle, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with bundle:
            arrays = {key: bundle[key] for key in ("images", "labels") if key in bundle}
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as .npz of plain arrays ({reason})") from error
    for key in ("images", "labels"):
        if key not in arrays:
            raise DataError(f"{path}: no array {key!r}, expected images and labels")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{path}: images of type {images.dtype}, expected uint8 or float")
    with np.errstate(over="ignore"):
        pixels = _levels(images) if images.dtype == np.uint8 else torch.from_numpy(images.astype(np.float32))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and has_channels_last(pixels.shape[1:]):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    try:
        return Dataset(pixels, check_labels(labels, labels.size).reshape(labels.shape), name, split)
    except (DataError, InvalidInputError) as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{name}: ')}") from None


def _levels(levels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(levels.astype(np.float32)) / 255
