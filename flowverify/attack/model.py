"""The classifier under attack: any torch module that maps images (B, C, H, W) to logits (B, classes)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowverify.conventions import check_logits
from flowverify.errors import InvalidInputError
from flowverify.witness import surplus

ROWS = 4  # batches are filled up to a multiple: a row's value then does not depend on how many there are
ROUNDING = 16  # units in the last place of the largest logit: how far beyond a tie a search goes at least


class AttackedModel:
    """A copy of a module in evaluation mode, in its own precision and in float64.

    A search runs in the module's own precision, and goes a little beyond ties; what counts is the rule of
    :mod:`flowverify.witness`.

    Args:
        module: maps (B, C, H, W) to (B, classes); differentiable where its gradient is to lead anywhere.

    Raises:
        InvalidInputError: not a torch module, or one with complex or half precision weights.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidInputError(f"model of type {type(module).__name__}: expected a torch.nn.Module")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        tensors = [*self.module.parameters(), *self.module.buffers()]
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
        if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
            raise InvalidInputError(
                f"model with weights of type {sorted(map(str, kinds))}: expected all float32 or all float64"
            )
        self.dtype = kinds.pop() if kinds else torch.float32
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._precise: nn.Module | None = None

    @property
    def precise(self) -> nn.Module:
        """The module in float64."""
        if self._precise is None:
            self._precise = self.module if self.dtype == torch.float64 else copy.deepcopy(self.module).double()
        return self._precise

    def logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, classes) in the module's own precision, returned as float64; no gradient.

        Raises:
            InvalidInputError: the module does not take such images or does not return logits.
        """
        with torch.no_grad():
            return self._call(self.module, images.to(self.dtype), alone).double()

    def exact_logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """As :meth:`logits`, computed in float64."""
        with torch.no_grad():
            return self._call(self.precise, images.double(), alone)

    def gradients(self, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """f_t - f_y and its gradient in the image, float64 (B,) and (B, C, H, W); NaN gradients become 0."""

        def margin(logits: Tensor) -> Tensor:
            return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

        return self.gradient_of(images, margin)

    def gradient_of(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Values (B,) of a function of the logits, and the gradients of each in its image, float64."""
        variable = images.to(self.dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            values = function(self._call(self.module, variable))
            if not values.requires_grad:  # nothing depends on the image
                return values.detach().double(), torch.zeros_like(images, dtype=torch.float64)
            (gradient,) = torch.autograd.grad(values.sum(), variable)
        return values.detach().double(), gradient.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def margins(self, images: Tensor, labels: Tensor) -> Tensor:
        """max over t of f_t - f_y, float64 (B,): positive where misclassified; NaN where a logit is."""
        return surplus(self.logits(images), labels)

    def crossed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is misclassified in the module's own precision, well beyond rounding; bool (B,)."""
        logits = self.logits(images)
        return surplus(logits, labels) > self.rounding(logits, 4)

    def rounding(self, logits: Tensor, times: float = 1.0) -> Tensor:
        """``times`` the allowance for rounding in the module's own precision, (B, classes) -> (B,)."""
        return times * ROUNDING * torch.finfo(self.dtype).eps * logits.abs().amax(1)

    def _call(self, module: nn.Module, images: Tensor, alone: bool = False) -> Tensor:
        count = images.shape[0]
        missing = 0 if alone else -count % ROWS
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        try:
            logits = module(images)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise InvalidInputError(
                f"model {type(self.module).__name__} on images of shape {tuple(images.shape[1:])} and type "
                f"{images.dtype}: {' '.join(str(error).split())[:200]}"
            ) from error
        return check_logits(logits, len(images))[:count]
