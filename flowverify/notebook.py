"""How objects show themselves: on one line, and in notebooks as a table or a row of pictures.

Pictures are PNG files in as few bytes as they take, and addresses that hold them; with zlib alone.
What they take is loaded with the first of them: results import this file, and so does every command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt


def by(shape: Sequence[int]) -> str:
    """A shape in words, such as 1 x 28 x 28."""
    return " x ".join(map(str, shape))


def counted(number: int, thing: str) -> str:
    """Such as "1 image" and "1,797 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def html_table(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """A table with its title as the caption; its first column is that of the names."""
    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr></thead>" if columns else ""
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in others)
        lines.append(f'<tr><th style="text-align:left">{escape(str(first))}</th>{cells}</tr>')
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>'
    return f"<table>{caption}{head}<tbody>{''.join(lines)}</tbody></table>"


def html_images(title: str, images: Iterable[tuple[str, str]]) -> str:
    """Small pictures side by side, each an address and what it shows."""
    style = "width:48px;image-rendering:pixelated;margin:2px"
    shown = "".join(f'<img src="{address}" alt="{escape(text)}" title="{escape(text)}" style="{style}"/>'
                    for address, text in images)  # fmt: skip
    return f"<div><div>{escape(title)}</div>{shown}</div>"


SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, LEVELS = 0, 2, 255  # colour types of the format, and its largest level


def png(image: npt.NDArray[Any], white: float = 1.0) -> bytes:
    """An image (C, H, W) >= 0 as PNG: colours for three channels, the sum of all in grey for other numbers of them.

    Args:
        white: the value of the brightest level; what is above it is as bright.
    """
    import struct
    import zlib

    import numpy as np

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
    import base64

    return f"data:image/png;base64,{base64.b64encode(png(image, white)).decode()}"


def _chunk(name: bytes, content: bytes) -> bytes:
    import struct
    import zlib

    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
