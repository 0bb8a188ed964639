"""Single images from files: PNG and JPEG pictures, grey or in colour, and arrays of numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.conventions import CHANNELS, has_channels_last
from flowverify.data import UNREADABLE, levels, read_npz, stacked
from flowverify.errors import DataError, DependencyError, InvalidInputError

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
