"""A node whose ReLUs are all decided is a linear program; its multipliers give a bound that needs no solver's word.

On such a node the network is affine, so the least value of the specification over the ball and the splits is a
linear program in the flows. HiGHS solves it; the dual prices of the splits become the gamma of
:func:`~flowverify.certifiers.complete.relaxation.lower_bound`, which is sound for any, and exact for these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from flowverify.certifiers.complete.problem import Problem
from flowverify.certifiers.complete.relaxation import Relaxation, lower_bound
from flowverify.certifiers.complete.tree_nodes import TreeNodes
from flowverify.grid import Grid

_INFEASIBLE = 2  # SciPy's code


class LeafProgram:
    """The linear programs over one ball.

    Args:
        problem: on l1 ground cost, without a cap.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._maps = problem, problem.maps
        self._tolerance = problem.settings.tree.solver_tolerance
        image = problem.ball.image
        self._incidence = Grid.of(image[None]).incidence_scipy().tocsr()
        self._image = image.detach().cpu().double().numpy().reshape(-1)

    def bound(self, node: TreeNodes) -> tuple[float, Tensor | None]:
        """The least value on one node (a batch of one), and a point (1, pixels) that attains it.

        An empty node is at infinity if multipliers prove it. Where HiGHS fails, the bound is the node's own.
        """
        ball, stage = self._problem.ball, self._problem.stage
        if not self._incidence.shape[1]:
            return self._proven(node), ball.flat[None]  # nothing can move
        rows, constants, signs, places = self._splits(node)
        objective, _ = self._affine(self._problem.specification[node.row[0]], node, stage)
        edges = self._incidence
        unit = max(ball.budget, 1e-300)
        # Flows are counted in units of the budget, so that the solver's tolerances are relative to it.
        to_flow = sparse.hstack([edges, -edges]).tocsr() * unit
        limits: list[Any] = [sparse.csr_array(np.ones((1, to_flow.shape[1])))]
        right = [np.ones(1)]
        if ball.positive:
            limits.append(-to_flow / unit)
            right.append(self._image / unit)
        if len(rows):
            # s z(x) >= 0, each row scaled to a largest coefficient of one.
            normal = -(signs[:, None] * rows) @ to_flow
            value = signs * (rows @ self._image + constants)
            scale = np.maximum(np.abs(normal).max(1), 1e-300)
            limits.append(sparse.csr_array(normal / scale[:, None]))
            right.append(value / scale)
        system = sparse.vstack(limits).tocsr(), np.concatenate(right)
        cost = objective @ to_flow
        size = max(float(np.abs(cost).max(initial=0.0)), 1e-300)
        solution = self._solve(cost / size, *system)
        if solution.status == 0:
            point = torch.from_numpy(self._image + to_flow @ solution.x)[None].to(ball.flat)
            if len(rows):
                self._price(node, -solution.ineqlin.marginals[-len(rows) :] * size / scale, signs, places)
            return max(float(node.bound[0]), self._proven(node)), point
        if solution.status == _INFEASIBLE and len(rows):
            # How far the splits are from holding together: the prices of that prove the node empty.
            slack = np.zeros((system[0].shape[0], 1))
            slack[-len(rows) :] = -1.0
            wider = sparse.hstack([system[0], sparse.csr_array(slack)]).tocsr()
            apart = self._solve(np.append(np.zeros(len(cost)), 1.0), wider, system[1])
            if apart.status == 0 and apart.fun > self._tolerance:
                known = float(node.bound[0])
                weight = 2 * (1 + (max(0.0, -known) if np.isfinite(known) else 0.0)) / apart.fun
                for _ in range(4):
                    self._price(node, -apart.ineqlin.marginals[-len(rows) :] * weight / scale, signs, places)
                    if self._proven(node) > 0:
                        return float("inf"), None
                    weight *= 10
        return float(node.bound[0]), None

    def _price(self, node: TreeNodes, prices: Any, signs: Any, places: list[tuple[int, int]]) -> None:
        for (layer, neuron), price, sign in zip(places, prices, signs, strict=True):
            node.multipliers.gamma[layer][0, neuron] = -sign * max(float(price), 0.0)

    def _proven(self, node: TreeNodes) -> float:
        relaxation = Relaxation.of(self._problem.rows(node.row), node.lower, node.upper)
        return float(lower_bound(relaxation, node.multipliers, tolerance=1e-12).value[0])

    def _phases(self, node: TreeNodes) -> list[Tensor]:
        return [(low[0] >= 0).double() for low in node.lower]

    def _affine(self, specification: Tensor, node: TreeNodes, stage: int) -> tuple[Any, float]:
        """The coefficients on pixels, and the constant, of a linear function of a stage on a decided node."""
        phases, value = self._phases(node), float(specification @ self._maps.stages[stage].bias)
        carried = {s: specification @ w for s, w in self._maps.stages[stage].weights.items()}
        for layer in range(stage, 0, -1):
            own = carried.pop(layer, None)
            if own is None:
                continue
            own = own * phases[layer - 1]
            value += float(own @ self._maps.stages[layer - 1].bias)
            for source, weight in self._maps.stages[layer - 1].weights.items():
                carried[source] = carried.get(source, 0.0) + own @ weight
        pixels = carried.get(0)
        return (np.zeros(self._image.size) if pixels is None else pixels.cpu().numpy()), value

    def _splits(self, node: TreeNodes) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
        rows, constants, signs, places = [], [], [], []
        for layer, split in enumerate(node.signs):
            for neuron in split[0].nonzero().flatten().tolist():
                unit = torch.zeros_like(node.lower[layer][0])
                unit[neuron] = 1.0
                row, constant = self._affine(unit, node, layer)
                rows.append(row)
                constants.append(constant)
                signs.append(float(split[0, neuron]))
                places.append((layer, neuron))
        return np.array(rows), np.array(constants), np.array(signs), places

    def _solve(self, cost: Any, system: Any, right: Any) -> Any:
        options = {
            "primal_feasibility_tolerance": self._tolerance,
            "dual_feasibility_tolerance": self._tolerance,
        }
        return linprog(cost, A_ub=system, b_ub=right, bounds=(0, None), method="highs", options=options)
