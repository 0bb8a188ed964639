"""What one training step minimises: the only part in which training methods differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import OUTSIDE, find_outside, is_outside


@dataclass(frozen=True)
class BatchContext:
    """Where in the training a batch stands.

    ``epoch`` counts from 0, ``progress`` is the share of all steps done, in [0, 1) (for radii and weights
    that grow), ``generator`` draws the randomness of a loss (on the CPU; seeded by the recipe). ``positions``
    (N,) are those of the batch's images among the ``training_size`` images, for a loss that keeps something
    for each of them.
    """

    epoch: int
    progress: float
    generator: torch.Generator
    positions: Tensor | None = None
    training_size: int = 0


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


@runtime_checkable
class StatefulLoss(Protocol):
    """A training method that remembers something from batch to batch, which a checkpoint has to hold."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class CrossEntropy:
    """The mean cross-entropy on the images as they are."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        logits = model(images)
        return BatchOutcome(nn.functional.cross_entropy(logits, labels), logits)


LOSSES: dict[str, Callable[..., BatchLoss]] = {"cross-entropy": CrossEntropy}
"""Training methods by the name that recipes use; each is called with the recipe's ``loss_options``."""


def build_loss(name: str, options: Mapping[str, Any]) -> BatchLoss:
    """The training method of this name, or MODULE:CLASS.

    Raises:
        UnknownNameError: the name is not in :data:`LOSSES`, or an option that this loss does not have.
        InvalidInputError: a value that the option cannot have, or no such class.
    """
    if name not in LOSSES and not is_outside(name):
        raise UnknownNameError("loss", name, [*LOSSES, OUTSIDE])
    loss: Callable[..., BatchLoss] = LOSSES[name] if name in LOSSES else find_outside("loss", name)
    valid = list(signature(loss).parameters)
    for option in options:
        if option not in valid:
            raise UnknownNameError(f"option of the loss {name}", option, valid or ["none"])
    try:
        return loss(**options)
    except TypeError as error:
        raise InvalidInputError(f"loss {name}: given options {dict(options)}: {error}") from error
