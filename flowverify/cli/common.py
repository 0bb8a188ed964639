"""What commands share: options and checks of their values, errors on one line, consoles, progress bars, JSON lines.

What is wrong with a call is one line too, and nothing in a list of commands is cut short. A command is a class of
typer's, whose newest releases bring a click of their own: nothing of click is imported here.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from flowverify.bounds.recipes import BOUNDS
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


def completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell offers for an option that takes one of these names."""
    known = list(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


DatasetName = Annotated[
    str | None,
    typer.Option(
        help=f"{DATASETS.listing()}; by default the shipped model's own.", autocompletion=completing(DATASETS)
    ),
]
Index = Annotated[str | None, typer.Option(help="Which images: 0:100, :50, 5 or 3,7,9; by default the first 100.")]
Split = Annotated[str, typer.Option(help="test, train, or validation (the last of train).")]
INCOMPLETE = "flowverify.certifiers.options:IncompleteOptions"
Bound = Annotated[str, typer.Option(help=help_of(INCOMPLETE, "bound"), autocompletion=completing(BOUNDS))]
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
                say(f"{self.model}: {note}")
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
REFUTED, UNDECIDED = 1, 3  # of a question about one image
UNBROKEN = 240  # columns; the widest table has less


def one_line(error: BaseException | str) -> str:
    """The message of an error without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def print_error(message: str) -> None:
    """``error: ...`` on standard error."""
    typer.echo(f"error: {message}", err=True)


class Talk(IntEnum):
    """How much a command says on standard error besides errors."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


_talk = Talk.NORMAL


def say(text: str) -> None:
    """A line on standard error, unless the user wants quiet."""
    if _talk > Talk.QUIET:
        typer.echo(text, err=True)


def explain(text: str) -> None:
    """A line on standard error where the user wants to know more."""
    if _talk >= Talk.VERBOSE:
        typer.echo(text, err=True)


def is_quiet() -> bool:
    """Whether the user wants no more than results and errors."""
    return _talk is Talk.QUIET


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more on standard error: versions, files, settings, where errors arise."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on standard error but errors.")]


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turns what a user can mend into one line on standard error and exit code 2, and an interruption into 130.

    The command gets the options ``--verbose`` and ``--quiet`` besides its own. SIGTERM interrupts it as Ctrl-C does.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        global _talk
        verbose, quiet = kwargs.pop("verbose", False), kwargs.pop("quiet", False)
        _talk = Talk.VERBOSE if verbose else Talk.QUIET if quiet else Talk.NORMAL
        try:
            if verbose and quiet:
                raise InvalidInputError("verbose and quiet: given both, expected one of them")
            explain(versions_text())
            with ended_by_termination():
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of our output has gone; typer ends quietly
        except (FlowverifyError, OSError) as error:
            explain("".join(traceback.format_exception(error)).rstrip())
            print_error(one_line(error))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            _talk = Talk.NORMAL

    signature = inspect.signature(command, eval_str=True)
    more = {"verbose": Verbose, "quiet": Quiet}
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in more.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**command.__annotations__, **more}
    return wrapped


@contextmanager
def ended_by_termination() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, so that what is done is kept and files are closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


DESCRIBED = ("flowverify", "torch", "numpy", "auto_LiRPA")


def versions() -> dict[str, str]:
    """The versions of what results may depend on; imports none of it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in DESCRIBED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def versions_text() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


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
        disable=quiet or is_quiet() or not console.is_terminal,
    )


LOG_EVERY = 30.0  # seconds between lines, where standard error shows no bar


class Log:
    """Where standard error is no terminal, a line on it now and then in place of a progress bar."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, text: Callable[[], str]) -> None:
        """Says how far things are, unless it was said a moment ago."""
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._last >= LOG_EVERY:
            self._last = now
            say(text())


@contextmanager
def working(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """What takes a call to say what is being done, shown on standard error with the time, on terminals only."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=quiet or is_quiet() or not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None)
        yield lambda text: shown.update(task, description=text)


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


UsageError: Any = typer.BadParameter.__base__  # of typer's click, whichever it is
SHOWS_HELP = "NoArgsIsHelpError"
UNCUT = 10_000  # letters of a command's first sentence in a list


class Command(TyperCommand):
    """A command that refuses an option which is given twice and counts once, instead of taking the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            order = self.make_parser(ctx).parse_args(args=list(args))[2]
            for option in dict.fromkeys(order):
                once = not any(getattr(option, name, False) for name in ("multiple", "is_flag", "count"))
                if option.param_type_name == "option" and once and order.count(option) > 1:
                    name = max(option.opts, key=len)
                    raise UsageError(f"{name}: given {order.count(option)} times, expected once", ctx)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A program of several commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command with the whole first sentence of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(UNCUT)) for name, one in commands if one is not None and not one.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the program: what is wrong with the call is one line on standard error and exit code 2."""

        def run() -> Any:
            return super(Group, self).main(args, prog_name, complete_var, False, windows_expand_args, **extra)

        if not standalone_mode:
            return run()
        try:
            code = run()
        except UsageError as error:
            if type(error).__name__ == SHOWS_HELP:
                error.show()
            else:
                where = "" if error.ctx is None else f"; see `{error.ctx.command_path} --help`"
                print_error(one_line(error.format_message()).rstrip(".") + where)
            sys.exit(BAD_INPUT)
        except typer.Abort:
            print_error("interrupted")
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
