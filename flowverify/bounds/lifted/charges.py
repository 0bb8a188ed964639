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
class Bend:
    """What a row above an activation f(z) = max(z, flattest z), 0 <= flattest <= 1, is made of: (B, Q, E) each.

    Attributes:
        wanted: where there is a bend; the rows of other entries are 0.
        centre: z0.
        known: how far from it z is known to get, upward for z0 < 0, downward else.
        right, left: slopes of the secants; see :mod:`flowverify.bounds.lifted.relaxations`.
    """

    wanted: Tensor
    centre: Tensor
    known: Tensor
    right: Tensor
    left: Tensor
    flattest: float


@dataclass(frozen=True)
class Charges:
    """Charges of each row's moves, of which no m of the ball pays more than 1 in all.

    Attributes:
        gains: (B, Q, R, ways, C, h, w), as the rows; >= 0 outside of the windows, 0 where not asked for.
        values: V, (B, Q, R, 1, 1, 1, 1), what they have been divided by: an upper bound of the row's largest gain.
    """

    gains: Tensor
    values: Tensor


def bent_rows(
    rows: MoveRows, moves: Moves, images: Tensor, budget: Tensor, feasible: bool, bend: Bend, trust: float
) -> Tensor:
    """Rows above f(z) - f(z0), (B, Q, E, ways, C, h, w): less charges, or by secants.

    Args:
        rows: of each of Q places the first E are above z - z0, the others above z0 - z; on the whole grid they may
            stand as one place. Their multipliers are those of charges; 0, or None, for secants.
        trust: secants are taken where z is known to within less than this share of V, or V does not reach the bend.
    """
    shape = torch.Size((*bend.centre.shape, *rows.gains.shape[3:]))
    if not use_compiled("auto", rows.gains):
        return _bent(rows, moves, images, budget, feasible, bend, trust)
    from flowverify.bounds.lifted import priced_kernel

    gains, places = rows.gains.detach(), len(rows.origins)
    flat = gains.reshape(gains.shape[0], -1, gains.shape[3:].numel()).double().contiguous().numpy()
    multipliers = torch.zeros(len(images), rows.count) if rows.multipliers is None else rows.multipliers
    given = multipliers.double().contiguous().numpy()
    mass, budgets = images.double().flatten(1).contiguous().numpy(), budget.double().numpy()
    wanted, *values = (
        value.flatten(1).contiguous().numpy()
        for value in (bend.wanted, *(v.double() for v in (bend.centre, bend.known, bend.right, bend.left)))
    )
    found = np.zeros((len(images), wanted.shape[1], flat.shape[2]))
    for index in range(len(images)):
        priced_kernel.bent_rows(
            flat[index if len(flat) > 1 else 0], gains.shape[1] == 1 and places > 1,
            rows.origins.cpu().numpy().astype(np.int64), gains.shape[2], tuple(gains.shape[-2:]),
            tuple(images.shape[1:]), np.array(moves.offsets), np.array(moves.prices), moves.chained, feasible,
            mass[index], float(budgets[index]), given[index], 2 * shape[2], wanted[index],
            *(value[index] for value in values), bend.flattest, trust, found[index],
        )  # fmt: skip
    return torch.from_numpy(found).to(gains.dtype).reshape(shape)


def _bent(
    rows: MoveRows, moves: Moves, images: Tensor, budget: Tensor, feasible: bool, bend: Bend, trust: float
) -> Tensor:
    """:func:`bent_rows` in torch."""

    def halves(values: Tensor) -> tuple[Tensor, Tensor]:
        split = values.reshape(len(values), -1, 2, bend.centre.shape[2], *values.shape[3:])
        return split[:, :, 0], split[:, :, 1]

    centre, known, right, left, wanted = (
        value[..., None, None, None, None] for value in (bend.centre, bend.known, bend.right, bend.left, bend.wanted)
    )
    up, _ = halves(rows.gains)
    gains = torch.maximum(right * up, left * up)
    if rows.multipliers is not None:
        charges = unit_charges(rows, moves, images, budget, rows.multipliers, feasible)
        less, own = charged(up, halves(charges.gains), halves(charges.values), centre, bend.flattest)
        # Charges for more than all that the row can do are no smaller than it.
        pays = (own > 0) & (own >= (1 - bend.flattest) * centre.abs())
        gains = torch.where(pays & (known >= trust * own), less, gains)
    return gains * wanted


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
        whole = whole_grid(MoveRows(rows.gains.detach(), rows.origins), images.shape[-2:]).double()
        whole = whole * moves.within(images.shape[-2], images.shape[-1], whole.device)
        whole = whole * (multipliers > 0)[..., None, None, None, None]
        raised, prices = prices_at(whole.expand(len(images), *whole.shape[1:]), multipliers.double(), moves)
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
