"""Wasserstein balls from their definition: ground costs, exact distances, points, linear maximisation.

A point of the ball is made by an explicit plan, whose cost is summed here, so that it is in the ball by construction.
An image is (C, n), float64: mass moves within a channel, all channels share the budget radius^p * mass.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack
from torch import Tensor

INSIDE = 1 - 1e-12  # points stay this much inside, so that their own rounding does not put them outside
ROOM = 1e-10  # of a mass of 1: what each pixel may receive more, or sums that are rounded apart have no plan
HIGHS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@lru_cache(maxsize=256)
def cost_matrix(height: int, width: int, ground: str) -> Tensor:
    """What moving a unit between pixels costs (n, n), row by row; infinite outside of a window."""
    base, _, power = ground.partition("^")
    parts = base.split(":")
    window = int(parts[1]) if parts[0] == "local" else None
    distance = base if window is None else (parts[2] if len(parts) > 2 else "l2")
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    apart = (place[:, None] - place[None]).abs().double()
    cost = apart.sum(-1) if distance == "l1" else (apart**2).sum(-1).sqrt()
    cost = cost ** float(power or 1)
    return cost if window is None else torch.where((apart <= window // 2).all(-1), cost, torch.inf)


@dataclass(frozen=True)
class Threat:
    """A ground cost on images of one shape, with the largest value of a pixel."""

    shape: tuple[int, int, int]
    ground: str
    cap: float | None

    @property
    def costs(self) -> Tensor:
        return cost_matrix(*self.shape[1:], self.ground)

    @property
    def power(self) -> float:
        return float(self.ground.partition("^")[2] or 1)

    @property
    def diameter(self) -> float:
        """The radius that lets all mass go as far as the cost lets it."""
        return float(self.costs[torch.isfinite(self.costs)].max()) ** (1 / self.power)

    def budget(self, image: Tensor, radius: float) -> float:
        """What a plan from this image (C, n) may cost."""
        return radius**self.power * float(image.sum())

    def distance(self, image: Tensor, other: Tensor) -> float:
        """W_p of the normalised images, by an exact solver: POT's, or HiGHS where a window forbids moves."""
        total = 0.0
        for source, target in zip(image.double(), other.double(), strict=True):
            mass = float(source.sum())
            if mass > 0 and not torch.equal(source, target):
                share = (source / mass).numpy(), (target / target.sum()).numpy()
                total += mass * _least_cost(*share, self.costs.numpy())
        return (total / float(image.sum())) ** (1 / self.power)

    def shorten(self, image: Tensor, points: Tensor, spent: Tensor, budget: float) -> Tensor:
        """Points (N, C, n), reached at these costs (N,), pulled back to budget and cap: balls are convex."""
        share = (budget / spent.clamp(min=1e-300)).clamp(max=1) * INSIDE
        change = points - image
        if self.cap is not None:
            room = torch.where(change > 0, (self.cap - image) / change.clamp(min=1e-300), torch.inf)
            share = torch.minimum(share, room.flatten(1).amin(1) * INSIDE)
        return (image + share[:, None, None] * change).clamp(min=0)


def _least_cost(source: NDArray[np.float64], target: NDArray[np.float64], costs: NDArray[np.float64]) -> float:
    if np.isfinite(costs).all():
        return float(ot.emd2(source, target, costs, numItermax=1_000_000))
    rows, columns = np.nonzero(np.isfinite(costs))
    at = np.arange(len(rows))
    one, n = np.ones(len(rows)), len(source)
    leaving, arriving = csr_array((one, (rows, at)), (n, len(rows))), csr_array((one, (columns, at)), (n, len(rows)))
    found = linprog(
        costs[rows, columns], A_eq=leaving, b_eq=source, A_ub=arriving, b_ub=target + ROOM,
        method="highs", options=HIGHS,
    )  # fmt: skip
    return float(found.fun) if found.status == 0 else float("inf")


def scattered(threat: Threat, image: Tensor, budget: float, count: int) -> Tensor:
    """Points (count, C, n): every pixel sends a share of its mass to one goal, all pixels alike or in random order."""
    channels, n = image.shape
    costs = threat.costs
    allowed = torch.isfinite(costs)
    anywhere = torch.multinomial(allowed.double(), channels * count, replacement=True).reshape(n, channels, count)
    near = costs + torch.where(torch.eye(n, dtype=torch.bool), torch.inf, 0.0)
    neighbour = (allowed & (near <= near.amin(1, keepdim=True) * 1.5)).double() + 1e-9 * torch.eye(n)
    neighbours = torch.multinomial(neighbour, channels * count, replacement=True).reshape(n, channels, count)
    common = torch.randint(n, (1, channels, count)).expand(n, -1, -1)
    pixel = torch.arange(n)[:, None, None].expand_as(common)
    common = torch.where(allowed[pixel, common], common, pixel)
    kind = torch.arange(count) % 3
    goal = torch.where(kind == 0, common, torch.where(kind == 1, neighbours, anywhere)).permute(2, 1, 0)
    mass = image.expand(count, channels, n)
    share = torch.where(torch.rand(count, 1, 1) < 0.2, torch.rand(count, channels, n, dtype=torch.float64), 1.0)
    price = costs[torch.arange(n), goal]
    spent = mass * share * price
    order = torch.rand(count, channels * n).argsort(-1)
    ordered = spent.flatten(1).gather(-1, order)
    served = ((budget - (ordered.cumsum(-1) - ordered)) / ordered.clamp(min=1e-300)).clamp(0, 1)
    in_turn = torch.zeros_like(ordered).scatter(-1, order, served).reshape(spent.shape)
    share = torch.where((torch.arange(count) % 2 == 0)[:, None, None], share, share * in_turn)
    leaving = mass * share
    points = (mass - leaving).scatter_add(-1, goal, leaving)
    return threat.shorten(image, points, (leaving * price).sum((1, 2)), budget)


def single_moves(threat: Threat, image: Tensor, budget: float, most: int) -> Tensor:
    """Points (N, C, n) at which one pixel sends to one other all that it has, or all that the budget pays for."""
    allowed = torch.isfinite(threat.costs) & (threat.costs > 0)
    moves = (allowed & (image > 0)[:, :, None]).nonzero()
    if len(moves) > most:
        moves = moves[torch.randperm(len(moves))[:most]]
    channel, source, target = moves.T
    price = threat.costs[source, target]
    amount = torch.minimum(image[channel, source], budget / price)
    points = image.expand(len(moves), *image.shape).clone()
    at = torch.arange(len(moves))
    points[at, channel, source] -= amount
    points[at, channel, target] += amount
    return threat.shorten(image, points, amount * price, budget)


def best_points(threat: Threat, image: Tensor, budget: float, gain: Tensor) -> Tensor:
    """For each gain (N, C, n) a point of the ball that maximises it, by Lagrange's multiplier of the budget.

    At a multiplier every pixel sends to argmax_j gain_j - multiplier * cost_ij; the two plans of the last bracket are
    mixed so that they spend the budget. With a cap the maximum is a linear program.
    """
    if threat.cap is not None:
        return torch.stack([_capped_best(threat, image, budget, one) for one in gain])
    costs = threat.costs
    finite = torch.where(torch.isfinite(costs), costs, 0.0)
    forbidden = torch.where(torch.isfinite(costs), 0.0, -torch.inf)

    def plan(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        worth = gain[:, :, None, :] - multiplier[:, None, None, None] * finite + forbidden
        worth = worth + 1e-13 * worth.abs().amax().nan_to_num(posinf=0.0) * torch.eye(len(costs))  # ties stay
        goal = worth.argmax(-1)
        return goal, (image * costs[torch.arange(len(costs)), goal]).sum((1, 2))

    cheapest = float(costs[costs > 0].min()) if bool((costs > 0).any()) else 1.0
    low = gain.new_zeros(len(gain))
    high = (gain.amax((1, 2)) - gain.amin((1, 2))) / cheapest * 1.01
    for _ in range(45):
        middle = (low + high) / 2
        over = plan(middle)[1] > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    points, spent = [], []
    for multiplier in (low, high):
        goal, cost = plan(multiplier)
        points.append(torch.zeros(goal.shape, dtype=torch.float64).scatter_add(-1, goal, image.expand_as(goal)))
        spent.append(cost)
    below = torch.where(spent[1] <= budget, spent[1], 0.0)
    second = torch.where((spent[1] <= budget)[:, None, None], points[1], image.expand_as(points[1]))
    mix = ((budget - below) / (spent[0] - below).clamp(min=1e-300)).clamp(0, 1)
    mix = torch.where(spent[0] <= budget, 1.0, mix)[:, None, None]
    cost = mix[:, 0, 0] * spent[0] + (1 - mix[:, 0, 0]) * below
    return threat.shorten(image, mix * points[0] + (1 - mix) * second, cost, budget)


def _capped_best(threat: Threat, image: Tensor, budget: float, gain: Tensor) -> Tensor:
    """The same by HiGHS, with every pixel of the result below the cap; the image itself where it finds nothing."""
    moves = Moves(threat, image)
    scale, mass = float(gain.abs().max()), float(image.sum())
    if not moves.price.size or not 0 < scale < np.inf or budget <= 0:
        return image
    cap = torch.full_like(image, threat.cap or 0.0)
    found = linprog(
        -(moves.change.T @ gain.flatten().numpy()) / scale,
        A_ub=vstack([moves.leaving, moves.change, csr_array(moves.price[None])]),
        b_ub=np.concatenate([image.flatten().numpy(), (cap - image).flatten().numpy(), [budget]]) / mass,
        method="highs", options=HIGHS,
    )  # fmt: skip
    if found.status != 0:
        return image
    amounts = np.clip(found.x, 0, None) * mass
    left = moves.leaving @ amounts
    amounts *= min(1.0, float(np.min(np.where(left > 0, image.flatten().numpy() / np.maximum(left, 1e-300), 1.0))))
    point = image + torch.from_numpy(moves.change @ amounts).reshape(image.shape)
    return threat.shorten(image, point[None], torch.tensor([float(moves.price @ amounts)]).double(), budget)[0]


class Moves:
    """All moves (channel, source, target) that a plan from this image can make, as columns of linear programs."""

    def __init__(self, threat: Threat, image: Tensor) -> None:
        channels, n = image.shape
        allowed = torch.isfinite(threat.costs) & (threat.costs > 0)
        moves = (allowed & (image > 0)[:, :, None]).nonzero().numpy()
        source, target = moves[:, 0] * n + moves[:, 1], moves[:, 0] * n + moves[:, 2]
        at, one, size = np.arange(len(moves)), np.ones(len(moves)), (channels * n, len(moves))
        self.price = threat.costs.numpy()[moves[:, 1], moves[:, 2]]
        self.leaving = csr_array((one, (source, at)), size)
        self.change = csr_array((one, (target, at)), size) - self.leaving


GROUNDS = ("l1", "l2", "l2^2", "l1^1.5", "local:3", "local:5:l1")


def draw_threat(dice: random.Random, images: Tensor) -> Threat:
    """A threat model for a batch of images (B, C, H, W); a window may be larger than they are."""
    _, channels, height, width = images.shape
    ground = "l1" if dice.random() < 0.4 else dice.choice(GROUNDS)
    cap = float(images.max()) * dice.choice([1.0, 1.001, 1.2, 2.0]) if dice.random() < 0.2 else None
    return Threat((channels, height, width), ground, cap)
