"""The command line, ``flowverify COMMAND``: one file for each command, or for a few that belong together.

Every command imports what it needs when it runs, so that ``--help`` answers at once and a missing package is
an error of one line.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flowverify import __version__
from flowverify.cli.attack import attack
from flowverify.cli.bench import bench, plot, report
from flowverify.cli.check import check
from flowverify.cli.common import Command, Group
from flowverify.cli.export import export, vnncomp
from flowverify.cli.lists import add_lists
from flowverify.cli.models import demo, doctor, models, train
from flowverify.cli.smooth import smooth
from flowverify.cli.verify import verify

app = typer.Typer(
    name="flowverify",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Certifies image classifiers against 1-Wasserstein (earth mover's) perturbations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (verify, check, attack, export, vnncomp, bench, report, plot, models, doctor, train, demo):
    app.command(cls=Command)(command)
app.add_typer(smooth, name="smooth")
add_lists(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flowverify {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself; typer reads them off this function."""


def main() -> None:
    """The console script."""
    app(prog_name="flowverify")


__all__ = ["app", "main"]
