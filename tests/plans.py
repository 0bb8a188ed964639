"""Oracles for any ground cost, on dense transport plans: linear programs and samples, written without the package.

A plan sends mass from every pixel to the pixels of its channel. Ground costs are written down here once more, from the
definition of their names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack
from torch import Tensor, nn

from flowverify.network import Network

# One of every kind, and mixtures: distances, powers, windows.
COSTS = ("l2", "l2^2", "l1^2", "l2^1.5", "l1^3", "local:3", "local:5", "local:3:l1", "local:5^2")


def power_of(ground: str) -> float:
    return float(ground.partition("^")[2] or 1)


def cost_matrix(height: int, width: int, ground: str) -> NDArray[np.float64]:
    """Costs between all pairs of pixels, row by row."""
    base, _, power = ground.partition("^")
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    apart = np.abs(place[:, None] - place[None])
    window, distance = None, base
    if base.startswith("local"):
        parts = base.split(":")
        window, distance = int(parts[1]), parts[2] if len(parts) > 2 else "l2"
    cost = (apart.sum(-1) if distance == "l1" else np.sqrt((apart**2).sum(-1))) ** float(power or 1)
    return cost if window is None else np.where((apart <= window // 2).all(-1), cost, np.inf)


class Plans:
    """The plans from one image (C, H, W): which pixel sends to which, at what cost, and that all mass is sent."""

    def __init__(self, image: Tensor, ground: str) -> None:
        channels, height, width = image.shape
        cost, plane = cost_matrix(height, width, ground), height * width
        mass = image.double().reshape(channels, plane).numpy()
        pairs = [
            (channel * plane + i, channel * plane + j, cost[i, j])
            for channel in range(channels)
            for i in np.flatnonzero(mass[channel] > 0)
            for j in np.flatnonzero(np.isfinite(cost[i]))
        ]
        self.source = np.array([pair[0] for pair in pairs])
        self.target = np.array([pair[1] for pair in pairs])
        self.cost = np.array([pair[2] for pair in pairs])
        self.size, self.pixels = len(pairs), channels * plane
        lit, row = np.unique(self.source, return_inverse=True)
        self.sent = coo_array((np.ones(self.size), (row, np.arange(self.size))), shape=(len(lit), self.size)).tocsr()
        self.mass = mass.reshape(-1)[lit]
        self.arriving: csr_array = coo_array(
            (np.ones(self.size), (self.target, np.arange(self.size))), shape=(self.pixels, self.size)
        ).tocsr()

    def gains(self, coefficients: Tensor) -> NDArray[np.float64]:
        values = coefficients.detach().double().flatten().numpy()
        return np.asarray(values[self.target] - values[self.source])

    def solve(self, objective: NDArray[np.float64], rows: list[csr_array], limits: list[float]) -> float:
        """min objective . plan with rows . plan <= limits; infinite where there is no such plan."""
        found = linprog(
            objective, A_ub=vstack(rows).tocsr(), b_ub=np.array(limits), A_eq=self.sent, b_eq=self.mass, method="highs"
        )
        if found.status == 2:
            return float("inf")
        assert found.status == 0, found.message
        return float(found.fun)


def plan_gain(coefficients: Tensor, image: Tensor, budget: float, ground: str, cap: float | None = None) -> float:
    """max c . (nu - mu) over the images that plans of at most this cost lead to."""
    plans = Plans(image, ground)
    rows, limits = [csr_array(plans.cost[None])], [budget]
    if cap is not None:
        rows.append(plans.arriving)
        limits += [cap] * plans.pixels
    return -plans.solve(-plans.gains(coefficients), rows, limits)


def plan_cost(coefficients: Tensor, image: Tensor, target: float, ground: str) -> float:
    """The least cost of a plan that gains the target; infinite where none does."""
    plans = Plans(image, ground)
    return plans.solve(plans.cost, [csr_array(-plans.gains(coefficients)[None])], [-target])


def distance_by_plans(image: Tensor, other: Tensor, ground: str) -> float:
    """The least cost of a plan from one image to the other."""
    plans = Plans(image, ground)
    goal = other.double().flatten().numpy()
    slack = 1e-12 * float(image.sum())
    return plans.solve(plans.cost, [plans.arriving, -plans.arriving], [*(goal + slack), *(slack - goal)])


def plan_samples(images: Tensor, budget: Tensor, count: int, ground: str, seed: int = 0) -> Tensor:
    """Points of the balls, (B, count, C, H, W): pixels send shares of their mass to random pixels they may send to."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = images.shape
    plane = height * width
    cost = torch.from_numpy(cost_matrix(height, width, ground))
    near = torch.argsort(cost + 1e-9 * torch.rand(cost.shape, generator=generator), dim=1)
    reach = torch.isfinite(cost).sum(1)
    mass = images.double().reshape(batch, 1, channels, plane).expand(batch, count, channels, plane)
    # Half of the samples send to the nearest few, half anywhere allowed.
    draw = torch.rand(batch, count, channels, plane, generator=generator, dtype=torch.float64)
    few = torch.where(torch.arange(count) % 2 == 0, 5, plane)[None, :, None, None]
    rank = (draw * torch.minimum(reach, few)).long()
    goal = near[torch.arange(plane).expand_as(rank), rank]
    fee = cost[torch.arange(plane).expand_as(goal), goal] * mass
    order = torch.rand(batch, count, channels * plane, generator=generator).argsort(-1)
    ordered = fee.flatten(2).gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    limit = budget.double().reshape(batch, 1, 1)
    served = ((limit - before) / ordered.clamp(min=1e-300)).clamp(0, 1)
    share = torch.zeros_like(ordered).scatter(-1, order, served).reshape(fee.shape)
    leaving = mass * share
    moved = (mass - leaving).scatter_add(-1, goal, leaving)
    return moved.reshape(batch, count, channels, height, width)


def least_margins(
    network: Network, image: Tensor, label: int, budget: float, ground: str, cap: float | None = None
) -> list[float]:
    """The least f_y - f_t over the ball for each t != y, for a chain of Linear and ReLU with few ReLUs.

    The ball is cut by every pattern of active ReLUs into pieces where the network is affine: one LP each.
    """
    plans = Plans(image, ground)
    layers = [node.operation for node in network.nodes if isinstance(node.operation, nn.Linear | nn.ReLU)]
    hidden = sum(node.shape[0] for node in network.nodes if isinstance(node.operation, nn.ReLU))
    others = [t for t in range(network.num_classes) if t != label]
    best = [float("inf")] * len(others)
    arriving = plans.arriving.toarray()
    for code in range(2**hidden):
        pattern = np.array([code >> bit & 1 for bit in range(hidden)])
        matrix, offset, taken = np.eye(plans.pixels), np.zeros(plans.pixels), 0
        rows, limits = [csr_array(plans.cost[None])], [budget]
        if cap is not None:
            rows.append(plans.arriving)
            limits += [cap] * plans.pixels
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().double().numpy()
                bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
                matrix, offset = weight @ matrix, weight @ offset + bias
                continue
            active = pattern[taken : taken + offset.size]
            taken += offset.size
            sign = np.where(active == 1, -1.0, 1.0)[:, None]
            rows.append(csr_array(sign * (matrix @ arriving)))
            limits += list(-sign[:, 0] * offset)
            matrix, offset = active[:, None] * matrix, active * offset
        for position, other in enumerate(others):
            difference = matrix[label] - matrix[other]
            value = plans.solve(difference @ arriving, rows, limits)
            best[position] = min(best[position], value + float(offset[label] - offset[other]))
    return best


def frank_wolfe(
    network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, budget: Tensor, ground: str, cap: float | None
) -> Tensor:
    """Points that make margins small, (B, N, C, H, W): vertices of the ball for gradients of margins, and mixtures."""
    from flowverify.transport.support import best_moves

    found = []
    classes = network(images[:1]).shape[1]
    for other in range(classes):
        current = images.clone()
        for step in range(3):
            points = current.detach().requires_grad_(True)
            logits = network(points)
            margin = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, other]
            (gradient,) = torch.autograd.grad(margin.sum(), points, allow_unused=True)
            if gradient is None:
                break
            vertex = best_moves(-gradient, images, budget=budget, ground=ground, cap=cap).image
            current = current + 2 / (step + 2) * (vertex - current)
            found += [vertex, current]
    return torch.stack(found, 1).detach()
