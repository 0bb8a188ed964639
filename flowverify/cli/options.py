"""Options that several commands take, and the checks of their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import DATASETS, help_of

Model = Annotated[str, typer.Argument(help="A shipped model (see `flowverify models`) or the path of an ONNX file.")]
DatasetName = Annotated[str | None, typer.Option(help=f"{DATASETS.listing()}; by default the shipped model's own.")]
Index = Annotated[str | None, typer.Option(help="Which images: 0:100, :50, 5 or 3,7,9; by default the first 100.")]
Split = Annotated[str, typer.Option(help="test or train.")]
INCOMPLETE = "flowverify.certifiers.options:IncompleteOptions"
Bound = Annotated[str, typer.Option(help=help_of(INCOMPLETE, "bound"))]
Ground = Annotated[
    str, typer.Option(help="The ground cost: l1, l2, local:5 (within 5 x 5 windows), or a power such as l2^2 (W_2).")
]
Cap = Annotated[float | None, typer.Option(help="Largest value of a pixel; without it, no limit.")]
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
        InvalidInputError: it does not end in .png, or its folder cannot be written to.
        DependencyError: matplotlib is not installed.
    """
    from flowverify.figures import require_matplotlib

    if path.suffix.lower() != ".png":
        raise InvalidInputError(f"picture {path}: expected a file name that ends in .png")
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
