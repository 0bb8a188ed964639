"""The base classifier of a smoothed one: what it answers, batch by batch, within a memory limit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError
from flowverify.network import Network
from flowverify.network.subject import Subject, close_to, surplus

MEMORY = 256 * 2**20  # bytes of noisy images and of what the network makes of them
ROWS = {"cpu": 128, "cuda": 65536}  # at most, together: more no longer fit the caches, or no longer gain


class Voter(Subject):
    """A copy of a network in evaluation mode, asked about batches that fit into memory.

    Args:
        network: maps (N, C, H, W) to logits (N, classes), in any floating-point precision.
        memory: bytes that a batch and the network's values for it may take, roughly; never fewer than 16 images.

    Raises:
        InvalidInputError: as :class:`~flowverify.network.subject.Subject`, or no memory.
    """

    filled_to = 16
    precisions = Subject.precisions | {torch.float16, torch.bfloat16}

    def __init__(self, network: nn.Module, memory: int = MEMORY) -> None:
        super().__init__(copy.deepcopy(network) if isinstance(network, Network) else network)
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise InvalidInputError(f"memory: given {memory!r}, expected a number of bytes >= 1")
        _let_activations_overwrite(self.own)
        self.memory = memory
        self._plan: tuple[tuple[int, ...], int, int] | None = None  # of images of this shape: rows, classes

    def classes(self, images: Tensor) -> int:
        return self.plan(images.shape[1:])[1]

    def plan(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many images (C, H, W) go through the network at once, and how many classes it has.

        Raises:
            InvalidInputError: the network does not take such images or does not return logits.
        """
        if self._plan is None or self._plan[0] != tuple(shape):
            sizes: list[int] = []

            def record(_module: nn.Module, _given: object, value: object) -> None:
                if isinstance(value, Tensor):
                    sizes.append(value.numel())

            hooks = [module.register_forward_hook(record) for module in self.own.modules()]
            try:
                logits = self._logits(torch.zeros(self.filled_to, *shape, dtype=self.dtype, device=self.device))
            finally:
                for hook in hooks:
                    hook.remove()
            width = 10 * prod(shape) + sum(sizes) // self.filled_to  # with noise drawn ahead
            if self.device.type != "cpu":
                width += 128 * prod(shape)  # the integers and values of the noise
            fit = self.memory // (width * self.dtype.itemsize)
            most = min(fit, ROWS.get(self.device.type, ROWS["cuda"]))
            rows = max(self.filled_to, most // self.filled_to * self.filled_to)
            self._plan = (tuple(shape), rows, logits.shape[1])
        return self._plan[1:]

    def votes(self, batch: Tensor, what: str) -> Tensor:
        """The class of each image, int64 (N,); -1 where none is strictly the best.

        A class is the best by the rule of :mod:`flowverify.network.subject`, in the network's own precision and, where
        that is near a tie, in float64 too: the base classifier is a function with one more answer, "none", for which
        certificates hold as well.

        Raises:
            InvalidInputError: as :meth:`logits_of`.
        """
        logits = self.logits_of(batch, what)
        winners = logits.argmax(1)
        close = close_to(logits, winners, self.dtype)
        if close.numel():
            best = winners[close]
            exact = self.exact_logits(batch[close])
            ahead = (surplus(logits[close], best) < 0) & (surplus(exact, best) < 0)
            winners[close] = torch.where(ahead, best, -1)
        return winners

    def logits_of(self, batch: Tensor, what: str) -> Tensor:
        """Logits (N, classes), without gradients.

        Raises:
            InvalidInputError: the network returns NaN on ``what``, does not take such images, or does not return
                logits.
        """
        count, logits = len(batch), self._logits(batch)
        undefined = logits.isnan().any(1)
        if undefined.any():
            raise InvalidInputError(
                f"{what}: the model returns NaN on {int(undefined.sum())} of {count} noisy images, expected numbers"
            )
        return logits

    def _logits(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.call(self.own, batch)


def _let_activations_overwrite(network: nn.Module) -> None:
    """Lets each ReLU of a canonical network overwrite what it alone reads, which saves its memory."""
    if isinstance(network, Network):
        nodes = {node.name: node for node in network.nodes}
        readers = Counter(name for node in network.nodes for name in node.inputs)
        for node in network.nodes:
            source = nodes.get(node.inputs[0])
            fresh = source is not None and isinstance(source.operation, nn.Conv2d | nn.Linear)
            if isinstance(node.operation, nn.ReLU) and fresh and readers[node.inputs[0]] == 1:
                node.operation.inplace = True
