"""Rewrites a network in fewer operations: those that an outside verifier, or the host of the CROWN bounds, gets right.

Every rewriting is exact up to the rounding of 1 / (window) in average pooling (theory, section 14):

- average pooling, zero padding: a convolution (and, where padding does not count, a scale);
- convolutions with groups or dilation: without, their kernels filled up with zeros;
- LeakyReLU of any slope s: s x + (1 - s) relu(x);
- maximum pooling of any windows: the windows side by side, each pixel as often as it is read, then pooling of windows
  that neither overlap nor lack anything;
- entries picked along a dimension, values side by side along one: dense layers along it;
- any other affine operation: a sum of dense layers, one an input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flowverify.errors import UnsupportedOperationError
from flowverify.network.affine import operation_matrices
from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import (
    Add,
    Concatenate,
    Index,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    is_affine,
    operation_name,
)

MAX_ENTRIES = 1 << 26  # of a dense layer that replaces an operation: half a gigabyte in float64

Keeps = Callable[[nn.Module], bool]
AnyGraph = TypeVar("AnyGraph", bound=Graph)


@dataclass(frozen=True, eq=False)
class Preactivation:
    """What an activation of the rewritten network reads: a value of the original one, or its pixels by windows.

    Attributes:
        source: the name of the value in the original network.
        windows: None for the value itself; else the positions (k, L) in the last two dimensions, flattened, of the k
            pixels of each of L windows: what is read is value.flatten(-2)[..., windows].
    """

    source: str
    windows: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """What is read, for a value (B, *shape) of the original network."""
        return value if self.windows is None else value.flatten(-2)[..., self.windows.to(value.device)]


@dataclass(frozen=True, eq=False)
class Lowered(Generic[AnyGraph]):
    """The rewritten graph, and what its activations read, in topological order."""

    graph: AnyGraph
    preactivations: tuple[Preactivation, ...]


def keeps_for_export(operation: nn.Module) -> bool:
    """Linear, Conv2d without groups and dilation, Add, ReLU and shapes: what every outside verifier reads right."""
    if isinstance(operation, nn.Conv2d):
        return operation.groups == 1 and tuple(operation.dilation) == (1, 1)
    return isinstance(operation, nn.ReLU | nn.Flatten | Reshape | Add | nn.Linear)


def lower(graph: AnyGraph, keeps: Keeps = keeps_for_export) -> Lowered[AnyGraph]:
    """The same function in float64, of operations that ``keeps`` accepts.

    Args:
        keeps: accepts Linear, Conv2d without groups and dilation, Add, ReLU, Flatten and Reshape at least. Linear is
            kept only along a single dimension, unless Permute is kept too.

    Raises:
        UnsupportedOperationError: MaxPool2d, Sigmoid or Tanh, which the operations kept cannot express; or a dense
            layer of more than ``MAX_ENTRIES`` entries would be needed.
    """
    builder = _Builder(copy.deepcopy(graph).cpu().double(), keeps)
    for node in builder.source.nodes:
        builder.add(node)
    return Lowered(type(graph)(graph.input_shape, builder.nodes), tuple(builder.preactivations))


class _Builder:
    def __init__(self, source: Graph, keeps: Keeps) -> None:
        self.source, self.keeps = source, keeps
        self.nodes: list[Node] = []
        self.preactivations: list[Preactivation] = []
        self.names = {INPUT: INPUT}
        self.shapes = {INPUT: source.input_shape}
        self.permutes, self.scales = keeps(Permute((0,))), keeps(ScaleShift())

    def emit(self, name: str, operation: nn.Module, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        self.nodes.append(Node(name, operation, inputs, shape))
        self.shapes[name] = shape
        return name

    def add(self, node: Node) -> None:
        inputs = tuple(self.names[name] for name in node.inputs)
        operation: Any = node.operation
        label = f"{len(self.names)}_{operation_name(operation)}"
        if isinstance(operation, nn.MaxPool2d) and self.permutes:
            name = self._maximum(label, operation, node.inputs[0], node.shape)
        elif self.keeps(operation) and (not isinstance(operation, nn.Linear) or self.permutes or len(node.shape) == 1):
            if not is_affine(operation):
                self.preactivations.append(Preactivation(node.inputs[0]))
            name = self.emit(label, operation, inputs, node.shape)
        elif isinstance(operation, nn.Conv2d):
            name = self.emit(label, plain_convolution(operation), inputs, node.shape)
        elif isinstance(operation, nn.AvgPool2d) and (self.scales or not _counts_inside_only(operation)):
            name = self._average(label, operation, inputs[0], node.shape)
        elif isinstance(operation, ScaleShift) and _by_channel(operation, node.shape):
            scale, shift = (_channel(t, node.shape[0]) for t in (operation.scale, operation.shift))
            name = self.emit(label, _diagonal_convolution(scale, shift), inputs, node.shape)
        elif isinstance(operation, Pad):
            name = self._pad(label, operation, inputs[0], node.shape)
        elif isinstance(operation, nn.LeakyReLU):
            self.preactivations.append(Preactivation(node.inputs[0]))
            name = self._leaky(label, float(operation.negative_slope), inputs, node.shape)
        elif isinstance(operation, Index) and self.permutes:
            name = self._select(label, operation, inputs[0], node.shape)
        elif isinstance(operation, Concatenate) and self.permutes:
            name = self._side_by_side(label, operation.dim, inputs, node.shape)
        elif is_affine(operation):
            name = self._dense(label, operation, inputs, node.shape)
        else:
            raise UnsupportedOperationError(
                f"node {node.name!r} ({operation_name(operation)}): cannot be exported with Gemm, MatMul, Add, Conv, "
                "Relu, Flatten and Reshape; expected a network of affine operations, ReLU and LeakyReLU"
            )
        self.names[node.name] = name

    def _average(self, label: str, operation: nn.AvgPool2d, value: str, shape: tuple[int, ...]) -> str:
        convolution = _average(operation, shape[0])
        if not _counts_inside_only(operation):
            return self.emit(label, convolution, (value,), shape)
        pooled = self.emit(f"{label}_all", convolution, (value,), shape)
        inside = torch.ones(1, 1, *self.shapes[value][1:], dtype=torch.float64)
        counted = nn.AvgPool2d(operation.kernel_size, operation.stride, operation.padding)(inside)[0]
        return self.emit(label, ScaleShift(1 / counted), (pooled,), shape)

    def _pad(self, label: str, operation: Pad, value: str, shape: tuple[int, ...]) -> str:
        """A convolution by a kernel with a single 1, which stands off its centre where the sides differ."""
        left, right, top, bottom = operation.amounts
        planes = (math.prod(shape[:-2]), *self.shapes[value][-2:])
        padded = (planes[0], *shape[-2:])
        if planes != self.shapes[value]:
            value = self.emit(f"{label}_planes", Reshape(planes), (value,), planes)
        rows, columns = max(top, bottom), max(left, right)
        window = torch.zeros(1 + abs(top - bottom), 1 + abs(left - right), dtype=torch.float64)
        window[rows - top, columns - left] = 1
        kernel = torch.eye(planes[0], dtype=torch.float64)[:, :, None, None] * window
        convolution = _convolution(kernel, None, 1, (rows, columns))
        if padded == shape:
            return self.emit(label, convolution, (value,), shape)
        return self.emit(label, Reshape(shape), (self.emit(f"{label}_padded", convolution, (value,), padded),), shape)

    def _leaky(self, label: str, slope: float, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """slope * x + (1 - slope) * relu(x)."""
        positive = self.emit(f"{label}_positive", nn.ReLU(), inputs, shape)
        parts: list[str] = []
        for value, factor in ((inputs[0], slope), (positive, 1 - slope)):
            part, scale = f"{label}_{len(parts)}", ScaleShift(torch.tensor(factor, dtype=torch.float64))
            if self.scales:
                parts.append(self.emit(part, scale, (value,), shape))
            elif len(shape) == 3:
                factors = scale.scale.expand(shape[0])
                parts.append(
                    self.emit(part, _diagonal_convolution(factors, torch.zeros_like(factors)), (value,), shape)
                )
            else:
                parts.append(self._dense(part, scale, (value,), shape))
        return self.emit(label, Add(), tuple(parts), shape)

    def _maximum(self, label: str, operation: nn.MaxPool2d, source: str, shape: tuple[int, ...]) -> str:
        value = self.names[source]
        channels, height, width = self.shapes[value]
        windows = pooling_windows(operation, height, width)
        self.preactivations.append(Preactivation(source, windows))
        flat = self.emit(f"{label}_flat", Reshape((channels, height * width)), (value,), (channels, height * width))
        picked = self.emit(
            f"{label}_picked", _selection(windows.flatten(), height * width), (flat,), (channels, windows.numel())
        )
        apart = self.emit(
            f"{label}_windows", Reshape((channels, *windows.shape)), (picked,), (channels, *windows.shape)
        )
        pool = nn.MaxPool2d((windows.shape[0], 1))
        largest = self.emit(f"{label}_largest", pool, (apart,), (channels, 1, windows.shape[1]))
        return self.emit(label, Reshape(shape), (largest,), shape)

    def _select(self, label: str, operation: Index, value: str, shape: tuple[int, ...]) -> str:
        """A dense layer along the dimension."""
        size = self.shapes[value][operation.dim]
        if isinstance(operation.selection, slice):
            positions = torch.arange(size)[operation.selection]
        else:
            positions = torch.as_tensor(operation.selection).reshape(-1) % size
        picked = self._along(label, operation.dim, _selection(positions, size), value)
        return picked if self.shapes[picked] == shape else self.emit(label, Reshape(shape), (picked,), shape)

    def _side_by_side(self, label: str, dim: int, values: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Each value in its place among zeros, by a dense layer along the dimension; then their sum."""
        parts, begin = list[str](), 0
        for position, value in enumerate(values):
            end = begin + self.shapes[value][dim]
            parts.append(self._along(f"{label}_{position}", dim, _placement(begin, end, shape[dim]), value))
            begin = end
        total = parts[0]
        for position, part in enumerate(parts[1:], 1):
            total = self.emit(f"{label}_sum{position}", Add(), (total, part), shape)
        return total

    def _along(self, label: str, dim: int, layer: nn.Linear, value: str) -> str:
        """A dense layer along any dimension, which goes last and comes back."""
        given = self.shapes[value]
        last = (*(k for k in range(len(given)) if k != dim), dim)
        back = tuple(last.index(k) for k in range(len(given)))
        turned = tuple(given[k] for k in last)
        if last != tuple(range(len(given))):
            value = self.emit(f"{label}_last", Permute(last), (value,), turned)
        result = (*turned[:-1], layer.out_features)
        value = self.emit(f"{label}_along", layer, (value,), result)
        if back != tuple(range(len(given))):
            value = self.emit(f"{label}_back", Permute(back), (value,), tuple(result[k] for k in back))
        return value

    def _dense(self, label: str, operation: nn.Module, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Any affine operation, as a sum of dense layers, one an input."""
        sizes = [math.prod(self.shapes[name]) for name in inputs]
        _check_entries(sum(sizes) * math.prod(shape), label)
        matrices, bias = operation_matrices(
            operation, [self.shapes[name] for name in inputs], torch.zeros(0, dtype=torch.float64)
        )
        parts = []
        for position, (name, columns) in enumerate(zip(inputs, matrices, strict=True)):
            flat = name
            if len(self.shapes[name]) > 1:
                flat = self.emit(f"{label}_flat{position}", nn.Flatten(), (name,), (sizes[position],))
            layer = nn.Linear(sizes[position], bias.numel(), bias=position == 0, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(torch.cat(list(columns)).T)
                if layer.bias is not None:
                    layer.bias.copy_(bias)
            last = len(inputs) == 1 and len(shape) == 1
            parts.append(self.emit(label if last else f"{label}_{position}", layer, (flat,), (bias.numel(),)))
        value = parts[0]
        if len(parts) > 1:
            value = self.emit(label if len(shape) == 1 else f"{label}_sum", Add(), tuple(parts), (bias.numel(),))
        return value if len(shape) == 1 else self.emit(label, Reshape(shape), (value,), shape)


def pooling_windows(operation: nn.MaxPool2d, height: int, width: int) -> Tensor:
    """The positions (k, L) among height * width pixels of the k pixels of each of the L windows, row by row.

    In place of padding, which never wins, stands another pixel of the same window.
    """
    indices = []
    for axis, size in enumerate((height, width)):
        kernel, stride, padding, dilation = (
            option if isinstance(option, int) else option[axis]
            for option in (operation.kernel_size, operation.stride, operation.padding, operation.dilation)
        )
        count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        index = torch.arange(kernel)[:, None] * dilation + torch.arange(count) * stride - padding
        outside = (index < 0) | (index >= size)
        indices.append(torch.where(outside, torch.where(outside, -1, index).amax(0), index))
    rows, columns = indices
    positions = rows[:, None, :, None] * width + columns[None, :, None, :]
    return positions.reshape(rows.shape[0] * columns.shape[0], -1)


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
    """The average over windows, padding included."""
    size: Any = layer.kernel_size
    height, width = (size, size) if isinstance(size, int) else size
    window = torch.full((height, width), 1 / (height * width), dtype=torch.float64)
    kernel = torch.eye(channels, dtype=torch.float64)[:, :, None, None] * window
    return _convolution(kernel, None, layer.stride, layer.padding)


def _counts_inside_only(layer: nn.AvgPool2d) -> bool:
    """Whether the average is over fewer pixels where a window reaches into the padding."""
    return not layer.count_include_pad and layer.padding not in (0, (0, 0))


def _selection(positions: Tensor, size: int) -> nn.Linear:
    """The dense layer that picks entries of the last dimension."""
    _check_entries(len(positions) * size, "selection")
    layer = nn.Linear(size, len(positions), bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight": torch.eye(size, dtype=torch.float64)[positions]})
    return layer


def _placement(begin: int, end: int, size: int) -> nn.Linear:
    """The dense layer that writes its inputs to the places from begin to end among zeros."""
    _check_entries((end - begin) * size, "placement")
    layer = nn.Linear(end - begin, size, bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight": torch.eye(size, dtype=torch.float64)[:, begin:end]})
    return layer


def _check_entries(entries: int, label: str) -> None:
    if entries > MAX_ENTRIES:
        raise UnsupportedOperationError(
            f"node {label!r}: a dense layer of {entries:,} entries would have to replace it, expected at most "
            f"{MAX_ENTRIES:,}"
        )


def _diagonal_convolution(scale: Tensor, shift: Tensor) -> nn.Conv2d:
    return _convolution(torch.diag(scale)[:, :, None, None], shift, 1, 0)


def _by_channel(operation: ScaleShift, shape: tuple[int, ...]) -> bool:
    """Whether the constants depend on nothing but the channel of an image."""
    tensors = (operation.scale, operation.shift)
    return len(shape) == 3 and all(t.numel() == 1 or (t.ndim == 3 and t.shape[1:] == (1, 1)) for t in tensors)


def _channel(value: Tensor, channels: int) -> Tensor:
    return value.double().reshape(-1).expand(channels)
