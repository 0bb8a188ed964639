"""From images and radii to the networks that they share and the properties that ask about them, and their texts.

A property is a box on the inputs, perhaps linear constraints on them, and what outputs would be unsafe. It asks for a
counterexample: "unsat" means that the label holds everywhere in the ball.

Properties are written as VNN-LIB 1.0, in the dialect that all its readers share, or as VNN-LIB 2.0. The shared dialect:
one statement a line, comments on lines of their own, plain decimals, coefficients of 1 and -1 as ``(+ X_0 (- X_3))``,
one pair of bounds a variable, ``(assert (or (and ...) (and ...)))`` for what is unsafe.

An L1 ball around 0, which a VNN-LIB file cannot say, goes into the configuration of alpha-beta-CROWN. It reads a box
from VNN-LIB, and with ``norm: 1`` beside such a file it takes the ball for one of radius 0 and proves everything. Only
data from a loader of one's own come with a radius; hence the few lines of Python.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowverify.ball import Threat, WassersteinBall
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.export.encodings import (
    Encoding,
    ExportedNetwork,
    FloatArray,
    FlowInputs,
    Parts,
    build,
    check_encoding,
    decimal,
    round_up,
    scalar_up,
    take_apart,
)
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.transport.distance import FLOAT32_MASS_TOLERANCE, channel_masses, check_measures
from flowverify.transport.references import flow_by_tree, make_reference

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

    def holds(self, values: FloatArray) -> bool:
        """Whether variables of these values fulfil it; the sum's sign is that of exact arithmetic."""
        terms = [*(float(values[k]) for k in self.plus), *(-float(values[k]) for k in self.minus), -self.bound]
        excess = math.fsum(terms)
        return excess >= 0 if self.relation == ">=" else excess <= 0


@dataclass(frozen=True, eq=False)
class Property:
    """Inputs with lower <= X <= upper and ``constraints``, such that every comparison of some conjunction holds."""

    lower: FloatArray
    upper: FloatArray
    constraints: tuple[Comparison, ...]
    unsafe: tuple[tuple[Comparison, ...], ...]
    outputs: int

    def holds(self, inputs: FloatArray, outputs: FloatArray) -> bool:
        """Whether these inputs, with these outputs of the network, are what the property asks for."""
        inside = bool(np.all((self.lower <= inputs) & (inputs <= self.upper)))
        values = {"X": inputs, "Y": outputs}
        return (
            inside
            and all(one.holds(values[one.variable]) for one in self.constraints)
            and any(all(one.holds(values[one.variable]) for one in case) for case in self.unsafe)
        )


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


NAMES = ("image", "uniform", "point:ROW,COLUMN", "FILE.npy")


def reference_pattern(name: str, grid: Grid) -> Tensor | None:
    """The pattern of mass 1 in every channel, float64 (C, H, W), that a name stands for; None for "image" and files.

    Raises:
        UnknownNameError: none of ``NAMES``.
        InvalidInputError: a pixel that is not on the grid.
    """
    ones = torch.ones(1, grid.channels, dtype=torch.float64)
    if name == "uniform":
        return make_reference("flat", grid, ones)[0]
    if match := re.fullmatch(r"point:([0-9]+),([0-9]+)", name):
        return make_reference("point", grid, ones, pixel=(int(match[1]), int(match[2])))[0]
    if name == "image" or name.endswith(".npy"):
        return None
    raise UnknownNameError("reference", name, NAMES)


def file_reference(path: str | Path, images: Tensor) -> Tensor:
    """The reference of a .npy file, (C, H, W) or (H, W), for images (B, C, H, W); float64 (C, H, W).

    Raises:
        InvalidInputError: the file cannot be read, or the reference has another shape, a value that is negative or
            not finite, or in some channel another mass than one of the images.
    """
    grid = Grid.of(images)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"reference {path}: cannot be read as a .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InvalidInputError(f"reference {path}: expected one array of numbers")
    reference = torch.from_numpy(array.astype(np.float64))
    if reference.ndim == 2:
        reference = reference[None]
    if tuple(reference.shape) != grid.image_shape:
        raise InvalidInputError(
            f"reference {path} of shape {tuple(array.shape)}: expected {grid.image_shape}, that of the images"
        )
    check_measures(reference, f"reference {path}")
    given, masses = channel_masses(reference[None]), channel_masses(images)
    wrong = ((given - masses).abs() > FLOAT32_MASS_TOLERANCE * masses.sum(1, keepdim=True)).any(1).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise InvalidInputError(
            f"reference {path} of mass {given[0].tolist()}: expected {masses[at].tolist()}, the mass of image {at} "
            f"of the {len(images)} given (the references uniform and point take the mass of each image)"
        )
    return reference


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        encoding: a name in :data:`flowverify.export.encodings.ENCODINGS`.
        radii: in pixels on normalised images, for the ground cost ``ground``.
        positivity: False leaves out R + A delta >= 0, for vanilla certification.
        reference: a name as in :data:`flowverify.export.plan.NAMES`. l1-penalty centres its inputs on the
            image, so that no reference makes a difference to it.
        penalty_weight: lambda of the penalty; None for one that is exact.

    Raises:
        InvalidInputError: no radius, or one that is not a finite number > 0; a weight that is negative.
        UnknownNameError: an unknown encoding or ground cost.
    """

    encoding: str
    radii: tuple[float, ...]
    positivity: bool = True
    reference: str = "image"
    ground: str = "l1"
    penalty_weight: float | None = None

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if not self.radii:
            raise InvalidInputError("radii: given none, expected at least one")
        for radius in self.radii:
            if WassersteinBall(radius, self.ground).radius <= 0:
                raise InvalidInputError(f"radius: given {radius!r}, expected a finite number > 0 (pixels)")
        weight = self.penalty_weight
        if weight is not None and not 0 <= weight < float("inf"):
            raise InvalidInputError(f"penalty weight: given {weight!r}, expected a finite number >= 0")

    @property
    def method(self) -> str:
        """The method of certification that an answer amounts to."""
        return "fine-tuned" if self.positivity else "vanilla"


@dataclass(frozen=True, eq=False)
class Instance:
    """One image at one radius."""

    position: int  # in the batch
    label: int
    radius: float
    budget: float  # eps, rounded up to float32
    centre: FloatArray
    property: Property


@dataclass(frozen=True, eq=False)
class Export:
    """One network, and the instances that share it."""

    name: str
    network: ExportedNetwork
    instances: list[Instance]


@dataclass(frozen=True, eq=False)
class _Placed:
    """An image with its reference and the flow between them."""

    position: int
    label: int
    image: Tensor  # (C, H, W)
    masses: Tensor  # (C,)
    pattern: Tensor  # (C, H, W): of mass 1 in every channel, or anything that the masses are not multiplied with
    reference: Tensor  # (C, H, W)
    flow: Tensor  # (edges,)
    error: float  # what delta_mu misses the image by, as a distance


def plan(network: Network, images: Tensor, labels: Tensor, request: Request) -> Iterator[Export]:
    """The exports of a batch of images (B, C, H, W), one network after the other.

    Images that share a reference pattern share a network; with the reference "image", and for l1-penalty, each has
    its own. Where outputs are margins, only images of one label share it.

    Raises:
        InvalidInputError: invalid images, labels or reference, or a ground cost that does not fit the images.
        FoldError, UnsupportedOperationError: the network cannot be exported.
    """
    encoding = check_encoding(request.encoding)
    images = Threat(request.ground).check(images, network.grid).detach().cpu().double()
    parts = take_apart(network)
    groups: dict[tuple[int, ...], list[_Placed]] = {}
    for one in _place(images, labels, encoding, request.reference):
        own = encoding.form == "delta" or request.reference == "image"
        key: tuple[int, ...] = (one.position,) if own else (-1, one.label) if encoding.per_label else (-1,)
        groups.setdefault(key, []).append(one)
    for key, members in groups.items():
        yield _export(network, parts, encoding, request, members, own=key[0] >= 0)


def _place(images: Tensor, labels: Tensor, encoding: Encoding, name: str) -> Iterator[_Placed]:
    grid = Grid.of(images)
    pattern = reference_pattern(name, grid)
    masses = channel_masses(images)
    given = file_reference(Path(name), images) if pattern is None and name != "image" else None
    for position, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        own = masses[position]
        if encoding.form == "delta" or name == "image":
            unit, reference = image, image
        else:
            shape = given if given is not None else pattern
            assert shape is not None
            total = shape.sum((-1, -2))
            unit = shape / torch.where(total > 0, total, 1.0)[:, None, None]
            reference = unit * own[:, None, None]
        if reference is image:
            flow, error = torch.zeros(grid.edges, dtype=torch.float64), 0.0
        else:
            flow = flow_by_tree(reference[None], image[None], grid)[0]
            missed = float((grid.apply(reference, flow) - image).abs().sum())
            error = missed * max(1, grid.diameter)
        yield _Placed(position, int(label), image, own, unit, reference, flow, error)


def _export(
    network: Network, parts: Parts, encoding: Encoding, request: Request, members: Sequence[_Placed], own: bool
) -> Export:
    grid, first = network.grid, members[0]
    asked = [(one, radius) for one in members for radius in request.radii]
    covers = [WassersteinBall(radius, request.ground).around(one.image).within(Threat("l1")) for one, radius in asked]
    budgets = [
        scalar_up(float(cover.budget) * (1 + 1e-12) + one.error) for (one, _), cover in zip(asked, covers, strict=True)
    ]
    several_masses = any(not torch.equal(one.masses, first.masses) for one in members)
    base = first.pattern if several_masses else first.reference
    plain = FlowInputs(grid, encoding.form, base)
    most = [plain.most_flow(one.flow, budget) for (one, _), budget in zip(asked, budgets, strict=True)]
    budget_input = encoding.penalised and encoding.form == "split" and len(set(most)) > 1
    inputs = FlowInputs(grid, encoding.form, base, several_masses, budget_input)
    centres = np.stack(
        [inputs.centre(one.flow, one.masses, budget) for (one, _), budget in zip(asked, budgets, strict=True)]
    )
    built = build(
        parts,
        inputs,
        encoding,
        request.positivity,
        centres,
        np.array(budgets),
        label=first.label if encoding.per_label else None,
        most_flow=most[0],
        penalty_weight=request.penalty_weight,
    )
    instances = [
        Instance(
            one.position,
            one.label,
            radius,
            budget,
            centre,
            make_property(built, one.label, centre, limit, budget, one.reference.flatten().numpy()),
        )
        for (one, radius), budget, limit, centre in zip(asked, budgets, most, centres, strict=True)
    ]
    label = f"_label{first.label}" if encoding.per_label and not own else ""
    name = f"image{first.position}" if own else "shared"
    return Export(name + label, built, instances)
