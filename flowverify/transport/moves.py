"""The best moves of mass for a linear function, for any ground cost: exact, without a search or a solver.

For an image mu >= 0, coefficients c and a ground cost d, over the images nu >= 0 of equal mass per channel,

    maximise c . nu  subject to  W1(mu, nu) <= budget          (the linear-minimisation oracle of an attack)
    minimise W1(mu, nu)  subject to  c . (nu - mu) >= target   (the distance to a half-space)

are one problem read in two ways. In terms of plans it is: each source i sends its mass mu_i to pixels j, gaining
c_j - c_i at cost d(i, j) a unit. The gains that a source can have at each cost form a concave envelope, and the
optimum takes the steps of all envelopes in order of their slope until the budget is spent or the target is
reached: a continuous multiple-choice knapsack, whose slope at the end is the dual's lambda (theory, section 5).
:func:`flowverify.transport.support.support` and :func:`flowverify.transport.least_budget.least_budget` do the same
for many functions of each image.

With a cap, nu <= cap, the plans that reach a pixel share its room. See :mod:`flowverify.transport.moves_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.compiled import share_out
from flowverify.transport.ground import offsets_by_cost, parse_ground

Array = NDArray[Any]


@dataclass(frozen=True)
class Moves:
    """The best moves for each image, float64, on the device of the images.

    ``image`` is nonnegative, of the mass of its image up to rounding, and the optimal plan between the two costs at
    most ``cost`` (without a cap, exactly that).
    """

    image: Tensor  # (B, C, H, W)
    gain: Tensor  # (B,), c . (nu - mu)
    cost: Tensor  # (B,), in mass times ground cost
    slope: Tensor  # (B,), gain for one more unit of budget; 0 where nothing more can be gained


def best_moves(
    coefficients: Tensor,  # (B, C, H, W)
    images: Tensor,  # (B, C, H, W)
    *,
    budget: Tensor | None = None,  # (B,)
    target: Tensor | None = None,  # (B,)
    ground: str = "l1",
    cap: float | None = None,
) -> Moves:
    """Moves mass as profitably as possible until ``budget`` is spent or ``target`` is gained, whichever is first.

    Args:
        coefficients: c, one function for each image.
        images: mu, finite and nonnegative.
        budget: in mass times ground cost; infinite by default.
        target: of c . (nu - mu); infinite by default. Where it cannot be reached, all that can be is gained.
        ground: the name of a ground cost; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel; pixels of ``images`` above it are an error.

    Raises:
        InvalidInputError: shapes that do not fit, NaN, or an image above the cap.
        UnknownNameError: the ground cost is unknown.
    """
    if images.ndim != 4 or coefficients.shape != images.shape:
        raise InvalidInputError(
            f"coefficients of shape {tuple(coefficients.shape)}, images of shape {tuple(images.shape)}: expected two "
            "equal shapes (B, C, H, W)"
        )
    device, (count, channels, height, width) = images.device, images.shape
    mass = np.ascontiguousarray(images.detach().double().cpu().numpy()).reshape(count, -1)
    rows = np.ascontiguousarray(coefficients.detach().double().cpu().numpy()).reshape(count, -1)
    budgets, targets = _limits(budget, count, "budget"), _limits(target, count, "target")
    if not np.isfinite(rows).all():
        raise InvalidInputError("coefficients: given NaN or infinite values, expected finite ones")
    if cap is not None and mass.max(initial=0.0) > cap:
        raise InvalidInputError(f"images: given a pixel of {mass.max():g}, expected at most the cap, {cap:g}")
    offsets, costs = offsets_by_cost(height, width, ground)
    moved, numbers = np.empty_like(mass), np.empty((count, 3))
    shape = (channels, height, width)
    metric, power = parse_ground(ground).is_metric, parse_ground(ground).power

    from flowverify.transport import moves_kernel  # numba compiles on first use

    longest = moves_kernel.WINDOW if metric else moves_kernel.SINGLE_WINDOW**power

    def work(first: int, last: int) -> None:
        for k in range(first, last):
            if cap is None:
                numbers[k] = moves_kernel.move_best(
                    rows[k], mass[k], shape, offsets, costs, budgets[k], targets[k], moved[k]
                )
            else:
                numbers[k] = moves_kernel.move_best_capped(
                    rows[k], mass[k], shape, offsets, costs, budgets[k], targets[k], cap, metric, longest, moved[k]
                )

    share_out(work, count)
    result = torch.from_numpy(numbers).to(device)
    return Moves(torch.from_numpy(moved).to(device).reshape(images.shape), result[:, 0], result[:, 1], result[:, 2])


def _limits(values: Tensor | None, count: int, what: str) -> Array:
    if values is None:
        return np.full(count, np.inf)
    if tuple(values.shape) != (count,) or bool(torch.isnan(values).any()):
        raise InvalidInputError(f"{what} of shape {tuple(values.shape)}: expected ({count},), and no NaN")
    return values.detach().double().cpu().numpy()
