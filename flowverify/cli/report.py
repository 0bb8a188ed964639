"""What commands share: errors on one line, consoles, progress bars, tables, and JSON lines."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from flowverify.errors import FlowverifyError
from flowverify.records import json_line as json_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

P = ParamSpec("P")

BAD_INPUT, INTERRUPTED, FAILED = 2, 130, 1  # exit codes
UNBROKEN = 240  # columns; the widest table has less


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def print_error(message: str) -> None:
    """``error: ...`` on standard error."""
    typer.echo(f"error: {message}", err=True)


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turns what a user can mend into one line on standard error and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of our output has gone; typer ends quietly
        except (FlowverifyError, OSError) as error:
            print_error(one_line(error))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def progress_bar(*, quiet: bool = False) -> Progress:
    """A progress bar on standard error, shown on terminals only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def schema_option(load: Callable[[], dict[str, Any]]) -> Any:
    """The option ``--schema`` of a command that reads a file of settings."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(json.dumps(load(), indent=1))
            raise typer.Exit

    help_text = "Print the JSON schema of such a file, by which editors complete and check it, and exit."
    return typer.Option("--schema", callback=show, is_eager=True, help=help_text)


def output() -> Console:
    """Standard output for tables and summaries; in a file or a pipe no line is broken for want of width."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, UNBROKEN)
    return console


def table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    """A table whose columns are numbers, aligned right, except those in ``left``."""
    from rich.table import Table

    result = Table()
    for column in columns:
        is_text = column in left
        result.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    return result
