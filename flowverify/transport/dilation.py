"""Grey-scale dilation of an image by a ground cost: D_lambda(c)_i = max_j c_j - lambda * d(i, j).

No transport solver is needed, on any device and in any dtype:

- l1 is a sum over the two axes, and a cone along each: a row pass and a column pass of two running maxima each;
- l2^2 is a sum over the two axes, a parabola along each: a row pass and a column pass over the offsets of one axis;
- every other cost: the offsets of the grid in order of their cost, until none that is left can pay.

This is the torch implementation, the reference for the compiled kernels.

So is the search over the multiplier that follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowverify.transport import compiled
from flowverify.transport.ground import L1, L2, Power, offsets_by_cost, parse_ground, steepest_offsets


class Dilation(NamedTuple):
    """``value`` is D_lambda(c); ``distance`` and ``origin`` belong to a maximiser j of every pixel i."""

    value: Tensor  # (..., C, H, W)
    distance: Tensor  # (..., C, H, W), cost from i to j
    origin: Tensor  # (..., C, H, W), int64 index of j within its channel's H*W pixels


def dilate(coefficients: Tensor, multiplier: Tensor, ground: str = "l1") -> Dilation:
    """Dilates each image of a batch by its own multiple of the cost.

    Args:
        coefficients: c, of shape (..., C, H, W). Channels are dilated independently.
        multiplier: lambda >= 0, of shape (...).
        ground: the name of the cost d.

    Returns:
        The dilation with, for every pixel i, a pixel j that attains max_j c_j - lambda * d(i, j). A pixel
        whose own value attains the maximum stays (distance 0).

    Raises:
        UnknownNameError, InvalidInputError: as :func:`flowverify.transport.ground.check_ground`.
    """
    cost = parse_ground(ground)
    slope = multiplier[..., None, None, None]
    if cost not in (L1(), Power(L2(), 2.0)):
        return _by_offsets(coefficients, slope, ground)
    one_axis = _running_maximum if cost.power == 1.0 else _parabola_maximum
    width = coefficients.shape[-1]
    value, column = one_axis(coefficients, slope)
    value_t, row_t = one_axis(value.transpose(-1, -2), slope)
    row = row_t.transpose(-1, -2)
    column = column.gather(-2, row)
    rows = torch.arange(row.shape[-2], device=row.device)[:, None]
    columns = torch.arange(width, device=row.device)
    along, across = (row - rows).abs(), (column - columns).abs()
    distance = along + across if cost.power == 1.0 else along**2 + across**2
    return Dilation(value_t.transpose(-1, -2), distance.to(coefficients.dtype), row * width + column)


def _running_maximum(values: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """max_j values_j - slope * |i - j| along the last axis, and its argmax (i itself where it attains it)."""
    position = torch.arange(values.shape[-1], device=values.device)
    ramp = slope * position
    forward = (values + ramp).cummax(-1).indices
    flipped = (values - ramp).flip(-1).cummax(-1).indices
    backward = values.shape[-1] - 1 - flipped.flip(-1)
    best, origin = values, position.expand(values.shape)
    for candidate in (forward, backward):
        # Evaluated from the index: adding and subtracting the ramp would round the stationary value.
        value = values.gather(-1, candidate) - slope * (candidate - position).abs()
        better = value > best
        best = torch.where(better, value, best)
        origin = torch.where(better, candidate, origin)
    return best, origin


def _parabola_maximum(values: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """max_j values_j - slope * (i - j)^2 along the last axis, and its argmax (i itself where it attains it)."""
    size = values.shape[-1]
    best, origin = values.clone(), torch.arange(size, device=values.device).repeat(*values.shape[:-1], 1)
    for step in range(1, size):
        fee = slope * step**2
        for here, there in ((slice(step, None), slice(None, -step)), (slice(None, -step), slice(step, None))):
            value = values[..., there] - fee
            better = value > best[..., here]
            best[..., here] = torch.where(better, value, best[..., here])
            index = torch.arange(size, device=values.device)[there].expand_as(value)
            origin[..., here] = torch.where(better, index, origin[..., here])
    return best, origin


def _by_offsets(coefficients: Tensor, slope: Tensor, ground: str) -> Dilation:
    height, width = coefficients.shape[-2:]
    offsets, costs = offsets_by_cost(height, width, ground)
    best, distance = coefficients.clone(), torch.zeros_like(coefficients)
    pixel = torch.arange(height * width, device=coefficients.device).reshape(height, width)
    origin = pixel.expand(coefficients.shape).clone()
    # Farther than this c_j - c_i <= lambda d(i, j) for every pixel of every image.
    rise = coefficients.amax((-1, -2), keepdim=True) - coefficients.amin((-1, -2), keepdim=True)
    reach = float(torch.where(rise > 0, rise / slope, 0.0).amax()) if coefficients.numel() else 0.0
    for (row, column), cost in zip(offsets[1:].tolist(), costs[1:].tolist(), strict=True):
        if cost > reach * (1 + 1e-6):
            break
        here, there = _shifted(row, column, height, width)
        value = coefficients[there] - slope * cost
        better = value > best[here]
        best[here] = torch.where(better, value, best[here])
        distance[here] = torch.where(better, cost, distance[here])
        origin[here] = torch.where(better, pixel[there[1:]], origin[here])
    return Dilation(best, distance, origin)


def _shifted(row: int, column: int, height: int, width: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where pixels are that have a pixel at this offset, and where that pixel is: indices of (..., H, W)."""
    top, left = max(0, -row), max(0, -column)
    bottom, right = height - max(0, row), width - max(0, column)
    here = (slice(top, bottom), slice(left, right))
    there = (slice(top + row, bottom + row), slice(left + column, right + column))
    return (..., *here), (..., *there)  # type: ignore[return-value]


def lipschitz_constant(coefficients: Tensor, ground: str = "l1") -> Tensor:
    """Lip(c) = max over pixels i, j of a channel of |c_i - c_j| / d(i, j), (..., C, H, W) -> (...).

    D_lambda(c) = c for every lambda >= Lip(c). For l1 the maximum is over neighbouring pixels, ||A^T c||_inf; for
    another cost, over the offsets that are not made of shorter ones. eps * Lip(c) is the largest gain in c of plans
    that need not start from the mass of the image, and so may be chained: the vanilla bound (theory, section 4). Chains
    make nothing cheaper for a metric. For d^p and windows they do: there it is the vanilla bound of the metric that
    chains of moves define, for l2^2 and every l1^p that of l1.
    """
    if parse_ground(ground).name == "l1":
        return _steepest_neighbours(coefficients)
    height, width = coefficients.shape[-2:]
    on_cpu = coefficients.device.type == "cpu" and coefficients.dtype in (torch.float32, torch.float64)
    if on_cpu and coefficients.numel() and not (coefficients.requires_grad and torch.is_grad_enabled()):
        flat = compiled.lipschitz_constants(coefficients.reshape(-1, *coefficients.shape[-3:]), ground)
        return flat.reshape(coefficients.shape[:-3])
    offsets, costs = steepest_offsets(height, width, ground)
    largest = coefficients.new_zeros(coefficients.shape[:-3])
    if not coefficients.numel():
        return largest
    rise = (coefficients.amax((-1, -2)) - coefficients.amin((-1, -2))).amax(-1)
    for (row, column), cost in zip(offsets.tolist(), costs.tolist(), strict=True):
        if bool((rise <= largest * cost).all()):
            break
        here, there = _shifted(row, column, height, width)
        difference = (coefficients[here] - coefficients[there]).abs()
        if difference.numel():
            largest = torch.maximum(largest, difference.flatten(-3).amax(-1) / cost)
    return largest


def steepest_moves(coefficients: Tensor, ground: str = "l1") -> Tensor:
    """The move that attains Lip(c) at a cost of 1, (..., C, H, W): mass from the pixel that is lower to the higher one.

    c . move = Lip(c); 0 where c is constant in every channel.
    """
    height, width = coefficients.shape[-2:]
    flat = coefficients.detach().reshape(-1, *coefficients.shape[-3:])
    largest, moves = flat.new_zeros(len(flat)), torch.zeros_like(flat)
    for (row, column), cost in zip(*(part.tolist() for part in steepest_offsets(height, width, ground)), strict=True):
        here, there = _shifted(row, column, height, width)
        difference = (flat[there] - flat[here]) / cost
        if not difference.numel():
            continue
        size, place = difference.abs().flatten(1).max(1)
        rows = (size > largest).nonzero().flatten()
        amount = torch.zeros_like(difference[rows]).flatten(1)
        chosen = place[rows, None]
        amount.scatter_(1, chosen, difference[rows].flatten(1).gather(1, chosen).sign() / cost)
        amount = amount.reshape(-1, *difference.shape[1:])
        step = torch.zeros_like(flat[rows])
        step[there] += amount
        step[here] -= amount
        largest[rows], moves[rows] = size[rows], step
    return moves.reshape(coefficients.shape)


def _steepest_neighbours(coefficients: Tensor) -> Tensor:
    largest = coefficients.new_zeros(coefficients.shape[:-3])
    for axis in (-1, -2):
        difference = coefficients.diff(dim=axis).abs()
        if difference.numel():
            largest = torch.maximum(largest, difference.flatten(-3).amax(-1))
    return largest


MAX_STEPS = 64
CHUNK = 1 << 24  # pixels of coefficients in one pass


def solve(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    guess: Tensor,
    tolerance: float,
    maximiser: bool,
    ground: str = "l1",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Excess, multiplier and maximiser of every problem; see :func:`flowverify.transport.support.support`."""
    batch, problems = images.shape[0], coefficients.shape[-4]
    size = max(1, CHUNK // (images[0].numel() * problems))
    parts = []
    for start in range(0, batch, size):
        chosen = slice(start, start + size)
        own = coefficients.expand(batch, *coefficients.shape[-4:])[chosen]
        own_budget = budget[chosen].to(images.device)
        parts.append(_bracket_search(own, images[chosen], own_budget, guess[chosen], tolerance, maximiser, ground))
    excess, multiplier, moved = zip(*parts, strict=True)
    return torch.cat(excess), torch.cat(multiplier), torch.cat(moved) if maximiser else None


def _bracket_search(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    guess: Tensor,
    tolerance: float,
    maximiser: bool,
    ground: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    mass = images[:, None]  # (B, 1, C, H, W)
    limit = lipschitz_constant(coefficients, ground).double()  # (B, S)
    budget = budget[:, None].expand_as(limit)

    def evaluate(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        value, distance, _ = dilate(coefficients, multiplier.to(coefficients.dtype), ground)
        gain = (mass * (value - coefficients)).flatten(2).double().sum(-1)
        cost = (mass * distance).flatten(2).double().sum(-1)
        return multiplier * budget + gain, budget - cost

    high, high_value, high_slope = limit, limit * budget, budget
    low = torch.full_like(limit, -1.0)
    low_value, low_slope = torch.zeros_like(limit), torch.zeros_like(limit)
    best, best_at = high_value, limit
    done = (limit == 0) | (budget == 0)
    guess = guess.to(limit.device)
    for step in range(MAX_STEPS):
        smaller = high * 0.35
        trial = torch.where(smaller > 1e-3 * limit, smaller, 0.0)
        if step == 0:
            trial = torch.where((guess > 0) & (guess < high), guess, trial)
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        trial = torch.where(low >= 0, crossing, trial)
        done = done | ((low >= 0) & ~((low < trial) & (trial < high)))
        if bool(done.all()):
            break
        trial = torch.where(done, limit, trial)
        value, slope = evaluate(trial)
        better = ~done & (value < best)
        best, best_at = torch.where(better, value, best), torch.where(better, trial, best_at)
        below, above = ~done & (slope < 0), ~done & (slope >= 0)
        low, low_value, low_slope = (
            torch.where(below, new, old) for new, old in ((trial, low), (value, low_value), (slope, low_slope))
        )
        high, high_value, high_slope = (
            torch.where(above, new, old) for new, old in ((trial, high), (value, high_value), (slope, high_slope))
        )
        done = done | (above & ((trial == 0) | (slope == 0)))
        crossing = (low_value - low * low_slope - high_value + high * high_slope) / (high_slope - low_slope)
        floor = low_value + (crossing - low) * low_slope
        done = done | ((low >= 0) & (best - floor <= tolerance * best))
    moved = mix(coefficients, images, budget, low, high, ground) if maximiser else None
    return best.to(images.dtype), best_at.to(images.dtype), moved


def mix(coefficients: Tensor, images: Tensor, budget: Tensor, low: Tensor, high: Tensor, ground: str = "l1") -> Tensor:
    """nu*: sources moved to their argmax on either side of the bracket, mixed so as to spend the budget."""
    near, near_cost = move(coefficients, images, high, ground)
    far, far_cost = move(coefficients, images, low.clamp(min=0), ground)
    stay = images[:, None].expand_as(near)
    overspent = near_cost > budget
    near = torch.where(overspent[..., None, None, None], stay, near)
    near_cost = torch.where(overspent, 0.0, near_cost)
    usable = (low >= 0) & (far_cost > near_cost)
    share = torch.where(usable, (budget - near_cost) / (far_cost - near_cost), 0.0).clamp(0, 1)
    share = share.to(images.dtype)[..., None, None, None]
    return (1 - share) * near + share * far


def move(coefficients: Tensor, images: Tensor, multiplier: Tensor, ground: str = "l1") -> tuple[Tensor, Tensor]:
    """Every source at its argmax, and what that costs."""
    _, distance, origin = dilate(coefficients, multiplier.to(coefficients.dtype), ground)
    mass = images[:, None].expand_as(coefficients)
    moved = torch.zeros_like(coefficients).flatten(-2).scatter_add(-1, origin.flatten(-2), mass.flatten(-2))
    return moved.reshape(coefficients.shape), (mass * distance).flatten(2).double().sum(-1)
