"""The classifier under attack: any torch module that maps images (B, C, H, W) to logits (B, classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowverify.network.subject import Subject, surplus

ROUNDING = 16  # units in the last place of the largest logit: how far beyond a tie a search goes at least


class AttackedModel(Subject):
    """A classifier with the gradients that a search follows.

    A search runs in the classifier's own precision, and goes a little beyond ties; what counts is the rule of
    :mod:`flowverify.network.subject`. The module should be differentiable where its gradient is to lead anywhere.
    """

    def gradients(self, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """f_t - f_y and its gradient in the image, float64 (B,) and (B, C, H, W); NaN gradients become 0."""

        def margin(logits: Tensor) -> Tensor:
            return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

        return self.gradient_of(images, margin)

    def gradient_of(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Values (B,) of a function of the logits, and the gradients of each in its image, float64."""
        variable = images.to(self.dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            values = function(self.call(self.own, variable))
            if not values.requires_grad:  # nothing depends on the image
                return values.detach().double(), torch.zeros_like(images, dtype=torch.float64)
            (gradient,) = torch.autograd.grad(values.sum(), variable)
        return values.detach().double(), gradient.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def margins(self, images: Tensor, labels: Tensor) -> Tensor:
        """max over t of f_t - f_y, float64 (B,): positive where misclassified; NaN where a logit is."""
        return surplus(self.logits(images), labels)

    def crossed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is misclassified in the classifier's own precision, well beyond rounding; bool (B,)."""
        logits = self.logits(images)
        return surplus(logits, labels) > self.rounding(logits, 4)

    def rounding(self, logits: Tensor, times: float = 1.0) -> Tensor:
        """``times`` the allowance for rounding in the classifier's own precision, (B, classes) -> (B,)."""
        return times * ROUNDING * torch.finfo(self.dtype).eps * logits.abs().amax(1)
