"""The images of one call of ``flowverify smooth``: computed a few at a time, printed and saved as they are done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from json import loads
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

from flowverify.cli.options import check_device
from flowverify.cli.records import Records
from flowverify.cli.report import INTERRUPTED, json_line, output, print_error, progress_bar, table

if TYPE_CHECKING:
    from flowverify.data import Dataset
    from flowverify.network import Network

SHORT_TABLE = 20
DEFAULT_COUNT = 100
AT_ONCE = 10  # images between two lines of output


class Job:
    """The images of one call, and what comes out of it."""

    def __init__(
        self,
        model: str,
        dataset: str | None,
        index: str | None,
        split: str,
        data_dir: Path | None,
        device: str,
        save: Path | None,
        settings: Mapping[str, Any],
        cost: int,
    ) -> None:
        from flowverify.cli.verify import load_inputs
        from flowverify.data import parse_index

        target = check_device(device)
        network, self.data = load_inputs(model, dataset, split, data_dir)
        self.network: Network = network.to(target)
        self.positions = list(
            parse_index(f":{min(DEFAULT_COUNT, len(self.data))}" if index is None else index, len(self.data))
        )
        self.records = Records(save, {**settings, "dataset": self.data.name})
        self.title, self.cost = f"{model} on {self.data.name}", cost
        self.interrupted, self.start, self.seconds, self.fresh = False, perf_counter(), 0.0, 0

    def run(
        self, work: Callable[[Dataset, list[int], Callable[[int], None]], Sequence[Any]], json: bool
    ) -> list[dict[str, Any]]:
        """Computes what is missing, prints each record with ``json``, and returns all in the order asked for."""
        if json:
            for place in self.positions:
                if place in self.records.done:
                    typer.echo(json_line(self.records.done[place]))
        missing = self.records.missing(self.positions)
        found = {place: self.records.done[place] for place in self.positions if place in self.records.done}
        with closing(self.records), progress_bar(quiet=json and output().is_terminal) as bar:
            task = bar.add_task(self.title, total=self.cost * len(missing))
            try:
                for first in range(0, len(missing), AT_ONCE):
                    part = missing[first : first + AT_ONCE]
                    results = work(self.data[part], part, lambda count: bar.advance(task, count))
                    for position, result in zip(part, results, strict=True):
                        line = self.records.add(position, result.to_json())
                        found[position] = loads(line)
                        self.fresh += 1
                        if json:
                            typer.echo(line)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                self.interrupted = True
        self.seconds = perf_counter() - self.start
        return [found[position] for position in self.positions if position in found]

    def print_table(
        self,
        records: list[dict[str, Any]],
        columns: tuple[str, ...],
        cells: Callable[[dict[str, Any]], tuple[str, ...]],
    ) -> None:
        rows = table(*columns, left=("outcome", "verdict"))
        for record in records[:SHORT_TABLE]:
            rows.add_row(*cells(record))
        output().print(rows)
        if len(records) > SHORT_TABLE:
            typer.echo(f"{len(records) - SHORT_TABLE} more images; --json or --save gives all")

    def finish(self, summary: str) -> None:
        known = len(self.positions) - len(self.records.missing(self.positions))
        before = f"; {known} were in the file" if known else ""
        typer.echo(f"{summary}; {self.seconds:.1f} s{before}")

    def end(self) -> None:
        if self.interrupted:
            print_error(f"interrupted after {self.fresh} images")
            raise typer.Exit(INTERRUPTED)
