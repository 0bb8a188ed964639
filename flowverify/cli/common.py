"""What commands share: options and checks of their values, errors on one line, consoles, progress bars, JSON lines."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from flowverify.errors import FlowverifyError, InvalidInputError, UnknownNameError
from flowverify.records import json_line as json_line
from flowverify.registry import DATASETS, help_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from flowverify.network import Network

N = TypeVar("N", int, float)

Model = Annotated[
    str,
    typer.Argument(
        help="A shipped model (see `flowverify models`); an .onnx, .pt2 or TorchScript file; or PATH.py:FACTORY, a "
        "function that returns a torch module."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(help="Channels of a file first (nchw) or last (nhwc), where it does not say.", show_default=False),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="Images of a file; by default those of the data set.", show_default=False),
]
Mean = Annotated[
    str | None,
    typer.Option(help="What was taken off pixels for a file that wants it: M, or one a channel.", show_default=False),
]
Std = Annotated[
    str | None, typer.Option(help="What they were divided by then: S, or one a channel.", show_default=False)
]
Output = Annotated[str | None, typer.Option(help="Which of several outputs holds the classes.", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="State dict (torch.save) for what a factory returns.", show_default=False)
]
DatasetName = Annotated[str | None, typer.Option(help=f"{DATASETS.listing()}; by default the shipped model's own.")]
Index = Annotated[str | None, typer.Option(help="Which images: 0:100, :50, 5 or 3,7,9; by default the first 100.")]
Split = Annotated[str, typer.Option(help="test or train.")]
INCOMPLETE = "flowverify.certifiers.options:IncompleteOptions"
Bound = Annotated[str, typer.Option(help=help_of(INCOMPLETE, "bound"))]
Ground = Annotated[
    str, typer.Option(help="The ground cost: l1, l2, local:5 (within 5 x 5 windows), or a power such as l2^2 (W_2).")
]
Cap = Annotated[float | None, typer.Option(help="Largest value of a pixel; without it, no limit.")]
Target = Annotated[
    int | None,
    typer.Option(help="Count this class alone as wrong: may it overtake the label? By default every other class."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data files; by default $FLOWVERIFY_DATA, or a download."),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line, and nothing else.")]
Save = Annotated[
    Path | None, typer.Option(help="Also write the JSON lines to this file; if it is there, go on after its records.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Another option of the method; repeat it for several.", show_default=False),
]


@dataclass(frozen=True)
class Source:
    """A model as the command line names it, with what its file does not say about itself."""

    model: str
    layout: str | None = None
    input_shape: str | None = None
    mean: str | None = None
    std: str | None = None
    output: str | None = None
    weights: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_shipped(self) -> bool:
        from flowverify.network.load import is_source

        return not is_source(self.model)

    def load(self, shape: tuple[int, int, int] | None = None) -> Network:
        """The network, for images of this shape unless ``--input-shape`` says another.

        Raises:
            FlowverifyError: see :func:`flowverify.zoo.load_model`.
        """
        from flowverify.zoo import load_model

        given = None if self.input_shape is None else _numbers("input-shape", self.input_shape, int)
        if given is not None:
            if len(given) != 3:
                raise InvalidInputError(f"input-shape {self.input_shape!r}: expected C,H,W")
            shape = (given[0], given[1], given[2])
        mean, std = (
            None if text is None else _numbers(name, text, float)
            for name, text in (("mean", self.mean), ("std", self.std))
        )
        network = load_model(
            self.model, shape, layout=self.layout, mean=mean, std=std, output=self.output, weights=self.weights
        )
        if not self.is_shipped:
            for note in network.notes:
                typer.echo(f"{self.model}: {note}", err=True)
        return network


def _numbers(name: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(f"{name} {text!r}: expected numbers with commas between them") from None


def check_device(name: str) -> Any:
    """The torch device of this name.

    Raises:
        UnknownNameError: neither cpu nor cuda.
        InvalidInputError: there is no such CUDA device here.
    """
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UnknownNameError("device", name, ("cpu", "cuda", "cuda:N"))
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InvalidInputError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def check_picture(path: Path) -> Path:
    """Returns the path of a picture that can be drawn; called before hours of work, not after.

    Raises:
        InvalidInputError: it ends otherwise, or its folder cannot be written to.
        DependencyError: matplotlib is not installed.
    """
    from flowverify.figures import PICTURES, require_matplotlib

    if path.suffix.lower() not in PICTURES:
        raise InvalidInputError(f"picture {path}: expected a file name that ends in {' or '.join(PICTURES)}")
    check_writable(path, "picture")
    require_matplotlib()
    return path


def check_writable(path: Path, what: str) -> Path:
    """Returns a path that a file can be written to, or raises InvalidInputError."""
    if path.is_dir():
        raise InvalidInputError(f"{what} {path}: is a folder, expected a file")
    if not path.parent.is_dir():
        raise InvalidInputError(f"{what} {path}: {path.parent} is not a folder, expected one that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidInputError(f"{what} {path}: cannot be written to, expected a writable file")
    return path


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
