"""Oracles and samples that share no code with what they check, for the tests of bounds and certifiers.

All of them take the definition of the ball: images nu >= 0 that come from mu by moving mass within each channel,
at a cost of at most ``budget`` (mass times l1 distance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from flowverify.network import Network
from flowverify.network.graph import INPUT

HIGHS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def quick(values: Iterable[Any], count: int) -> list[Any]:
    """Values of a parameter; all but the first ``count`` are slow: they repeat a check on other seeds or cases."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[] if at < count else [pytest.mark.slow]) for at, row in enumerate(rows)]


def incidence(channels: int, height: int, width: int) -> scipy.sparse.csr_array:
    """+1 at the head and -1 at the tail of every edge, written down pixel by pixel."""
    rows, columns, signs, edges = [], [], [], 0
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                here = (channel * height + row) * width + column
                for there, exists in ((here + 1, column + 1 < width), (here + width, row + 1 < height)):
                    if exists:
                        rows += [here, there]
                        columns += [edges, edges]
                        signs += [-1.0, 1.0]
                        edges += 1
    return scipy.sparse.csr_array((signs, (rows, columns)), shape=(channels * height * width, edges))


def largest_gain(coefficients: Tensor, image: Tensor, budget: float) -> float:
    """max c . (nu - mu) over the ball, by HiGHS on flows: nu = mu + A(p - q) >= 0, sum(p + q) <= budget.

    Flows are counted in units of the most that can be spent, so that the solver's tolerances are relative.
    """
    channels, height, width = image.shape
    mass = float(image.sum())
    unit = min(budget, mass * max(1, height + width - 2))
    edges = incidence(channels, height, width)
    if unit == 0 or edges.shape[1] == 0:
        return 0.0
    cost = edges.T @ coefficients.detach().double().flatten().numpy()
    scale = float(np.abs(cost).max())
    if scale == 0:
        return 0.0
    signed = scipy.sparse.hstack([edges, -edges])
    total = scipy.sparse.csr_array(np.ones((1, signed.shape[1])))
    solution = linprog(
        -np.concatenate([cost, -cost]) / scale,
        A_ub=scipy.sparse.vstack([-signed, total]),
        b_ub=np.concatenate([image.double().flatten().numpy() / unit, [budget / unit]]),
        bounds=(0, None),
        method="highs",
        options=HIGHS,
    )
    assert solution.status == 0, solution.message
    return -float(solution.fun) * scale * unit


def samples(images: Tensor, budget: Tensor, count: int, seed: int = 0) -> Tensor:
    """Points of the balls, (B, count, C, H, W) in float64: every pixel sends a share of its mass to another one.

    A plan that costs more than the budget is cut short: half of the samples scale all shares alike (points
    inside), the others serve the pixels in random order until the budget is spent (points like vertices). In
    a third of them all pixels send to one place, in a third to a neighbour, in a third anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = images.shape
    plane = height * width
    images = images.detach().double()
    mass = images.reshape(batch, 1, channels, plane).expand(batch, count, channels, plane)
    pixel = torch.arange(plane)
    draw = torch.randint(plane, (batch, count, channels, plane), generator=generator)
    common = draw[..., :1].expand_as(draw)
    step = draw % 4
    row, column = pixel // width, pixel % width
    rows = (row + (step == 0).long() - (step == 1).long()).clamp(0, height - 1)
    columns = (column + (step == 2).long() - (step == 3).long()).clamp(0, width - 1)
    kind = torch.arange(count)[:, None, None] % 3
    goal = torch.where(kind == 0, common, torch.where(kind == 1, rows * width + columns, draw))
    distance = (goal // width - row).abs() + (goal % width - column).abs()
    share = torch.rand(batch, count, channels, plane, generator=generator, dtype=torch.float64)
    share = torch.where(torch.arange(count)[:, None, None] % 5 == 0, share, 1.0)
    cost = mass * share * distance
    limit = budget.double().reshape(batch, 1, 1, 1).expand(batch, count, 1, 1)
    factor = (limit / cost.sum((-1, -2), keepdim=True).clamp(min=1e-300)).clamp(max=1)
    order = torch.rand(batch, count, channels * plane, generator=generator).argsort(-1)
    ordered = cost.flatten(2).gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    served = ((limit[..., 0] - before) / ordered.clamp(min=1e-300)).clamp(0, 1)
    in_turn = torch.zeros_like(ordered).scatter(-1, order, served).reshape(cost.shape)
    share = share * torch.where(torch.arange(count)[:, None, None] % 2 == 0, factor, in_turn)
    leaving = mass * share
    return (mass - leaving).scatter_add(-1, goal, leaving).reshape(batch, count, channels, height, width)


def margins_at(network: Callable[[Tensor], Tensor], points: Tensor, labels: Tensor) -> Tensor:
    """f_y - f_t for t != y in ascending order at points (B, N, C, H, W): (B, N, classes - 1)."""
    batch, count = points.shape[:2]
    logits = network(points.flatten(0, 1)).reshape(batch, count, -1)
    parts = []
    for values, label in zip(logits, labels.tolist(), strict=True):
        others = [t for t in range(values.shape[1]) if t != label]
        parts.append(values[:, label : label + 1] - values[:, others])
    return torch.stack(parts)


def descend(network: nn.Module, images: Tensor, labels: Tensor, budget: Tensor, steps: int = 4) -> Tensor:
    """Points that make margins small, (B, N, C, H, W) in float64: Frank-Wolfe steps over the ball, one run a class.

    They are feasible because the maximiser of a linear function is; ``test_support.py`` holds it to exact W1.
    """
    from flowverify.transport.support import support

    images = images.double()
    classes = int(network(images[:1]).shape[1])
    current = images[:, None].expand(-1, classes - 1, *images.shape[1:]).clone()
    found = []
    for step in range(steps):
        points = current.detach().requires_grad_(True)
        margins = torch.diagonal(margins_at(network, points, labels), dim1=1, dim2=2)
        gradient = torch.autograd.grad(margins.sum(), points)[0]
        vertex = support(-gradient, images, budget, maximiser=True).maximiser
        assert vertex is not None
        current = current + 2 / (step + 2) * (vertex - current)
        found += [vertex, current]
    return torch.cat(found, 1).detach()


def exact_margins(network: Network, image: Tensor, label: int, budget: float) -> list[float]:
    """The least f_y - f_t over the ball for each t != y, for a chain of Linear and ReLU with at most 8 ReLUs.

    The ball is cut by every pattern of active ReLUs into pieces where the network is affine: one LP each.
    """
    shape = tuple(int(size) for size in image.shape)
    layers = [node.operation for node in network.nodes if isinstance(node.operation, nn.Linear | nn.ReLU)]
    hidden = [node.shape[0] for node in network.nodes if isinstance(node.operation, nn.ReLU)]
    edges = incidence(*shape).toarray()
    signed = np.concatenate([edges, -edges], 1)
    centre = image.double().flatten().numpy()
    others = [t for t in range(network.num_classes) if t != label]
    best = [np.inf] * len(others)
    for code in range(2 ** sum(hidden)):
        pattern = np.array([code >> bit & 1 for bit in range(sum(hidden))])
        matrix, offset, taken = np.eye(centre.size), np.zeros(centre.size), 0
        rows, limits = [-signed, np.ones((1, signed.shape[1]))], [centre, np.array([budget])]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.double().numpy()
                bias = 0.0 if layer.bias is None else layer.bias.double().numpy()
                matrix, offset = weight @ matrix, weight @ offset + bias
                continue
            active = pattern[taken : taken + offset.size]
            taken += offset.size
            sign = np.where(active == 1, -1.0, 1.0)[:, None]  # sign * value <= 0
            rows.append(sign * (matrix @ signed))
            limits.append(-sign[:, 0] * (matrix @ centre + offset))
            matrix, offset = active[:, None] * matrix, active * offset
        for position, other in enumerate(others):
            difference = matrix[label] - matrix[other]
            solution = linprog(
                difference @ signed, A_ub=np.concatenate(rows), b_ub=np.concatenate(limits), bounds=(0, None),
                method="highs", options=HIGHS,
            )  # fmt: skip
            if solution.status == 0:
                value = float(solution.fun + difference @ centre + offset[label] - offset[other])
                best[position] = min(best[position], value)
    return best


def least_radius(network: Network, image: Tensor, label: int) -> float:
    """The exact radius of a linear network: least W1 to an image that ties another class, over its mass.

    One LP a class: min sum(p + q) with mu + A(p - q) >= 0 and f_y - f_t <= 0.
    """
    zero = torch.zeros(1, *network.input_shape, dtype=torch.float64)
    double = network.double()
    bias = double(zero)[0]
    basis = torch.eye(zero.numel(), dtype=torch.float64).reshape(-1, *network.input_shape)
    matrix = (double(basis) - bias).T.numpy()
    edges = incidence(*network.input_shape)
    signed = scipy.sparse.hstack([edges, -edges]).tocsr()
    centre = image.double().flatten().numpy()
    radii = []
    for other in range(network.num_classes):
        if other == label:
            continue
        difference = matrix[label] - matrix[other]
        margin = difference @ centre + float(bias[label] - bias[other])
        solution = linprog(
            np.ones(signed.shape[1]),
            A_ub=scipy.sparse.vstack([-signed, scipy.sparse.csr_array((difference @ signed)[None])]),
            b_ub=np.concatenate([centre, [-margin]]),
            bounds=(0, None),
            method="highs",
            options=HIGHS,
        )
        if solution.status == 0:
            radii.append(float(solution.fun) / float(image.sum()))
    return min(radii, default=float("inf"))


def random_network(shape: Sequence[int], modules: Sequence[nn.Module], seed: int) -> Network:
    """A chain with normal weights of the usual size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    network = Network.sequential(shape, modules).double()
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values * (2 / fan_in) ** 0.5)
    return network


def sparse_images(shape: Sequence[int], batch: int, seed: int, share: float = 0.6) -> Tensor:
    """Images in [0, 1] (float64) with about ``share`` of the pixels lit, at least one in every channel."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    lit = torch.rand(batch, *shape, generator=generator) < share
    lit[..., 0, 0] = True
    return values * lit + 1e-3 * lit


__all__ = [
    "INPUT",
    "descend",
    "exact_margins",
    "incidence",
    "largest_gain",
    "least_radius",
    "margins_at",
    "random_network",
    "samples",
    "sparse_images",
]
