"""Properties: a box on the inputs, perhaps linear constraints on them, and what outputs would be unsafe.

A property asks for a counterexample: "unsat" means that the label holds everywhere in the ball.

Properties are written as VNN-LIB 1.0, in the dialect that all its readers share, or as VNN-LIB 2.0. The shared dialect:
one statement a line, comments on lines of their own, plain decimals, coefficients of 1 and -1 as ``(+ X_0 (- X_3))``,
one pair of bounds a variable, ``(assert (or (and ...) (and ...)))`` for what is unsafe.

An L1 ball around 0, which a VNN-LIB file cannot say, goes into the configuration of alpha-beta-CROWN. It reads a box
from VNN-LIB, and with ``norm: 1`` beside such a file it takes the ball for one of radius 0 and proves everything. Only
data from a loader of one's own come with a radius; hence the few lines of Python.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flowverify.errors import UnknownNameError
from flowverify.export.encodings import ExportedNetwork, FloatArray, decimal, round_up, scalar_up
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


VERSIONS = ("1.0", "2.0")


def write_property(prop: Property, comments: Sequence[str], version: str = "1.0") -> str:
    """The text of a file.

    Raises:
        UnknownNameError: another version than "1.0" and "2.0".
    """
    if version not in VERSIONS:
        raise UnknownNameError("VNN-LIB version", version, VERSIONS)
    inputs = len(prop.lower)
    lines = [f"; {line}" for line in comments]
    if version == "1.0":
        lines += [f"(declare-const X_{k} Real)" for k in range(inputs)]
        lines += [f"(declare-const Y_{k} Real)" for k in range(prop.outputs)]
    else:
        lines += [
            "(vnnlib-version <2.0>)",
            "(declare-network f",
            f"  (declare-input X float32 [1,{inputs}])",
            f"  (declare-output Y float32 [1,{prop.outputs}])",
            ")",
        ]
    names = {kind: f"{kind}_%d" if version == "1.0" else f"{kind}[0,%d]" for kind in ("X", "Y")}
    for k, (low, high) in enumerate(zip(prop.lower.tolist(), prop.upper.tolist(), strict=True)):
        name = names["X"] % k
        lines.append(f"(assert (>= {name} {decimal(low)}))")
        lines.append(f"(assert (<= {name} {decimal(high)}))")
    lines += [f"(assert {_comparison(one, names)})" for one in prop.constraints]
    if len(prop.unsafe) == 1:  # a disjunction of one is more than some readers take
        lines += [f"(assert {_comparison(one, names)})" for one in prop.unsafe[0]]
    else:
        cases = (f"(and {' '.join(_comparison(one, names) for one in case)})" for case in prop.unsafe)
        lines.append(f"(assert (or {' '.join(cases)}))")
    return "\n".join(lines) + "\n"


def _comparison(one: Comparison, names: dict[str, str]) -> str:
    name = names[one.variable]
    plus, minus = [name % k for k in one.plus], [name % k for k in one.minus]
    if len(plus) == 1 and len(minus) == 1 and one.bound == 0:
        return f"({one.relation} {plus[0]} {minus[0]})"
    terms = [*plus, *(f"(- {text})" for text in minus)]
    left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
    return f"({one.relation} {left} {decimal(one.bound)})"


LOADER = "origin.py"

LOADER_TEXT = '''"""For alpha-beta-CROWN: the data of an l1-penalty property, the origin with a radius around it."""

import torch


def origin(spec, inputs):
    """One point, 0 in every flow; the ball is {X : ||X||_1 <= epsilon}."""
    return {
        "X": torch.zeros(1, inputs),
        "labels": torch.zeros(1, dtype=torch.int64),
        "eps": float(spec["epsilon"]),
        "norm": 1.0,
    }
'''


def configuration(prop: Property, onnx: str, budget: float, timeout: float) -> str:
    """The text of a YAML file: every output is to be positive over the L1 ball of radius ``budget``.

    Args:
        onnx: the path of the network, relative to the file.
    """
    inputs = len(prop.lower)
    loader = json.dumps(f'Customized("{LOADER}", "origin", inputs={inputs})')
    return f"""\
# alpha-beta-CROWN: run `abcrown.py --config` with this file, in its own folder.
# safe: every image of the ball is classified right. Do not add the .vnnlib: its box is larger than the ball.
general:
  device: cpu
  conv_mode: matrix
model:
  onnx_path: {json.dumps(onnx)}
  input_shape: [-1, {inputs}]
data:
  dataset: {loader}
  num_outputs: {prop.outputs}
  start: 0
  end: 1
specification:
  type: lp
  norm: 1.0
  epsilon: {decimal(budget)}
  robustness_type: all-positive
attack:
  pgd_order: skip
bab:
  timeout: {timeout:g}
"""
