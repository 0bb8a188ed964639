"""The records of a run: JSON Lines that only ever grow, on disk before anything else happens.

A record is a line. Records are appended by one write, which is flushed to the disk before it counts, so that a
process that is killed leaves whole lines and at most one torn line at the end; the next one cuts it off. An
``error`` that was tried again is superseded by the later line, and is removed when the store is opened next.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flowverify.bench.suite import Suite
from flowverify.bench.tasks import Key, Record
from flowverify.errors import DataError, InvalidInputError
from flowverify.lock import take_lock

RECORDS, SUITE, LOCK, RUNS = "records.jsonl", "suite.json", "lock", "runs.jsonl"


def key_of(record: Record) -> Key:
    return record["task"], record["index"]


class Store:
    """The folder of one suite, locked for one run; use as a context manager.

    Raises:
        InvalidInputError: the folder belongs to another suite, holds something else, or another run is using it.
        DataError: it cannot be written to, or a line in the middle of the records is no record.
    """

    def __init__(self, folder: str | Path, suite: Suite) -> None:
        self.folder = Path(folder)
        self._path = self.folder / RECORDS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            take_lock(self._lock, str(self.folder))
            self._claim(suite)
            self._superseded = False
            self.records = self._recover({(task.name, index) for task in suite.tasks for index in task.positions})
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            os.close(self._lock)
            raise _unwritable(self.folder, error) from error
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; when it returns they are on the disk.

        Raises:
            InvalidInputError: a record that is there already, and is no error.
            DataError: the disk is full or fails; the records before are kept.
        """
        for record in records:
            known = self.records.get(key_of(record))
            if known is not None and known["verdict"] not in ("error", "timeout"):
                raise InvalidInputError(f"record {key_of(record)} is in {self._path} already")
        content = "".join(_line(record) for record in records).encode()
        size = os.fstat(self._file).st_size
        try:
            _write(self._file, content)
        except OSError as error:
            os.ftruncate(self._file, size)  # the file system may have taken a part of it
            kept = f"; the {len(self.records)} records before are kept"
            raise DataError(f"{self._path}: cannot be written to ({error.strerror}){kept}") from error
        for record in records:
            self._superseded |= self.records.pop(key_of(record), None) is not None
            self.records[key_of(record)] = record

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line about a run, which no result depends on."""
        file = os.open(self.folder / RUNS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _write(file, _line(entry).encode())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        finally:
            os.close(file)

    def close(self) -> None:
        os.close(self._file)
        if self._superseded:
            with suppress(OSError):  # a full disk: the next run does it
                self._rewrite()
        os.close(self._lock)  # and with it goes the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self, suite: Suite) -> None:
        """Writes the suite into a new folder, or compares it with the one that is there."""
        path = self.folder / SUITE
        if path.is_file():
            known = _read_suite(path)
            if known.fingerprint != suite.fingerprint:
                raise InvalidInputError(
                    f"{self.folder}: holds results of another suite, {known.name!r} ({known.fingerprint[:12]}), "
                    f"expected {suite.name!r} ({suite.fingerprint[:12]}) or a new folder"
                )
        elif others := sorted(one.name for one in self.folder.iterdir() if one.name not in (LOCK, f".{SUITE}.new")):
            raise InvalidInputError(f"{self.folder}: holds {others[0]} and no results, expected an empty or new folder")
        _replace(path, json.dumps(suite.to_json(), indent=1).encode())

    def _recover(self, expected: set[Key]) -> dict[Key, Record]:
        """The last record of each key; makes the file what it should be if it is not."""
        content = self._path.read_bytes() if self._path.is_file() else b""
        kept = parse_records(content, self._path)
        if foreign := next((key for key in kept if key not in expected), None):
            raise DataError(f"{self._path}: holds a record of {foreign}, which is not in this suite")
        self.records = kept
        if content and (content.count(b"\n") != len(kept) or not content.endswith(b"\n")):
            self._rewrite()
        return kept

    def _rewrite(self) -> None:
        _replace(self._path, "".join(_line(record) for record in self.records.values()).encode())


def read_folder(folder: str | Path) -> tuple[Suite, list[Record], list[dict[str, Any]]]:
    """The suite of a folder, its records in the order of the suite, and the log of its runs; takes no lock.

    Raises:
        InvalidInputError: the folder does not hold results.
        DataError: a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / SUITE).is_file():
        raise InvalidInputError(f"{folder}: holds no {SUITE}, expected the folder of a run (flowverify bench --out)")
    suite = _read_suite(folder / SUITE)
    path = folder / RECORDS
    known = parse_records(path.read_bytes(), path) if path.is_file() else {}
    order = [(task.name, index) for task in suite.tasks for index in task.positions]
    log = list(_lines((folder / RUNS).read_bytes(), folder / RUNS)) if (folder / RUNS).is_file() else []
    return suite, [known[key] for key in order if key in known], log


def parse_records(content: bytes, path: Path) -> dict[Key, Record]:
    """The last record of each key; a torn last line is left out.

    Raises:
        DataError: another line is no record.
    """
    result: dict[Key, Record] = {}
    for record in _lines(content, path):
        result.pop(key_of(record), None)
        result[key_of(record)] = record
    return result


def _lines(content: bytes, path: Path) -> Iterator[Record]:
    parts = content.split(b"\n")
    last = len(parts) - 1 if parts[-1] else len(parts) - 2
    needed = {"task", "index", "verdict"} if path.name == RECORDS else set()
    for number, part in enumerate(parts[:-1]):  # what follows the last line break is torn
        try:
            record = json.loads(part)
            if not isinstance(record, dict) or not needed <= set(record):
                raise ValueError("no record")
        except ValueError as error:
            if number == last:  # blocks that a crash of the machine left unwritten
                return
            raise DataError(f"{path}: line {number + 1} is damaged, expected a record") from error
        yield record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
    os.fsync(file)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file in one step: whoever is killed leaves the old one or the new one."""
    scratch = path.with_name(f".{path.name}.new")
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write(file, content)
    finally:
        os.close(file)
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_suite(path: Path) -> Suite:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        suite = Suite.from_json(values)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}), expected the suite of a run") from error
    if suite.fingerprint != values["fingerprint"]:
        raise DataError(f"{path}: its fingerprint does not fit its content, expected the file as it was written")
    return suite


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be written to ({error.strerror or error}), expected a writable folder")


__all__ = ["RECORDS", "Store", "key_of", "parse_records", "read_folder"]
