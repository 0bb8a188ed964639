"""What one training step minimises: the only part in which training methods differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnknownNameError


@dataclass(frozen=True)
class BatchContext:
    """Where in the training a batch stands.

    ``epoch`` counts from 0, ``progress`` is the share of all steps done, in [0, 1) (for radii and weights
    that grow), ``generator`` draws the randomness of a loss (on the CPU; seeded by the recipe).
    """

    epoch: int
    progress: float
    generator: torch.Generator


@dataclass(frozen=True)
class BatchOutcome:
    """A scalar ``loss`` to minimise and the ``logits`` (N, classes) that it scored.

    ``metrics`` are further averages over the batch; the loop reports their mean over each epoch.
    """

    loss: Tensor
    logits: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class BatchLoss(Protocol):
    """A training method: what to minimise on a batch of images (N, C, H, W) with labels (N,)."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome: ...


class CrossEntropy:
    """The mean cross-entropy on the images as they are."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        logits = model(images)
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits)


LOSSES: dict[str, Callable[..., BatchLoss]] = {"cross-entropy": CrossEntropy}
"""Training methods by the name that recipes use; each is called with the recipe's ``loss_options``."""


def build_loss(name: str, options: Mapping[str, float]) -> BatchLoss:
    """The training method of this name.

    Raises:
        UnknownNameError: the name is not in :data:`LOSSES`.
        InvalidInputError: an option that this loss does not have.
    """
    if name not in LOSSES:
        raise UnknownNameError("loss", name, list(LOSSES))
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise InvalidInputError(f"loss {name}: given options {dict(options)}: {error}") from error
