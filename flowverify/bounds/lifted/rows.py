"""Rows of moves above values of the network: from coefficients of pixels, and from rows stored at activations.

A row P of a value v, with centre v0, says v - v0 <= P . m for every m of the ball. There is no constant: at the centre
everything is exact. Rows of neurons of convolutions are windows; others stand on the whole grid, listed by neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.bounds.lifted.coefficients import Coefficients
from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves
from flowverify.bounds.lifted.support import MoveRows, whole_grid


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
        """Of (B, 1, R, channels, H, W): one product at each place, and windows that overlap are added up."""
        batch, height, width = self.gains.shape[:3]
        planes, (h, w) = self.gains.shape[4:6], self.gains.shape[6:]
        own = data[:, 0].flatten(3).permute(0, 3, 1, 2)  # (B, places, R, channels)
        parts = own @ self.gains.flatten(4).flatten(1, 2)  # (B, places, R, entries)
        batch, places, rows = parts.shape[:3]
        stride = tuple(max(1, step) for step in self.stride)
        size = ((height - 1) * self.stride[0] + h, (width - 1) * self.stride[1] + w)
        windows = parts.permute(0, 2, 3, 1).reshape(batch * rows, -1, places)
        total = torch.nn.functional.fold(windows, size, (h, w), stride=stride)
        origins = torch.tensor([self.offset], device=data.device)
        return MoveRows(total.reshape(batch, 1, rows, *planes, *size), origins)

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


@dataclass(frozen=True, eq=False)
class ListedRows:
    """Rows on the whole grid above some entries of a value.

    Attributes:
        index: (K,), the entries in the flattened value.
        gains: (B, K, ways, C, H, W).
    """

    index: Tensor
    gains: Tensor
    shape: tuple[int, ...]

    def combine(self, outer: Coefficients) -> MoveRows:
        """The rows of sums with coefficients >= 0 of the entries."""
        own = outer.whole(self.shape).data.flatten(3)[..., self.index]  # (B, 1, R, K)
        total = own[:, 0] @ self.gains.flatten(2)
        origins = torch.zeros(1, 2, dtype=torch.long, device=own.device)
        return MoveRows(total.reshape(len(total), 1, -1, *self.gains.shape[2:]), origins)


StoredRows = WindowRows | ListedRows


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
                    sum_ = own if sum_ is None else sum_ + own
                assert sum_ is not None
                return MoveRows(sum_, parts[0].origins + torch.tensor([top, left], device=parts[0].origins.device))
    whole = sum(whole_grid(part, size) for part in parts)
    assert isinstance(whole, Tensor)
    return MoveRows(whole[:, None], torch.zeros(1, 2, dtype=torch.long, device=whole.device))
