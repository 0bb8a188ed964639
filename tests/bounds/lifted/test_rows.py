"""Rows of moves that are put together from stored ones."""

from __future__ import annotations

import pytest
import torch

from flowverify.bounds.lifted.rows import Coefficients, WindowRows


@pytest.mark.parametrize(("stride", "window"), [((1, 1), (3, 3)), ((2, 1), (3, 4)), ((2, 3), (1, 2))])
@pytest.mark.parametrize("batches", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_windows_of_all_places_are_added_up_where_they_stand(
    stride: tuple[int, int], window: tuple[int, int], batches: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width, channels, rows = 2, 3, 2, 3
    own = torch.randn(batches[0], 1, rows, channels, height, width, generator=generator, dtype=torch.float64)
    gains = torch.randn(batches[1], height, width, channels, 4, 1, *window, generator=generator, dtype=torch.float64)
    stored = WindowRows(gains, stride, (-1, 2))
    found = stored.combine(Coefficients(own, None))
    size = (height - 1) * stride[0] + window[0], (width - 1) * stride[1] + window[1]
    expected = torch.zeros(max(batches), rows, 4, 1, *size, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            part = torch.einsum("brk,bkwcij->brwcij", own[:, 0, :, :, i, j], gains[:, i, j])
            top, left = i * stride[0], j * stride[1]
            expected[..., top : top + window[0], left : left + window[1]] += part
    assert found.origins.tolist() == [[-1, 2]]
    torch.testing.assert_close(found.gains[:, 0], expected)
    own.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: stored.combine(Coefficients(one, None)).gains, own)
