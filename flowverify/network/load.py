"""One entry for every kind of network that a user may give: files in all their forms, modules, canonical networks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network.from_onnx import read_onnx
from flowverify.network.from_torch import from_torch
from flowverify.network.graph import Network
from flowverify.network.operations import first_line
from flowverify.network.reading import Reading, module_form
from flowverify.quiet import quiet, without_warnings

FORMS = ("PATH.onnx", "PATH.pt2", "PATH.pt (TorchScript)", "PATH.py:FACTORY", "MODULE:FACTORY")
OPSET = 17  # of the ONNX that TorchScript is read through


def is_source(text: str) -> bool:
    """Whether a text is one of :data:`FORMS`."""
    return Path(text).suffix in (".onnx", ".pt2", ".pt", ".pth", ".ts") or ":" in text


def load_network(
    source: str | Path | nn.Module | Network,
    input_shape: Sequence[int] | None = None,
    reading: Reading | None = None,
) -> Network:
    """The canonical form of a file, a ``torch.nn.Module`` or a network that is canonical already.

    Files are ONNX (.onnx), an exported program (.pt2, ``torch.export.save``) or TorchScript (.pt, ``torch.jit.save``).
    ``net.py:make`` or ``package.module:make`` is a function of a Python file or module that returns a module; it is
    run, and gets the weights of ``reading.weights``, a state dict. Nothing else that a file holds is executed.

    Args:
        source: a path or factory as above, a module, or a network (returned as it is).
        input_shape: (C, H, W); needed for all but ONNX files that say it themselves.
        reading: what a file or a module does not say about itself.

    Raises:
        InvalidInputError: another type, a missing ``input_shape``, or one that does not fit.
        ModelFileError: a file is missing or corrupt, holds weights without a network, or its code fails.
        UnsupportedOperationError: see :func:`read_onnx` and :func:`from_torch`.
    """
    reading = reading or Reading()
    if isinstance(source, Network):
        if input_shape is not None and tuple(input_shape) != source.input_shape:
            raise InvalidInputError(f"input shape {tuple(input_shape)}: expected {source.input_shape}")
        return source
    if not isinstance(source, str | Path | nn.Module):
        raise InvalidInputError(f"network of type {type(source).__name__}: expected a path, a module or a Network")
    if not isinstance(source, nn.Module):
        text, path = str(source), Path(source)
        made = ":" in text and not path.exists()
        if reading.weights is not None and not made:
            raise InvalidInputError(f"weights {reading.weights}: expected with a factory, PATH.py:FACTORY, alone")
        if not made and path.suffix not in (".pt2", ".pt", ".pth", ".ts"):
            return read_onnx(source, input_shape, reading)
        _check_shape(input_shape, text)
        if made:
            source = make_module(text, reading.weights)
        elif path.suffix == ".pt2":
            source = _Exported(path)
        else:
            return _from_script(path, input_shape or (), reading)
    _check_shape(input_shape, f"module {type(source).__name__}")
    return from_torch(source, input_shape or (), reading)


def _check_shape(input_shape: Sequence[int] | None, what: str) -> None:
    if input_shape is None or len(input_shape) != 3:
        given = "" if input_shape is None else f" {tuple(input_shape)}"
        raise InvalidInputError(f"{what} without input_shape{given}: expected (channels, height, width)")


class _Exported(nn.Module):
    """The module of a saved program; it is in evaluation mode for good.

    Raises:
        ModelFileError: the file is no exported program.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        with _reading(path, "an exported program of torch.export.save"):
            self.body = torch.export.load(path).module()

    def forward(self, images: torch.Tensor) -> Any:
        return self.body(images)

    def train(self, mode: bool = True) -> Self:
        return self


def _from_script(path: Path, input_shape: Sequence[int], reading: Reading) -> Network:
    channels, height, width = (int(size) for size in input_shape)
    sample = module_form((channels, height, width), reading.layout).sample
    with _reading(path, "a network: TorchScript (torch.jit.save), or weights with PATH.py:FACTORY and weights="):
        module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder, without_warnings():
        target = Path(folder) / f"{path.stem}.onnx"
        try:
            with quiet():
                torch.onnx.export(
                    module, (torch.zeros(1, *sample),), str(target), input_names=["images"], opset_version=OPSET,
                    dynamic_axes={"images": {0: "batch"}}, dynamo=False,
                )  # fmt: skip
        except Exception as error:  # scripts are anybody's code
            raise ModelFileError(f"model file {str(path)!r}: cannot be traced ({first_line(error)})") from error
        return read_onnx(target, input_shape, reading)


def make_module(text: str, weights: str | None = None) -> nn.Module:
    """What the factory of PATH.py:FACTORY or MODULE:FACTORY returns, with the weights of a file; its code is run.

    Raises:
        ModelFileError: the code cannot be run, or makes no module, or the weights do not fit.
    """
    where, _, name = text.rpartition(":")
    try:
        made = getattr(_module(where), name)
        module = made() if isinstance(made, Callable) and not isinstance(made, nn.Module) else made  # type: ignore[arg-type]
    except Exception as error:  # it is anybody's code
        raise ModelFileError(f"model {text!r}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelFileError(f"model {text!r}: returned {type(module).__name__}, expected a torch.nn.Module")
    if weights is not None:
        _fill(module, Path(weights))
    return module


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {where}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _fill(module: nn.Module, path: Path) -> None:
    with _reading(path, "a state dict (torch.save(module.state_dict(), PATH))"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(found, Mapping) and isinstance(found.get(key), (Mapping, list)):
                found = found[key]
        if isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
        if not isinstance(found, Mapping):
            raise TypeError(f"it holds {type(found).__name__}")
        prefix = "module."  # of DataParallel
        module.load_state_dict({key.removeprefix(prefix): value for key, value in found.items()})


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r}: expected an existing file")
    try:
        with without_warnings():
            yield
    except Exception as error:  # a corrupt file can raise anything
        raise ModelFileError(
            f"model file {str(path)!r} cannot be read ({first_line(error)}): expected {expected}"
        ) from error
