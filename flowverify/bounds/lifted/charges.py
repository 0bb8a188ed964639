"""Rows above convex activations from the prices of the ball: tighter than secants (theory, section 22).

Where lambda d(i, j) + y_i - y_j, for y >= 0 and lambda >= 0, is what a move is *charged* (without y_j, where moves are
single), no m of the ball pays more than V = lambda eps + mu . y in all. So z - z0 <= P . m gives

    max(0, z0 + (z - z0)) <= max(0, P - |z0| / V * charge) . m          for z0 < 0,

entry by entry: the part of the gain that only leads up to the kink is taken off every move. For vanilla balls, y = 0,
it is the interpolation of the activation between the vertices of the simplex m (Behl et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowverify.bounds.lifted.moves import Moves, shifted
from flowverify.bounds.lifted.support import MoveRows, whole_grid, windows_of
from flowverify.bounds.lifted.sweeps import UNIT, prices_at
from flowverify.transport.compiled import use_compiled


@dataclass(frozen=True)
class Charges:
    """Charges of each row's moves, of which no m of the ball pays more than 1 in all.

    Attributes:
        gains: (B, Q, R, ways, C, h, w), as the rows; >= 0 outside of the windows, 0 where not asked for.
        values: V, (B, Q, R, 1, 1, 1, 1), what they have been divided by: an upper bound of the row's largest gain.
    """

    gains: Tensor
    values: Tensor


def charged(
    up: Tensor, charges: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], centre: Tensor, flattest: float
) -> tuple[Tensor, Tensor]:
    """Rows above f(z) - f(z0), f(z) = max(z, flattest z), 0 <= flattest <= 1, and V of the charges that they rest on.

    Args:
        up: rows above z - z0.
        charges, values: unit charges made of the rows above z - z0, and of those above z0 - z.
        centre: z0; all broadcast together.
    """
    height = (1 - flattest) * centre.abs()  # of the piece that does not meet the centre, below it
    left = torch.maximum(flattest * up, up - height * charges[0])
    right = torch.maximum(up, flattest * up - height * charges[1])
    return torch.where(centre < 0, left, right), torch.where(centre < 0, values[0], values[1])


def unit_charges(
    rows: MoveRows, moves: Moves, images: Tensor, budget: Tensor, multipliers: Tensor, feasible: bool
) -> Charges:
    """Charges of the rows, made of the prices of each row at a multiplier.

    Args:
        rows: gains of moves, (B or 1, Q or 1, R, ways, C, h, w).
        images, budget: (B, C, H, W) and (B,).
        multipliers: lambda of each row, (B, Q * R); 0 for rows that are not asked for.
        feasible: whether images of the ball are nonnegative; else prices are 0.
    """
    images, budget = images.double(), budget.double()
    if feasible:
        raised, prices = _prices(rows, moves, images, multipliers.double())
    else:
        raised, prices = multipliers.double(), None
    count, cheapest = images[0].numel(), min(moves.prices)
    value = raised * budget[:, None] * (1 + 8 * UNIT)
    largest = raised * max(moves.prices)
    if prices is not None:
        value = (value + (images[:, None] * prices).flatten(2).sum(2)) * (1 + 2 * (count + 8) * UNIT)
        largest = largest + 2 * prices.flatten(2).amax(2)
    # What rounding of charges may add up to: a move costs at least the cheapest.
    value = value + 8 * UNIT * largest * budget[:, None] / cheapest
    scale = torch.where(value > 0, 1 / value.clamp(min=torch.finfo(torch.float64).tiny), 0.0) * (1 - 8 * UNIT)
    shape = (len(images), len(rows.origins), rows.gains.shape[2])
    unit = (raised * scale).reshape(*shape, 1, 1, 1, 1) * moves.priced(rows.gains)
    if prices is None:
        charges = unit.expand(*shape, *rows.gains.shape[3:])
    else:
        charges = unit + _priced(prices * scale[..., None, None, None], rows, moves)
    return Charges(charges.to(rows.gains.dtype), value.reshape(*shape, 1, 1, 1, 1).to(rows.gains.dtype))


def _priced(prices: Tensor, rows: MoveRows, moves: Moves) -> Tensor:
    """y_i - y_j, or y_i for single moves, of prices (B, Q * R, C, H, W), in the windows; 0 for moves that leave."""
    inside = moves.within(prices.shape[-2], prices.shape[-1], prices.device)
    parts = []
    for way, offset in enumerate(moves.offsets):
        ahead = shifted(prices, offset, 0.0) if moves.chained else 0.0
        plane = torch.where(inside[way], prices - ahead, 0.0)
        parts.append(windows_of(plane[:, :, None], rows))
    return torch.cat(parts, 3)


def _prices(rows: MoveRows, moves: Moves, images: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers (B, Q * R) and prices (B, Q * R, C, H, W) that fulfil the inequalities of each row."""
    gains = rows.gains.detach()
    if not use_compiled("auto", gains):
        whole = whole_grid(rows, images.shape[-2:]).double()
        whole = whole * moves.within(images.shape[-2], images.shape[-1], whole.device)
        whole = whole * (multipliers > 0)[..., None, None, None, None]
        return prices_at(whole.expand(len(images), *whole.shape[1:]), multipliers, moves)
    from flowverify.bounds.lifted import priced_kernel

    flat = gains.reshape(gains.shape[0], -1, gains.shape[3:].numel()).contiguous().numpy()
    given = multipliers.contiguous().numpy()
    raised, prices = np.zeros(given.shape), np.zeros((*given.shape, images[0].numel()))
    for index, mass in enumerate(images.flatten(1).contiguous().numpy()):
        priced_kernel.prices_at(
            flat[index if len(flat) > 1 else 0], gains.shape[1] == 1 and len(rows.origins) > 1,
            rows.origins.cpu().numpy().astype(np.int64), gains.shape[2], tuple(gains.shape[-2:]),
            tuple(images.shape[1:]), np.array(moves.offsets), np.array(moves.prices), moves.chained, mass,
            given[index], 0, given.shape[1], raised[index], prices[index],
        )  # fmt: skip
    return torch.from_numpy(raised), torch.from_numpy(prices).reshape(*given.shape, *images.shape[1:])
