"""Lifted bounds through which weights can be trained: what moves of mass do to margins, one budget for all neurons.

Intervals let every neuron spend the whole budget, so that they cannot train convolutional networks, where thousands of
neurons each have the worst that can be done to them. Rows of moves (theory, section 21) share one budget. The flow that
a row's maximum takes is its gradient (Danskin's theorem), and the rows of a layer are products of those below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.bounds.intervals import Interval
from flowverify.bounds.lifted.engine import LiftedBounds, _Batch
from flowverify.bounds.lifted.rows import Coefficients
from flowverify.network import Network, is_affine
from flowverify.training.interval_bounds import TrainableBounds

TOLERANCE = 1e-2  # relative gap at which the search for a row's maximum stops; it is a bound wherever it stops


class LiftedTrainableBounds(TrainableBounds):
    """As :class:`TrainableBounds`, by rows of moves above the first layer.

    Where it pays to move mass around cycles of more than two moves, the gradient is that of the steepest pair of moves.

    Args:
        targets: how many classes are bounded: those with the largest clean scores beside the label's.

    Raises:
        InvalidInputError: a network that is affine as a whole.
        UnsupportedOperationError: an operation that lifted bounds have no rule for, named.
    """

    def __init__(self, network: Network, targets: int = 1, refresh: int = 1) -> None:
        super().__init__(network, 0, refresh)
        self.targets = min(targets, network.num_classes - 1)
        dtype = next(network.parameters()).dtype
        self._lifted = LiftedBounds(network, dtype=dtype, tolerance=TOLERANCE, trained=True)

    def bound(self, images: Tensor, labels: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Clean logits, and upper bounds of f_t - f_y over the ball around each image, both (B, classes).

        The bound of t = y is 0; classes that get none are at minus infinity.
        """
        known: dict[str, Interval] = {
            name: self._affine(name, self.rows(name), images, budget)[1] for name in self._frontier
        }
        ball = _Batch(self._lifted, images, budget, known)
        for node in self.network.nodes:
            if not is_affine(node.operation) and node.name not in ball.relaxations:
                read = node.inputs[0]
                ball.relax_readers(read, ball.bound(read, tighten=read not in self._frontier))
            ball.enter(node)
        logits = ball.values[self.network.output]
        classes = logits.detach().scatter(1, labels[:, None], -torch.inf).topk(self.targets, 1).indices
        identity = torch.eye(self.network.num_classes, dtype=logits.dtype, device=logits.device)
        rises = identity[classes] - identity[labels][:, None]
        rows, constant = ball.rows(self.network.output, Coefficients(rises[:, None], None))
        every = torch.full(rises.shape[:2], -torch.inf, dtype=torch.float64, device=logits.device)
        excess, _ = ball.maximum(rows, every, None, TOLERANCE)
        bounds = (rises @ logits[..., None]).squeeze(-1) + constant + excess
        worst = torch.full_like(logits, -torch.inf).scatter(1, classes, bounds)
        return logits, worst.scatter(1, labels[:, None], 0.0)
