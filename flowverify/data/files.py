"""Data sets and images from files, in the formats of their authors.

Data sets come in their own formats, as images in folders, and from Hugging Face, by its library ``datasets``; single
images as PNG and JPEG pictures, grey or in colour, and as arrays of numpy.

Sources: digits is scikit-learn's copy of the UCI optical digits (Alpaydin and Kaynak 1998); mnist is LeCun, Cortes and
Burges (1998), fashion-mnist Xiao, Rasul and Vollgraf (2017), kmnist Clanuwat et al. (2018), all in the IDX format
described on the page of mnist; cifar10 and cifar100 are Krizhevsky (2009), in their binary version.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowverify.conventions import CHANNELS, has_channels_last
from flowverify.data import SPLITS, UNREADABLE, Dataset, as_dataset, data_folder, levels, read_npz, stacked
from flowverify.errors import DataError, DependencyError, InvalidInputError


@dataclass(frozen=True)
class IdxFiles:
    """Four files in IDX format: where they are downloaded, and their sums."""

    urls: tuple[str, ...]
    sums: dict[str, str]

    kinds: ClassVar[dict[str, tuple[str, int]]] = {
        "images": ("images-idx3-ubyte", 3),
        "labels": ("labels-idx1-ubyte", 1),
    }


IDX = {
    "mnist": IdxFiles(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": IdxFiles(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "kmnist": IdxFiles(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        {
            "train-images-idx3-ubyte.gz": "md5:bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte.gz": "md5:e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte.gz": "md5:5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte.gz": "md5:7320c461ea6c1c855c0b718fb2a4b134",
        },
    ),
}


@dataclass(frozen=True)
class BinaryRecords:
    """Records of some bytes of labels, of which the last counts, and 3 x 32 x 32 levels, in files of an archive."""

    archive: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int

    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/"


CIFAR = {
    "cifar10": BinaryRecords(
        "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
        tuple(f"data_batch_{k}.bin" for k in range(1, 6)), ("test_batch.bin",), 1,
    ),
    "cifar100": BinaryRecords(
        "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
        ("train.bin",), ("test.bin",), 2,
    ),
}  # fmt: skip


@cache
def _digits_arrays() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    found = find_spec("sklearn")
    if found is None:
        raise DependencyError("the data set digits needs scikit-learn: pip install scikit-learn")
    # Importing it would take longer than all else that is done with a few images.
    table = Path(str(found.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    if table.is_file():
        rows = np.loadtxt(table, delimiter=",")
        images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    else:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


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
    """28x28 digits."""
    return read_idx("mnist", split, data_dir)


def read_fashion_mnist(split: str, data_dir: str | Path | None = None) -> Dataset:
    """28x28 clothes."""
    return read_idx("fashion-mnist", split, data_dir)


def read_kmnist(split: str, data_dir: str | Path | None = None) -> Dataset:
    """28x28 cursive Japanese letters."""
    return read_idx("kmnist", split, data_dir)


def read_idx(name: str, split: str, data_dir: str | Path | None) -> Dataset:
    """A data set of four IDX files, which are downloaded where no folder is known."""
    folder, arrays = data_folder(name.replace("-", "_"), data_dir), {}
    for kind, (ending, dimensions) in IdxFiles.kinds.items():
        stem = f"{'train' if split == 'train' else 't10k'}-{ending}"
        if folder is None:
            path = _download(name, f"{stem}.gz", IDX[name].urls, IDX[name].sums[f"{stem}.gz"])
        else:
            path = _find_idx(folder, stem, name)
        arrays[kind] = (path, _read_idx(path, dimensions))
    (path, images), (labels_path, labels) = arrays["images"], arrays["labels"]
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels, expected {len(images)} as in {path}")
    return Dataset(levels(images[:, None]), torch.from_numpy(labels.astype(np.int64)), name, split)


def _find_idx(folder: Path, stem: str, name: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise DataError(f"{folder}: no file {stem}.gz or {stem}, expected the four files of {name} in IDX format")


def _download(name: str, file: str, urls: Sequence[str], known: str, processor: Any = None) -> Any:
    try:
        import pooch
    except ImportError as error:
        raise DependencyError(f"downloading {name} needs pooch: pip install pooch") from error
    reasons, kept = [], file if name == "mnist" else f"{name}-{file}"
    for url in urls:
        try:
            more = {} if processor is None else {"processor": processor}
            found = pooch.retrieve(url + file, known, kept, pooch.os_cache("flowverify"), **more)
        except (OSError, ValueError) as error:
            reasons.append(f"{url}: {' '.join(str(error).split())}")
        else:
            return found if processor is not None else Path(found)
    raise DataError(
        f"{name}: {file} is neither in a data folder (--data-dir, $FLOWVERIFY_DATA/{name.replace('-', '_')}) nor could "
        f"it be downloaded ({'; '.join(reasons)})"
    )


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Reads unsigned bytes in IDX format: 0, 0, type 8, dimensions, the sizes (big-endian), the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except UNREADABLE as error:
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
    folder = data_folder("cifar10_sample", data_dir)
    if split != "test":
        raise DataError("cifar10-sample: has no train split, expected split='test'")
    paths = [] if folder is None else sorted(folder.glob("cifar10_test_*.npz"))
    if not paths:
        raise DataError(
            f"cifar10-sample: no cifar10_test_*.npz in {folder or '$FLOWVERIFY_DATA/cifar10_sample'}, "
            "expected it there or in the data folder"
        )
    return read_npz(paths[0], "cifar10-sample", split)


def read_cifar10(split: str, data_dir: str | Path | None = None) -> Dataset:
    """32x32 colour images of ten classes."""
    return read_cifar("cifar10", split, data_dir)


def read_cifar100(split: str, data_dir: str | Path | None = None) -> Dataset:
    """32x32 colour images of a hundred classes, the fine labels."""
    return read_cifar("cifar100", split, data_dir)


def read_cifar(name: str, split: str, data_dir: str | Path | None) -> Dataset:
    """A data set of the binary version, which is downloaded where no folder is known."""
    form, folder = CIFAR[name], data_folder(name, data_dir)
    names = form.train if split == "train" else form.test
    if folder is None:
        paths = _downloaded_records(name, form, names)
    else:
        inside = folder / form.folder if (folder / form.folder).is_dir() else folder
        paths = [inside / file for file in names]
    images, labels = [], []
    for path in paths:
        size = form.label_bytes + 3 * 32 * 32
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}), expected a file of {name}'s binary version") from error
        if not content or len(content) % size:
            raise DataError(f"{path}: {len(content)} bytes, expected records of {size}, {name}'s binary version")
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
        labels.append(records[:, form.label_bytes - 1].astype(np.int64))
        images.append(records[:, form.label_bytes :].reshape(-1, 3, 32, 32))
    return Dataset(levels(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)), name, split)


def _downloaded_records(name: str, form: BinaryRecords, names: Sequence[str]) -> list[Path]:
    try:
        from pooch import Untar
    except ImportError as error:
        raise DependencyError(f"downloading {name} needs pooch: pip install pooch") from error
    members = [f"{form.folder}/{file}" for file in names]
    found = _download(name, form.archive, (form.url,), f"md5:{form.md5}", Untar(members=members))
    by_name = {Path(path).name: Path(path) for path in found}
    return [by_name[file] for file in names]


def splits_of(folder: Path) -> list[str]:
    """The splits that a folder of images is divided into; none where it is taken whole."""
    return [split for split in SPLITS if (folder / split).is_dir()]


def read_folder(folder: Path, split: str) -> Dataset:
    """PNG and JPEG images in one folder a class, the classes in the order of their names.

    Folders ``train``, ``validation`` and ``test`` inside are the splits; without any of them the folder is taken whole.

    Raises:
        DataError: there are splits, but not this one; no image, one that cannot be read, or images of several sizes.
        DependencyError: Pillow is not installed.
    """
    splits = splits_of(folder)
    if splits and split not in splits:
        raise DataError(f"{folder}: has the splits {', '.join(splits)}, given {split}")
    inside = folder / split if splits else folder
    classes = sorted(path for path in inside.iterdir() if path.is_dir())
    found = [
        (path, label)
        for label, one in enumerate(classes)
        for path in sorted(one.iterdir())
        if path.suffix.lower() in PICTURES
    ]
    pairs = [(read_picture(path), label) for path, label in found]
    return as_dataset(pairs, str(folder), split)


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


PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npy", ".npz")
GREY, COLOUR = "L", "RGB"
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # how Pillow calls grey values of 16 bits
LARGEST_DEEP = 65535


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels`` float32 (C, H, W), unnormalised; the ``label``, if the file has one; what was made of the file."""

    pixels: Tensor
    label: int | None = None
    note: str = ""


def read_image(path: Path, index: int | None = None, channels: int | None = None) -> Picture:
    """One image of a file: a picture, an array (.npy), or an array of an .npz, with its label if there are ``labels``.

    Arrays are uint8, which is divided by 255, or float >= 0, which is taken as it is. An image is (H, W), (C, H, W) or
    (H, W, C); several have one more dimension in front.

    Args:
        index: of the image in a file that holds several.
        channels: 1 or 3: what a picture is turned into; by default grey stays grey and colour colour. Arrays stay.

    Raises:
        DataError: a file that is missing, of another kind or malformed; or see :func:`read_picture`.
        DependencyError: Pillow is not installed.
        InvalidInputError: an index where there is one image, none where there are several, or one beyond the last.
    """
    ending = path.suffix.lower()
    if ending not in (*PICTURES, *ARRAYS):
        raise DataError(f"image {path}: expected a file that ends in {', '.join((*PICTURES, *ARRAYS))}")
    if not path.is_file():
        raise DataError(f"image {path}: no such file, expected a picture or an array")
    if ending in ARRAYS:
        return _read_array(path, index)
    if index is not None:
        raise InvalidInputError(f"index {index}: given with the picture {path}, expected none")
    pixels = read_picture(path, channels)
    turned = channels is not None and len(read_picture(path)) != channels
    return Picture(pixels, note=f"turned into {'grey values' if channels == 1 else 'colour'}" if turned else "")


def read_picture(path: Path, channels: int | None = None) -> Tensor:
    """The pixels of a PNG or JPEG file in [0, 1], float32 (C, H, W).

    Args:
        channels: 1 for grey values, 3 for colours; by default what the file has.

    Raises:
        DataError: it cannot be read, has transparent pixels, or other channels are wanted.
        DependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError(f"image {path} needs Pillow: pip install pillow") from error
    if channels not in (None, 1, 3):
        raise DataError(f"{path}: a picture has 1 or 3 channels, expected {channels}")
    try:
        with Image.open(path) as image:
            image.load()
            if _is_transparent(image):
                raise DataError(f"{path}: has transparent pixels, expected an opaque picture")
            grey = image.mode in ("1", GREY, "LA", *DEEP)
            if image.mode in DEEP:
                deep = torch.from_numpy(np.asarray(image).astype(np.float32) / LARGEST_DEEP)[None]
                return deep if channels != 3 else deep.expand(3, -1, -1).contiguous()
            mode = {None: GREY if grey else COLOUR, 1: GREY, 3: COLOUR}[channels]
            array = np.asarray(image.convert(mode))
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    return levels(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _is_transparent(image: Any) -> bool:
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return False
    return int(image.convert("RGBA").getchannel("A").getextrema()[0]) < 255


def _read_array(path: Path, index: int | None) -> Picture:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"image {path}: cannot be read as an array of numbers ({reason})") from error
    if {"images", "labels"} <= set(arrays):
        return _of_several(path, index, read_npz(path, path.stem, "test"))
    if "images" not in arrays and len(arrays) != 1:
        raise DataError(f"image {path}: holds {', '.join(arrays) or 'nothing'}, expected images, or one array")
    found = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    several = found.ndim == 4 and len(found) > 1
    several |= found.ndim == 3 and found.shape[0] not in CHANNELS and not has_channels_last(found.shape)
    if found.ndim not in (2, 3, 4) or 0 in found.shape:
        raise DataError(f"image {path}: an array of shape {found.shape}, expected (H, W), (C, H, W) or (H, W, C)")
    if index is not None:
        if found.ndim == 2:
            raise InvalidInputError(f"index {index}: given with the one image in {path}, expected none")
        _check_index(path, index, len(found))
        found = found[index : index + 1]
    elif several:
        raise InvalidInputError(f"image {path}: holds {len(found)} images, expected an index")
    elif found.ndim < 4:
        found = found[None]
    try:
        pixels, note = stacked(found)
    except DataError as error:
        raise DataError(f"image {path}: {error}") from None
    return Picture(pixels[0], note=note)


def _of_several(path: Path, index: int | None, data: Any) -> Picture:
    if index is None and len(data) != 1:
        raise InvalidInputError(f"image {path}: holds {len(data)} images, expected an index")
    _check_index(path, index or 0, len(data))
    pixels, label = data[index or 0]
    return Picture(pixels, label, data.note)


def _check_index(path: Path, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InvalidInputError(f"index {index}: {path} holds {count} images, expected 0 to {count - 1}")
