"""Folds Delta(R, .) into a convolution: a kernel over flow planes, one larger than the kernel over pixels.

A pixel gains what flows in from the left and from above and loses what flows out to the right and below, so
its kernel entry appears twice over the rightward plane (plus at the pixel on its left, minus at the pixel)
and twice over the downward plane. Source: framework paper (2021), Corollary 2.1, for convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.network.graph import Node
from flowverify.network.operations import Pad, ScaleShift, operation_name


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
