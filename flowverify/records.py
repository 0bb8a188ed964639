"""Records as lines of JSON in a file that only ever grows: the store of ``bench``, and of every ``--save``.

What is appended is one write, flushed to the disk before it counts, so that a process that is killed leaves whole lines
and at most one torn line at the end, which the next one cuts off. One process at a time has a file open: the lock is
the operating system's, on the file itself, and ends with its holder, even if killed. A record that was made again
follows the one that it supersedes, which is removed when the file is closed or opened next.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from flowverify.errors import DataError, InvalidInputError

Record = dict[str, Any]  # plain JSON values
Key = TypeVar("Key")


class RecordFile(Generic[Key]):
    """A file of records that one process at a time adds to; use as a context manager.

    Args:
        path: of a file that is gone on with, or a new one. What is no file, such as /dev/null, takes lines from
            everybody.
        key: what a record is the only one of, such as its image's position.
        needed: fields that every record has.

    Attributes:
        records: the last record of each key, in the order of the file.

    Raises:
        InvalidInputError: another process has the file open.
        DataError: a line is no record.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, key: Callable[[Record], Key], needed: Collection[str] = ()) -> None:
        self.path, self._key = path, key
        self.records: dict[Key, Record] = {}
        self._superseded = False
        self._file = _open_alone(path)
        try:
            found, size = _parse(path, needed)
            self._keep(found)
            if path.is_file() and os.fstat(self._file).st_size > size:
                os.ftruncate(self._file, size)
            self._tidy()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; when it returns they are on the disk.

        Raises:
            DataError: the disk is full or fails; the records before are kept.
        """
        size = os.fstat(self._file).st_size
        try:
            _write(self._file, _lines(records))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)  # the file system may have taken a part of it
            kept = f"the {len(self.records)} records before are kept"
            raise DataError(f"{self.path}: cannot be written to ({error.strerror}); {kept}") from error
        self._keep(records)

    def close(self) -> None:
        """Lets others write to the file."""
        self._tidy()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, records: Sequence[Record]) -> None:
        for record in records:
            self._superseded |= self.records.pop(self._key(record), None) is not None
            self.records[self._key(record)] = record

    def _tidy(self) -> None:
        """Removes what is superseded, by a file that takes the place of this one and is locked before."""
        if not self._superseded or not self.path.is_file():
            return
        with suppress(OSError):  # a full disk: the next one does it
            file = write_whole(self.path, _lines(self.records.values()))
            os.close(self._file)
            self._file, self._superseded = file, False


def read_records(path: Path, needed: Collection[str] = ()) -> list[Record]:
    """The records of a file, superseded ones too, or none if it is not there; takes no lock.

    Raises:
        DataError: a line is no record; a torn one at the end is left out.
    """
    return _parse(path, needed)[0]


def write_whole(path: Path, content: bytes) -> int:
    """Writes a file in one step, and returns it open and locked; a kill leaves the old one or the new one."""
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.new")
    file = _open_alone(scratch)
    try:
        os.ftruncate(file, 0)
        _write(file, content)
        scratch.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        os.close(file)
        raise
    return file


def json_line(record: Mapping[str, Any]) -> str:
    """One JSON object without line breaks; numbers that JSON does not have become null."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _lines(records: Collection[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json_line(record)}\n" for record in records).encode()


def _parse(path: Path, needed: Collection[str]) -> tuple[list[Record], int]:
    """The records of a file, and the bytes that they take from its start."""
    *whole, torn = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    found: list[Record] = []
    for number, line in enumerate([*whole, torn], 1):
        record = None
        with suppress(ValueError):
            record = json.loads(line)
        if number <= len(whole) and isinstance(record, dict) and set(needed) <= set(record):
            found.append(record)
            continue
        # A write that was cut short, or blocks that a crash of the machine left unwritten; nobody else's text.
        ends = number > len(whole) or (number == len(whole) and not torn)
        if not ends or not (line[:1] in (b"", b"{", b"\0") if number > len(whole) else b"\0" in line):
            fields = f" with {', '.join(needed)}" if needed else ""
            raise DataError(f"{path}: line {number} is no record, expected an object of JSON{fields}")
        break
    return found, sum(len(line) + 1 for line in whole[: len(found)])


def _open_alone(path: Path) -> int:
    """Opens a file to append to and locks it until it is closed; forked children share the lock."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise InvalidInputError(f"{path}: another run is writing to it, expected to be the only one") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whoever held it has put another file in its place


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
    if stat.S_ISREG(os.fstat(file).st_mode):
        os.fsync(file)
