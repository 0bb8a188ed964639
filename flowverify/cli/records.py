"""A file of JSON lines that a command fills image by image, and goes on with when it is run again."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from flowverify.cli.options import check_writable
from flowverify.errors import FlowverifyError, InvalidInputError
from flowverify.records import RecordFile, json_line


class Records:
    """Records of images by position, in a file (:class:`flowverify.records.RecordFile`) or nowhere.

    Args:
        path: of the file, or None; one that is there is gone on with.
        settings: what the results depend on; every record holds them.

    Raises:
        InvalidInputError: the file cannot be written to, another process is writing to it, or it holds records of
            other settings.
        DataError: it holds something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.done: dict[int, dict[str, Any]] = {}
        self._file: RecordFile[int] | None = None
        if path is None:
            return
        try:
            self._file = RecordFile(check_writable(path, "save"), itemgetter("index"), ("index",))
        except FlowverifyError as error:
            raise type(error)(f"save {str(error).removeprefix('save ')}") from error
        except OSError as error:
            raise InvalidInputError(f"save {path}: {error.strerror or error}, expected a writable file") from error
        for number, (position, record) in enumerate(self._file.records.items(), 1):
            for key, value in self.settings.items():
                if record.get(key) != value:
                    self.close()
                    raise InvalidInputError(
                        f"save {path}: line {number} was computed with {key} {record.get(key)!r}, given {value!r}, "
                        "expected the same (or another file)"
                    )
            self.done[position] = record

    def add(self, position: int, record: Mapping[str, Any]) -> str:
        """Appends a record to the file at once, and returns its line."""
        whole = {"index": position, **record, **self.settings}
        if self._file is not None:
            self._file.append([whole])
        return json_line(whole)

    def close(self) -> None:
        """Lets others write to the file."""
        if self._file is not None:
            self._file.close()
