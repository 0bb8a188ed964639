"""Upper bounds of linear functions over the balls around a batch of images, each image with functions of its own.

By duality (theory, section 5) every lambda >= 0 gives one; here the least over a fixed set of shares of Lip(c) is
taken, which is enough for training. The gradient in c is where that lambda moves the mass of the image (Danskin's
theorem).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.support import support_value

SHARES = (0.55, 0.35, 0.22, 0.14)  # and 1, which costs no dilation


def ball_bounds(
    coefficients: Tensor,  # (B, S, C, H, W)
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
) -> Tensor:
    """Upper bounds of c . nu over the images nu within the budget of mu, (B, S); differentiable in c.

    On the CPU in float32 or float64 by a compiled kernel with few lambdas; elsewhere the exact maximum.
    """
    compiled = images.device.type == "cpu" and coefficients.dtype in (torch.float32, torch.float64)
    if not compiled:
        return support_value(coefficients, images.to(coefficients.dtype), budget)
    value: Tensor = _BallBounds.apply(coefficients, images, budget)  # type: ignore[no-untyped-call]
    return value


class _BallBounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, images: Tensor, budget: Tensor) -> Tensor:
        from flowverify.training import dilation_kernel

        dtype, (batch, count) = coefficients.dtype, coefficients.shape[:2]
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        rows = coefficients.detach().reshape(batch * count, -1).contiguous()
        mass = images.detach().to(dtype).flatten(1).contiguous()
        excess, maximiser = torch.empty(len(rows), dtype=dtype), torch.empty_like(rows)
        lipschitz = lipschitz_constant(rows.reshape(-1, *shape))
        dilation_kernel.maximise_rows(
            rows.numpy(),
            mass.numpy(),
            budget.detach().to(dtype).contiguous().numpy(),
            lipschitz.numpy(),
            torch.tensor(SHARES, dtype=dtype).numpy(),
            shape,
            excess.numpy(),
            maximiser.numpy(),
        )
        ctx.save_for_backward(maximiser)
        ctx.shape = coefficients.shape
        centre = (rows.reshape(batch, count, -1) @ mass[:, :, None]).squeeze(2)
        return centre + excess.reshape(batch, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (maximiser,) = ctx.saved_tensors
        return (gradient.reshape(-1, 1) * maximiser).reshape(ctx.shape), None, None
