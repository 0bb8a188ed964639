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

from flowverify.certifiers.complete.affine_maps import AffineMaps
from flowverify.certifiers.complete.balls import Polytope
from flowverify.certifiers.complete.nodes import Nodes
from flowverify.certifiers.complete.relaxation import lower_bound
from flowverify.grid import Grid

TOLERANCE = 1e-10
_INFEASIBLE = 2  # SciPy's code


class LeafProgram:
    """The linear programs over one ball; of one network and image."""

    def __init__(self, maps: AffineMaps, image: Tensor, feasible: bool) -> None:
        self._maps, self._feasible = maps, feasible
        self._incidence = Grid.of(image[None]).incidence_scipy().tocsr()
        self._image = image.detach().cpu().double().numpy().reshape(-1)

    def bound(self, ball: Polytope, stage: int, specification: Tensor, node: Nodes) -> tuple[float, Tensor | None]:
        """The least value on one node (a batch of one), and a point (1, pixels) that attains it.

        An empty node is at infinity if multipliers prove it. Where HiGHS fails, the bound is the node's own.
        """
        if not self._incidence.shape[1]:
            return self._proven(ball, stage, specification, node), ball.flat[None]  # nothing can move
        rows, constants, signs, places = self._splits(node)
        objective, _ = self._affine(specification, node, stage)
        edges = self._incidence
        unit = max(ball.budget, 1e-300)
        # Flows are counted in units of the budget, so that the solver's tolerances are relative to it.
        to_flow = sparse.hstack([edges, -edges]).tocsr() * unit
        limits: list[Any] = [sparse.csr_array(np.ones((1, to_flow.shape[1])))]
        right = [np.ones(1)]
        if self._feasible:
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
        solution = _solve(cost / size, *system)
        if solution.status == 0:
            point = torch.from_numpy(self._image + to_flow @ solution.x)[None].to(ball.flat)
            if len(rows):
                self._price(node, -solution.ineqlin.marginals[-len(rows) :] * size / scale, signs, places)
            return max(float(node.bound[0]), self._proven(ball, stage, specification, node)), point
        if solution.status == _INFEASIBLE and len(rows):
            # How far the splits are from holding together: the prices of that prove the node empty.
            slack = np.zeros((system[0].shape[0], 1))
            slack[-len(rows) :] = -1.0
            wider = sparse.hstack([system[0], sparse.csr_array(slack)]).tocsr()
            apart = _solve(np.append(np.zeros(len(cost)), 1.0), wider, system[1])
            if apart.status == 0 and apart.fun > TOLERANCE:
                known = float(node.bound[0])
                weight = 2 * (1 + (max(0.0, -known) if np.isfinite(known) else 0.0)) / apart.fun
                for _ in range(4):
                    self._price(node, -apart.ineqlin.marginals[-len(rows) :] * weight / scale, signs, places)
                    if self._proven(ball, stage, specification, node) > 0:
                        return float("inf"), None
                    weight *= 10
        return float(node.bound[0]), None

    def _price(self, node: Nodes, prices: Any, signs: Any, places: list[tuple[int, int]]) -> None:
        for (layer, neuron), price, sign in zip(places, prices, signs, strict=True):
            node.multipliers.gamma[layer][0, neuron] = -sign * max(float(price), 0.0)

    def _proven(self, ball: Polytope, stage: int, specification: Tensor, node: Nodes) -> float:
        found = lower_bound(
            self._maps, ball, stage, specification[None], node.lower, node.upper, node.multipliers, tolerance=1e-12
        )
        return float(found.value[0])

    def _phases(self, node: Nodes) -> list[Tensor]:
        return [(low[0] >= 0).double() for low in node.lower]

    def _affine(self, specification: Tensor, node: Nodes, stage: int) -> tuple[Any, float]:
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

    def _splits(self, node: Nodes) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
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


def _solve(cost: Any, system: Any, right: Any) -> Any:
    options = {"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE}
    return linprog(cost, A_ub=system, b_ub=right, bounds=(0, None), method="highs", options=options)
