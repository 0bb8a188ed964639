"""A file of JSON lines that a command fills image by image, and goes on with when it is run again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flowverify.cli.options import check_writable, open_alone
from flowverify.cli.report import json_line
from flowverify.errors import InvalidInputError


class Records:
    """Records of images by position, in a file or nowhere.

    A file that is there is gone on with, by one process at a time: its records must have the same ``settings``. A
    last line that an interruption left incomplete is removed.

    Args:
        path: of the file, or None.
        settings: what the results depend on; every record holds them.

    Raises:
        InvalidInputError: the file cannot be written to, another process is writing to it, or it holds something
            else, or records of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.done: dict[int, dict[str, Any]] = {}
        self._file: TextIO | None = None
        if path is not None:
            self._file = open_alone(check_writable(path, "save"), "save")
            try:
                self._read(path, self._file)
            except BaseException:
                self.close()
                raise

    def add(self, position: int, record: Mapping[str, Any]) -> str:
        """Appends a record to the file at once, and returns its line."""
        line = json_line({"index": position, **record, **self.settings})
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        return line

    def close(self) -> None:
        """Lets others write to the file."""
        if self._file is not None:
            self._file.close()

    def missing(self, positions: Sequence[int]) -> list[int]:
        """The positions that the file has no record of."""
        return [position for position in positions if position not in self.done]

    def _read(self, path: Path, file: TextIO) -> None:
        content = path.read_bytes() if path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].decode(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                position = record["index"]
                if not isinstance(position, int):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise InvalidInputError(
                    f"save {path}: line {number} is no record of an image, expected a file that this command wrote"
                ) from None
            for key, value in self.settings.items():
                if record.get(key) != value:
                    raise InvalidInputError(
                        f"save {path}: line {number} was computed with {key} {record.get(key)!r}, given {value!r}, "
                        "expected the same (or another file)"
                    )
            self.done[position] = record
        if whole != len(content):
            file.truncate(whole)
