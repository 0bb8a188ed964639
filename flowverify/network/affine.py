"""Affine parts of a network: as rows and a constant, and folded with Delta(R, .) into one layer over flows.

The columns of a matrix are the values of the map's linear part at the unit vectors. The linear part is the same
operations without their constants, so that no constant cancels in it: f(e) - f(0) would round at the size of f(0).

f(Delta(R, delta)) has the first layer W1 A delta + (W1 R + b1). Source: framework paper (2021), Corollary 2.1; theory,
section 3.

A convolution becomes one over flow planes, its kernel one larger than that over pixels: a pixel gains what flows in
from the left and from above and loses what flows out to the right and below, so its kernel entry appears twice over the
rightward plane (plus at the pixel on its left, minus at the pixel) and twice over the downward plane. Source: framework
paper (2021), Corollary 2.1, for convolutions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flowverify.errors import FoldError, InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network.graph import INPUT, Graph, Network, Node
from flowverify.network.operations import WEIGHTED, Pad, Reshape, ScaleShift, is_affine, operation_name
from flowverify.notebook import by

CHUNK_ENTRIES = 1 << 23


def columns(
    linear: Callable[[Tensor], Tensor], shape: Sequence[int], *, like: Tensor, widest: int = 0
) -> Iterator[Tensor]:
    """The matrix of a linear map, a few columns at a time: tensors (n, entries), one row a column of the matrix.

    Args:
        linear: from (n, *shape) to (n, ...).
        like: of the precision and on the device of the result.
        widest: entries of the largest value in between, which decides how many columns are computed at once.
    """
    size = math.prod(shape)
    count = max(1, CHUNK_ENTRIES // max(size, widest))
    for start in range(0, size, count):
        units = like.new_zeros(min(count, size - start), size)
        units[torch.arange(len(units)), start + torch.arange(len(units))] = 1
        yield linear(units.reshape(-1, *shape)).flatten(1)


def matrix(linear: Callable[[Tensor], Tensor], shape: Sequence[int], *, like: Tensor, widest: int = 0) -> Tensor:
    """The matrix of a linear map as a whole, (entries, inputs); the arguments of :func:`columns`."""
    result, start = None, 0
    for part in columns(linear, shape, like=like, widest=widest):
        if result is None:
            result = part.new_empty(part.shape[1], math.prod(shape))
        result[:, start : start + len(part)] = part.T
        start += len(part)
    assert result is not None
    return result


def linear_part(operation: nn.Module) -> nn.Module:
    """A copy of an affine operation, or of a graph with all its affine operations, without their constants."""
    operation = copy.deepcopy(operation)
    drop_biases(operation)
    return operation


def drop_biases(module: nn.Module) -> None:
    """Makes affine operations linear, in place: a single one, or all of a graph."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                part.bias.zero_()
            elif isinstance(part, ScaleShift):
                part.shift.zero_()


def operation_matrices(
    operation: nn.Module, shapes: Sequence[tuple[int, ...]], like: Tensor
) -> tuple[list[Iterator[Tensor]], Tensor]:
    """Of an affine operation on inputs of these shapes, jointly: the :func:`columns` by input, and the constant.

    The constant has the shape (entries,). Nothing is differentiated.
    """
    linear, zeros = linear_part(operation), [like.new_zeros(1, *shape) for shape in shapes]

    def alone(position: int) -> Callable[[Tensor], Tensor]:
        def value(units: Tensor) -> Tensor:
            given = [zero.expand(len(units), *zero.shape[1:]) for zero in zeros]
            given[position] = units
            with torch.no_grad():
                return linear(*given)  # type: ignore[no-any-return]

        return value

    with torch.no_grad():
        constant = operation(*zeros).flatten()
    return [
        columns(alone(position), shape, like=like, widest=constant.numel()) for position, shape in enumerate(shapes)
    ], constant


def affine_rows(network: Graph, node_name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows and bias with value(x) = rows @ x.flatten() + bias, for a value of ``affine_of_input()``.

    The value's entries and the image's pixels are counted in row-major order. Computed in float64 and rounded once.

    Returns:
        rows (entries, pixels) and bias (entries,), on the CPU.

    Raises:
        InvalidInputError: the network has no such value, or it is not affine in the input.
    """
    known = network.affine_of_input()
    if node_name not in known:
        raise InvalidInputError(f"value {node_name!r}: expected one that is affine in the input: {sorted(known)}")
    part = network.before(node_name).cpu().double()
    zero = torch.zeros(1, *part.input_shape, dtype=torch.float64)
    linear = linear_part(part)
    widest = max((math.prod(node.shape) for node in part.nodes), default=0)
    with torch.no_grad():
        bias = part(zero).flatten()
        rows = matrix(lambda units: linear(units).to(dtype), part.input_shape, like=zero, widest=widest)
    return rows, bias.to(dtype)


@dataclass(frozen=True)
class FlowConvolution:
    """The first ``length`` operations of a network, as one convolution of masked flow planes (float64)."""

    length: int
    convolution: nn.Conv2d
    shape: tuple[int, ...]

    @property
    def multiplications(self) -> int:
        return self.shape[1] * self.shape[2] * self.convolution.weight.numel()


def flow_convolution(chain: Sequence[Node], input_shape: Sequence[int]) -> FlowConvolution | str:
    """Matches scales, zero padding, one Conv2d and scales at the start of an affine chain.

    Scales must be equal within a channel; shifts may be anything.

    Returns:
        the folded convolution, or why there is none.
    """
    scale = torch.ones(input_shape[0], 1, 1, dtype=torch.float64)
    sides = (0, 0, 0, 0)
    shape = tuple(input_shape)
    for position, node in enumerate(chain):
        operation = node.operation
        if isinstance(operation, nn.Conv2d):
            kernel = _dense_kernel(operation) * scale[:, 0, 0, None, None]
            length, kernel = _fold_scales_after(chain, position, kernel)
            rows, columns = (int(size) for size in operation.padding)
            sides = (sides[0] + columns, sides[1] + columns, sides[2] + rows, sides[3] + rows)
            stride = (int(operation.stride[0]), int(operation.stride[1]))
            return FlowConvolution(length, _grow(kernel, sides, stride, input_shape), node.shape)
        factor = _channel_scale(operation, shape)
        if factor is not None and node.shape == shape:
            scale = scale * factor
        elif isinstance(operation, Pad):
            before = zip(sides, operation.amounts, strict=True)
            sides = tuple(first + second for first, second in before)  # type: ignore[assignment]
        else:
            return f"node {node.name!r} ({operation_name(operation)}) comes before the first Conv2d"
        shape = node.shape
    return "there is no Conv2d"


def _fold_scales_after(chain: Sequence[Node], position: int, kernel: Tensor) -> tuple[int, Tensor]:
    """Multiplies the scales that follow the convolution into its kernel; returns the new length."""
    shape = chain[position].shape
    for length in range(position + 1, len(chain)):
        factor = _channel_scale(chain[length].operation, shape)
        if factor is None or chain[length].shape != shape:
            return length, kernel
        kernel = kernel * factor[..., None]
    return len(chain), kernel


def _channel_scale(operation: nn.Module, shape: Sequence[int]) -> Tensor | None:
    """The scale (C, 1, 1) of a ScaleShift whose scale is equal within each channel, in float64."""
    if not isinstance(operation, ScaleShift):
        return None
    try:
        scale = operation.scale.detach().double().cpu().expand(*shape)
    except RuntimeError:
        return None
    first = scale[:, :1, :1]
    return first if bool((scale == first).all()) else None


def _dense_kernel(convolution: nn.Conv2d) -> Tensor:
    """The kernel (outputs, channels, height, width) with groups and dilation written out as zeros."""
    weight = convolution.weight.detach().double().cpu()
    outputs, width_of_group = weight.shape[:2]
    rows, columns = (int(step) for step in convolution.dilation)
    size = [(weight.shape[2] - 1) * rows + 1, (weight.shape[3] - 1) * columns + 1]
    dense = weight.new_zeros(outputs, convolution.in_channels, *size)
    per_group = outputs // convolution.groups
    for group in range(convolution.groups):
        outs = slice(group * per_group, (group + 1) * per_group)
        ins = slice(group * width_of_group, (group + 1) * width_of_group)
        dense[outs, ins, ::rows, ::columns] = weight[outs]
    return dense


def _grow(
    kernel: Tensor, sides: tuple[int, int, int, int], stride: tuple[int, int], input_shape: Sequence[int]
) -> nn.Conv2d:
    """The convolution over planes: C rightward, then C downward; symmetric padding, the same output size."""
    left, right, top, bottom = sides
    rightward = nn.functional.pad(kernel, (0, 1, 1, 0)) - nn.functional.pad(kernel, (1, 0, 1, 0))
    downward = nn.functional.pad(kernel, (1, 0, 0, 1)) - nn.functional.pad(kernel, (1, 0, 1, 0))
    grown = torch.cat([rightward, downward], dim=1)
    padding_rows, head_rows, tail_rows = _centre(input_shape[1], kernel.shape[2], top, bottom, stride[0])
    padding_columns, head_columns, tail_columns = _centre(input_shape[2], kernel.shape[3], left, right, stride[1])
    grown = nn.functional.pad(grown, (head_columns, tail_columns, head_rows, tail_rows))
    convolution = nn.Conv2d(
        grown.shape[1], grown.shape[0], (grown.shape[2], grown.shape[3]), stride,
        (padding_rows, padding_columns), bias=False, dtype=torch.float64,
    )  # fmt: skip
    convolution.load_state_dict({"weight": grown})
    return convolution


def _centre(size: int, kernel: int, before: int, after: int, stride: int) -> tuple[int, int, int]:
    """Symmetric padding, and zeros to put before and after the kernel of size ``kernel + 1``.

    The grown kernel starts one position earlier, at -(before + 1). As many outputs as before must come out.
    """
    padding = max(before + 1, after)
    head = padding - before - 1
    outputs = (size + before + after - kernel) // stride
    tail = 0
    while (size + 2 * padding - head - (kernel + 1) - tail) // stride != outputs:
        tail += 1
    return padding, head, tail


Structure = Literal["dense", "convolution"]


class FoldedNetwork(nn.Module):
    """f(Delta(R, delta)) = remainder(W~1 delta + offset) with offset = prefix(R) and W~1 = W1 A.

    ``flow_input`` is the flow (B, edges) itself where the structure is dense, and flow planes
    (B, 2C, H, W) where it is a convolution; :meth:`encode` makes it. The entries of the planes that are
    not edges of the grid have no effect.

    W~1 is computed in float64 from the network's own weights and rounded once to their precision:
    for double accuracy fold ``network.double()``; ``fold(network).double()`` keeps the rounded W~1.

    The planes are multiplied by the mask of the edges before the convolution. auto_LiRPA's interval
    propagation loses an L1 ball at that product (its bounds are then UNSOUND), and its patches mode cannot
    take it: give it all intervals, with ``conv_mode: matrix``, or fold with structure "dense".

    Attributes:
        grid: the grid of the images.
        structure: "dense" or "convolution".
        prefix: the affine start that was folded, as a graph from the image.
        first: W~1, without bias.
        first_shape: the shape of the folded layer's output for one sample.
        remainder: the rest, as a graph from the folded layer's output; the identity if nothing is left.
    """

    mask: Tensor

    def __init__(self, network: Network, chain: list[Node], convolution: FlowConvolution | None) -> None:
        super().__init__()
        length = len(chain) if convolution is None else convolution.length
        last = chain[length - 1].name
        self.grid: Grid = network.grid
        self.structure: Structure = "dense" if convolution is None else "convolution"
        self.prefix: Graph = network.before(last)
        self.remainder: Graph = network.after(last)
        self.first_shape: tuple[int, ...] = chain[length - 1].shape
        dtype = network.dtype
        if convolution is None:
            rows = self.first_layer_rows()
            self.first: nn.Linear | nn.Conv2d = nn.Linear(self.grid.edges, rows.shape[0], False, dtype=dtype)
            self.first.load_state_dict({"weight": rows})
            mask = torch.ones(())
        else:
            self.first = copy.deepcopy(convolution.convolution).to(dtype)
            mask = self.grid.planes_mask()[None]
        self.register_buffer("mask", mask.to(dtype), persistent=False)
        self.requires_grad_(False)
        self.train(False)
        self.to(next((parameter.device for parameter in network.parameters()), torch.device("cpu")))

    def __repr__(self) -> str:
        return f"FoldedNetwork(flows of {by(self.flow_shape)} -> {self.first!r} -> {self.remainder!r})"

    @property
    def flow_shape(self) -> tuple[int, ...]:
        """The shape of one ``flow_input``: (edges,) or (2C, H, W)."""
        grid = self.grid
        return (grid.edges,) if self.structure == "dense" else (2 * grid.channels, grid.height, grid.width)

    @property
    def num_classes(self) -> int:
        return self.remainder.output_shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    def first_layer_rows(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """W~1 as a dense matrix (entries of the first layer, edges), whatever the structure.

        Computed in float64 from the folded prefix: it does not carry the rounding of ``first``.
        """
        rows, _ = affine_rows(self.prefix, self.prefix.output)
        return self.grid.differences(rows.reshape(-1, *self.grid.image_shape)).to(dtype)

    def offset(self, reference: Tensor) -> Tensor:
        """prefix(R): (B, C, H, W) -> (B, *first_shape)."""
        return self.prefix(self.grid.check_image(reference, "reference"))  # type: ignore[no-any-return]

    def encode(self, flow: Tensor) -> Tensor:
        """A flow (B, edges) as the module's flow input."""
        return self.grid.check_flow(flow) if self.structure == "dense" else self.grid.to_planes(flow)

    def decode(self, flow_input: Tensor) -> Tensor:
        """The inverse of :meth:`encode`: (B, edges)."""
        if tuple(flow_input.shape[1:]) != self.flow_shape:
            raise InvalidInputError(
                f"flow input of shape {tuple(flow_input.shape)}: expected (batch, {self.flow_shape})"
            )
        return flow_input if self.structure == "dense" else self.grid.from_planes(flow_input)

    def first_layer(self, flow_input: Tensor) -> Tensor:
        """W~1 delta: the linear part of the folded layer, (B, *first_shape)."""
        if self.structure == "convolution":
            return self.first(flow_input * self.mask)  # type: ignore[no-any-return]
        value: Tensor = self.first(flow_input)
        return value if len(self.first_shape) == 1 else value.reshape(-1, *self.first_shape)

    def forward(self, flow_input: Tensor, offset: Tensor) -> Tensor:
        """(B, *flow_shape) and (B, *first_shape) -> logits (B, classes)."""
        return self.remainder(self.first_layer(flow_input) + offset)  # type: ignore[no-any-return]

    def with_reference(self, reference: Tensor) -> Graph:
        """The network of the flow input alone for one reference R of shape (C, H, W) or (1, C, H, W).

        A graph of canonical operations, whose first weighted layer has the offset for its bias (a
        constant map added to the convolution where it varies over positions).

        Raises:
            InvalidInputError: the reference has another shape.
        """
        batch = reference if reference.ndim == 4 else reference[None]
        if batch.shape[0] != 1:
            raise InvalidInputError(f"reference of shape {tuple(reference.shape)}: expected one image")
        offset = self.offset(batch)[0].detach()
        taken = {node.name for node in self.remainder.nodes}
        nodes: list[Node] = []

        def append(label: str, operation: nn.Module, shape: tuple[int, ...]) -> None:
            name = label
            while name in taken:
                name += "_"
            nodes.append(Node(name, operation, (nodes[-1].name if nodes else INPUT,), shape))

        if isinstance(self.first, nn.Conv2d):
            append("flow_mask", ScaleShift(self.mask[0]), self.flow_shape)
            append("flow_first", copy.deepcopy(self.first), self.first_shape)
            append("flow_offset", ScaleShift(1.0, offset), self.first_shape)
        else:
            layer = nn.Linear(self.grid.edges, offset.numel(), dtype=self.dtype)
            layer.load_state_dict({"weight": self.first.weight, "bias": offset.flatten()})
            append("flow_first", layer, (offset.numel(),))
            if len(self.first_shape) > 1:
                append("flow_shape", Reshape(self.first_shape), self.first_shape)
        last = nodes[-1].name
        for node in copy.deepcopy(self.remainder.nodes):
            inputs = tuple(last if name == INPUT else name for name in node.inputs)
            nodes.append(replace(node, inputs=inputs))
        return Graph(self.flow_shape, nodes)


def fold(network: Network, structure: Literal["auto", "dense", "convolution"] = "auto") -> FoldedNetwork:
    """Folds Delta(R, .) and the affine start of a network into one layer over flows.

    The affine start is the chain of affine operations with one input each, from the image up to the first
    operation that is not affine, has several inputs, or whose input has several readers. "auto" takes the
    structure with fewer multiplications.

    Raises:
        FoldError: nothing affine comes first; the image has several readers; several values are combined
            before the first Linear or Conv2d; or a convolution was asked for and the start is none.
        UnknownNameError: an unknown structure.
    """
    valid = ("auto", *get_args(Structure))
    if structure not in valid:
        raise UnknownNameError("fold structure", structure, valid)
    chain = _affine_chain(network)
    if structure == "dense":
        return FoldedNetwork(network, chain, None)
    convolution = flow_convolution(chain, network.input_shape)
    if isinstance(convolution, str):
        if structure == "convolution":
            raise FoldError(f"the network does not start with a convolution that can be folded: {convolution}")
        return FoldedNetwork(network, chain, None)
    dense = math.prod(chain[-1].shape) * network.grid.edges
    if structure == "auto" and dense <= convolution.multiplications:
        return FoldedNetwork(network, chain, None)
    return FoldedNetwork(network, chain, convolution)


def _affine_chain(network: Network) -> list[Node]:
    chain: list[Node] = []
    name = INPUT
    while name != network.output:
        readers = network.consumers(name)
        reason = ""
        if len(readers) > 1:
            reason = "is read by " + ", ".join(f"{r.name!r} ({operation_name(r.operation)})" for r in readers)
        elif len(readers[0].inputs) > 1:
            reason = f"meets other values in {readers[0].name!r} ({operation_name(readers[0].operation)})"
        if reason:
            if not any(isinstance(node.operation, WEIGHTED) for node in chain):
                raise FoldError(f"cannot fold the flow: value {name!r} {reason} before the first Linear or Conv2d")
            break
        if not is_affine(readers[0].operation):
            break
        chain.append(readers[0])
        name = readers[0].name
    if not chain:
        first = network.nodes[0]
        raise FoldError(
            f"cannot fold the flow: the first operation, {first.name!r} ({operation_name(first.operation)}), "
            "is not affine"
        )
    return chain
