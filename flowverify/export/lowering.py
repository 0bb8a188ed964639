"""Rewrites a network with the few operations that outside verifiers read right: Linear, Conv2d, Add, ReLU, shapes.

Convolutions lose groups and dilation (Marabou's Python reader stops at the one and ignores the other); other
affine operations become convolutions or dense layers; LeakyReLU becomes a sum. All of it is exact.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import UnsupportedOperationError
from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import (
    Add,
    Reshape,
    ScaleShift,
    is_affine,
    operation_name,
)

MAX_ENTRIES = 1 << 26  # of a dense layer that replaces an operation: half a gigabyte in float64
_KEPT = (nn.ReLU, nn.Flatten, Reshape, Add)


def lower(graph: Graph) -> Graph:
    """The same function in float64, of Linear, Conv2d, Add, ReLU, Flatten and Reshape only.

    Raises:
        UnsupportedOperationError: MaxPool2d, Sigmoid or Tanh, which these cannot express; or a dense layer of
            more than ``MAX_ENTRIES`` entries would be needed.
    """
    builder = _Builder(copy.deepcopy(graph).cpu().double())
    for node in builder.source.nodes:
        builder.add(node)
    return Graph(graph.input_shape, builder.nodes)


class _Builder:
    def __init__(self, source: Graph) -> None:
        self.source = source
        self.nodes: list[Node] = []
        self.names = {INPUT: INPUT}
        self.shapes = {INPUT: source.input_shape}

    def emit(self, name: str, operation: nn.Module, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        self.nodes.append(Node(name, operation, inputs, shape))
        self.shapes[name] = shape
        return name

    def add(self, node: Node) -> None:
        inputs = tuple(self.names[name] for name in node.inputs)
        operation: Any = node.operation
        label = f"{len(self.names)}_{operation_name(operation)}"
        if isinstance(operation, _KEPT) or (isinstance(operation, nn.Linear) and len(node.shape) == 1):
            name = self.emit(label, operation, inputs, node.shape)
        elif isinstance(operation, nn.Conv2d):
            name = self.emit(label, plain_convolution(operation), inputs, node.shape)
        elif isinstance(operation, nn.AvgPool2d) and (operation.count_include_pad or operation.padding in (0, (0, 0))):
            name = self.emit(label, _average(operation, node.shape[0]), inputs, node.shape)
        elif isinstance(operation, ScaleShift) and _by_channel(operation, node.shape):
            scale, shift = (_channel(t, node.shape[0]) for t in (operation.scale, operation.shift))
            name = self.emit(label, _diagonal_convolution(scale, shift), inputs, node.shape)
        elif isinstance(operation, nn.LeakyReLU):
            name = self._leaky(label, float(operation.negative_slope), inputs, node.shape)
        elif is_affine(operation):
            name = self._dense(label, operation, inputs, node.shape)
        else:
            raise UnsupportedOperationError(
                f"node {node.name!r} ({operation_name(operation)}): cannot be exported with Gemm, MatMul, Add, Conv, "
                "Relu, Flatten and Reshape; expected a network of affine operations, ReLU and LeakyReLU"
            )
        self.names[node.name] = name

    def _leaky(self, label: str, slope: float, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """slope * x + (1 - slope) * relu(x)."""
        positive = self.emit(f"{label}_positive", nn.ReLU(), inputs, shape)
        parts: list[str] = []
        for value, factor in ((inputs[0], slope), (positive, 1 - slope)):
            part = f"{label}_{len(parts)}"
            if len(shape) == 3:
                factors = torch.full((shape[0],), factor, dtype=torch.float64)
                parts.append(
                    self.emit(part, _diagonal_convolution(factors, torch.zeros_like(factors)), (value,), shape)
                )
            else:
                scale = ScaleShift(torch.tensor(factor, dtype=torch.float64))
                parts.append(self._dense(part, scale, (value,), shape))
        return self.emit(label, Add(), tuple(parts), shape)

    def _dense(self, label: str, operation: nn.Module, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Any affine operation, as a sum of dense layers, one an input."""
        sizes = [math.prod(self.shapes[name]) for name in inputs]
        entries = sum(sizes) * math.prod(shape)
        if entries > MAX_ENTRIES:
            raise UnsupportedOperationError(
                f"node {label!r}: a dense layer of {entries:,} entries would have to replace it, expected at most "
                f"{MAX_ENTRIES:,}"
            )
        zeros = [torch.zeros(1, *self.shapes[name], dtype=torch.float64) for name in inputs]
        with torch.no_grad():
            bias = operation(*zeros).flatten()
        parts = []
        for position, name in enumerate(inputs):
            flat = name
            if len(self.shapes[name]) > 1:
                flat = self.emit(f"{label}_flat{position}", nn.Flatten(), (name,), (sizes[position],))
            layer = nn.Linear(sizes[position], bias.numel(), bias=position == 0, dtype=torch.float64)
            basis = torch.eye(sizes[position], dtype=torch.float64).reshape(-1, *self.shapes[name])
            others = [value.expand(sizes[position], *value.shape[1:]) for value in zeros]
            others[position] = basis
            with torch.no_grad():
                layer.weight.copy_((operation(*others).flatten(1) - bias).T)
                if layer.bias is not None:
                    layer.bias.copy_(bias)
            last = len(inputs) == 1 and len(shape) == 1
            parts.append(self.emit(label if last else f"{label}_{position}", layer, (flat,), (bias.numel(),)))
        value = parts[0]
        if len(parts) > 1:
            value = self.emit(label if len(shape) == 1 else f"{label}_sum", Add(), tuple(parts), (bias.numel(),))
        return value if len(shape) == 1 else self.emit(label, Reshape(shape), (value,), shape)


def plain_convolution(layer: nn.Conv2d) -> nn.Conv2d:
    """The same convolution without groups and dilation: its kernel is filled up with zeros."""
    groups, dilation = layer.groups, layer.dilation
    outputs, inputs, height, width = layer.weight.shape
    size = ((height - 1) * dilation[0] + 1, (width - 1) * dilation[1] + 1)
    kernel = layer.weight.new_zeros(outputs, inputs * groups, *size)
    for group in range(groups):
        rows = slice(group * outputs // groups, (group + 1) * outputs // groups)
        columns = slice(group * inputs, (group + 1) * inputs)
        kernel[rows, columns, :: dilation[0], :: dilation[1]] = layer.weight[rows].detach()
    return _convolution(kernel, layer.bias, layer.stride, layer.padding)


def _convolution(kernel: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> nn.Conv2d:
    outputs, inputs, height, width = kernel.shape
    layer = nn.Conv2d(
        inputs, outputs, (height, width), stride=stride, padding=padding, bias=bias is not None, dtype=kernel.dtype
    )
    state = {"weight": kernel} if bias is None else {"weight": kernel, "bias": bias.detach()}
    layer.load_state_dict(state)
    return layer


def _average(layer: nn.AvgPool2d, channels: int) -> nn.Conv2d:
    size: Any = layer.kernel_size
    height, width = (size, size) if isinstance(size, int) else size
    window = torch.full((height, width), 1 / (height * width), dtype=torch.float64)
    kernel = torch.eye(channels, dtype=torch.float64)[:, :, None, None] * window
    return _convolution(kernel, None, layer.stride, layer.padding)


def _diagonal_convolution(scale: Tensor, shift: Tensor) -> nn.Conv2d:
    return _convolution(torch.diag(scale)[:, :, None, None], shift, 1, 0)


def _by_channel(operation: ScaleShift, shape: tuple[int, ...]) -> bool:
    """Whether the constants depend on nothing but the channel of an image."""
    tensors = (operation.scale, operation.shift)
    return len(shape) == 3 and all(t.numel() == 1 or (t.ndim == 3 and t.shape[1:] == (1, 1)) for t in tensors)


def _channel(value: Tensor, channels: int) -> Tensor:
    return value.double().reshape(-1).expand(channels)
