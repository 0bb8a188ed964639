"""Frank-Wolfe over the Wasserstein ball, with the exact linear-minimisation oracle.

At an iterate x the linearised f_t - f_y is maximised over the whole ball around mu, exactly
(:func:`flowverify.transport.moves.best_moves`), and the iterate moves towards that maximiser: a mix of two points
of a convex set, so no projection is needed, and with a cap the oracle keeps to the cap. Wu, Wang & Yu 2020,
"Stronger and Faster Wasserstein Adversarial Attacks", use the method with an approximate, regularised oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.batch import Batch
from flowverify.attack.model import AttackedModel
from flowverify.attack.rows import Rows, ranked_targets, target_margin
from flowverify.errors import InvalidInputError
from flowverify.network.subject import surplus

STEPS = (1.0, 0.5, 0.25, 0.1)  # of the line search


class FrankWolfe(BaseAttack):
    """Maximises f_t - f_y over the ball for the ``targets`` classes whose linearised boundary is nearest.

    An image is done when any of its targets is reached. The smallest radius is found by bisection.

    Args:
        iterations: for each image and target.
        targets: classes tried for each image.
    """

    name: ClassVar[str] = "frank-wolfe"

    def __init__(
        self, model: nn.Module, *, iterations: int = 20, targets: int = 3, batch_size: int = 100, seed: int = 0
    ) -> None:
        super().__init__(model, batch_size=batch_size, seed=seed)
        if iterations < 1 or targets < 1:
            raise InvalidInputError(f"iterations {iterations}, targets {targets}: expected at least 1 of each")
        self.iterations, self.targets = iterations, targets

    def search(self, batch: Batch) -> Tensor:
        targets, _ = ranked_targets(self.model, batch, self.targets)
        owner = torch.arange(len(batch), device=targets.device).repeat_interleave(targets.shape[1])
        rows = Rows.start(batch, owner, targets.flatten())
        best = batch.images.clone()
        done = batch.ball.budget <= 0
        for _ in range(self.iterations):
            rows = rows[~done[rows.owner]]
            if not len(rows):
                break
            _, gradient = self.model.gradients(rows.iterate, rows.label, rows.target)
            goal = rows.ball.best_moves(gradient)
            step_along(self.model, rows, goal.image, goal.cost, STEPS, torch.full_like(goal.cost, torch.inf))
            hit = self.model.crossed(rows.iterate.clamp(min=0), rows.label)
            best[rows.owner[hit]] = rows.iterate[hit]
            done = done.index_fill(0, rows.owner[hit], True)
        return best


def step_along(
    model: AttackedModel, rows: Rows, goal: Tensor, cost: Tensor, steps: Sequence[float], enough: Tensor
) -> Tensor:
    """Moves each row towards its goal by the step of ``steps`` with the largest f_t - f_y.

    A row whose max f_t - f_y exceeds ``enough`` (R,) at one step is not tried at the next ones.

    Returns:
        max over all t of f_t - f_y there, (R,): positive where the row's iterate is misclassified.
    """
    values = torch.full_like(cost, -torch.inf)
    reached, chosen = values.clone(), torch.full_like(cost, steps[0])
    todo = torch.arange(len(rows), device=cost.device)
    for step in steps:
        start = rows.iterate[todo]
        logits = model.logits((start + step * (goal[todo] - start)).clamp(min=0))
        value = target_margin(logits, rows, todo).nan_to_num(nan=-torch.inf)
        better = value > values[todo]
        own = todo[better]
        values[own], chosen[own] = value[better], step
        reached[own] = surplus(logits, rows.label[todo])[better]
        todo = todo[~(reached[todo] > enough[todo])]
        if not todo.numel():
            break
    rows.towards(goal, cost, chosen)
    return reached
