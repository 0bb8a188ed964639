"""What files of scikit-learn have beside the usual operators: those of the domain ``ai.onnx.ml``, and patterns.

Patterns become one operator, of the same values:

- 1 / (1 + exp(-x)) is Sigmoid(x).
- 1 - sigmoid(x) beside sigmoid(x) is the sigmoid of -x beside x: what two classes are answered with.
- Scores of several classes one against the rest, p / sum(p) with a uniform answer where the sum is 0: LpNormalization
  of p, of order 1. For p >= 0 they differ where all are 0 alone, and there both answers are ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import compositions as compose
from flowverify.network.builder import Builder, Value
from flowverify.network.onnx_operators import Attributes, Handler, refused

Nodes = list[onnx.NodeProto]


@dataclass(frozen=True)
class _Graph:
    made_by: Mapping[str, onnx.NodeProto]
    constants: Mapping[str, Any]

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a value, if it is of one of these kinds."""
        node = self.made_by.get(name)
        return node if node is not None and node.domain in ("", "ai.onnx") and node.op_type in kinds else None

    def number(self, name: str) -> float | None:
        """A constant of one entry that leaves shapes as they are."""
        found = self.constants.get(name)
        plain = found is not None and np.size(found) == 1 and np.ndim(found) <= 1
        return float(np.asarray(found).reshape(())) if plain else None

    def beside(self, node: onnx.NodeProto, number: float) -> str | None:
        """The other operand of a node of two, one of which is this number."""
        first, second = map(str, node.input)
        if self.number(second) == number:
            return first
        return second if self.number(first) == number else None


def rewritten(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any]) -> Nodes:
    """The same nodes, in their order, with these patterns as one operator; nodes that nothing reads any more stay.

    Args:
        nodes: in an order in which values are made before they are read.
        constants: arrays by their names.
    """
    made = list(nodes)
    for pattern in (_sigmoid, _both_classes, _share):
        graph = _Graph({name: node for node in made for name in node.output if name}, constants)
        made = [new for node in made for new in _replaced(pattern, node, graph)]
    return made


def _replaced(pattern: Callable[[onnx.NodeProto, _Graph], Nodes | None], node: onnx.NodeProto, graph: _Graph) -> Nodes:
    found = pattern(node, graph) if node.domain in ("", "ai.onnx") else None
    return [node] if found is None else found


def _sigmoid(node: onnx.NodeProto, graph: _Graph) -> Nodes | None:
    inverse = node.op_type == "Reciprocal" or (node.op_type == "Div" and graph.number(node.input[0]) == 1)
    total = graph.maker(node.input[-1], "Add") if inverse else None
    power = graph.maker(graph.beside(total, 1) or "", "Exp") if total is not None else None
    turned = graph.maker(power.input[0], "Mul", "Neg") if power is not None else None
    if turned is None:
        return None
    value = turned.input[0] if turned.op_type == "Neg" else graph.beside(turned, -1)
    return None if value is None else [onnx.helper.make_node("Sigmoid", [value], list(node.output), name=node.name)]


def _both_classes(node: onnx.NodeProto, graph: _Graph) -> Nodes | None:
    if node.op_type != "Concat" or len(node.input) != 2:
        return None
    rest, own = graph.maker(node.input[0], "Sub"), graph.maker(node.input[1], "Sigmoid")
    if rest is None or own is None or graph.number(rest.input[0]) != 1 or rest.input[1] != own.output[0]:
        return None
    name = node.output[0]
    turned, pair = f"{name}_turned", f"{name}_pair"
    both = onnx.helper.make_node("Concat", [turned, own.input[0]], [pair], name=pair)
    both.attribute.extend(node.attribute)
    return [
        onnx.helper.make_node("Neg", [own.input[0]], [turned], name=turned),
        both,
        onnx.helper.make_node("Sigmoid", [pair], [name], name=node.name),
    ]


def _share(node: onnx.NodeProto, graph: _Graph) -> Nodes | None:
    """(p + e) / (s + k e) with s = sum(p) and e = 1 where s is 0, else 0."""
    above, below = (graph.maker(name, "Add") for name in node.input) if node.op_type == "Div" else (None, None)
    if above is None or below is None:
        return None
    value, empty = above.input
    total, mask = below.input
    summed, scaled = graph.maker(total, "ReduceSum"), graph.maker(mask, "Mul")
    if summed is None or scaled is None or summed.input[0] != value or scaled.input[0] != empty:
        return None
    steps, name = [], empty
    for kind in ("Cast", "Not", "Cast"):
        step = graph.maker(name, kind)
        if step is None:
            return None
        steps.append(step)
        name = step.input[0]
    first = next((entry.i for entry in steps[2].attribute if entry.name == "to"), 0)
    keeps = next((one.i for one in summed.attribute if one.name == "keepdims"), 1)
    axis = _axis_of(summed, graph)
    if name != total or first != onnx.TensorProto.BOOL or axis is None or not keeps or not _nonnegative(value, graph):
        return None
    return [onnx.helper.make_node("LpNormalization", [value], list(node.output), name=node.name, axis=axis, p=1)]


def _nonnegative(name: str, graph: _Graph) -> bool:
    """Whether a value is a sigmoid, or (a clipped value + shift) / divisor that is known to be at least 0."""
    if graph.maker(name, "Sigmoid") is not None:
        return True
    scaled = graph.maker(name, "Div")
    shifted = graph.maker(scaled.input[0], "Add") if scaled is not None else None
    clipped = next((one for one in map(graph.made_by.get, shifted.input) if one is not None), None) if shifted else None
    if scaled is None or shifted is None or clipped is None or clipped.op_type != "Clip" or len(clipped.input) < 2:
        return False
    divisor, least = graph.number(scaled.input[1]), graph.number(clipped.input[1])
    shift = next((graph.number(one) for one in shifted.input if one != clipped.output[0]), None)
    return divisor is not None and divisor > 0 and least is not None and shift is not None and least + shift >= 0


def _axis_of(node: onnx.NodeProto, graph: _Graph) -> int | None:
    """The one axis of a reduction."""
    given = next((list(entry.ints) for entry in node.attribute if entry.name == "axes"), None)
    if given is None and len(node.input) > 1 and node.input[1] in graph.constants:
        given = [int(axis) for axis in np.asarray(graph.constants[node.input[1]]).reshape(-1)]
    return given[0] if given is not None and len(given) == 1 else None


DOMAIN = "ai.onnx.ml"
TRANSFORM = "post_transform"
LOGITS = "logits"  # the name under which the handler finds whether its transform is dropped
TRANSFORMS = {b"NONE": None, b"SOFTMAX": "Softmax", b"LOGISTIC": "Sigmoid"}


def _numbers(attributes: Attributes, name: str) -> Tensor:
    """A list of numbers, which files hold in float32."""
    return torch.tensor(attributes.pop(name, []), dtype=torch.float32)


def _classified(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> list[Any]:
    """LinearClassifier: x W^T + b, then its transform; the first result, the class itself, is not computed.

    One row of weights for two classes is the logit s of the second one. With LOGISTIC the answer is 1 - sigmoid(s)
    beside sigmoid(s), the sigmoids of -s and s.
    """
    value: Value = inputs[0]
    names = attributes.pop("classlabels_ints", []) or attributes.pop("classlabels_strings", [])
    coefficients, bias = _numbers(attributes, "coefficients"), _numbers(attributes, "intercepts")
    attributes.pop("multi_class", 0)  # which of the ways to many classes made the weights
    transform, dropped = attributes.pop(TRANSFORM, b"NONE"), attributes.pop(LOGITS, False)
    rows = len(bias) or len(names)
    if value.rank != 1 or not rows or coefficients.numel() != rows * value.shape[0]:
        raise InvalidInputError(
            f"{coefficients.numel()} coefficients in {rows} rows: expected {rows} x {value.shape[-1]} for samples of "
            f"shape {value.shape}"
        )
    if transform not in TRANSFORMS:
        raise UnsupportedOperationError(
            f"{TRANSFORM} {transform.decode()!r} is not supported: expected NONE, SOFTMAX or LOGISTIC"
        )
    if len(names) != max(rows, 2):
        raise InvalidInputError(f"{rows} rows of coefficients: expected as many as classes, {len(names)}")
    weight = coefficients.reshape(rows, -1)
    if rows == 1:
        if TRANSFORMS[transform] != "Sigmoid":
            raise UnsupportedOperationError(
                f"one row of coefficients with {TRANSFORM} {transform.decode()!r} is not supported: 1 - s and s are in "
                "another order than the class, by the sign of s; expected LOGISTIC, or two rows"
            )
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    logits = builder.linear(value, weight, bias if len(bias) else None, label)
    return [None, _transformed(builder, logits, None if dropped else TRANSFORMS[transform], label)]


def _transformed(builder: Builder, value: Value, transform: str | None, label: str) -> Value:
    if transform == "Softmax":
        return compose.softmax(builder, value, 0, label)
    return value if transform is None else builder.add(nn.Sigmoid(), [value], label)


def _scaled(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """Scaler: (x - offset) * scale, one number for all features or one each."""
    value: Value = inputs[0]
    offset, scale = (_numbers(attributes, name).double() for name in ("offset", "scale"))
    for name, given in (("offset", offset), ("scale", scale)):
        if value.rank != 1 or given.numel() not in (1, *value.shape):
            raise InvalidInputError(
                f"{name} of {given.numel()} numbers: expected one, or one for each feature of samples {value.shape}"
            )
    return builder.scale_shift(value, scale, -offset * scale, label)


HANDLERS: dict[str, Handler] = {
    "LinearClassifier": _classified,
    "Scaler": _scaled,
    "Normalizer": refused(
        "it divides by the norm of each image. The L1 norm of a nonnegative image is its mass, which is the same all "
        "over the ball but not for all images, and a network is one function of all images; divide the images instead, "
        "and leave it out of the file"
    ),
    "Binarizer": refused("it jumps; Clip of a steep line is the nearest function"),
    "TreeEnsembleClassifier": refused("trees jump; a network of Gemm and Relu is the nearest classifier"),
    "TreeEnsemble": refused("trees jump; a network of Gemm and Relu is the nearest classifier"),
    "SVMClassifier": refused("kernels; LinearClassifier is the nearest classifier"),
}
