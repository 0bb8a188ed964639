"""A classifier in two precisions: what it answers, whom it takes, and what counts as misclassified.

A network is asked twice: in its own precision, as it is used, and in float64, which is near to what a certificate is
about. The rule, for an image of label y:

* It is *classified right* if f_y is strictly above every other f_t, in both precisions. Otherwise it is misclassified:
  there is nothing to certify, and nothing to attack.
* It is a *counterexample* (to a claim about the ball that it lies in) if some f_t is strictly above f_y in float64, and
  in its own precision the network answers a class other than y.

An image whose two best logits tie, or on which the precisions disagree, is neither: not classified right, and no
counterexample. The same goes for NaN. Both questions have the same answer whatever batch an image comes in (theory,
section 18).
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.conventions import check_labels, check_logits
from flowverify.errors import InvalidInputError
from flowverify.network.graph import Network

CLOSE = 64  # units in the last place of the largest logit: so near a tie, the rest of the batch could decide


class Subject:
    """A classifier in its own precision and in float64; images may be on another device.

    Args:
        module: a :class:`~flowverify.network.Network`, or any torch module from images (B, C, H, W) to logits
            (B, classes). A module is copied; a network, which is in evaluation mode for good, is not.
        precise: the same in float64; by default, the module itself, converted.

    Attributes:
        own: the classifier in its own precision, in evaluation mode, without gradients of its weights.

    Raises:
        InvalidInputError: not a torch module, or one whose weights are not all float32 or all float64.
    """

    filled_to: ClassVar[int] = 4  # a multiple: a row's value then does not depend on how many rows there are
    precisions: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float64})

    def __init__(self, module: nn.Module, precise: nn.Module | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidInputError(f"model of type {type(module).__name__}: expected a torch.nn.Module")
        self.own = module if isinstance(module, Network) else copy.deepcopy(module).eval().requires_grad_(False)
        tensors = [*self.own.parameters(), *self.own.buffers()]
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
        if len(kinds) > 1 or not kinds <= self.precisions:
            raise InvalidInputError(
                f"model with weights of type {sorted(map(str, kinds))}: expected all float32 or all float64"
            )
        self.dtype = kinds.pop() if kinds else torch.float32
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._precise = precise

    @cached_property
    def precise(self) -> nn.Module:
        """The classifier in float64."""
        return copy.deepcopy(self.own).double() if self._precise is None else self._precise

    def logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, classes) in its own precision, returned as float64, without gradients.

        With ``alone`` the images are the whole batch, as for users who look at one; otherwise it is filled up.

        Raises:
            InvalidInputError: the module does not take such images, or does not return logits.
        """
        with torch.no_grad():
            return self.call(self.own, images.to(self.device, self.dtype), alone).double().to(images.device)

    def exact_logits(self, images: Tensor, *, alone: bool = False) -> Tensor:
        """As :meth:`logits`, computed in float64."""
        with torch.no_grad():
            return self.call(self.precise, images.to(self.device, torch.float64), alone).to(images.device)

    def call(self, module: nn.Module, images: Tensor, alone: bool = False) -> Tensor:
        """As :meth:`logits` for ``own`` or ``precise`` and images of its precision and device, with gradients."""
        count = images.shape[0]
        missing = 0 if alone else -count % self.filled_to
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        try:
            logits = module(images)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise InvalidInputError(
                f"model {type(self.own).__name__} on images of shape {tuple(images.shape[1:])} and type "
                f"{images.dtype}: {' '.join(str(error).split())[:200]}"
            ) from error
        return check_logits(logits, len(images))[:count]

    def check(self, images: Tensor, labels: Any, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch in their own dtype, and labels as int64 of its length, on the classifier's device.

        Raises:
            InvalidInputError: wrong shape, a pixel that is negative, not finite or above the threat's cap, mass 0, a
                label that is no class, a ground cost that does not fit the images, or a module that does not take them.
        """
        threat = Threat() if threat is None else threat
        grid = self.own.grid if isinstance(self.own, Network) else None
        if grid is not None:
            threat.cost.check_grid(grid.height, grid.width)
        images = threat.check(images, grid).detach().to(self.device)
        given = check_labels(labels, len(images), device=self.device)
        return images, check_labels(given, len(images), self.classes(images)) if len(images) else given

    def classes(self, images: Tensor) -> int:
        """How many there are for such images, of which there is at least one."""
        return self.own.num_classes if isinstance(self.own, Network) else self.logits(images[:1]).shape[1]

    def clean(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B,), and whether each image (B, C, H, W) is classified right (B,).

        The prediction of an image that is misclassified is another class than its label: the one that float64 or the
        classifier's own precision answers, and the strongest other one where both answer the label.
        """
        exact, own = self._both(images, labels)
        right = (surplus(exact, labels) < 0) & (surplus(own, labels) < 0)
        prediction = exact.scatter(1, labels[:, None], -torch.inf).argmax(1)
        for logits in (own, exact):
            answer = logits.argmax(1)
            prediction = torch.where(answer != labels, answer, prediction)
        return torch.where(right, labels, prediction), right

    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image (B, C, H, W) is given another class, as a counterexample is; bool (B,)."""
        exact, own = self._both(images, labels)
        return (surplus(exact, labels) > 0) & (surplus(own, labels) >= 0) & (own.argmax(1) != labels)

    def _both(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float64 and in the own precision; an image so near a tie that it matters is asked alone."""
        found = []
        for ask, dtype in ((self.exact_logits, torch.float64), (self.logits, self.dtype)):
            logits = ask(images)
            for row in close_to(logits, labels, dtype).tolist():
                logits[row] = ask(images[row : row + 1], alone=True)[0]
            found.append(logits)
        return found[0], found[1]


def surplus(logits: Tensor, labels: Tensor) -> Tensor:
    """max over t != y of f_t - f_y, (B, classes) -> (B,); NaN where a logit is."""
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


def ascent_direction(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`surplus` at images (B, C, H, W), and its gradient in them: 0 where that is no number."""
    with torch.enable_grad():
        variable = images.detach().requires_grad_(True)
        values = surplus(network(variable), labels)
        (gradient,) = torch.autograd.grad(values.sum(), variable)
    return values.detach(), as_direction(gradient)


def as_direction(gradient: Tensor) -> Tensor:
    """A gradient with 0, no direction, in place of what is no number, or infinite."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def close_to(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of logits (B, classes), computed in ``dtype``, in which f_y and the best other one may tie; int64 (N,)."""
    limit = CLOSE * torch.finfo(dtype).eps * logits.abs().amax(1)
    return (~(surplus(logits, labels).abs() > limit)).nonzero().flatten()
