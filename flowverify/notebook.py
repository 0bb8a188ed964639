"""How objects show themselves: on one line, and in notebooks as a table or a row of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


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
