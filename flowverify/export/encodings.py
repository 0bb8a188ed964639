"""The encodings of one question, "is there a misclassified image in the ball?", who can answer each, and its networks.

With delta = delta_mu + p - q and eps = radius * mass the question is: are there p, q >= 0 with sum(p + q) <= eps
and R + A delta >= 0 such that f_t >= f_y for some t != y? (Framework paper 2021, Theorem 6; without the second
constraint, Theorem 3.) Verifiers differ in what they take besides a box on the inputs.

What is written is rounded to float32 towards one side, so that no constraint is tighter than the one that is meant.

The networks that are exported are folded over flows, with constraints as outputs or as a penalty where asked. Weights
are computed in float64 and rounded once, when the file is written. Constants of constraints are rounded outward
beforehand, and ``allowance`` covers the rounding of everything else: an unsafe set is never too small.

How far rounding of weights and moved mass can reach is bounded by propagating absolute values: |W v| <= |W| |v|, and
ReLU enlarges no difference. They hold for every input, whatever the pattern of active neurons.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network import INPUT, Add, Graph, Network, Node, Reshape, affine_rows, fold
from flowverify.network.lowering import lower

Form = Literal["split", "delta"]


@dataclass(frozen=True)
class Encoding:
    """One way of writing the question down.

    Attributes:
        form: the inputs of the network: "split" (p, q), or "delta" for tools with an L1 ball of their own.
        per_label: whether the outputs are margins of one label, so that a file serves that label only.
        penalised: whether constraints have become a penalty on the margins.
        reader: which verifier it is for, as the header of a property says.
    """

    name: str
    form: Form
    per_label: bool
    penalised: bool
    reader: str


ENCODINGS: dict[str, Encoding] = {
    "linear": Encoding(
        "linear",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "for Marabou, which decides it exactly. It has linear constraints on several INPUTS, and other readers "
            "misread it: the package vnnlib 0.0.1 drops terms without a word, alpha-beta-CROWN stops at an assertion. "
            "For other verifiers use the encoding outputs or penalty."
        ),
    ),
    "outputs": Encoding(
        "outputs",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "a box on the inputs, and constraints on outputs only: every reader parses it. A verifier must weigh "
            "several outputs in one conjunction to decide it; Marabou does."
        ),
    ),
    "penalty": Encoding(
        "penalty",
        "split",
        per_label=True,
        penalised=True,
        reader=(
            "a box on the inputs, and a sign for each output: for verifiers that know boxes only, such as "
            "alpha-beta-CROWN."
        ),
    ),
    "l1-penalty": Encoding(
        "l1-penalty",
        "delta",
        per_label=True,
        penalised=True,
        reader=(
            "for tools with an L1 ball of their own, such as alpha-beta-CROWN with `norm: 1`; use the configuration "
            "beside it. The box of this file alone is LARGER than the ball: unsat holds for the ball, sat may not."
        ),
    ),
}


def check_encoding(name: str) -> Encoding:
    """The encoding of this name, or UnknownNameError with the valid ones."""
    if name not in ENCODINGS:
        raise UnknownNameError("encoding", name, tuple(ENCODINGS))
    return ENCODINGS[name]


FloatArray = npt.NDArray[np.float64]


def round_up(values: FloatArray) -> FloatArray:
    """The least float32 numbers that are not below the given ones, as float64."""
    nearest = np.asarray(values, dtype=np.float64).astype(np.float32)
    raised = np.nextafter(nearest, np.float32(np.inf))
    return np.where(nearest.astype(np.float64) < values, raised, nearest).astype(np.float64)


def round_down(values: FloatArray) -> FloatArray:
    """The largest float32 numbers that are not above the given ones, as float64."""
    return -round_up(-np.asarray(values, dtype=np.float64))


def tensor_up(values: Tensor) -> Tensor:
    """:func:`round_up` for a tensor; the result is float64."""
    return torch.from_numpy(round_up(values.detach().cpu().double().numpy()))


def scalar_up(value: float) -> float:
    """:func:`round_up` for one number."""
    return float(round_up(np.array(value)))


def decimal(value: float) -> str:
    """A plain decimal that reads back as the same float64: no exponent, and always a point.

    Raises:
        ValueError: the number is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"given {value}, expected a finite number")
    return str(np.format_float_positional(value + 0.0, unique=True, trim="0"))


@dataclass(frozen=True, eq=False)
class FlowInputs:
    """image(X) = R + A delta, with delta = X_p - X_q ("split", 2d inputs) or delta = X ("delta", d inputs).

    In the split form the offset delta_mu stands in the box: X = (delta_mu+ + p, delta_mu- + q) with p, q >= 0.
    So one network serves every image of a reference, and sum(X) <= ||delta_mu||_1 + eps is the budget.

    What differs between the instances that share a network is an input that the box fixes, after the flows: the
    mass of each channel, where R = sum over c of mass_c * pattern_c; then the budget, where a penalty needs it.

    Attributes:
        reference: R, float64 (C, H, W); the pattern, of mass 1 in every channel, with ``mass_inputs``.
    """

    grid: Grid
    form: Form
    reference: Tensor
    mass_inputs: bool = False
    budget_input: bool = False

    @property
    def flows(self) -> int:
        """How many inputs are flows: d or 2d. They come first."""
        return self.grid.edges * (2 if self.form == "split" else 1)

    @property
    def size(self) -> int:
        return self.flows + (self.grid.channels if self.mass_inputs else 0) + self.budget_input

    @cached_property
    def matrix(self) -> scipy.sparse.csr_array:
        """J with image(X) = J X + offset; (pixels, size), float64."""
        incidence = self.grid.incidence_scipy()
        blocks = [incidence, -incidence] if self.form == "split" else [incidence]
        if self.mass_inputs:
            pattern = self.reference.reshape(self.grid.channels, -1).numpy()
            blocks.append(scipy.sparse.block_diag([part[:, None] for part in pattern]))
        if self.budget_input:
            blocks.append(scipy.sparse.csr_array((self.grid.pixels, 1)))
        return scipy.sparse.hstack(blocks, format="csr")

    @property
    def offset(self) -> Tensor:
        """The constant part of the image, float64 (C, H, W)."""
        return torch.zeros_like(self.reference) if self.mass_inputs else self.reference

    def rows(self, weight: Tensor) -> Tensor:
        """W J for rows W over pixels, (m, pixels) -> (m, size), without forming J."""
        images = weight.double().reshape(-1, *self.grid.image_shape)
        flows = self.grid.differences(images)
        parts = [flows, -flows] if self.form == "split" else [flows]
        if self.mass_inputs:
            parts.append((images * self.reference).sum((-1, -2)))
        if self.budget_input:
            parts.append(images.new_zeros(len(images), 1))
        return torch.cat(parts, 1)

    def image(self, values: FloatArray) -> Tensor:
        """The image (C, H, W), float64, of an input vector (size,); pixels may be negative.

        Raises:
            InvalidInputError: another length, or a value that is not finite.
        """
        if values.shape != (self.size,) or not np.isfinite(values).all():
            raise InvalidInputError(f"input vector of shape {values.shape}: expected {self.size} finite numbers")
        return torch.from_numpy(self.matrix @ values).reshape(self.grid.image_shape) + self.offset

    def centre(self, flow: Tensor, masses: Tensor, budget: float) -> FloatArray:
        """The input vector of the image itself, for its flow delta_mu (edges,), channel masses (C,), and eps."""
        flow = flow.double()
        parts = [flow.clamp(min=0), (-flow).clamp(min=0)] if self.form == "split" else [flow]
        if self.mass_inputs:
            parts.append(masses.double())
        if self.budget_input:
            parts.append(torch.tensor([self.most_flow(flow, budget)], dtype=torch.float64))
        return torch.cat(parts).numpy()

    def most_flow(self, flow: Tensor, budget: float) -> float:
        """||delta_mu||_1 + eps, the largest sum of the split inputs in the ball, rounded up to float32."""
        return scalar_up(float(flow.double().abs().sum()) + budget)

    def box(self, centre: FloatArray, budget: float) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bounds of X over the ball, float32 numbers rounded outward."""
        lower, upper = centre.copy(), centre.copy()
        upper[: self.flows] += budget
        if self.form == "delta":
            lower[: self.flows] -= budget
        return round_down(lower), round_up(upper)


_LAYERS = (nn.Linear, nn.Conv2d)


def largest_change(graph: Graph, change: Tensor) -> Tensor:
    """A bound on the change of every output, for a change of the input of at most ``change`` in every entry.

    Args:
        graph: of the operations of :func:`flowverify.network.lowering.lower`.
        change: (B, *input_shape), nonnegative.
    """
    absolute = copy.deepcopy(graph)
    for node in absolute.nodes:
        if isinstance(node.operation, _LAYERS):
            node.operation.weight.abs_()
            if node.operation.bias is not None:
                node.operation.bias.zero_()
    result: Tensor = absolute(change)
    return result


def rounding_change(graph: Graph, centres: Tensor, reach: Tensor, flows: int) -> Tensor:
    """How much the outputs change at most when the weights of ``graph`` are rounded to float32; (B, outputs).

    The bound is for all inputs X with sum over the first ``flows`` entries of |X - centre| <= reach, the other
    entries being those of the centre. In the first layers |dW X + db| <= |dW centre + db| + reach * max_k |dW_k|;
    behind them |W'v' - Wv| <= |W'| |v' - v| + |W' - W| |v|.

    Args:
        graph: float64, of the operations of :func:`~flowverify.network.lowering.lower`; only Linear reads the input.
        centres: (B, inputs) and reach (B,), one row for each ball.
    """
    change: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    for node in graph.nodes:
        operation, sources = node.operation, node.inputs
        if isinstance(operation, _LAYERS):
            rounded, step, absolute = (copy.deepcopy(operation) for _ in range(3))
            for exact, near, difference, positive in zip(
                operation.parameters(), rounded.parameters(), step.parameters(), absolute.parameters(), strict=True
            ):
                near.copy_(exact.float().double())
                difference.copy_(near - exact)
                positive.copy_(exact.abs())
            if sources == (INPUT,):
                change[node.name] = step(centres).abs() + reach[:, None] * step.weight[:, :flows].abs().amax(1)
                size[node.name] = operation(centres).abs() + reach[:, None] * absolute.weight[:, :flows].amax(1)
                continue
            for layer in (rounded, step):
                for parameter in layer.parameters():
                    parameter.abs_()
            shift = rounded(torch.zeros_like(change[sources[0]]))
            change[node.name] = rounded(change[sources[0]]) - shift + step(size[sources[0]])
            size[node.name] = absolute(size[sources[0]])
        elif isinstance(operation, Add):
            change[node.name] = operation(*(change[name] for name in sources))
            size[node.name] = operation(*(size[name] for name in sources))
        else:
            change[node.name] = operation(change[sources[0]])
            size[node.name] = operation(size[sources[0]])
    return change[graph.output]


SLACK = 1e-3  # relative: what float64 arithmetic itself may add to a bound on rounding


@dataclass(frozen=True, eq=False)
class Parts:
    """A network taken apart once: f(x) = tail(W x + b)."""

    weight: Tensor  # (m, pixels), float64
    bias: Tensor  # (m,)
    tail: Graph  # from (m's shape) to the logits, lowered
    classes: int


@dataclass(frozen=True, eq=False)
class ExportedNetwork:
    """A graph over :class:`FlowInputs`, ready to be written, and what its outputs mean.

    The outputs are, for the encoding
        linear: the logits;
        outputs: the logits; the logits plus ``allowance``; sum of the flows; without ``positivity`` nothing more,
            with it the pixels R + A delta;
        penalty, l1-penalty: for each t != label in ascending order f_label - f_t - allowance + the penalty.
    """

    graph: Graph
    inputs: FlowInputs
    encoding: Encoding
    positivity: bool
    classes: int
    label: int | None
    allowance: float
    penalty_weight: float | None

    @property
    def targets(self) -> list[int]:
        return [t for t in range(self.classes) if t != self.label]


def take_apart(network: Network) -> Parts:
    """The folded first layer as rows over pixels, and the rest in operations that all verifiers read.

    Raises:
        FoldError, UnsupportedOperationError: as :func:`flowverify.network.fold` and
            :func:`flowverify.network.lowering.lower`.
    """
    folded = fold(network, "dense")
    weight, bias = affine_rows(folded.prefix, folded.prefix.output)
    return Parts(weight, bias, lower(folded.remainder).graph, network.num_classes)


def build(
    parts: Parts,
    inputs: FlowInputs,
    encoding: Encoding,
    positivity: bool,
    centres: FloatArray,  # (B, inputs.size): the balls that this network is to serve
    budgets: FloatArray,  # (B,)
    *,
    label: int | None = None,
    most_flow: float | None = None,
    penalty_weight: float | None = None,
) -> ExportedNetwork:
    """The network of an encoding for all the given balls.

    Args:
        positivity: False for the vanilla version.
        label: for encodings whose outputs are margins.
        most_flow: ||delta_mu||_1 + eps, for "penalty" without an input for it.
        penalty_weight: lambda; by default :func:`exact_penalty_weight`.
    """
    classes = parts.classes
    if encoding.per_label:
        assert label is not None
        rows = margin_rows(classes, label)
    else:
        rows = torch.eye(classes, dtype=torch.float64)
    tail = append_rows(parts.tail, rows)
    if encoding.penalised and penalty_weight is None:
        penalty_weight = exact_penalty_weight(parts, inputs, tail)
    weight = None if penalty_weight is None or not encoding.penalised else scalar_up(penalty_weight)
    graph = first_and(parts, inputs, tail)
    error = rounding_change(graph, torch.from_numpy(centres), torch.from_numpy(budgets), inputs.flows).amax(0)
    allowance = scalar_up(float(error.max()) * (1 if encoding.per_label else 2) * (1 + SLACK))
    if encoding.name == "outputs":
        raised = append_rows(
            parts.tail, torch.cat([rows, rows]), torch.tensor([0.0, allowance]).repeat_interleave(classes)
        )
        graph = _with_constraint_outputs(first_and(parts, inputs, raised), inputs, positivity, 2 * classes)
    elif encoding.penalised:
        lowered = append_rows(parts.tail, rows, torch.full((classes - 1,), -allowance))
        graph = first_and(parts, inputs, lowered)
        graph = _with_penalty(graph, inputs, positivity, most_flow, weight)
    return ExportedNetwork(graph, inputs, encoding, positivity, classes, label, allowance, weight)


def exact_penalty_weight(parts: Parts, inputs: FlowInputs, margins: Graph) -> float:
    """A lambda from which on the penalty is exact.

    Claim. Let m be the margin f_y - f_t as a function of images, and L >= |m(nu) - m(nu')| / w whenever nu and nu'
    differ by mass w moved within a channel, from any pixels to any others. For inputs with flow delta = delta_mu + d
    let v = relu(||d||_1 - eps) + sum_i relu(-(mu + A d)_i), which no X with the flow d falls short of. Then some
    image nu'' of the ball has m(nu'') <= m(mu + A d) + L v. So min over X of m + lambda v is the minimum of m over
    the ball for every lambda >= L; for every lambda >= 0 it is no larger, as v = 0 in the ball (soundness).

    Proof. Let nu = mu + A d. Decompose d into paths that run with its signs: the norms add up, a path starts where
    nu < mu and ends where nu > mu. Pixel i sends off mu_i - nu_i. Where nu_i < 0, take back -nu_i of what it sends:
    pixel i ends at 0, and targets lose no more than these paths brought them, so they stay at mu_j >= 0 or above.
    The result nu' = mu + A d' is nonnegative, ||d'||_1 <= ||d||_1, and it differs from nu by N = sum_i relu(-nu_i) of
    moved mass: m(nu') <= m(nu) + L N. If ||d'||_1 <= eps it is in the ball. Otherwise put
    theta = eps / ||d'||_1 and nu'' = mu + theta A d' = (1 - theta) mu + theta nu' >= 0, which is in the ball. It
    differs from nu' by the flow (1 - theta) d' of norm ||d'||_1 - eps <= relu(||d||_1 - eps), and a flow of norm w
    moves mass w by one edge at a time: m(nu'') <= m(nu') + L relu(||d||_1 - eps). Together: L v.

    L is bounded by the oscillation of the first layer's rows within a channel, the most that a unit of moved mass
    changes a neuron, times absolute weights behind it.
    """
    planes = parts.weight.reshape(len(parts.weight), inputs.grid.channels, -1)
    oscillation = (planes.amax(-1) - planes.amin(-1)).amax(-1)
    change = largest_change(margins, oscillation.reshape(1, *margins.input_shape))
    return float(change.max()) * (1 + SLACK)


def append_rows(tail: Graph, rows: Tensor, shift: Tensor | None = None) -> Graph:
    """rows @ tail + shift, merged into the last layer where that is a Linear.

    A shift is rounded to float32 together with the layer's bias, away from 0 in its own direction.
    """
    nodes = list(tail.nodes)
    size = rows.shape[0]
    last = nodes[-1].operation if nodes else None
    layer = nn.Linear(rows.shape[1], size, dtype=torch.float64)
    if isinstance(last, nn.Linear):
        weight, bias = (
            rows @ last.weight,
            rows @ (last.bias if last.bias is not None else rows.new_zeros(rows.shape[1])),
        )
        layer = nn.Linear(last.in_features, size, dtype=torch.float64)
        nodes, source = nodes[:-1], nodes[-1].inputs
    else:
        weight, bias = rows, rows.new_zeros(size)
        source = (nodes[-1].name if nodes else INPUT,)
    if shift is not None:
        shift = shift.double()
        bias = torch.where(shift > 0, tensor_up(bias + shift), torch.where(shift < 0, -tensor_up(-bias - shift), bias))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return Graph(tail.input_shape, [*nodes, Node("outputs", layer, source, (size,))])


def margin_rows(classes: int, label: int) -> Tensor:
    """e_label - e_t for every t != label in ascending order, (classes - 1, classes)."""
    identity = torch.eye(classes, dtype=torch.float64)
    return identity[label] - identity[[t for t in range(classes) if t != label]]


def first_and(parts: Parts, inputs: FlowInputs, tail: Graph) -> Graph:
    """tail(W J X + (W R + b)) as a graph over X, in float64."""
    first = nn.Linear(inputs.size, len(parts.bias), dtype=torch.float64)
    bias = parts.bias + parts.weight @ inputs.offset.flatten()
    first.load_state_dict({"weight": inputs.rows(parts.weight), "bias": bias})
    flat, shape, rest = (len(parts.bias),), tail.input_shape, list(tail.nodes)
    nodes, values = [Node("flow_first", first, (INPUT,), flat)], {INPUT: "flow_first"}
    if len(shape) > 1:
        # ReLUs come before the values get their shape: alpha-beta-CROWN looks for a layer right before each.
        relus = [node for node in rest if node.inputs == (INPUT,) and isinstance(node.operation, nn.ReLU)]
        rest = [node for node in rest if node not in relus]
        nodes += [replace(node, inputs=("flow_first",), shape=flat) for node in relus]
        sources = {node.name: node.name for node in relus}
        if any(INPUT in node.inputs for node in rest):
            sources[INPUT] = "flow_first"
        values |= {name: f"flow_{name}" for name in sources}
        nodes += [Node(values[name], Reshape(shape), (source,), shape) for name, source in sources.items()]
    nodes += [replace(node, inputs=tuple(values.get(name, name) for name in node.inputs)) for node in rest]
    return Graph((inputs.size,), nodes)


def _pixel_rows(inputs: FlowInputs) -> tuple[Tensor, Tensor]:
    """J and R, of R + A delta >= 0, with the entries that are not whole numbers rounded up."""
    matrix = torch.from_numpy(inputs.matrix.toarray())
    return tensor_up(matrix), tensor_up(inputs.offset.flatten())


def _with_constraint_outputs(graph: Graph, inputs: FlowInputs, positivity: bool, plain: int) -> Graph:
    """The outputs, then the sum of the flows, then the pixels: one layer from the input, added to the last one."""
    total = torch.zeros(1, inputs.size, dtype=torch.float64)
    total[:, : inputs.flows] = 1
    matrix, offset = _pixel_rows(inputs) if positivity else (total[:0], total.new_zeros(0))
    extra = 1 + len(offset)
    rows = torch.cat([torch.eye(plain, dtype=torch.float64), torch.zeros(extra, plain, dtype=torch.float64)])
    graph = append_rows(graph, rows)
    values = nn.Linear(inputs.size, plain + extra, dtype=torch.float64)
    values.load_state_dict(
        {
            "weight": torch.cat([total.new_zeros(plain, inputs.size), total, matrix]),
            "bias": torch.cat([total.new_zeros(plain + 1), offset]),
        }
    )
    size = (plain + extra,)
    nodes = [
        *graph.nodes,
        Node("constraints", values, (INPUT,), size),
        Node("sum", Add(), ("outputs", "constraints"), size),
    ]
    return Graph(graph.input_shape, nodes)


def _with_penalty(
    graph: Graph, inputs: FlowInputs, positivity: bool, most_flow: float | None, weight: float | None
) -> Graph:
    """The outputs plus weight * [relu(sum(X) - most_flow) + sum_i relu(-(R + A delta)_i)]."""
    rows, shifts = [], []
    if inputs.form == "split":
        total = torch.zeros(1, inputs.size, dtype=torch.float64)
        total[:, : inputs.flows] = 1
        if inputs.budget_input:
            total[:, -1] = -1
        rows.append(total)
        shifts.append(torch.tensor([0.0 if inputs.budget_input else -float(most_flow or 0.0)], dtype=torch.float64))
    if positivity:
        matrix, offset = _pixel_rows(inputs)
        rows.append(-matrix)
        shifts.append(-offset)
    if not rows:
        return graph
    assert weight is not None
    violation, bias = torch.cat(rows), torch.cat(shifts)
    layer = nn.Linear(inputs.size, len(bias), dtype=torch.float64)
    layer.load_state_dict({"weight": violation, "bias": bias})
    outputs = graph.output_shape[0]
    scale = nn.Linear(len(bias), outputs, bias=False, dtype=torch.float64)
    scale.load_state_dict({"weight": torch.full((outputs, len(bias)), weight, dtype=torch.float64)})
    nodes = [
        *graph.nodes,
        Node("violation", layer, (INPUT,), (len(bias),)),
        Node("violated", nn.ReLU(), ("violation",), (len(bias),)),
        Node("penalty", scale, ("violated",), (outputs,)),
        Node("sum", Add(), ("outputs", "penalty"), (outputs,)),
    ]
    return Graph(graph.input_shape, nodes)


def penalty_terms(inputs: FlowInputs, values: FloatArray, most_flow: float, positivity: bool) -> float:
    """v of :func:`exact_penalty_weight` at an input vector, for tests and messages."""
    image = inputs.image(values).numpy()
    excess = max(0.0, float(values[: inputs.flows].sum()) - most_flow) if inputs.form == "split" else 0.0
    return excess + (float(np.maximum(-image, 0).sum()) if positivity else 0.0)
