"""The base classifier of a smoothed one: what it answers, batch by batch, within a memory limit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from flowverify.conventions import check_logits
from flowverify.errors import InvalidInputError
from flowverify.network import Network
from flowverify.network.subject import close_to, surplus

MEMORY = 256 * 2**20  # bytes of noisy images and of what the network makes of them
MULTIPLE = 16  # rows are filled up to one: a row's logits then do not depend on how many there are
ROWS = {"cpu": 128, "cuda": 65536}  # at most, together: more no longer fit the caches, or no longer gain


class Voter:
    """A copy of a network in evaluation mode, asked about batches that fit into memory.

    Args:
        network: maps (N, C, H, W) to logits (N, classes).
        memory: bytes that a batch and the network's values for it may take, roughly; never fewer than 16 images.

    Raises:
        InvalidInputError: not a torch module, or no memory.
    """

    def __init__(self, network: nn.Module, memory: int = MEMORY) -> None:
        if not isinstance(network, nn.Module):
            raise InvalidInputError(f"model of type {type(network).__name__}: expected a torch.nn.Module")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise InvalidInputError(f"memory: given {memory!r}, expected a number of bytes >= 1")
        self.network = _in_place(copy.deepcopy(network).eval().requires_grad_(False))
        self.memory = memory
        tensors = [*self.network.parameters(), *self.network.buffers()]
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._plan: tuple[tuple[int, ...], int, int] | None = None  # of images of this shape: rows, classes

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

            hooks = [module.register_forward_hook(record) for module in self.network.modules()]
            try:
                logits = self._logits(torch.zeros(MULTIPLE, *shape, dtype=self.dtype, device=self.device))
            finally:
                for hook in hooks:
                    hook.remove()
            width = 10 * prod(shape) + sum(sizes) // MULTIPLE  # with noise drawn ahead
            if self.device.type != "cpu":
                width += 128 * prod(shape)  # the integers and values of the noise
            fit = self.memory // (width * self.dtype.itemsize)
            rows = max(MULTIPLE, min(fit, ROWS.get(self.device.type, ROWS["cuda"])) // MULTIPLE * MULTIPLE)
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
            with torch.inference_mode():
                exact = self.precise(batch[close].double())
            ahead = (surplus(logits[close], best) < 0) & (surplus(exact, best) < 0)
            winners[close] = torch.where(ahead, best, -1)
        return winners

    @cached_property
    def precise(self) -> nn.Module:
        """The network in float64."""
        return copy.deepcopy(self.network).double()

    def logits_of(self, batch: Tensor, what: str) -> Tensor:
        """Logits (N, classes), without gradients.

        Raises:
            InvalidInputError: the network returns NaN on ``what``, does not take such images, or does not return
                logits.
        """
        count = len(batch)
        if count % MULTIPLE:
            batch = torch.cat([batch, batch[:1].expand(-count % MULTIPLE, *batch.shape[1:])])
        logits = self._logits(batch)[:count]
        undefined = logits.isnan().any(1)
        if undefined.any():
            raise InvalidInputError(
                f"{what}: the model returns NaN on {int(undefined.sum())} of {count} noisy images, expected numbers"
            )
        return logits

    def _logits(self, batch: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                logits = self.network(batch)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise InvalidInputError(
                f"model {type(self.network).__name__} on images of shape {tuple(batch.shape[1:])} and type "
                f"{batch.dtype}: {' '.join(str(error).split())[:200]}"
            ) from error
        return check_logits(logits, len(batch))


def _in_place(network: nn.Module) -> nn.Module:
    """Lets each ReLU of a canonical network overwrite what it alone reads, which saves its memory."""
    if isinstance(network, Network):
        nodes = {node.name: node for node in network.nodes}
        readers = Counter(name for node in network.nodes for name in node.inputs)
        for node in network.nodes:
            source = nodes.get(node.inputs[0])
            fresh = source is not None and isinstance(source.operation, nn.Conv2d | nn.Linear)
            if isinstance(node.operation, nn.ReLU) and fresh and readers[node.inputs[0]] == 1:
                node.operation.inplace = True
    return network
