"""Binarised input as a defence (Wong et al. 2019, Section 5.1): pixels are set to 0 or 1 before the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError


class Binarised(nn.Module):
    """x -> network(1 where x >= threshold, else 0).

    A threshold has no derivative. Backwards it acts as the identity (a straight-through estimate, Bengio et al.
    2013), or as the derivative of a sigmoid of the given steepness, so that gradients lead to pixels near the
    threshold. It changes where an attack looks, never what it finds: that is checked on the hard threshold.

    In the authors' code the images are binarised once, before the attack, and the attack then perturbs the network
    without the threshold: to do the same, attack the network itself on :func:`binarise` d images.

    Args:
        network: any module of images.
        threshold: a finite number.
        steepness: of the sigmoid in the derivative; None for the identity.
    """

    def __init__(self, network: nn.Module, threshold: float = 0.5, steepness: float | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InvalidInputError(f"network of type {type(network).__name__}: expected a torch.nn.Module")
        if not abs(threshold) < float("inf") or (steepness is not None and not 0 < steepness < float("inf")):
            raise InvalidInputError(f"threshold {threshold}, steepness {steepness}: expected finite numbers")
        self.network, self.threshold, self.steepness = network, threshold, steepness

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> what the network returns for the binarised images."""
        binary: Tensor = _Threshold.apply(images, self.threshold, self.steepness)  # type: ignore[no-untyped-call]
        result: Tensor = self.network(binary)
        return result


def binarise(images: Tensor, threshold: float = 0.5) -> Tensor:
    """1 where a pixel is at least the threshold, else 0."""
    return (images >= threshold).to(images.dtype)


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, threshold: float, steepness: float | None) -> Tensor:
        ctx.save_for_backward(images)
        ctx.threshold, ctx.steepness = threshold, steepness
        return binarise(images, threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.steepness is None:
            return gradient, None, None
        (images,) = ctx.saved_tensors
        level = torch.sigmoid(ctx.steepness * (images - ctx.threshold))
        return gradient * ctx.steepness * level * (1 - level), None, None
