"""Rows of moves above values of the network: from coefficients of pixels, and from rows stored at activations.

A row P of a value v, with centre v0, says v - v0 <= P . m for every m of the ball. There is no constant: at the centre
everything is exact. Rows of neurons of convolutions are windows; others stand on the whole grid, listed by neuron.

:class:`Coefficients` are linear functions of a value of the network, pulled back through affine operations: as patches
where windows allow. A *patch* holds the coefficients of one place's rows over a part of a feature map, as in the
backward bounds of convolutional networks: what a neuron of a convolution reads is small, and stays small for some
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves
from flowverify.bounds.lifted.support import MoveRows, whole_grid
from flowverify.network import operations as ops

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """R rows of coefficients at each of Q places, for each of B images.

    Attributes:
        data: (B, Q, R, *shape) for whole values (then Q is 1), or (B, Q, R, channels, h, w) for patches of a feature
            map. B and Q may be 1 where all share the same.
        origins: (Q, 2), where the patch of each place stands in the map (and maybe beyond), or None for whole values.
    """

    data: Tensor
    origins: Tensor | None

    def scaled(self, factor: Tensor) -> Coefficients:
        """Every coefficient times the factor (B, *shape) of its entry."""
        return Coefficients(self.data * self.taken(factor), self.origins)

    def taken(self, values: Tensor) -> Tensor:
        """What stands at the entries of the rows in ``values`` (B, *shape), 0 outside; broadcasts against the data."""
        if self.origins is None:
            return values[:, None, None]
        index, inside = self._index(values.shape[-2:])
        flat = values.flatten(2)[:, :, index]  # (B, channels, Q, h, w)
        return (flat * inside).transpose(1, 2)[:, :, None]

    def _index(self, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        assert self.origins is not None
        (height, width), (h, w) = size, self.data.shape[-2:]
        i = self.origins[:, 0, None] + torch.arange(h, device=self.origins.device)
        j = self.origins[:, 1, None] + torch.arange(w, device=self.origins.device)
        inside = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None]
        return i.clamp(0, height - 1)[:, :, None] * width + j.clamp(0, width - 1)[:, None], inside

    def whole(self, shape: Shape) -> Coefficients:
        """The same rows as whole values, (B, 1, Q * R, *shape)."""
        if self.origins is None:
            return self
        index, inside = self._index(shape[-2:])
        batch, _, rows = self.data.shape[:3]
        data = (self.data * inside[:, None, None]).expand(batch, len(self.origins), *self.data.shape[2:])
        places = len(self.origins)
        result = data.new_zeros(batch, places, rows, shape[0], shape[1] * shape[2])
        at = index.flatten(1)[None, :, None, None].expand(batch, places, rows, shape[0], -1)
        result.scatter_add_(-1, at, data.flatten(-2))
        return Coefficients(result.reshape(batch, 1, places * rows, *shape), None)


def added(first: Coefficients, second: Coefficients, shape: Shape) -> Coefficients:
    """The sum of two functions of one value."""
    if first.origins is None or second.origins is None:
        return Coefficients(first.whole(shape).data + second.whole(shape).data, None)
    shift = second.origins - first.origins
    if bool((shift != shift[:1]).any()):
        return Coefficients(first.whole(shape).data + second.whole(shape).data, None)
    (top, left), (h1, w1), (h2, w2) = shift[0].tolist(), first.data.shape[-2:], second.data.shape[-2:]
    i, j = min(0, top), min(0, left)
    height, width = max(h1, top + h2) - i, max(w1, left + w2) - j

    def placed(data: Tensor, at_i: int, at_j: int) -> Tensor:
        h, w = data.shape[-2:]
        return functional.pad(data, (at_j, width - w - at_j, at_i, height - h - at_i))

    total = placed(first.data, -i, -j) + placed(second.data, top - i, left - j)
    return Coefficients(total, first.origins + torch.tensor([i, j], device=first.origins.device))


def pull_back(operation: nn.Module, outer: Coefficients, shapes: Sequence[Shape], shape: Shape) -> list[Coefficients]:
    """The functions of the inputs (of ``shapes``) of an affine operation that a function of its output becomes.

    Constants are left out: what is pulled back are differences from the centre.
    """
    if outer.origins is not None:
        rule = _WINDOWED.get(type(operation))
        found = None if rule is None else rule(operation, outer, shapes, shape)
        if found is not None:
            return found
        outer = outer.whole(shape)
    data = outer.data
    if isinstance(operation, nn.Flatten | ops.Reshape):
        return [Coefficients(data.reshape(*data.shape[:3], *shapes[0]), None)]
    if isinstance(operation, nn.Linear):
        return [Coefficients(data @ operation.weight, None)]
    flat = data.reshape(-1, *shape)
    zeros = [flat.new_zeros(len(flat), *one) for one in shapes]
    adjoint = torch.func.vjp(operation, *zeros)[1]
    return [Coefficients(part.reshape(*data.shape[:3], *part.shape[1:]), None) for part in adjoint(flat)]


def pair(value: Any) -> tuple[int, int]:
    """An option of both axes, given once or for each."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _transposed(
    outer: Coefficients, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> list[Coefficients]:
    assert outer.origins is not None
    stride, padding = pair(stride), pair(padding)
    data = outer.data
    inner = functional.conv_transpose2d(
        data.reshape(-1, *data.shape[3:]), weight, stride=stride, dilation=pair(dilation), groups=groups
    )
    moved = outer.origins * torch.tensor(stride, device=outer.origins.device) - torch.tensor(
        padding, device=outer.origins.device
    )
    return [Coefficients(inner.reshape(*data.shape[:3], *inner.shape[1:]), moved)]


def _masked(outer: Coefficients, shape: Shape) -> Coefficients:
    """Without what stands outside of the map: needed before an operation that spreads it."""
    _, inside = outer._index(shape[-2:])
    return Coefficients(outer.data * inside[:, None, None], outer.origins)


def _through_convolution(
    operation: nn.Conv2d, outer: Coefficients, shapes: Sequence[Shape], shape: Shape
) -> list[Coefficients]:
    clean = outer if outer.data.shape[-2:] == (1, 1) else _masked(outer, shape)
    return _transposed(
        clean, operation.weight, operation.stride, operation.padding, operation.dilation, operation.groups
    )


def _through_average(
    operation: nn.AvgPool2d, outer: Coefficients, shapes: Sequence[Shape], shape: Shape
) -> list[Coefficients]:
    kernel, channels = pair(operation.kernel_size), shapes[0][0]
    ones = outer.data.new_ones(1, *shapes[0])
    if operation.count_include_pad:
        share = ones.new_full((1, *shape), 1 / math.prod(kernel))
    else:
        total = functional.avg_pool2d(ones, kernel, operation.stride, operation.padding, count_include_pad=True)
        share = 1 / (total * math.prod(kernel))
    weight = ones.new_ones(channels, 1, *kernel)
    return _transposed(outer.scaled(share), weight, operation.stride, operation.padding, 1, channels)


def _through_scale(
    operation: ops.ScaleShift, outer: Coefficients, shapes: Sequence[Shape], shape: Shape
) -> list[Coefficients] | None:
    if tuple(shapes[0]) != tuple(shape):
        return None
    return [outer.scaled(operation.scale.expand(shape)[None]) if operation.has_scale else outer]


def _through_pad(operation: ops.Pad, outer: Coefficients, shapes: Sequence[Shape], shape: Shape) -> list[Coefficients]:
    assert outer.origins is not None
    left, _, top, _ = operation.amounts
    return [Coefficients(outer.data, outer.origins - torch.tensor([top, left], device=outer.origins.device))]


def _through_sum(
    operation: nn.Module, outer: Coefficients, shapes: Sequence[Shape], shape: Shape
) -> list[Coefficients] | None:
    if any(tuple(one) != tuple(shape) for one in shapes):
        return None
    if isinstance(operation, ops.Subtract):
        return [outer, Coefficients(-outer.data, outer.origins)]
    return [outer] * len(shapes)


def _through_concatenation(
    operation: ops.Concatenate, outer: Coefficients, shapes: Sequence[Shape], shape: Shape
) -> list[Coefficients] | None:
    if operation.dim != 0:
        return None
    return [Coefficients(part, outer.origins) for part in torch.split(outer.data, [one[0] for one in shapes], dim=3)]


_WINDOWED: dict[type[nn.Module], Callable[..., list[Coefficients] | None]] = {
    nn.Conv2d: _through_convolution,
    nn.AvgPool2d: _through_average,
    ops.ScaleShift: _through_scale,
    ops.Pad: _through_pad,
    ops.Add: _through_sum,
    ops.Subtract: _through_sum,
    ops.Concatenate: _through_concatenation,
}


@dataclass(frozen=True, eq=False)
class WindowRows:
    """Rows above the entries of a feature map: the window of entry (i, j) stands at stride * (i, j) + offset.

    Attributes:
        gains: (B, H, W, channels, ways, C, h, w).
    """

    gains: Tensor
    stride: tuple[int, int]
    offset: tuple[int, int]

    def combine(self, outer: Coefficients) -> MoveRows:
        """The rows of sums with coefficients >= 0 of the entries."""
        return self._combine_whole(outer.data) if outer.origins is None else self._combine_patches(outer)

    def _combine_whole(self, data: Tensor) -> MoveRows:
        """Of (B, 1, R, channels, H, W): the windows of all places, added up where they overlap."""
        own = data[:, 0].flatten(3).permute(0, 3, 1, 2)  # (B, places, R, channels)
        own = own.expand(max(len(own), len(self.gains)), -1, -1, -1).contiguous()
        total: Tensor = _SumOfWindows.apply(own, self.gains, self.stride)  # type: ignore[no-untyped-call]
        return MoveRows(total[:, None], torch.tensor([self.offset], device=data.device))

    def _combine_patches(self, outer: Coefficients) -> MoveRows:
        gains = self.gains
        batch, height, width = gains.shape[:3]
        ways, colours, h, w = gains.shape[4:]
        data, origins = outer.data, outer.origins
        assert origins is not None
        places, rows, (taps_i, taps_j) = len(origins), data.shape[2], data.shape[-2:]
        batch = max(batch, data.shape[0])
        total = gains.new_zeros(
            batch, places, rows, ways, colours, (taps_i - 1) * self.stride[0] + h, (taps_j - 1) * self.stride[1] + w
        )
        flat = gains.flatten(4)
        for a in range(taps_i):
            for b in range(taps_j):
                i, j = origins[:, 0] + a, origins[:, 1] + b
                inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                chosen = inside.nonzero().flatten()
                if not len(chosen):
                    continue
                above = flat[:, i[chosen], j[chosen]]  # (B, chosen, channels, entries)
                own = data[..., a, b]
                own = own if own.shape[1] == 1 and places > 1 else own[:, chosen]
                part = own @ above
                part = part.reshape(*part.shape[:-1], ways, colours, h, w)
                top, left = a * self.stride[0], b * self.stride[1]
                if len(chosen) == places:
                    total[..., top : top + h, left : left + w] += part
                else:
                    total[..., top : top + h, left : left + w].index_add_(1, chosen, part)
        moved = origins * torch.tensor(self.stride, device=origins.device)
        return MoveRows(total, moved + torch.tensor(self.offset, device=origins.device))


class _SumOfWindows(torch.autograd.Function):
    """Coefficients (B, places, R, channels) times windows (B, H, W, channels, ways, C, h, w), each where it stands.

    One place after another: windows of all places at once would be many times what they add up to.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, gains: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(own, gains)
        ctx.stride = stride
        height, width = gains.shape[1:3]
        planes, (h, w) = gains.shape[4:6], gains.shape[6:]
        batch, rows = len(own), own.shape[2]
        size = ((height - 1) * stride[0] + h, (width - 1) * stride[1] + w)
        total = own.new_zeros(batch, rows, *planes, *size)
        for place in range(height * width):
            i, j = divmod(place, width)
            part = own[:, place] @ gains[:, i, j].flatten(2)
            top, left = i * stride[0], j * stride[1]
            total[..., top : top + h, left : left + w] += part.reshape(batch, rows, *planes, h, w)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        own, gains = ctx.saved_tensors
        height, width = gains.shape[1:3]
        h, w = gains.shape[6:]
        parts, of_gains = [], torch.empty_like(gains) if ctx.needs_input_grad[1] else None
        for place in range(height * width):
            i, j = divmod(place, width)
            top, left = i * ctx.stride[0], j * ctx.stride[1]
            window = gradient[..., top : top + h, left : left + w].flatten(2)
            parts.append(window @ gains[:, i, j].flatten(2).transpose(1, 2))
            if of_gains is not None:
                found = own[:, place].transpose(1, 2) @ window
                of_gains[:, i, j] = found.sum_to_size(len(gains), *found.shape[1:]).reshape(of_gains[:, i, j].shape)
        return torch.stack(parts, 1), of_gains, None


@dataclass(frozen=True, eq=False)
class ListedRows:
    """Rows on the whole grid above some entries of a value.

    Attributes:
        index: (B or 1, K), the entries in each image's flattened value.
        gains: (B, K, ways, C, H, W).
    """

    index: Tensor
    gains: Tensor
    shape: tuple[int, ...]

    def combine(self, outer: Coefficients) -> MoveRows:
        """The rows of sums with coefficients >= 0 of the entries."""
        own, index = outer.whole(self.shape).data.flatten(3)[:, 0], self.index[:, None]  # (B, R, entries)
        batch = max(len(own), len(index))
        own = own.expand(batch, -1, -1).gather(2, index.expand(batch, own.shape[1], -1))
        total = own @ self.gains.flatten(2)
        origins = torch.zeros(1, 2, dtype=torch.long, device=own.device)
        return MoveRows(total.reshape(len(total), 1, -1, *self.gains.shape[2:]), origins)


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Rows max(first * P, second * P) above all entries of a value that is affine in the image, first >= second.

    P is the same for all images, so that rows of sums are two products of matrices: first takes where P gains, second
    where it loses.

    Attributes:
        gain, loss: max(P, 0) and min(P, 0), (K, ways, C, H, W).
        first, second: (B, K).
    """

    gain: Tensor
    loss: Tensor
    first: Tensor
    second: Tensor
    shape: tuple[int, ...]

    def combine(self, outer: Coefficients) -> MoveRows:
        """The rows of sums with coefficients >= 0 of the entries."""
        own = outer.whole(self.shape).data.flatten(3)[:, 0]  # (B, R, entries)
        own = own.expand(len(self.first), -1, -1)
        total = (own * self.first[:, None]) @ self.gain.flatten(1) + (own * self.second[:, None]) @ self.loss.flatten(1)
        origins = torch.zeros(1, 2, dtype=torch.long, device=own.device)
        return MoveRows(total.reshape(len(total), 1, -1, *self.gain.shape[1:]), origins)


StoredRows = WindowRows | ListedRows | SharedRows


def listed(rows: WindowRows | ListedRows, size: tuple[int, int]) -> ListedRows:
    """The same rows, on the whole grid of this size."""
    if isinstance(rows, ListedRows):
        return rows
    batch, height, width, channels = rows.gains.shape[:4]
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(rows.gains.device)
    origins = places * places.new_tensor(rows.stride) + places.new_tensor(rows.offset)
    gains = rows.gains.reshape(batch, height * width, channels, *rows.gains.shape[4:])
    order = torch.arange(height * width, device=places.device)[:, None]
    index = torch.arange(channels, device=places.device) * height * width + order
    whole = whole_grid(MoveRows(gains, origins), size)
    return ListedRows(index.flatten()[None], whole, (channels, height, width))


def rows_of_pixels(coefficients: Coefficients, shape: tuple[int, int, int], moves: Moves = NEIGHBOURS) -> MoveRows:
    """The rows of linear functions of the image: exact, for every move."""
    if coefficients.origins is None:
        origins = torch.zeros(1, 2, dtype=torch.long, device=coefficients.data.device)
        return MoveRows(moves.gains(coefficients.data), origins)
    down, right = moves.reach
    padded = torch.nn.functional.pad(coefficients.data, (right, right, down, down))
    origins = coefficients.origins - torch.tensor([down, right], device=coefficients.origins.device)
    inside = _moves_inside(origins, padded.shape[-2:], shape[-2:], moves)
    return MoveRows(moves.gains(padded) * inside, origins)


def _moves_inside(origins: Tensor, window: Sequence[int], size: Sequence[int], moves: Moves) -> Tensor:
    """Which moves of windows stay in the grid, (Q, 1, ways, 1, h, w)."""
    i = origins[:, 0, None] + torch.arange(window[0], device=origins.device)
    j = origins[:, 1, None] + torch.arange(window[1], device=origins.device)
    parts = []
    for row, column in moves.offsets:
        goal_i, goal_j = i + row, j + column
        rows = (i >= 0) & (i < size[0]) & (goal_i >= 0) & (goal_i < size[0])
        columns = (j >= 0) & (j < size[1]) & (goal_j >= 0) & (goal_j < size[1])
        parts.append(rows[:, :, None] & columns[:, None])
    return torch.stack(parts, 1)[:, None, :, None]


def total(parts: Sequence[MoveRows], size: tuple[int, int]) -> MoveRows:
    """The sum of rows of the same places; on the whole grid where windows have grown to it."""
    if len(parts) == 1 and max(parts[0].gains.shape[-2] - size[0], parts[0].gains.shape[-1] - size[1]) <= 0:
        return parts[0]
    places = max(len(part.origins) for part in parts)
    if all(len(part.origins) == places for part in parts):
        shifts = [part.origins - parts[0].origins for part in parts]
        if all(bool((shift == shift[:1]).all()) for shift in shifts):
            at = [shift[0].tolist() for shift in shifts]
            top, left = min(i for i, _ in at), min(j for _, j in at)
            height = max(i + part.gains.shape[-2] for (i, _), part in zip(at, parts, strict=True)) - top
            width = max(j + part.gains.shape[-1] for (_, j), part in zip(at, parts, strict=True)) - left
            if height <= size[0] and width <= size[1]:
                sum_ = None
                for (i, j), part in zip(at, parts, strict=True):
                    h, w = part.gains.shape[-2:]
                    pads = (j - left, width - w - (j - left), i - top, height - h - (i - top))
                    own = torch.nn.functional.pad(part.gains, pads) if any(pads) else part.gains
                    # What parts are made of is nobody else's: the first takes the others in.
                    sum_ = own if sum_ is None else sum_ + own if sum_.shape != own.shape else sum_.add_(own)
                assert sum_ is not None
                return MoveRows(sum_, parts[0].origins + torch.tensor([top, left], device=parts[0].origins.device))
    whole = sum(whole_grid(part, size) for part in parts)
    assert isinstance(whole, Tensor)
    return MoveRows(whole[:, None], torch.zeros(1, 2, dtype=torch.long, device=whole.device))
