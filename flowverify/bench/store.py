"""The folder of a run: its suite, its records (:mod:`flowverify.records`), and the log of its processes.

Images that attacks and complete methods found are kept in a file beside the records, which stay lines to be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowverify.bench.suite import Suite
from flowverify.bench.tasks import WITNESS, Key, Record
from flowverify.errors import DataError, InvalidInputError
from flowverify.records import RecordFile, read_records, write_whole

RECORDS, SUITE, RUNS, WITNESSES = "records.jsonl", "suite.json", "runs.jsonl", "witnesses.jsonl"
NEEDED, IMAGE_OF = ("task", "index", "verdict"), ("task", "index", WITNESS)


def key_of(record: Record) -> Key:
    return record["task"], record["index"]


class Store(RecordFile[Key]):
    """The folder of one suite, locked for one run; use as a context manager.

    Raises:
        InvalidInputError: the folder belongs to another suite, holds something else, or another run is using it.
        DataError: it cannot be written to, or a line in the middle of the records is no record.
    """

    def __init__(self, folder: str | Path, suite: Suite) -> None:
        self.folder = Path(folder)
        self._witnesses: RecordFile[Key] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / SUITE).is_file():
                self._check_empty()
            super().__init__(self.folder / RECORDS, key_of, NEEDED)
            try:
                self._claim(suite)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; when it returns they are on the disk.

        Raises:
            InvalidInputError: a record that is there already, and is no error.
            DataError: the disk is full or fails; the records before are kept.
        """
        for record in records:
            known = self.records.get(key_of(record))
            if known is not None and known["verdict"] not in ("error", "timeout"):
                raise InvalidInputError(f"record {key_of(record)} is in {self.path} already")
        self._keep_witnesses(records)
        super().append([{name: value for name, value in one.items() if name != WITNESS} for one in records])

    def _keep_witnesses(self, records: Sequence[Record]) -> None:
        """Before their records: one that is there has its image, whenever this ends."""
        found = {key_of(one): {name: one[name] for name in IMAGE_OF} for one in records if WITNESS in one}
        if not found:
            return
        try:
            if self._witnesses is None:
                self._witnesses = RecordFile(self.folder / WITNESSES, key_of, IMAGE_OF)
            self._witnesses.append(list(found.values()))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._witnesses.records.clear()  # they are for reports; of several of one image the last counts

    def close(self) -> None:
        """Lets others write to the folder."""
        if self._witnesses is not None:
            self._witnesses.close()
        super().close()

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line about a run, which no result depends on."""
        try:
            with RecordFile(self.folder / RUNS, id) as runs:
                runs.append([entry])
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _check_empty(self) -> None:
        """A new folder may hold what a run leaves that was killed before it had written its suite."""
        left = (RECORDS, f".{SUITE}.new", "lock")
        for one in sorted(self.folder.iterdir()):
            if one.name not in left or (one.name == RECORDS and one.stat().st_size):
                raise InvalidInputError(
                    f"{self.folder}: holds {one.name} and no results, expected an empty or new folder"
                )

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
        expected = {(task.name, index) for task in suite.tasks for index in task.positions}
        if foreign := next((key for key in self.records if key not in expected), None):
            raise DataError(f"{self.path}: holds a record of {foreign}, which is not in this suite")
        os.close(write_whole(path, json.dumps(suite.to_json(), indent=1).encode()))


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
    known = {key_of(record): record for record in read_records(folder / RECORDS, NEEDED)}
    order = [(task.name, index) for task in suite.tasks for index in task.positions]
    return suite, [known[key] for key in order if key in known], read_records(folder / RUNS)


def read_witnesses(folder: str | Path) -> dict[Key, str]:
    """The images that were found, packed (:func:`flowverify.bench.tasks.unpacked`), by task and position.

    Raises:
        DataError: the file is damaged.
    """
    found = read_records(Path(folder) / WITNESSES, IMAGE_OF)
    return {key_of(one): one[WITNESS] for one in found}


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
