"""Certificates by mixed-integer programming: a second complete method, that shares no search with the first.

*The program* is a ReLU network over the ball as a mixed-integer linear program, for HiGHS. Flows p, q >= 0 give the
image mu + A (p - q) >= 0 at the cost sum(p + q). A ReLU of input z in [l, u] with l < 0 < u has a binary s: a >= 0,
a >= z, a <= u s, a <= z - l (1 - s) (Tjeng et al. 2019, arXiv:1711.07356). What the network computes is read from its
own operations, one matrix each, so that nothing is shared with branch and bound.

Solvers' tolerances are absolute, so that all is scaled to be of order one: flows by the budget, the value of a neuron
by its bound, every row and the objective by its largest coefficient. Factors are powers of two: nothing is rounded.

What is written down is in floating point, and the network is not: beside each value stands by how much it may be off
anywhere on the program (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and rows give way by it.

*The proof:* lower bounds need no solver's word. For rows G x <= h, columns 0 <= x <= u with a limit T on the sum of the
first ones (the flows), and any y >= 0,

    min c . x >= -y . h + T min(0, min over flows of r) + sum over the rest of min(r x_low, r x_high),  r = c + G^T y

(weak duality; theory, section 16). HiGHS's linear programs propose y; the right side is computed here, in float64, less
what rounding may have added to it (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Where it is
not enough, a binary is fixed to either side: a tree that covers all phases. A side is empty if the right side is
positive for c = 0.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.bounds.intervals import Interval
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import Bound
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.problem import relus_only
from flowverify.certifiers.options import DEFAULTS, CompleteOptions, ProgramSettings
from flowverify.deadline import Deadline
from flowverify.errors import InvalidInputError, SolverError, UnsupportedOperationError
from flowverify.network import Network, is_affine, operation_name
from flowverify.network.affine import operation_matrices
from flowverify.network.graph import INPUT
from flowverify.network.rounding import FEW, INFLATED, TINY, UNIT
from flowverify.quiet import quiet
from flowverify.results import Certificate, Verdict

Array = NDArray[np.float64]


def gamma(roundings: int) -> float:
    """The relative error of a sum of products with so many roundings on any of them."""
    share = roundings * UNIT
    return INFLATED * share / (1 - share)


@dataclass(frozen=True)
class Value:
    """matrix x + constant, for the columns x of the program.

    Attributes:
        magnitude: of the sum of all terms' absolute values, for any x of the program.
        error: how far the network's exact value is off, at most.
        path: the sum of absolute values along all paths of the network, for the rounding of bounds by relaxations.
    """

    matrix: Any
    constant: Array
    magnitude: Array
    error: Array
    path: Array


def affine_value(matrices: Sequence[Any], bias: Array, values: Sequence[Value]) -> Value:
    width = max(value.matrix.shape[1] for value in values)
    matrix: Any = sparse.csr_array((len(bias), width))
    constant, magnitude, error, path = bias, np.abs(bias), np.zeros(len(bias)), np.abs(bias)
    for own, value in zip(matrices, values, strict=True):
        missing = sparse.csr_array((value.matrix.shape[0], width - value.matrix.shape[1]))
        matrix = matrix + own @ sparse.hstack([value.matrix, missing]).tocsr()
        size = abs(own)
        constant, magnitude = constant + own @ value.constant, magnitude + size @ value.magnitude
        error, path = error + size @ value.error, path + size @ value.path
    terms = sum(own.shape[1] for own in matrices) + FEW
    return Value(sparse.csr_array(matrix), constant, magnitude, error + gamma(terms) * magnitude + TINY, path)


REACH = 8.0  # times mass and budget: what the terms of a linear function's maximum over the ball come to
GAIN = 2.0  # of a ReLU's relaxation, in what rounding its lines may lose
LEAST_SCALE = 1e-9  # of a row's largest coefficient


@dataclass(frozen=True)
class Optimum:
    """What HiGHS says: a lower bound, the best value, its image (flat), whether time ran out or nothing is feasible."""

    bound: float
    value: float
    image: Array | None
    timeout: bool
    infeasible: bool


@dataclass(frozen=True)
class Objective:
    """size (cost . x) + constant, off by at most ``error``; the largest cost is between 1/2 and 1, or all are 0."""

    cost: Array
    size: float
    constant: float
    error: float


class NetworkProgram:
    """The program for one image, with neurons' bounds that hold over the largest ball it is asked about.

    Args:
        network: affine layers and ReLUs.
        image: (C, H, W).
        budget: of the largest ball, mass times pixels.
        bounds: of what each ReLU reads, (1, *shape) each, computed in float64 by relaxations; they are widened by
            what rounding may change in them.

    Raises:
        UnsupportedOperationError: another activation, named.
        SolverError: bounds or weights that are not finite.

    Attributes:
        system, right: rows ``system @ x <= right``; they hold, the network's rounding included.
        upper: of the columns, that are all >= 0.
        flows: the first columns; their sum is at most the budget in ``unit``.
        total: that largest sum.
        neurons: (K, 2) the columns a and s of each open neuron, and ``rows`` (K, 3) its rows, in the order above.
        scales: (K, 4), of a and of the rows.
    """

    def __init__(self, network: Network, image: Tensor, budget: float, bounds: Sequence[Interval]) -> None:
        self._image = image.detach().cpu().double().numpy().reshape(-1)
        self._budget, self.unit = float(budget), float(_power(np.array(budget)))
        self.total = self._budget / self.unit
        edges = network.grid.incidence_scipy().tocsr()
        self.flows = 2 * edges.shape[1]
        self._to_image = sparse.hstack([edges, -edges]).tocsr() * self.unit
        self._precise = copy.deepcopy(network).cpu().double()
        self._columns, self._count = self.flows, 0
        self._blocks: list[Any] = []
        self._right: list[Array] = []
        self._upper, self._integer = [np.full(self.flows, self.total)], [np.zeros(self.flows)]
        self._neurons: list[NDArray[np.intp]] = []
        self._places: list[NDArray[np.intp]] = []
        self._scales: list[Array] = []
        with np.errstate(all="ignore"):
            self._build(bounds)
        self.upper, self.integer = np.concatenate(self._upper), np.concatenate(self._integer)
        wide = [sparse.hstack([b, sparse.csr_array((b.shape[0], self._columns - b.shape[1]))]) for b in self._blocks]
        self.system, self.right = sparse.vstack(wide).tocsr(), np.concatenate(self._right)
        self.neurons = np.concatenate([np.zeros((0, 2), dtype=np.intp), *self._neurons])
        self.rows = np.concatenate([np.zeros((0, 3), dtype=np.intp), *self._places])
        self.scales = np.concatenate([np.zeros((0, 4)), *self._scales])
        if not all(np.isfinite(numbers).all() for numbers in (self.system.data, self.right, self.upper)):
            raise SolverError("mixed-integer program: bounds of neurons or weights are not finite in float64")

    def _build(self, bounds: Sequence[Interval]) -> None:
        """Writes every value down; ReLUs add columns and rows."""
        none = np.zeros(self._image.size)
        reach = np.full(self._image.size, REACH * (float(self._image.sum()) + self._budget))
        values = {INPUT: Value(self._to_image, self._image, self._image + self._budget, none, reach)}
        # A pixel that has more than the budget stays positive anyway.
        scarce = np.flatnonzero(self._image < self._budget)
        self._add(-self._to_image[scarce] / self.unit, self._image[scarce] / self.unit)
        known = iter(bounds)
        sizes = [int(np.prod(node.shape)) for node in self._precise.nodes]
        self._gamma = gamma(8 * (self._image.size + sum(sizes)) + FEW * (len(sizes) + 2)) * (1 + len(bounds))
        for node in self._precise.nodes:
            if isinstance(node.operation, nn.ReLU):
                low, high = (end.reshape(-1).double().cpu().numpy() for end in next(known))
                values[node.name] = self._relu(values[node.inputs[0]], low, high)
            elif is_affine(node.operation):
                shapes = [self._precise.input_shape if n == INPUT else self._precise.node(n).shape for n in node.inputs]
                columns, bias = operation_matrices(node.operation, shapes, torch.zeros(0, dtype=torch.float64))
                matrices = [sparse.vstack([sparse.csr_array(p.numpy()) for p in parts]).T.tocsr() for parts in columns]
                values[node.name] = affine_value(matrices, bias.numpy(), [values[n] for n in node.inputs])
            else:
                raise UnsupportedOperationError(
                    f"complete certification: layer {node.name!r} is {operation_name(node.operation)}; expected affine "
                    "layers and ReLU only"
                )
        self._logits = values[self._precise.output]

    def _add(self, block: Any, right: Array) -> NDArray[np.intp]:
        """Adds rows; their indices."""
        self._blocks.append(sparse.csr_array(block))
        self._right.append(right)
        self._count += len(right)
        return np.arange(self._count - len(right), self._count)

    def _add_scaled(self, block: Any, right: Array) -> tuple[NDArray[np.intp], Array]:
        """Adds rows, each divided by its largest coefficient; indices and divisors."""
        block, largest = sparse.coo_array(block), np.zeros(len(right))
        np.maximum.at(largest, block.row, np.abs(block.data))
        scale = _power(largest)
        return self._add(sparse.diags_array(1 / scale) @ block.tocsr(), right / scale), scale

    def _relu(self, value: Value, low: Array, high: Array) -> Value:
        slack = self._gamma * value.path + TINY
        low, high = low - slack, high + slack
        if not bool((low <= high).all()):
            raise SolverError("mixed-integer program: a neuron's bounds are not numbers, or contradict each other")
        matrix, count = sparse.csr_array(value.matrix), value.constant.size
        on, off = low >= 0, high <= 0
        open_ = np.flatnonzero(~on & ~off)
        size, first, width = open_.size, self._columns, matrix.shape[1]
        self._columns += 2 * size
        unit = _power(high[open_])
        self._upper.append(np.concatenate([high[open_] / unit, np.ones(size)]))
        self._integer.append(np.concatenate([np.zeros(size), np.ones(size)]))
        own, shift, error = matrix[open_], value.constant[open_], value.error[open_]
        gap, zero = sparse.csr_array((size, first - width)), sparse.csr_array((size, size))
        inputs, none = sparse.hstack([own, gap]).tocsr(), sparse.csr_array((size, first))
        output, upper, lower = (sparse.diags_array(v).tocsr() for v in (unit, high[open_], low[open_]))
        below = error + FEW * UNIT * np.abs(low[open_]) + shift - low[open_]
        added = [
            self._add_scaled(sparse.hstack([inputs, -output, zero]), error - shift),  # z - a <= 0
            self._add_scaled(sparse.hstack([none, output, -upper]), np.zeros(size)),  # a - u s <= 0
            self._add_scaled(sparse.hstack([-inputs, output, -lower]), below),  # a - z - l s <= -l
        ]
        columns = first + np.arange(size)
        self._neurons.append(np.stack([columns, columns + size], 1))
        self._places.append(np.stack([rows for rows, _ in added], 1))
        self._scales.append(np.stack([unit, *(scale for _, scale in added)], 1))
        # The output: z where on, 0 where off, the new column elsewhere.
        place = sparse.csr_array((unit, (open_, columns)), shape=(count, self._columns))
        kept = sparse.diags_array(on.astype(float)).tocsr() @ matrix
        kept = sparse.hstack([kept, sparse.csr_array((count, self._columns - width))]).tocsr()
        magnitude = np.where(on, value.magnitude, np.where(off, 0.0, high))
        return Value(
            (kept + place).tocsr(), np.where(on, value.constant, 0.0), magnitude, np.where(on, value.error, 0.0),
            GAIN * value.path,
        )  # fmt: skip

    def least_margin(self, label: int, other: int, budget: float, seconds: float | None) -> Optimum:
        """min f_label - f_other over the ball of this budget (mass times pixels)."""
        objective = self.margin(label, other)
        found = self._solve(objective.cost, [(self._spent(), budget / self.unit)], seconds)
        bound, value = (objective.size * v + objective.constant for v in (found.bound, found.value))
        return Optimum(bound, value, found.image, found.timeout, found.infeasible)

    def least_budget(self, label: int, other: int, budget: float, seconds: float | None) -> Optimum:
        """min cost, at most ``budget``, of an image with f_label - f_other <= 0."""
        objective, spent = self.margin(label, other), self._spent()
        # The image itself misses this row by the constant, which is to be more than a tolerance.
        constant = objective.constant / objective.size
        scale = float(_power(np.array(min(1.0, max(constant, LEAST_SCALE)))))
        reached = objective.cost / scale, -constant / scale
        found = self._solve(spent, [(spent, budget / self.unit), reached], seconds)
        return Optimum(
            found.bound * self.unit, found.value * self.unit, found.image, found.timeout, found.infeasible
        )  # fmt: skip

    def margin(self, label: int, other: int) -> Objective:
        """f_label - f_other."""
        logits, width = self._logits, self._logits.matrix.shape[1]
        row = sparse.csr_array(logits.matrix)
        cost = np.zeros(self._columns)
        cost[:width] = row[[label]].toarray()[0] - row[[other]].toarray()[0]
        size = float(_power(np.abs(cost).max(initial=0.0)))
        magnitude = float(logits.magnitude[label] + logits.magnitude[other])
        error = float(logits.error[label] + logits.error[other]) + 4 * UNIT * magnitude
        return Objective(cost / size, size, float(logits.constant[label] - logits.constant[other]), error)

    def _spent(self) -> Array:
        total = np.zeros(self._columns)
        total[: self.flows] = 1.0
        return total

    def _solve(self, objective: Array, rows: Sequence[tuple[Array, float]], seconds: float | None) -> Optimum:
        if not self._columns:
            feasible = all(limit >= 0 for _, limit in rows)
            value = 0.0 if feasible else np.inf
            return Optimum(value, value, self._image if feasible else None, False, not feasible)
        system = sparse.vstack([self.system, *(sparse.csr_array(row[None]) for row, _ in rows)]).tocsc()
        right = np.concatenate([self.right, [limit for _, limit in rows]])
        if not np.isfinite(right).all():
            raise SolverError("mixed-integer program: a row is not finite in float64")
        options: dict[str, Any] = {"mip_rel_gap": 1e-9}
        if seconds is not None:
            options["time_limit"] = max(0.01, seconds)
        begin = time.perf_counter()
        with quiet():
            result = milp(
                objective,
                constraints=LinearConstraint(system, -np.inf, right),
                bounds=Bounds(np.zeros(self._columns), self.upper),
                integrality=self.integer,
                options=options,
            )
        late = seconds is not None and time.perf_counter() - begin >= 0.95 * seconds
        if result.status == 2:
            return Optimum(np.inf, np.inf, None, False, True)
        if result.status not in (0, 1):
            raise SolverError(f"mixed-integer program: HiGHS ended with {result.message!r}")
        bound = getattr(result, "mip_dual_bound", None)
        image = None if result.x is None else self._image + self._to_image @ result.x[: self.flows]
        value = np.inf if result.x is None else float(result.fun)
        if not self.integer.any() and result.status == 0:
            bound = value  # a linear program has no gap
        lowest = -np.inf if bound is None or not np.isfinite(bound) else float(bound)
        return Optimum(lowest, value, image, result.status == 1 or late, False)


def _power(values: Array) -> Array:
    """The power of two above each value; 1 for 0, so that what is divided stays."""
    _, exponent = np.frexp(np.where(np.isfinite(values), values, 0.0))
    return np.where(values > 0, np.ldexp(1.0, np.clip(exponent, -1000, 1000)), 1.0)


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
        # Among the roundings are the budget's, a product with a sum over the pixels: there are more flows than those.
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


THREAT = Threat()  # the only one that the program knows
NEURONS = Bound("what neurons are bounded by", ("interval", "lifted", "crown"), ("interval",))


class MilpCertifier(BaseCertifier):
    """The exact answer by HiGHS, on the flows that lead to images, with neurons' bounds from lifted bounds and CROWN.

    For small networks, and as an oracle. HiGHS's word proves nothing: a certificate rests on

    - the neurons' bounds, the tighter of both at each (:class:`flowverify.bounds.margins.MarginBounds`), widened by
      what rounding may change in them;
    - a bound for every other class, over a tree of phases, by weak duality in our own arithmetic, rounding included
      (:mod:`flowverify.certifiers.complete.milp`). HiGHS only proposes the multipliers.

    What HiGHS takes for proven and this does not confirm is ``unknown``, or ``timeout`` where time ran out.
    Counterexamples are replayed. With branch and bound (``complete``) it shares the support function, by which the
    neurons of the first layer are bounded, and the replay.

    Raises:
        UnsupportedOperationError: an activation that is not piecewise linear, named.
        DependencyError: auto_LiRPA cannot be used.
    """

    batched = False

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "milp",
        *,
        options: CompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(model, method, "highs", input_shape)
        self.options = CompleteOptions() if options is None else options
        self._posed = relus_only(self.precise)
        # Built once without bounds, so that what is unsupported comes out first.
        empty = [(torch.zeros(1, *n.shape), torch.zeros(1, *n.shape)) for n in self._posed.activations]
        NetworkProgram(self._posed, torch.ones(self.network.input_shape), 1.0, empty)
        self._bounds = MarginBounds(self._posed, Threat(), NEURONS, dtype=torch.float64)

    @classmethod
    def check_network(cls, network: Network) -> None:
        relus_only(network)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Decides each image at the radius of ``ball``: one program for each other class.

        Raises:
            InvalidInputError: another ground cost than l1, or a cap.
            Interrupted: at Ctrl-C, with what is known until then.
        """
        return self._each(images, labels, ball.threat, ball.radius)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The least distance to a counterexample of each image; raises as :meth:`certify`."""
        return self._each(images, labels, threat or THREAT, None)

    def program(self, image: Tensor, budget: float) -> NetworkProgram:
        """The program for one image (C, H, W), with bounds that hold up to this budget.

        Raises:
            SolverError: bounds that are not finite.
        """
        image = image.double()
        bounds = self._bounds.neurons(THREAT.ball(image, budget))
        return NetworkProgram(self._posed, image, budget, bounds)

    def _each(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> list[Certificate]:
        if threat != THREAT:
            raise InvalidInputError(
                f"method milp with ground cost {threat.ground!r} and cap {threat.cap}: expected l1 and no cap"
            )

        def one(image: Tensor, label: Tensor, prediction: Tensor) -> Certificate:
            if radius is None:
                return self._search(image, label, prediction)
            return self._decide(image, label, prediction, radius)

        return self.one_by_one(images, labels, threat, radius, one)

    def _budget(self, image: Tensor, radius: float) -> float:
        return float(THREAT.budget(radius, image[None]))

    def _radius(self, image: Tensor, budget: float) -> float:
        return float(THREAT.radius(image.new_tensor([budget]), image[None]))

    def _decide(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        nearest, deadline = self._nearest(image, label), self.options.deadline()
        budget = self._budget(image, radius)
        program = self.program(image, budget)
        proof, least = self._proof(program, budget, deadline), math.inf
        for other in self._others(int(label)):
            if deadline.stop():
                least = -math.inf
                break
            found = program.least_margin(int(label), other, budget, self._share(deadline))
            if found.infeasible:
                raise SolverError("mixed-integer program: HiGHS finds the ball empty, which has the image itself")
            if found.image is not None:
                nearest.offer(torch.from_numpy(found.image).to(image)[None])
            if nearest.budget <= budget:
                break
            if least > 0:
                least = min(least, proof.least(program.margin(int(label), other), 0.0))
        verdict = Verdict.TIMEOUT if deadline.stop() else Verdict.UNKNOWN
        if nearest.budget <= budget:
            verdict = Verdict.FALSIFIED
        elif least > 0:
            verdict = Verdict.CERTIFIED
        margin = least if math.isfinite(least) else None
        return self._certified(nearest, label, prediction, verdict, radius, margin, deadline.elapsed)

    def _search(self, image: Tensor, label: Tensor, prediction: Tensor) -> Certificate:
        nearest, deadline = self._nearest(image, label), self.options.deadline()
        if self.options.adversary is not None:
            nearest.ask(self.options.adversary)
        nearest.descend()
        limit = self._budget(image, THREAT.largest_radius(self.network.grid))
        upper = min(nearest.budget * (1 + 1e-6), limit)
        program = self.program(image, upper)
        least = upper
        for other in self._others(int(label)):
            if deadline.stop():
                least = 0.0
                break
            found = program.least_budget(int(label), other, upper, self._share(deadline))
            least = min(least, max(0.0, found.bound))
            if found.image is not None:
                # The optimum is a tie; a little farther the class changes.
                point, centre = torch.from_numpy(found.image).to(image), image.flatten()
                nearest.offer(torch.stack([point, centre + (1 + 1e-6) * (point - centre)]), descend=True)
        proven, margin = 0.0, None
        first, farthest = min(least, nearest.budget), min(nearest.budget, limit)
        for trial in self._trials(first, limit) + (self._trials(farthest, limit) if first < farthest else []):
            margin = self._proven(program, int(label), trial, deadline)
            if margin is not None:
                proven = trial
                break
        verdict = Verdict.TIMEOUT if deadline.stop() else Verdict.UNKNOWN
        if margin is not None and (proven > 0 or limit == 0):
            verdict = Verdict.CERTIFIED
        seconds, note = deadline.elapsed, ""
        if proven < limit and not nearest.budget <= proven * (1 + self.options.tolerance):
            radius = self._radius(image, first)
            why = f"the nearest image by HiGHS, at radius {radius:.6g}, is a tie to within its tolerances"
            note = f"bracket not closed: {'out of budget' if deadline.stop() else why}"
        radius = self._radius(image, proven)
        return self._certified(nearest, label, prediction, verdict, radius, margin, seconds, note)

    def _proven(self, program: NetworkProgram, label: int, budget: float, deadline: Deadline) -> float | None:
        """The least margin that is proven over the ball of this budget, if it is positive for all classes."""
        proof, least = self._proof(program, budget, deadline), math.inf
        for other in self._others(label):
            least = min(least, proof.least(program.margin(label, other), 0.0))
            if not least > 0:
                return None
        return least

    def _nearest(self, image: Tensor, label: Tensor) -> NearestCounterexample:
        return NearestCounterexample(
            self.subject, image, int(label), THREAT, settings=self.options.settings.counterexamples
        )

    def _proof(self, program: NetworkProgram, budget: float, deadline: Deadline) -> DualProof:
        return DualProof(program, budget, deadline, self.options.settings.program)

    def _share(self, deadline: Deadline) -> float | None:
        """The seconds for one program; None for no limit."""
        left = deadline.seconds_left
        return None if left == math.inf else self.options.settings.program.solver_share * left

    def _trials(self, budget: float, limit: float) -> list[float]:
        """Budgets to prove, up to that of a nearest image; the limit itself, which nothing is beyond."""
        shares = self.options.settings.program.shares
        return ([limit] if budget >= limit else []) + [share * budget for share in shares if budget > 0]

    def _others(self, label: int) -> list[int]:
        return [t for t in range(self.network.num_classes) if t != label]

    def _certified(
        self,
        nearest: NearestCounterexample,
        label: Tensor,
        prediction: Tensor,
        verdict: Verdict,
        radius: float,
        margin: float | None,
        seconds: float,
        note: str = "",
    ) -> Certificate:
        upper = self._radius(nearest.image, nearest.budget) if math.isfinite(nearest.budget) else None
        if upper is not None and verdict is Verdict.FALSIFIED:
            upper = min(upper, radius)  # its plan costs no more than the budget of that
        return self.certificate(
            label, prediction, verdict, THREAT, radius, seconds, margin=margin, upper_radius=upper, note=note,
            witness=nearest.witness,
        )  # fmt: skip
