"""Properties: a box on the inputs, perhaps linear constraints on them, and what outputs would be unsafe.

A property asks for a counterexample: "unsat" means that the label holds everywhere in the ball.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flowverify.export.networks import ExportedNetwork
from flowverify.export.rounding import FloatArray, round_up, scalar_up
from flowverify.grid import Grid

Relation = Literal["<=", ">="]
Variable = Literal["X", "Y"]


@dataclass(frozen=True)
class Comparison:
    """Sum of signed variables, in relation to a constant, or to one further variable of the same kind.

    ``plus`` and ``minus`` hold positions of variables with the coefficients 1 and -1.
    """

    variable: Variable
    plus: tuple[int, ...]
    minus: tuple[int, ...]
    relation: Relation
    bound: float


@dataclass(frozen=True, eq=False)
class Property:
    """Inputs with lower <= X <= upper and ``constraints``, such that every comparison of some conjunction holds."""

    lower: FloatArray
    upper: FloatArray
    constraints: tuple[Comparison, ...]
    unsafe: tuple[tuple[Comparison, ...], ...]
    outputs: int


def make_property(
    network: ExportedNetwork, label: int, centre: FloatArray, most_flow: float, budget: float, reference: FloatArray
) -> Property:
    """The property of one image and radius.

    Args:
        centre: the inputs that stand for the image, (inputs.size,).
        most_flow: ||delta_mu||_1 + eps; ``budget``: eps.
        reference: R (pixels,), of the image's own mass.
    """
    inputs, classes = network.inputs, network.classes
    lower, upper = inputs.box(centre, budget)
    targets = [t for t in range(classes) if t != label]
    outputs = network.graph.output_shape[0]
    flows = tuple(range(inputs.flows))
    limit = scalar_up(most_flow)
    if network.encoding.penalised:
        signs = tuple((Comparison("Y", (k,), (), "<=", 0.0),) for k in range(classes - 1))
        return Property(lower, upper, (), signs, outputs)
    if network.encoding.name == "linear":
        constraints = [Comparison("X", flows, (), "<=", limit)]
        if network.positivity:
            constraints += _pixels(inputs.grid, reference)
        larger = tuple((Comparison("Y", (t,), (label,), ">=", -network.allowance),) for t in targets)
        return Property(lower, upper, tuple(constraints), larger, outputs)
    inside = [Comparison("Y", (2 * classes,), (), "<=", limit)]
    inside += [Comparison("Y", (k,), (), ">=", 0.0) for k in range(2 * classes + 1, outputs)]
    unsafe = tuple((Comparison("Y", (classes + t,), (label,), ">=", 0.0), *inside) for t in targets)
    return Property(lower, upper, (), unsafe, outputs)


def by_a_gap(prop: Property, gap: float) -> Property:
    """The property with outputs that are unsafe by ``gap`` at least: its counterexamples stand replaying better.

    That there are none proves nothing.
    """
    cases = []
    for first, *others in prop.unsafe:
        cases.append((replace(first, bound=gap if first.relation == ">=" else -gap), *others))
    return replace(prop, unsafe=tuple(cases))


def _pixels(grid: Grid, reference: FloatArray) -> list[Comparison]:
    """(A (X_p - X_q))_i >= -R_i for every pixel, with R_i rounded up."""
    matrix = grid.incidence_scipy()
    bounds = -round_up(reference)
    result = []
    for pixel in range(grid.pixels):
        part = slice(matrix.indptr[pixel], matrix.indptr[pixel + 1])
        edges, signs = matrix.indices[part], matrix.data[part]
        order = np.argsort(edges)
        into = tuple(int(edge) for edge in edges[order][signs[order] > 0])
        out = tuple(int(edge) for edge in edges[order][signs[order] < 0])
        plus = into + tuple(edge + grid.edges for edge in out)
        minus = out + tuple(edge + grid.edges for edge in into)
        if plus:
            result.append(Comparison("X", plus, minus, ">=", float(bounds[pixel])))
    return result
