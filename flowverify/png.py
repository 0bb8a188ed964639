"""Images as PNG files in as few bytes as they take, and as addresses that hold them; with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, LEVELS = 0, 2, 255  # colour types of the format, and its largest level


def png(image: npt.NDArray[Any], white: float = 1.0) -> bytes:
    """An image (C, H, W) >= 0 as PNG: colours for three channels, the sum of all in grey for other numbers of them.

    Args:
        white: the value of the brightest level; what is above it is as bright.
    """
    shown = np.asarray(image, dtype=np.float64) / white
    colour = shown.shape[0] == 3
    shown = np.moveaxis(shown, 0, -1) if colour else shown.sum(0)[..., None]
    levels = np.rint(np.clip(shown, 0, 1) * LEVELS).astype(np.uint8)
    height, width, channels = levels.shape
    # Each row of the format starts with the number of its filter; 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), levels.reshape(height, width * channels)], 1)
    head = struct.pack(">IIBBBBB", width, height, 8, COLOUR if colour else GREY, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in parts)


def data_address(image: npt.NDArray[Any], white: float = 1.0) -> str:
    """An image as :func:`png` gives it, for the ``src`` of an ``<img>``."""
    return f"data:image/png;base64,{base64.b64encode(png(image, white)).decode()}"


def _chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
