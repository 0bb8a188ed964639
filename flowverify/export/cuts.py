"""The question over the first layer's values instead of flows: fewer variables, and linear cuts for the ball.

f(nu) = tail(z) with z = W nu + b, and the ball is a convex set of images. So z is in the convex set
{z : a . z <= h(a) for all a}, h(a) = a . b + max of (a W) . nu over the ball, which the support function gives exactly
(theory, section 5; section 4 for vanilla). Any choice of directions a leaves a set that is larger, so "no
counterexample in it" is a proof. A point of it that is a counterexample may be the value of no image: then a direction
that separates it from the values of images is one more cut, and the question is asked again.

The tail is a program of linear equations, inequalities and ReLUs over numbered variables, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from flowverify.ball import Ball, Threat
from flowverify.bounds.intervals import Interval, intersect, propagate
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.relaxations import crosses_zero, pull_back, relax
from flowverify.errors import SolverError
from flowverify.export.encodings import FloatArray, Parts, append_rows, margin_rows
from flowverify.network import INPUT, Add, Graph, Network, Node, Reshape
from flowverify.network.affine import operation_matrices

SLACK = 1e-7  # relative: every bound and limit is this much wider


@dataclass(frozen=True, eq=False)
class Program:
    """lower <= v <= upper, equations @ v = right, inequalities @ v <= limits, v[out] = max(0, v[in]).

    The first ``inputs`` variables are the inputs of the graph; ``outputs`` are the numbers of its outputs.
    """

    lower: FloatArray
    upper: FloatArray
    equations: Any  # scipy.sparse CSR
    right: FloatArray
    inequalities: Any  # scipy.sparse CSR
    limits: FloatArray
    relus: Any  # (k, 2), integers
    inputs: int
    outputs: Any  # (outputs,), integers

    def save(self, path: Path) -> None:
        """Writes the arrays that the process of Marabou reads."""
        np.savez(
            path,
            lower=self.lower,
            upper=self.upper,
            right=self.right,
            limits=self.limits,
            relus=self.relus,
            inputs=self.inputs,
            outputs=self.outputs,
            **_arrays("equations", self.equations),
            **_arrays("inequalities", self.inequalities),
        )


def write_program(graph: Graph, intervals: Mapping[str, Interval]) -> Program:
    """The program of a graph; bounds of ReLUs' inputs are set, and the line above a ReLU is an inequality.

    Marabou's own linear relaxation has no such line; without it, it would have to split on every ReLU.

    Args:
        graph: float64, of the operations of :func:`flowverify.network.lowering.lower`.
        intervals: of values by name, (1, *shape) each; of "input" and of what ReLUs read at least.
    """
    size = int(np.prod(graph.input_shape))
    numbers: dict[str, Any] = {INPUT: np.arange(size)}
    count = size
    blocks, right = [], []
    relus: list[Any] = []
    slopes: list[Any] = []
    for node in graph.nodes:
        sources = [numbers[name] for name in node.inputs]
        if isinstance(node.operation, nn.Linear | nn.Conv2d | Add | nn.ReLU):
            own = np.arange(count, count + int(np.prod(node.shape)))
            count += len(own)
        else:  # only the shape changes
            own = sources[0]
        numbers[node.name] = own
        if isinstance(node.operation, nn.ReLU):
            relus.append(np.stack([sources[0], own], 1))
            slopes.append(node.inputs[0])
        elif isinstance(node.operation, nn.Linear | nn.Conv2d | Add):
            matrices, bias = operation_matrices(
                node.operation, [graph.shape(name) for name in node.inputs], torch.zeros(0, dtype=torch.float64)
            )
            sparse = [scipy.sparse.vstack([scipy.sparse.csr_array(c.numpy()) for c in part]).T for part in matrices]
            blocks.append((own, list(zip(sources, sparse, strict=True))))
            right.append(-bias.numpy())
    equations = [_embed(own, parts, count) for own, parts in blocks]
    lower, upper = np.full(count, -np.inf), np.full(count, np.inf)
    for name, interval in intervals.items():
        lower[numbers[name]], upper[numbers[name]] = (bound.flatten().numpy() for bound in interval)
    lines, limits = [], []
    for name, pairs in zip(slopes, relus, strict=True):
        across = crosses_zero(intervals[name]).flatten().numpy()
        above = relax(nn.ReLU(), intervals[name])
        slope, offset = (one.flatten().numpy()[across] for one in (above.upper_slope, above.upper_offset))
        low = intervals[name][0].flatten().numpy()
        lower[pairs[:, 1]], upper[pairs[:, 1]] = np.maximum(low, 0), np.maximum(upper[pairs[:, 0]], 0)
        rows = np.arange(len(slope)).repeat(2)
        values = np.stack([-slope, np.ones(len(slope))], 1).ravel()
        lines.append(scipy.sparse.csr_array((values, (rows, pairs[across].ravel())), (len(slope), count)))
        limits.append(_wider(offset))
    finite = np.isfinite(lower)
    return Program(
        np.where(finite, -_wider(np.where(finite, -lower, 0)), lower),
        np.where(np.isfinite(upper), _wider(np.where(np.isfinite(upper), upper, 0)), upper),
        scipy.sparse.vstack([scipy.sparse.csr_array((0, count)), *equations], format="csr"),
        np.concatenate([np.zeros(0), *right]),
        scipy.sparse.vstack([scipy.sparse.csr_array((0, count)), *lines], format="csr"),
        np.concatenate([np.zeros(0), *limits]),
        np.concatenate([np.zeros((0, 2), dtype=np.int64), *relus]),
        size,
        numbers[graph.output],
    )


def with_cuts(program: Program, output: int, directions: FloatArray, reach: FloatArray) -> Program:
    """The program with output number ``output`` <= 0 and direction . input <= reach for every cut.

    Args:
        directions: (S, inputs), and reach (S,).
    """
    upper = program.upper.copy()
    upper[program.outputs[output]] = SLACK
    scale = np.abs(directions).max(1, initial=1e-300)
    rows = scipy.sparse.csr_array(directions / scale[:, None])
    rows.resize((len(directions), len(upper)))
    return Program(
        program.lower,
        upper,
        program.equations,
        program.right,
        scipy.sparse.vstack([program.inequalities, rows], format="csr"),
        np.concatenate([program.limits, _wider(reach / scale)]),
        program.relus,
        program.inputs,
        program.outputs,
    )


def _wider(values: FloatArray) -> FloatArray:
    return np.asarray(values + SLACK * (1 + np.abs(values)), dtype=np.float64)


def _embed(own: Any, parts: list[tuple[Any, Any]], count: int) -> Any:
    """Rows of: sum of matrix @ v[sources] - v[own]."""
    total = -scipy.sparse.csr_array((np.ones(len(own)), (np.arange(len(own)), own)), (len(own), count))
    for sources, matrix in parts:
        spread = matrix.tocoo()
        total = total + scipy.sparse.csr_array((spread.data, (spread.row, sources[spread.col])), (len(own), count))
    return total.tocsr()


def _arrays(name: str, matrix: Any) -> dict[str, Any]:
    return {f"{name}_data": matrix.data, f"{name}_columns": matrix.indices, f"{name}_starts": matrix.indptr}


MOST_CUTS = 256  # from hidden neurons, at the start
MIXTURES = 40  # steps towards the nearest value of an image
CLOSE = 1e-3  # of the squared distance: a direction that good is a cut
VIOLATED = 1e-6  # relative


@dataclass(frozen=True, eq=False)
class Refinement:
    """What a point that is no value of an image teaches: whether there is a new cut, and images near the point."""

    cut: bool
    images: Tensor  # (k, C, H, W), in the ball


class ReducedQuestion:
    """Is there a z within the cuts whose margin f_label - f_t is <= 0? One question for each t.

    Args:
        ball: one ball with l1 ground cost, float64; with positivity or without it.
    """

    def __init__(self, parts: Parts, ball: Ball, label: int) -> None:
        self.weight, self.bias = parts.weight, parts.bias
        self.ball, self.image = ball, ball.images[0]
        self.valid = Threat(ball.threat.ground).ball(ball.images, ball.budget)  # where counterexamples are
        self.graph = append_rows(parts.tail, margin_rows(parts.classes, label))
        self.middle = self.weight @ self.image.flatten() + self.bias
        self._intervals: dict[str, Interval] = {}
        self._directions = [torch.zeros(0, len(self.bias), dtype=torch.float64)]
        self._bound_values(self._of_images(parts))
        identity = torch.eye(parts.classes - 1, dtype=torch.float64)
        rows, least = self._below(self.graph.output, -identity, self._intervals)
        reach = self.reach(rows)
        self.margins = -(reach + least)  # CROWN's lower bounds, (classes - 1,)
        shared = torch.cat(self._directions)
        reached = self.reach(shared)
        self.cuts = [
            (torch.cat([shared, rows[k, None]]), torch.cat([reached, reach[k, None]])) for k in range(len(rows))
        ]

    def reach(self, directions: Tensor) -> Tensor:
        """h(a) for rows a, (S, inputs) -> (S,)."""
        return directions @ self.middle + self._excess(directions @ self.weight)

    def program(self, target: int) -> Program:
        """The question about the margin at position ``target``, with all cuts found for it so far."""
        directions, reach = self.cuts[target]
        return with_cuts(self._program, target, directions.numpy(), reach.numpy())

    def refine(self, target: int, point: FloatArray) -> Refinement:
        """Adds the cuts that a counterexample (inputs,) violates: along its gradient, and towards the images."""
        wanted = torch.from_numpy(point)
        value = wanted.reshape(1, *self.graph.input_shape).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.graph(value)[0, target], value)
        vertex = self._furthest(-gradient.flatten())
        direction, nearest = self._nearest(wanted, vertex)
        directions = torch.stack([-gradient.flatten(), direction])
        reach = self.reach(directions)
        new = directions @ wanted > reach + VIOLATED * (1 + reach.abs())
        old, limits = self.cuts[target]
        self.cuts[target] = torch.cat([old, directions[new]]), torch.cat([limits, reach[new]])
        return Refinement(bool(new.any()), torch.stack([vertex, nearest]))

    def _excess(self, rows: Tensor) -> Tensor:
        """The maximum of c . (nu - image) over the ball for rows c over pixels, (S, pixels) -> (S,)."""
        return self.ball.support(rows.reshape(-1, *self.image.shape)).excess[0]

    def _of_images(self, parts: Parts) -> dict[str, Interval]:
        """Lifted bounds over the ball of what ReLUs behind the first layer read: its budget is shared there."""
        first = nn.Linear(parts.weight.shape[1], len(parts.bias), dtype=torch.float64)
        first.weight.data, first.bias.data = parts.weight, parts.bias
        size = (len(parts.bias),)
        nodes = [
            Node(f"{INPUT}-pixels", nn.Flatten(), (INPUT,), (parts.weight.shape[1],)),
            Node(f"{INPUT}-flat", first, (f"{INPUT}-pixels",), size),
            Node(f"{INPUT}-values", Reshape(self.graph.input_shape), (f"{INPUT}-flat",), self.graph.input_shape),
        ]
        behind = [
            replace(node, inputs=tuple(f"{INPUT}-values" if name == INPUT else name for name in node.inputs))
            for node in copy.deepcopy(parts.tail).nodes
        ]
        network = Network(self.image.shape, [*nodes, *behind])
        bounds = MarginBounds(network, self.ball.threat, "lifted", dtype=torch.float64)
        found = zip(network.activations, bounds.neurons(self.ball), strict=True)
        return {activation.inputs[0]: interval for activation, interval in found}

    def _bound_values(self, known: Mapping[str, Interval]) -> None:
        """Intervals of all that ReLUs read: exact for the input, behind it the tighter of these and of two methods."""
        up, down = self._excess(self.weight), self._excess(-self.weight)
        shape = (1, *self.graph.input_shape)
        values: dict[str, Interval] = {INPUT: ((self.middle - down).reshape(shape), (self.middle + up).reshape(shape))}
        for node in self.graph.nodes:
            values[node.name] = propagate(node.operation, [values[name] for name in node.inputs])
            if any(isinstance(reader.operation, nn.ReLU) for reader in self.graph.consumers(node.name)):
                if node.name in known:
                    values[node.name] = intersect(values[node.name], known[node.name])
                values[node.name] = self._tighten(node.name, values)
        read = {node.inputs[0] for node in self.graph.nodes if isinstance(node.operation, nn.ReLU)}
        self._intervals = {name: values[name] for name in (INPUT, *sorted(read - {INPUT}))}
        self._program = write_program(self.graph, self._intervals)

    def _tighten(self, name: str, values: dict[str, Interval]) -> Interval:
        lower, upper = (bound.flatten().clone() for bound in values[name])
        chosen = crosses_zero(values[name]).flatten().nonzero().flatten()
        if not chosen.numel():
            return values[name]
        identity = torch.zeros(len(chosen), len(lower), dtype=torch.float64)
        identity[torch.arange(len(chosen)), chosen] = 1
        low_rows, low = self._below(name, -identity, values)
        high_rows, high = self._below(name, identity, values)
        found = -(self.reach(low_rows) + low), self.reach(high_rows) + high
        lower[chosen], upper[chosen] = intersect(found, (lower[chosen], upper[chosen]))
        room = MOST_CUTS - sum(map(len, self._directions))
        open_ = (lower[chosen] < 0) & (upper[chosen] > 0)
        self._directions.append(torch.stack([low_rows[open_], high_rows[open_]], 1).flatten(0, 1)[: max(room, 0)])
        shape = values[name][0].shape
        return lower.reshape(shape), upper.reshape(shape)

    @torch.no_grad()
    def _below(self, name: str, rows: Tensor, intervals: dict[str, Interval]) -> tuple[Tensor, Tensor]:
        """Directions (S, inputs) and constants (S,) of functions of z that are nowhere less than rows of a value."""
        shaped = rows.reshape(1, len(rows), *self.graph.shape(name))
        found, constant = pull_back(self.graph, name, shaped, intervals)
        return found[INPUT][0].flatten(1), constant[0]

    def _furthest(self, direction: Tensor) -> Tensor:
        """The image of the ball with positivity whose value is furthest along a direction."""
        rows = (direction @ self.weight).reshape(1, *self.image.shape)
        found = self.valid.support(rows, maximiser=True).maximiser
        assert found is not None
        return found[0, 0]

    def _nearest(self, wanted: Tensor, vertex: Tensor) -> tuple[Tensor, Tensor]:
        """The direction from the nearest value of an image to a point, and that image.

        Frank-Wolfe, fully corrective: the best mixture of all images found, then the image furthest along the rest.
        """
        images = torch.stack([self.image, vertex])
        for _ in range(MIXTURES):
            points = images.flatten(1) @ self.weight.T + self.bias
            weights = _mixture(points.numpy(), wanted.numpy())
            rest = wanted - weights @ points
            nearest = torch.einsum("k,kchw->chw", weights, images)
            used = images[weights > 0]
            further = self._furthest(rest)
            gain = rest @ (self.weight @ (further - nearest).flatten())
            if gain <= CLOSE * rest @ rest:
                break
            images = torch.cat([used, further[None]])
        return rest, nearest


def _mixture(points: FloatArray, wanted: FloatArray) -> Tensor:
    """Weights w >= 0 of sum 1 with ||w @ points - wanted|| least."""
    scale = 1e3 * max(1.0, float(np.abs(points).max()))  # holds the sum near 1
    matrix = np.vstack([points.T, np.full((1, len(points)), scale)])
    try:
        weights = torch.from_numpy(nnls(matrix, np.append(wanted, scale), maxiter=100 * len(points))[0])
    except RuntimeError as error:
        raise SolverError(f"nonnegative least squares: {error}") from error
    return weights / weights.sum()
