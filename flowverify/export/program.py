"""A lowered graph as a program of linear equations, inequalities and ReLUs over numbered variables, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import nn

from flowverify.bounds.intervals import Interval
from flowverify.bounds.relaxations import crosses_zero, relax
from flowverify.export.rounding import FloatArray
from flowverify.network import INPUT, Add, Graph
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
