"""Sizes of the windows of convolutions and pooling: (height, width) pairs and (left, right, top, bottom)."""

from __future__ import annotations

from collections.abc import Sequence

from flowverify.errors import InvalidInputError, UnsupportedOperationError

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]
LARGEST = 4096


def check_window(stride: Pair, padding: Sides, dilation: Pair, kernel: Pair = (1, 1)) -> None:
    """Checks the sizes of a window before anything of that size is allocated.

    Raises:
        InvalidInputError: a stride, dilation or kernel is not in 1..LARGEST.
        UnsupportedOperationError: the padding is not in 0..LARGEST.
    """
    if min(*stride, *dilation, *kernel) < 1 or max(*stride, *dilation, *kernel) > LARGEST:
        raise InvalidInputError(
            f"window with kernel {kernel}, stride {stride}, dilation {dilation}: expected 1..{LARGEST}"
        )
    if not 0 <= min(padding) <= max(padding) <= LARGEST:
        raise UnsupportedOperationError(f"padding {padding} is not supported: expected 0..{LARGEST}")


def check_ceil(shape: Sequence[int], kernel: Pair, stride: Pair, padding: Sides, dilation: Pair, ceil: bool) -> None:
    """Rounding the output size up is accepted where it is the same as rounding down."""
    if not ceil or len(shape) != 3:
        return
    for axis, sides in enumerate((padding[2] + padding[3], padding[0] + padding[1])):
        if (shape[axis + 1] + sides - dilation[axis] * (kernel[axis] - 1) - 1) % stride[axis]:
            raise UnsupportedOperationError("pooling with an output size rounded up is not supported")
