"""A ReLU network over the ball as a mixed-integer linear program, for HiGHS.

Flows p, q >= 0 give the image mu + A (p - q) >= 0 at the cost sum(p + q). A ReLU of input z in [l, u] with l < 0 < u
has a binary s: a >= 0, a >= z, a <= u s, a <= z - l (1 - s) (Tjeng et al. 2019, arXiv:1711.07356). What the network
computes is read from its own operations, one matrix each, so that nothing is shared with branch and bound.

Solvers' tolerances are absolute, so that all is scaled to be of order one: flows by the budget, the value of a neuron
by its bound, every row and the objective by its largest coefficient. Factors are powers of two: nothing is rounded.

What is written down is in floating point, and the network is not: beside each value stands by how much it may be off
anywhere on the program (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and rows give way by it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval
from flowverify.errors import SolverError, UnsupportedOperationError
from flowverify.network import Network, is_affine, operation_name
from flowverify.network.affine import drop_biases
from flowverify.network.graph import INPUT
from flowverify.network.rounding import FEW, INFLATED, TINY, UNIT
from flowverify.quiet import quiet

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


def _run(operation: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = operation(*inputs)
    return result.reshape(len(result), -1)


def at_zero(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Array:
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    result: Array = _run(operation, zeros)[0].numpy()
    return result


def matrices_of(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The matrix of an operation without biases for each of its inputs: images of unit vectors, without rounding.

    (An average is rounded once.)
    """
    if isinstance(operation, nn.Linear) and len(shapes[0]) == 1:
        return [sparse.csr_array(operation.weight.detach().numpy())]
    result = []
    for position, shape in enumerate(shapes):
        size, parts = int(np.prod(shape)), []
        for start in range(0, size, 512):
            stop = min(size, start + 512)
            inputs = [torch.zeros(stop - start, *other, dtype=torch.float64) for other in shapes]
            inputs[position] = torch.eye(size, dtype=torch.float64)[start:stop].reshape(-1, *shape)
            parts.append(sparse.csr_array(_run(operation, inputs).T.numpy()))
        result.append(sparse.hstack(parts).tocsr())
    return result


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
        linear = copy.deepcopy(self._precise)
        drop_biases(linear)
        sizes = [int(np.prod(node.shape)) for node in self._precise.nodes]
        self._gamma = gamma(8 * (self._image.size + sum(sizes)) + FEW * (len(sizes) + 2)) * (1 + len(bounds))
        for node, without in zip(self._precise.nodes, linear.nodes, strict=True):
            if isinstance(node.operation, nn.ReLU):
                low, high = (end.reshape(-1).double().cpu().numpy() for end in next(known))
                values[node.name] = self._relu(values[node.inputs[0]], low, high)
            elif is_affine(node.operation):
                shapes = [self._precise.input_shape if n == INPUT else self._precise.node(n).shape for n in node.inputs]
                matrices, bias = matrices_of(without.operation, shapes), at_zero(node.operation, shapes)
                values[node.name] = affine_value(matrices, bias, [values[n] for n in node.inputs])
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
