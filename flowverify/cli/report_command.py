"""``flowverify report``: the results of a suite as a page, as CSV and as LaTeX tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowverify.cli.bench import use_data_folder
from flowverify.cli.options import DataDir
from flowverify.cli.report import user_errors


@user_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Of the results, as given to `flowverify bench --out`.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; by default the same folder.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write report.html, one page that needs no network, records.csv, summary.csv and tables.tex.

    A run that is not finished, or still going on, is reported as far as it is.
    """
    use_data_folder(data_dir)

    from flowverify.bench.report import write_report

    for path in write_report(folder, out):
        typer.echo(f"wrote {path}")
