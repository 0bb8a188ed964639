"""How lifted bounds relax activations and maximum pools: by lines from the centre of the ball, or by its prices.

*Activations:* secants from the centre. For z in [l, u], t = z - z0, an activation f with f(z) - f(z0) <= s t for
t >= 0, s the largest slope from the centre to the right, and the least to the left for t < 0. Where the first is not
above the second one line bounds f from above; else f(z) - f(z0) <= max(s+ t, s- t). The same from below, with the signs
turned (theory, section 21).

*Maximum pooling:* from below its largest member at the centre, from above the entrywise maximum of its members' rows.
Let v be the largest member z_k0 at the centre. For a member k with upper bound u_k the line from (z_k0, 0) to
(u_k, u_k - v) is above z_k - v wherever z_k <= u_k, as its slope is at most 1: z_k - v <= s_k (z_k - z_k0), with
s_k = (u_k - v) / (u_k - z_k0), and 1 for the largest member itself. Members that cannot reach v are left out.

*Convex activations of two pieces:* rows above them that are tighter than secants (theory, section 22). Where
lambda d(i, j) + y_i - y_j, for y >= 0 and lambda >= 0, is what a move is *charged* (without y_j, where moves are
single), no m of the ball pays more than V = lambda eps + mu . y in all. So z - z0 <= P . m gives

    max(0, z0 + (z - z0)) <= max(0, P - |z0| / V * charge) . m          for z0 < 0,

entry by entry: the part of the gain that only leads up to the kink is taken off every move. For vanilla balls, y = 0,
it is the interpolation of the activation between the vertices of the simplex m (Behl et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.bounds.lifted.moves import Moves, shifted
from flowverify.bounds.lifted.rows import Coefficients, ListedRows, StoredRows, WindowRows, pair
from flowverify.bounds.lifted.support import UNIT, MoveRows, prices_at, whole_grid, windows_of
from flowverify.bounds.relaxations import pieces
from flowverify.errors import UnsupportedOperationError
from flowverify.network.curves import CURVES, Curve, slopes_between
from flowverify.network.operations import operation_name
from flowverify.transport.compiled import use_compiled

BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class Secants:
    """Slopes of secants of one activation from the centre, each (B, *shape)."""

    most_right: Tensor
    least_left: Tensor
    least_right: Tensor
    most_left: Tensor


def secants(operation: nn.Module, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Extreme slopes of (f(z) - f(z0)) / (z - z0) over z in [lower, upper], lower <= centre <= upper.

    Rounding is on the safe side up to a few units in the last place, as section 15 of the theory allows for.

    Raises:
        UnsupportedOperationError: an activation without a rule, named.
    """
    if isinstance(operation, nn.ReLU):
        return _two_pieces(0.0, lower, centre, upper)
    if isinstance(operation, nn.LeakyReLU):
        return _two_pieces(float(operation.negative_slope), lower, centre, upper)
    if isinstance(operation, nn.Sigmoid | nn.Tanh):
        return _s_shaped(operation, lower, centre, upper)
    if type(operation) in CURVES:
        return _curved(operation, CURVES[type(operation)](operation), lower, centre, upper)
    raise UnsupportedOperationError(f"lifted bounds: no rule for {operation_name(operation)}")


def _two_pieces(slope: float, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """z for z >= 0, slope * z below: slopes lie between those of the pieces, by how much of the way each takes."""
    tiny = torch.finfo(centre.dtype).tiny
    on = (centre >= 0).to(centre.dtype)
    own = on + (1 - on) * slope
    # The share of the way to the end that lies beyond zero; both terms of the sum are of one sign.
    beyond = torch.where(upper > 0, upper / (upper - centre).clamp(min=tiny), 0.0).clamp(0, 1)
    right = torch.where(centre >= 0, 1.0, slope + (1 - slope) * beyond)
    before = torch.where(lower < 0, lower / (lower - centre).clamp(max=-tiny), 0.0).clamp(0, 1)
    left = torch.where(centre >= 0, 1.0 + (slope - 1.0) * before, slope)
    # At a centre of exactly zero nothing is known but the pieces themselves.
    left = torch.where((centre == 0) & (lower < 0), slope, left)
    own_left = torch.where((centre == 0) & (lower < 0), slope, own)
    four = (
        torch.maximum(own, right),
        torch.minimum(own_left, left),
        torch.minimum(own, right),
        torch.maximum(own_left, left),
    )
    settled = torch.where(upper <= 0, torch.full_like(centre, slope), 1.0)
    return Secants(*(torch.where((lower >= 0) | (upper <= 0), settled, one) for one in four))


def _s_shaped(operation: nn.Module, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Convex up to zero, concave above: slopes from the centre rise up to a tangent and fall from there."""

    def value(z: Tensor) -> Tensor:
        found: Tensor = operation(z)
        return found

    def derivative(z: Tensor) -> Tensor:
        at = value(-z.abs())  # at the side where nothing cancels
        return at * (1 - at) if isinstance(operation, nn.Sigmoid) else (1 - at) * (1 + at)

    steepest = 0.25 if isinstance(operation, nn.Sigmoid) else 1.0
    epsilon = 4 * torch.finfo(centre.dtype).eps

    def extremes(end: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """The least and the largest slope from the centre to one side, up to the end."""
        far = (end - centre).abs()
        safe = far.clamp(min=torch.finfo(centre.dtype).tiny)
        doubt = epsilon / safe + epsilon
        here, chord = derivative(centre), (value(end) - value(centre)).abs() / safe
        chord = torch.where(far > 0, chord, here)
        least = (torch.minimum(here, chord - doubt) * (1 - epsilon)).clamp(min=0)
        # Where the centre lies on the other side of zero, the largest is at a tangent: below it, on the way from zero,
        # derivatives are above the slope, so that any point there gives an upper bound.
        near, most = torch.zeros_like(centre), -centre.abs() * 0
        beyond = end.abs()
        for _ in range(BISECTIONS):
            middle = (near + beyond) / 2
            point = sign * middle
            slope = (value(point) - value(centre)).abs() / (point - centre).abs().clamp(
                min=torch.finfo(centre.dtype).tiny
            )
            short = derivative(point) >= slope
            near, beyond = torch.where(short, middle, near), torch.where(short, beyond, middle)
        turned = derivative(sign * near)
        reaches = sign * end > 0
        over = sign * centre < 0
        tangent_or_end = torch.where(reaches & (derivative(end) < chord), turned, chord + doubt)
        most = torch.where(over, torch.maximum(tangent_or_end, here), here)
        return least, (most * (1 + epsilon) + torch.finfo(centre.dtype).tiny).clamp(max=steepest)

    least_right, most_right = extremes(upper, +1)
    least_left, most_left = extremes(lower, -1)
    return Secants(most_right, least_left, least_right, most_left)


def _curved(operation: nn.Module, curve: Curve, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
    """Piece by piece: for z from a to b, f(z) is at most f(a) + s (z - a), s the largest slope on the piece.

    The slope of the secant to z is then at most (f(a) - f(z0) + s (z - a)) / (z - z0), which is monotone in z: the
    largest of it is at an end of the piece, on the first piece it is s itself. It holds on both sides of z0, and for
    the least slopes as well.
    """
    epsilon, tiny = 4 * torch.finfo(centre.dtype).eps, torch.finfo(centre.dtype).tiny
    value = operation(centre)

    def extremes(end: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest slope from the centre to one side, up to the end."""
        begin, stop = pieces(centre, end)
        least, largest = slopes_between(curve, torch.minimum(begin, stop), torch.maximum(begin, stop))
        known = operation(begin)
        gain = known - value
        doubt = epsilon * (known.abs() + value.abs())

        def quotients(place: Tensor, numerator: Tensor) -> tuple[Tensor, Tensor]:
            far = place - centre
            size = far.abs().clamp(min=tiny)
            slope, off = numerator * far.sign() / size, doubt / size
            return slope - off, slope + off

        at_begin, way = quotients(begin, gain), stop - begin
        low = torch.cat([at_begin[0][1:], quotients(stop, gain + least * way)[0][1:], least[:1]]).amin(0)
        high = torch.cat([at_begin[1][1:], quotients(stop, gain + largest * way)[1][1:], largest[:1]]).amax(0)
        return torch.maximum(low, least.amin(0)), torch.minimum(high, largest.amax(0))

    least_right, most_right = extremes(upper)
    least_left, most_left = extremes(lower)
    return Secants(most_right, least_left, least_right, most_left)


@dataclass(frozen=True, eq=False)
class PoolRelaxation:
    """How a maximum pool is bounded around the centre of each ball.

    Attributes:
        chosen: which member is the largest at the centre, one-hot, (taps, B, channels, h, w).
        settled: where that member is the largest in the whole ball.
        rows: above the pool less its centre, 0 where settled.
    """

    operation: nn.MaxPool2d
    chosen: Tensor
    settled: Tensor
    rows_above: StoredRows | None
    rows_below: None = None
    chord: None = None
    mixes = False

    def through(self, up: Coefficients, down: Coefficients, shape: tuple[int, ...]) -> Coefficients:
        """What is handed on to the pool's input, of this shape."""
        outer = Coefficients(up.data * up.taken(self.settled.to(up.data.dtype)) + down.data, up.origins)
        kernel, stride, padding, dilation = _options(self.operation)
        if outer.origins is None:
            index = self._positions(shape).flatten(2)[:, None, None]
            data = outer.data.expand(len(index), *outer.data.shape[1:]).flatten(4)
            result = data.new_zeros(*data.shape[:4], shape[1] * shape[2])
            return Coefficients(
                result.scatter_add(-1, index.expand(data.shape), data).reshape(*data.shape[:4], *shape[1:]), None
            )
        total: Tensor | None = None
        channels = shape[0]
        for tap, chosen in enumerate(self.chosen):
            weight = outer.data.new_zeros(channels, 1, *kernel)
            weight[:, 0, tap // kernel[1], tap % kernel[1]] = 1
            own = outer.scaled(chosen).data
            part = functional.conv_transpose2d(
                own.reshape(-1, *own.shape[3:]), weight, stride=stride, dilation=dilation, groups=channels
            ).reshape(
                *own.shape[:4],
                *[(own.shape[4 + a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 for a in (0, 1)],
            )
            total = part if total is None else total + part
        assert total is not None
        device = outer.origins.device
        moved = outer.origins * torch.tensor(stride, device=device) - torch.tensor(padding, device=device)
        return Coefficients(total, moved)

    def _positions(self, shape: tuple[int, ...]) -> Tensor:
        """Where the largest member stands in the input's plane, (B, channels, h, w)."""
        index, _ = tap_positions(self.operation, shape, tuple(self.chosen.shape[-2:]))
        return (self.chosen.long() * index[:, None, None].to(self.chosen.device)).sum(0)


def _options(operation: nn.MaxPool2d) -> tuple[tuple[int, int], ...]:
    return tuple(
        pair(option) for option in (operation.kernel_size, operation.stride, operation.padding, operation.dilation)
    )


def tap_positions(operation: nn.MaxPool2d, shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where each tap of each window stands in the input's plane, (taps, h, w), and whether it stands in the map."""
    kernel, stride, padding, dilation = _options(operation)
    i, j = (
        (torch.arange(kernel[a]) * dilation[a])[:, None] + torch.arange(size[a]) * stride[a] - padding[a]
        for a in (0, 1)
    )
    inside = ((i >= 0) & (i < shape[1]))[:, None, :, None] & ((j >= 0) & (j < shape[2]))[None, :, None]
    index = i.clamp(0, shape[1] - 1)[:, None, :, None] * shape[2] + j.clamp(0, shape[2] - 1)[None, :, None]
    return index.flatten(0, 1), inside.flatten(0, 1)


def relax_pool(
    operation: nn.MaxPool2d,
    lower: Tensor,
    centre: Tensor,
    upper: Tensor,
    size: tuple[int, int],
    members: StoredRows | None,
) -> PoolRelaxation:
    """The relaxation from bounds of the input (B, channels, H, W), and rows above it."""
    shape = tuple(centre.shape[1:])
    index, inside = (t.to(centre.device) for t in tap_positions(operation, shape, size))

    def taken(values: Tensor) -> Tensor:
        """(taps, B, channels, h, w), -inf for what stands in the padding."""
        found = values.flatten(2)[:, :, index].movedim(2, 0)
        return found.masked_fill(~inside[:, None, None], -torch.inf)

    low, middle, high = taken(lower), taken(centre), taken(upper)
    largest, best = middle.max(0)
    chosen = functional.one_hot(best, len(index)).movedim(-1, 0).to(centre.dtype)
    others = high.masked_fill(chosen > 0, -torch.inf).amax(0)
    lowest = low.gather(0, best[None])
    settled = lowest[0] >= others
    if members is None or bool(settled.all()):
        return PoolRelaxation(operation, chosen, settled | torch.tensor(members is None), None)
    tiny = torch.finfo(centre.dtype).tiny
    slope = ((high - largest) / (high - middle).clamp(min=tiny)).nan_to_num(nan=0.0).clamp(0, 1)
    slope = torch.where(chosen > 0, 1.0, slope)
    # A member that stays below v has slope 0: where the chosen one falls below it, the pool falls no further.
    counts = (chosen > 0) | ((high > lowest) & inside[:, None, None])
    return PoolRelaxation(operation, chosen, settled, _rows(operation, members, slope, counts, settled, inside, index))


def _rows(
    operation: nn.MaxPool2d,
    members: StoredRows,
    slope: Tensor,
    counts: Tensor,
    settled: Tensor,
    inside: Tensor,
    index: Tensor,
) -> StoredRows:
    kernel, stride, padding, dilation = _options(operation)
    plane = _by_entry(members)  # (B, H * W, channels, 4, C, h, w)
    h, w = plane.shape[-2:]
    steps = members.stride if isinstance(members, WindowRows) else (0, 0)
    height, width = ((kernel[a] - 1) * dilation[a] * steps[a] + (h, w)[a] for a in (0, 1))
    total: Tensor | None = None
    for tap in range(len(index)):
        own = plane[:, index[tap]]  # (B, oh, ow, channels, ...)
        factor, valid = (t[tap].permute(0, 2, 3, 1)[..., None, None, None, None] for t in (slope, counts))
        top, left = (tap // kernel[1]) * dilation[0] * steps[0], (tap % kernel[1]) * dilation[1] * steps[1]
        placed = functional.pad(own * factor, (left, width - w - left, top, height - h - top))
        placed = placed.masked_fill(~valid, -torch.inf)
        total = placed if total is None else torch.maximum(total, placed)
    assert total is not None
    total = total.masked_fill(settled.permute(0, 2, 3, 1)[..., None, None, None, None], 0.0)
    if isinstance(members, WindowRows):
        moved = tuple(steps[a] * stride[a] for a in (0, 1))
        offset = tuple(members.offset[a] - steps[a] * padding[a] for a in (0, 1))
        return WindowRows(total, (moved[0], moved[1]), (offset[0], offset[1]))
    oh, ow, channels = total.shape[1:4]
    flat = total.permute(0, 3, 1, 2, *range(4, total.ndim)).flatten(1, 3)
    entries = torch.arange(flat.shape[1], device=flat.device)
    return ListedRows(entries[None], flat, (channels, oh, ow))


def _by_entry(members: StoredRows) -> Tensor:
    if isinstance(members, WindowRows):
        return members.gains.flatten(1, 2)
    assert isinstance(members, ListedRows), "values that pools read have rows of their own for each image"
    channels, height, width = members.shape
    gains = members.gains
    full = gains.new_zeros(gains.shape[0], channels * height * width, *gains.shape[2:])
    full[torch.arange(len(full), device=full.device)[:, None], members.index] = gains
    return full.reshape(len(full), channels, height * width, *full.shape[2:]).transpose(1, 2)


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
    flat = gains.reshape(gains.shape[0], -1, gains.shape[3:].numel())
    multipliers = torch.zeros(len(images), rows.count) if rows.multipliers is None else rows.multipliers
    given = multipliers.double().contiguous().numpy()
    mass, budgets = images.double().flatten(1).contiguous().numpy(), budget.double().numpy()
    wanted, *values = (
        value.flatten(1).contiguous().numpy()
        for value in (bend.wanted, *(v.double() for v in (bend.centre, bend.known, bend.right, bend.left)))
    )
    found = gains.new_empty(len(images), wanted.shape[1], flat.shape[2])
    for index in range(len(images)):
        own = np.zeros(found.shape[1:])
        priced_kernel.bent_rows(
            flat[index if len(flat) > 1 else 0].double().contiguous().numpy(), gains.shape[1] == 1 and places > 1,
            rows.origins.cpu().numpy().astype(np.int64), gains.shape[2], tuple(gains.shape[-2:]),
            tuple(images.shape[1:]), np.array(moves.offsets), np.array(moves.prices), moves.chained, feasible,
            mass[index], float(budgets[index]), given[index], 2 * shape[2], wanted[index],
            *(value[index] for value in values), bend.flattest, trust, own,
        )  # fmt: skip
        found[index] = torch.from_numpy(own)
    return found.reshape(shape)


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
