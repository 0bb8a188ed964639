"""A lower bound on the optimum of a mixed-integer program that needs no solver's word.

For rows G x <= h, columns 0 <= x <= u with a limit T on the sum of the first ones (the flows), and any y >= 0,

    min c . x >= -y . h + T min(0, min over flows of r) + sum over the rest of min(r x_low, r x_high),  r = c + G^T y

(weak duality; theory, section 16). HiGHS's linear programs propose y; the right side is computed here, in float64, less
what rounding may have added to it (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Where it is
not enough, a binary is fixed to either side: a tree that covers all phases. A side is empty if the right side is
positive for c = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from flowverify.certifiers.complete.deadline import Deadline
from flowverify.certifiers.complete.program import NetworkProgram, Objective
from flowverify.certifiers.complete.program_values import Array, gamma
from flowverify.certifiers.complete.settings import DEFAULTS, ProgramSettings
from flowverify.network.rounding import TINY
from flowverify.quiet import quiet

_OPTIMAL, _INFEASIBLE = 0, 2  # SciPy's codes


@dataclass(frozen=True)
class _Node:
    """The least and largest value of each column, and the multipliers of the node above."""

    lower: Array
    upper: Array
    prices: Array


class DualProof:
    """Proofs for one program and budget.

    Args:
        budget: mass times pixels, at most that of the program's bounds.
        deadline: where no proof came out until then, there is none.
    """

    def __init__(
        self, program: NetworkProgram, budget: float, deadline: Deadline, settings: ProgramSettings = DEFAULTS.program
    ) -> None:
        self._program, self._deadline, self._settings = program, deadline, settings
        self._total = budget / program.unit
        self._system, self._right = program.system, program.right
        self._transposed = program.system.T.tocsr()
        self._sizes = abs(self._transposed).tocsr()
        self._gamma = gamma(2 * sum(program.system.shape) + 16)

    def least(self, objective: Objective, enough: float) -> float:
        """A lower bound on the objective over the ball and all phases; minus infinity where none came out in time.

        It exceeds ``enough`` if such a proof was found; the search ends where there can be none.
        """
        columns = len(self._program.upper)
        start = _Node(np.zeros(columns), self._program.upper, np.zeros(len(self._right)))
        open_, least = [start], np.inf
        while open_:
            node = open_.pop()
            bound = self._bound(objective, node.prices, node)
            if not bound > enough:
                if self._deadline.stop():
                    return -np.inf
                bound, prices, point = self._solve(objective, node)
                if not bound > enough:
                    neuron = None if point is None else self._choose(node, prices, point)
                    if neuron is None:
                        return float(bound)
                    open_ += self._split(node, neuron, prices)
                    continue
            least = min(least, bound)
        return float(least)

    def _solve(self, objective: Objective, node: _Node) -> tuple[float, Array, Array | None]:
        """The best bound of a node, its multipliers, and the optimum of its relaxation; infinite if it is empty."""
        columns, rows = len(self._program.upper), len(self._right)
        if not columns:
            return self._bound(objective, node.prices, node), node.prices, None
        spent = np.zeros((1, columns))
        spent[0, : self._program.flows] = 1.0
        system = sparse.vstack([self._system, sparse.csr_array(spent)]).tocsr()
        right = np.append(self._right, self._total)
        bounds = np.stack([node.lower, node.upper], 1)
        solution = self._linear_program(objective.cost, system, right, bounds)
        if solution.status == _OPTIMAL:
            prices = np.maximum(0.0, -solution.ineqlin.marginals[:rows])
            return self._bound(objective, prices, node), prices, solution.x
        if solution.status == _INFEASIBLE:
            # How far the rows are from holding together: the multipliers of that prove the node empty.
            slack = np.append(np.full(rows, -1.0), 0.0)[:, None]
            apart = self._linear_program(
                np.append(np.zeros(columns), 1.0), sparse.hstack([system, sparse.csr_array(slack)]).tocsr(), right,
                np.concatenate([bounds, [[0.0, np.inf]]]),
            )  # fmt: skip
            if apart.status == _OPTIMAL:
                prices = np.maximum(0.0, -apart.ineqlin.marginals[:rows])
                if self._bound(Objective(np.zeros(columns), 1.0, 0.0, 0.0), prices, node) > 0:
                    return np.inf, prices, None
        return -np.inf, node.prices, None

    def _bound(self, objective: Objective, prices: Array, node: _Node) -> float:
        """The right side of weak duality, rounded down; minus infinity where it is not a number."""
        flows = self._program.flows
        with np.errstate(all="ignore"):
            reduced = objective.cost + self._transposed @ prices
            reduced = reduced - self._gamma * (np.abs(objective.cost) + self._sizes @ prices)
            moved = self._total * min(0.0, float(reduced[:flows].min(initial=0.0)))
            rest = reduced[flows:]
            terms = np.minimum(rest * node.lower[flows:], rest * node.upper[flows:])
            paid = prices * self._right
            value = moved + terms.sum() - paid.sum()
            magnitude = abs(moved) + np.abs(terms).sum() + np.abs(paid).sum()
            value = objective.size * (value - self._gamma * magnitude) + objective.constant
            value = value - self._gamma * (abs(objective.size) * magnitude + abs(objective.constant)) - objective.error
        return float(value - TINY) if np.isfinite(value) else -np.inf

    def _choose(self, node: _Node, prices: Array, point: Array) -> int | None:
        """The neuron farthest from its ReLU, in what its upper lines cost the bound; None if all have one phase."""
        program = self._program
        free = node.lower[program.neurons[:, 1]] < node.upper[program.neurons[:, 1]]
        output = point[program.neurons[:, 0]]
        rows, scales = program.rows, program.scales
        above = (self._right - self._system @ point)[rows[:, 0]] * scales[:, 1] / scales[:, 0]  # a - z
        gap = np.where(free, np.minimum(output, above), 0.0)
        gap = np.where(gap > self._settings.apart, gap, 0.0)
        if not gap.any():
            return None
        weight = (prices[rows[:, 1:]] / scales[:, 2:]).sum(1) * scales[:, 0]
        score = gap * weight
        return int((score if score.any() else gap).argmax())

    def _split(self, node: _Node, neuron: int, prices: Array) -> list[_Node]:
        """Both sides: the output is z, or 0."""
        output, phase = self._program.neurons[neuron]
        raised, lowered = node.lower.copy(), node.upper.copy()
        raised[phase] = 1.0
        lowered[[phase, output]] = 0.0
        return [_Node(raised, node.upper, prices), _Node(node.lower, lowered, prices)]

    def _linear_program(self, cost: Array, system: Any, right: Array, bounds: Array) -> Any:
        tolerance, left = self._settings.solver_tolerance, self._deadline.seconds_left
        options = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance}
        if left < np.inf:
            options["time_limit"] = max(0.01, left)
        with quiet():
            return linprog(cost, A_ub=system, b_ub=right, bounds=bounds, method="highs", options=options)
