"""The images of one call: loaded, computed a few at a time, printed and saved as they are done.

They go to a file of JSON lines that a command fills image by image, and goes on with when it is run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from hashlib import sha256
from json import loads
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from flowverify.cli.common import (
    INTERRUPTED,
    Log,
    Source,
    check_device,
    check_writable,
    explain,
    json_line,
    one_line,
    output,
    print_error,
    progress_bar,
    say,
    table,
    versions,
)
from flowverify.errors import FlowverifyError, InvalidInputError
from flowverify.records import RecordFile
from flowverify.results import Interrupted, Verdict

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch import Tensor

    from flowverify.data import Dataset
    from flowverify.network import Network


LATER = ("sha256",)  # settings that records of earlier versions do not have


class Records:
    """Records of images by position, in a file (:class:`flowverify.records.RecordFile`) or nowhere.

    Args:
        path: of the file, or None; one that is there is gone on with.
        settings: what the results depend on; every record holds them.
        noted: what else every record holds, such as versions; records with others are gone on with.

    Raises:
        InvalidInputError: the file cannot be written to, another process is writing to it, or it holds records of
            other settings.
        DataError: it holds something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], noted: Mapping[str, Any] | None = None) -> None:
        self.path, self.settings, self.noted = path, dict(settings), dict(noted or {})
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
                if record.get(key) != value and (key in record or key not in LATER):
                    self.close()
                    raise InvalidInputError(
                        f"save {path}: line {number} was computed with {key} {record.get(key)!r}, given {value!r}, "
                        "expected the same (or another file)"
                    )
            self.done[position] = record
        if older := sum(not set(LATER) <= set(record) for record in self.done.values()):
            say(f"save {path}: {older} records of an earlier version do not say of which model file; taken as of this")

    def add(self, position: int, record: Mapping[str, Any]) -> str:
        """Appends a record to the file at once, and returns its line."""
        whole = {"index": position, **record, **self.settings, **self.noted}
        if self._file is not None:
            self._file.append([whole])
        return json_line(whole)

    def close(self) -> None:
        """Lets others write to the file."""
        if self._file is not None:
            self._file.close()


def check_radius(radius: float) -> float:
    """A radius of a ball; raises as :class:`flowverify.ball.WassersteinBall`."""
    from flowverify.ball import WassersteinBall

    return WassersteinBall(radius).radius


class Radii:
    """What ``--radius`` asks about: nothing (a search), one radius, or a file with a radius of each image.

    A line of the file is a position in the data set and a radius, with a comma or spaces between them, or a record
    that ``--save`` or ``--json`` wrote. A first line of words is passed over.

    Args:
        given: the option's text.

    Raises:
        InvalidInputError: neither a number nor a file that can be read; a line that is something else; a position
            that is in the file twice.
    """

    def __init__(self, given: str | None) -> None:
        self.asked: float | str | None = None  # what records hold
        self._radii: dict[int, float] | None = None
        self._path = given
        if given is None:
            return
        try:
            number = float(given)
        except ValueError:
            self.asked = self._read_file(given)
        else:
            self.asked = check_radius(number)

    def _read_file(self, given: str) -> str:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is no text"
            raise InvalidInputError(f"radius {given}: {why}, expected a number or a file of radii") from error
        self._radii = self._read(text)
        return f"of {len(self._radii)} images, SHA-256 {sha256(text.encode()).hexdigest()}"

    def _read(self, text: str) -> dict[int, float]:
        radii: dict[int, float] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or (number == 1 and line.strip()[0].isalpha()):
                continue
            try:
                if line.lstrip().startswith("{"):
                    record = loads(line)
                    index, radius = int(record["index"]), float(record["radius"])
                else:
                    first, second = line.replace(",", " ").split()
                    index, radius = int(first), float(second)
                radius = check_radius(radius)
            except (ValueError, KeyError, TypeError, InvalidInputError) as error:
                raise InvalidInputError(
                    f"radius {self._path}: line {number} is {line.strip()[:60]!r}, expected INDEX,RADIUS"
                ) from error
            if index in radii:
                raise InvalidInputError(
                    f"radius {self._path}: line {number} is the second of image {index}, expected one"
                )
            radii[index] = radius
        return radii

    def check(self, positions: Sequence[int]) -> None:
        """Raises InvalidInputError: an image has no radius in the file."""
        missing = [place for place in positions if self._radii is not None and place not in self._radii]
        if missing:
            raise InvalidInputError(f"radius {self._path}: has none for image {missing[0]}, expected one for each")

    def of(self, position: int) -> float | None:
        """The radius asked about for an image; None for a search."""
        if self._radii is not None:
            return self._radii[position]
        return None if self.asked is None else float(self.asked)

    def groups(self, positions: Sequence[int]) -> dict[float | None, list[int]]:
        """The rows of ``positions`` that are asked about the same radius, in their order."""
        found: dict[float | None, list[int]] = {}
        for row, position in enumerate(positions):
            found.setdefault(self.of(position), []).append(row)
        return found


SHORT_TABLE = 20
LEVELS = 2.0  # brighter images are probably levels from 0 to 255
DEFAULT_COUNT = 100

Work = Callable[["Dataset", list[int], Callable[[int], None]], Sequence[Mapping[str, Any]]]


class Job:
    """The images of one call, and what comes out of it.

    Args:
        source: a shipped model, a file or a factory.
        save: a file of JSON lines that is gone on with, if it is there.
        target: the one class that counts as wrong; images that have it as their label are left out, with a line that
            says how many.

    Raises:
        FlowverifyError: a model, data set, index, device or file that is not there, or not usable.
    """

    def __init__(
        self,
        source: Source,
        dataset: str | None,
        index: str | None,
        split: str,
        data_dir: Path | None,
        device: str,
        save: Path | None,
        *,
        json: bool,
        target: int | None = None,
    ) -> None:
        from flowverify.data import parse_index
        from flowverify.zoo import source_digest

        place = check_device(device)
        self.save = None if save is None else check_writable(save, "save")
        network, self.data = load_inputs(source, dataset, split, data_dir)
        self.network: Network = network.to(place)
        self.positions = list(
            parse_index(f":{min(DEFAULT_COUNT, len(self.data))}" if index is None else index, len(self.data))
        )
        if target is not None:
            self.positions = self._without(target)
        say_brightness(self.data.name, self.data.images)
        self.title, self.json = f"{source.model} on {self.data.name}", json
        self.settings: dict[str, Any] = {**source.settings, "dataset": self.data.name, "split": split}
        self.settings |= {"target": target, "sha256": source_digest(source.model, source.weights)}
        explain_model(source, self.network, device)
        explain(f"data {self.data.name} {self.data.split}: {len(self.positions)} of {len(self.data)} images")
        self.interrupted, self.start, self.seconds, self.fresh, self.known = False, perf_counter(), 0.0, 0, 0
        self._bar: tuple[Progress, TaskID] | None = None

    def _without(self, target: int) -> list[int]:
        """The positions of images whose label is not the target."""
        own = [place for place in self.positions if int(self.data.labels[place]) == target]
        if len(own) == len(self.positions):
            raise InvalidInputError(f"target {target}: is the label of every image chosen, expected another class")
        if own:
            say(f"{len(own)} of {len(self.positions)} images have the label {target}: left out")
        return [place for place in self.positions if place not in set(own)]

    @cached_property
    def chosen(self) -> Dataset:
        """All images of the call, with their labels."""
        return self.data[self.positions]

    def run(
        self,
        work: Work,
        settings: Mapping[str, Any],
        *,
        at_once: int = 10,
        cost: int = 1,
        failed: Callable[[list[int], float, str], Sequence[Mapping[str, Any]]] | None = None,
    ) -> list[dict[str, Any]]:
        """Computes what is missing, prints each record with ``json``, and returns all in the order asked for.

        Args:
            work: from images, their positions and what is to be told of progress, to a record of each.
            settings: what the results depend on, beside the model and the data.
            at_once: images between two lines of output.
            cost: of an image, in what ``work`` tells of progress.
            failed: the records of images for which ``work`` broke down after so many seconds, with the reason; the
                next ones are tried. Without it, that ends the call.
        """
        explain(f"asked: {json_line(settings)}")
        records = Records(self.save, {**settings, **self.settings}, {"versions": versions()})
        found = {
            place: record
            for place in self.positions
            if (record := records.done.get(place)) is not None and record.get("verdict") != Verdict.ERROR
        }
        missing = [place for place in self.positions if place not in found]
        self.known = len(found)
        if self.json:
            for record in found.values():
                typer.echo(json_line(record))

        def keep(positions: Sequence[int], results: Sequence[Mapping[str, Any]]) -> None:
            for position, result in zip(positions, results, strict=False):
                line = records.add(position, result)
                found[position] = loads(line)
                self.fresh += 1
                if self.json:
                    typer.echo(line)
            sys.stdout.flush()

        log, done, start = Log(), 0, perf_counter()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.advance(task, count)
            total = cost * len(missing)
            left = (perf_counter() - start) * max(0, total - done) / max(1, done)
            log.tell(lambda: f"{self.title}: {done // cost} of {len(missing)} images, {left:.0f} s left")

        with closing(records), progress_bar(quiet=self.json and output().is_terminal) as bar:
            task = bar.add_task(self.title, total=cost * len(missing))
            self._bar = bar, task
            try:
                for first in range(0, len(missing), at_once):
                    part, begin = missing[first : first + at_once], perf_counter()
                    try:
                        keep(part, work(self.data[part], part, advance))
                    except Interrupted as stopped:
                        keep(part, [certificate.to_json() for certificate in stopped.certificates])
                        raise
                    except Exception as error:  # whatever one dies of must not cost the others
                        if failed is None:
                            raise
                        reason = f"{type(error).__name__}: {one_line(error)}"
                        print_error(f"images {part[0]} to {part[-1]}: {reason}")
                        keep(part, failed(part, (perf_counter() - begin) / len(part), reason))
                        advance(cost * len(part))
            except KeyboardInterrupt:
                self.interrupted = True
        self.seconds = perf_counter() - self.start
        return [found[position] for position in self.positions if position in found]

    def say(self, state: str) -> None:
        """Shows what a long computation is at beside the name of the progress bar."""
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, description=f"{self.title}: {state}")

    def print_table(
        self,
        records: Sequence[Any],
        columns: tuple[str, ...],
        cells: Callable[[Any], tuple[str, ...]],
        *,
        everything: bool = False,
        more: str = "--json or --save gives all",
    ) -> None:
        """Prints a line of ``cells`` for each record, for the first ones unless ``everything``."""
        rows = table(*columns, left=("outcome", "verdict"))
        shown = records if everything else records[:SHORT_TABLE]
        for record in shown:
            rows.add_row(*cells(record))
        output().print(rows)
        if len(shown) < len(records):
            typer.echo(f"{len(records) - len(shown)} more images; {more}")

    def finish(self, summary: str) -> None:
        """Prints the summary, with the time that it took and how much was known before."""
        rate = f", {1000 * self.seconds / self.fresh:.1f} ms an image" if self.fresh else ""
        before = f"; {self.known} were in the file" if self.known else ""
        typer.echo(f"{summary}; {self.seconds:.1f} s{rate}{before}")

    def end(self) -> None:
        """Exits with the code of an interruption, if there was one."""
        if self.interrupted:
            print_error(f"interrupted after {self.known + self.fresh} of {len(self.positions)} images")
            raise typer.Exit(INTERRUPTED)


def explain_model(source: Source, network: Network, device: str) -> None:
    """Says which network was read, from which file, where the user wants to know more."""
    from flowverify.zoo import source_digest

    shape, digest = " x ".join(map(str, network.input_shape)), source_digest(source.model, source.weights)
    where = f"{network.num_classes} classes, on {device}; SHA-256 {digest or 'of no file'}"
    explain(f"model {source.model}: {shape} images, {where}")


def say_brightness(name: str, images: Tensor) -> None:
    """Says so on standard error where images are brighter than pixels usually are."""
    brightest = float(images.max()) if images.numel() else 0.0
    if brightest > LEVELS:
        say(
            f"{name}: pixels go up to {brightest:g}; radii do not depend on that, but the network has to take such "
            "images"
        )


def load_inputs(source: Source, dataset: str | None, split: str, data_dir: Path | None) -> tuple[Network, Dataset]:
    """A model and its data set, by default the one of a shipped model's card."""
    from flowverify.data import load_dataset
    from flowverify.zoo import load_card

    shipped = source.load() if source.is_shipped else None
    if dataset is None and shipped is None:
        raise InvalidInputError(f"model {source.model}: a file does not name its data set, expected --dataset NAME")
    data = load_dataset(dataset or load_card(source.model).dataset, split, data_dir)
    network = source.load(data.input_shape) if shipped is None else shipped
    if data.note:
        say(f"{data.name}: {data.note}")
    return network, data
