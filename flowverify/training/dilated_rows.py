"""Dilations of a layer's rows that gradients flow through, shared by a whole batch of training images.

By duality (theory, section 5), sum_i mu_i D_lambda(c)_i + lambda * eps bounds c over the Wasserstein ball for EVERY
lambda >= 0. In training one lambda a row serves all images, so the bounds of a batch are one matrix product.
The value at pixel i is c_j - lambda * d(i, j) for some j, its origin, so its derivative in c_j is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowverify.transport.dilation import dilate


class DilatedRows(NamedTuple):
    """``rows``: D_lambda(sign * row), (R, pixels); ``origins``: where each pixel has its value from, (R, pixels)."""

    rows: Tensor
    origins: Tensor


def dilate_rows(
    rows: Tensor,  # (R, C, H, W)
    multipliers: Tensor,  # (R,)
    sign: int,
    origins: Tensor | None = None,  # (R, pixels)
) -> DilatedRows:
    """Dilates ``sign * rows``, each by its own multiplier lambda >= 0; differentiable in the rows.

    With the ``origins`` of an earlier call, values are taken from there: no more than the dilation, and nearly
    it while the rows have hardly changed. On the CPU in float32 or float64 a compiled kernel does it, elsewhere
    torch.
    """
    value, found = _DilatedRows.apply(rows, multipliers, sign, origins)  # type: ignore[no-untyped-call]
    return DilatedRows(value, found)


def transport_costs(origins: Tensor, image: Tensor) -> Tensor:
    """What moving the mass of one image (C, H, W) to the origins of each row costs, float64 (R,)."""
    if origins.device.type == "cpu":
        from flowverify.training import dilation_kernel

        costs = torch.empty(len(origins), dtype=torch.float64)
        mass = image.detach().double().contiguous().flatten().numpy()
        dilation_kernel.transport_costs(origins.numpy(), mass, _shape(image), costs.numpy())
        return costs
    return _distances(origins, image) @ image.detach().double().flatten()


class _DilatedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, multipliers = rows.detach(), multipliers.detach().to(rows.dtype)
        ctx.sign, ctx.shape = sign, rows.shape
        ctx.compiled = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
        value, origins = (_compiled if ctx.compiled else _by_torch)(rows, multipliers, sign, origins)
        ctx.save_for_backward(origins)
        ctx.mark_non_differentiable(origins)
        return value, origins

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (origins,) = ctx.saved_tensors
        result = torch.zeros_like(gradient)
        if ctx.compiled:
            from flowverify.training import dilation_kernel

            array = gradient.contiguous().numpy()
            dilation_kernel.gather_gradient(array, origins.numpy(), array.dtype.type(ctx.sign), result.numpy())
        else:
            result.scatter_add_(1, origins, ctx.sign * gradient)
        return result.reshape(ctx.shape), None, None, None


def _compiled(rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None) -> tuple[Tensor, Tensor]:
    from flowverify.training import dilation_kernel

    flat = rows.flatten(1).contiguous()
    array, prices, shape = flat.numpy(), multipliers.contiguous().numpy(), _shape(rows[0])
    value, factor = torch.empty_like(flat), array.dtype.type(sign)
    if origins is None:
        origins = torch.empty(flat.shape, dtype=torch.int32)
        dilation_kernel.dilate_rows(array, prices, factor, shape, value.numpy(), origins.numpy())
    else:
        dilation_kernel.follow_origins(array, origins.numpy(), prices, factor, shape, value.numpy())
    return value, origins


def _by_torch(rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None) -> tuple[Tensor, Tensor]:
    if origins is None:
        found = dilate(sign * rows, multipliers)
        plane = rows.shape[2] * rows.shape[3]
        channel = torch.arange(rows.shape[1], device=rows.device)[:, None, None] * plane
        return found.value.flatten(1), (found.origin + channel).flatten(1)
    distance = _distances(origins, rows[0]).to(rows.dtype)
    return sign * rows.flatten(1).gather(1, origins) - multipliers[:, None] * distance, origins


def _distances(origins: Tensor, image: Tensor) -> Tensor:
    """The l1 distance of each pixel to its origin, float64 (R, pixels)."""
    _, height, width = _shape(image)
    pixel = torch.arange(origins.shape[1], device=origins.device) % (height * width)
    goal = origins.long() % (height * width)
    return ((goal // width - pixel // width).abs() + (goal % width - pixel % width).abs()).double()


def _shape(image: Tensor) -> tuple[int, int, int]:
    return int(image.shape[0]), int(image.shape[1]), int(image.shape[2])
