"""One entry for every kind of network that a user may give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from flowverify.errors import InvalidInputError
from flowverify.network.from_onnx import read_onnx
from flowverify.network.from_torch import from_torch
from flowverify.network.graph import Network


def load_network(source: str | Path | nn.Module | Network, input_shape: Sequence[int] | None = None) -> Network:
    """The canonical form of an ONNX file, a ``torch.nn.Module`` or a network that is canonical already.

    Args:
        source: the path of an .onnx file, a module, or a network (returned as it is).
        input_shape: (C, H, W); needed for a module.

    Raises:
        InvalidInputError: another type, a missing ``input_shape``, or one that does not fit.
        ModelFileError, UnsupportedOperationError: see :func:`read_onnx` and :func:`from_torch`.
    """
    if isinstance(source, Network):
        if input_shape is not None and tuple(input_shape) != source.input_shape:
            raise InvalidInputError(f"input shape {tuple(input_shape)}: expected {source.input_shape}")
        return source
    if isinstance(source, nn.Module):
        if input_shape is None:
            raise InvalidInputError(
                f"module {type(source).__name__} without input_shape: expected (channels, height, width)"
            )
        return from_torch(source, input_shape)
    if isinstance(source, str | Path):
        return read_onnx(source, input_shape)
    raise InvalidInputError(f"network of type {type(source).__name__}: expected a path, a module or a Network")
