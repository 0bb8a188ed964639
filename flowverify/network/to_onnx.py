"""Writes a graph in canonical form as an ONNX file that outside verifiers read: few and plain operators."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network.curves import Erf, Exp, Log, Power, Softplus
from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import (
    Add,
    Concatenate,
    Index,
    MatrixProduct,
    Multiply,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Softmax,
    Standardise,
    Subtract,
    operation_name,
)

OPSET, IR_VERSION, OUTPUT = 13, 8, "output"


def write_onnx(network: Graph, path: str | Path) -> None:
    """Writes ``network`` to ``path`` in float32, operator set 13, IR version 8.

    The input is called "input" with a free batch dimension "batch", the output "output". The file appears
    whole or not at all, and the same network always gives the same bytes.

    Raises:
        ModelFileError: the file cannot be written.
        InvalidInputError: a weight is too large for float32.
    """
    path = Path(path)
    data = onnx_model(network).SerializeToString(deterministic=True)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise ModelFileError(f"model file {str(path)!r} cannot be written: {error.strerror or error}") from error


def onnx_model(network: Graph) -> onnx.ModelProto:
    """The checked ONNX model of a graph (see :func:`write_onnx`)."""
    writer = _Writer(network)
    for node in network.nodes:
        writer.write(node)
    if not network.nodes:
        writer.emit("Identity", [INPUT], OUTPUT)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        writer.nodes,
        "flowverify",
        [onnx.helper.make_tensor_value_info(INPUT, kind, ["batch", *network.input_shape])],
        [onnx.helper.make_tensor_value_info(OUTPUT, kind, ["batch", *network.output_shape])],
        writer.constants,
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="flowverify",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Writer:
    """Collects ONNX nodes and constants; node ``n`` has the value ``v_n``, the last one ``output``."""

    def __init__(self, network: Graph) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names = {INPUT: INPUT} | {node.name: f"v_{node.name}" for node in network.nodes}
        self.names |= {network.output: OUTPUT} if network.nodes else {}
        self.shapes = {INPUT: network.input_shape} | {node.name: node.shape for node in network.nodes}

    def write(self, node: Node) -> None:
        inputs = [self.names[name] for name in node.inputs]
        _EMITTERS[type(node.operation)](self, node, inputs, self.names[node.name])

    def emit(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output], name=f"n_{output}", **attributes))
        return output

    def floats(self, node: Node, label: str, tensor: Tensor) -> str:
        array = tensor.detach().cpu().to(torch.float32).numpy()
        if not np.isfinite(array).all():
            raise InvalidInputError(
                f"node {node.name!r} ({operation_name(node.operation)}): given a {label} too large for float32"
            )
        return self._store(node, label, np.array(array))

    def integers(self, node: Node, label: str, numbers: int | Sequence[int]) -> str:
        return self._store(node, label, np.array(numbers, dtype=np.int64))

    def _store(self, node: Node, label: str, array: Any) -> str:
        name = f"c_{node.name}_{label}"
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name


Emitter = Callable[[_Writer, Node, list[str], str], Any]


def _pair(numbers: Any) -> list[int]:
    return [numbers, numbers] if isinstance(numbers, int) else [int(number) for number in numbers]


def _linear(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    vector = len(writer.shapes[node.inputs[0]]) == 1
    weight = writer.floats(node, "weight", operation.weight if vector else operation.weight.T)
    bias = [] if operation.bias is None else [writer.floats(node, "bias", operation.bias)]
    if vector:
        writer.emit("Gemm", [*inputs, weight, *bias], output, transB=1)
    elif bias:
        product = writer.emit("MatMul", [*inputs, weight], f"{output}_product")
        writer.emit("Add", [product, *bias], output)
    else:
        writer.emit("MatMul", [*inputs, weight], output)


def _convolution(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    constants = [writer.floats(node, name, tensor) for name, tensor in operation.named_parameters()]
    writer.emit(
        "Conv", [*inputs, *constants], output, group=operation.groups, strides=_pair(operation.stride),
        dilations=_pair(operation.dilation), pads=_pair(operation.padding) * 2,
        kernel_shape=_pair(operation.kernel_size),
    )  # fmt: skip


def _pool(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    attributes = {
        "kernel_shape": _pair(operation.kernel_size),
        "strides": _pair(operation.stride),
        "pads": _pair(operation.padding) * 2,
    }
    if isinstance(operation, nn.AvgPool2d):
        writer.emit("AveragePool", inputs, output, count_include_pad=int(operation.count_include_pad), **attributes)
    else:
        writer.emit("MaxPool", inputs, output, dilations=_pair(operation.dilation), **attributes)


def _scale_shift(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    value = inputs[0]
    if operation.has_scale or not operation.has_shift:
        target = f"{output}_scaled" if operation.has_shift else output
        value = writer.emit("Mul", [value, writer.floats(node, "scale", operation.scale)], target)
    if operation.has_shift:
        writer.emit("Add", [value, writer.floats(node, "shift", operation.shift)], output)


def _reshape(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    writer.emit("Reshape", [*inputs, writer.integers(node, "shape", [-1, *node.shape])], output)


def _permute(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    writer.emit("Transpose", inputs, output, perm=[0, *(dim + 1 for dim in operation.dims)])


def _index(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    selection, axis = operation.selection, operation.dim + 1
    if isinstance(selection, slice):
        positions = range(writer.shapes[node.inputs[0]][operation.dim])[selection]
        bounds = {"starts": positions.start, "ends": positions.stop, "axes": axis, "steps": positions.step}
        constants = [writer.integers(node, name, [number]) for name, number in bounds.items()]
        writer.emit("Slice", [*inputs, *constants], output)
    else:
        writer.emit("Gather", [*inputs, writer.integers(node, "index", selection)], output, axis=axis)


def _pad(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    left, right, top, bottom = operation.amounts
    before = [0] * (len(node.shape) - 1)
    amounts = writer.integers(node, "pads", [*before, top, left, *before, bottom, right])
    writer.emit("Pad", [*inputs, amounts, writer.floats(node, "zero", torch.zeros(()))], output)


def _add(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    value = inputs[0]
    for position, other in enumerate(inputs[1:], start=2):
        target = output if position == len(inputs) else f"{output}_{position}"
        value = writer.emit("Add", [value, other], target)


def _times_gate(*kinds: str, **attributes: Any) -> Emitter:
    """x times a chain of operators of x, of which the last has these attributes."""

    def emit(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
        gate = inputs[0]
        for position, kind in enumerate(kinds):
            given = attributes if position + 1 == len(kinds) else {}
            gate = writer.emit(kind, [gate], f"{output}_gate{position}", **given)
        writer.emit("Mul", [inputs[0], gate], output)

    return emit


def _gelu(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    """x (1 + erf(x / sqrt 2)) / 2, or x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    operation: Any = node.operation

    def number(label: str, value: float) -> str:
        return writer.floats(node, label, torch.tensor(value))

    inner = inputs[0]
    if operation.approximate == "tanh":
        cube = writer.emit("Pow", [inner, number("three", 3.0)], f"{output}_cube")
        small = writer.emit("Mul", [cube, number("cubic", 0.044715)], f"{output}_small")
        inner = writer.emit("Add", [inner, small], f"{output}_bent")
    factor = math.sqrt(2 / math.pi) if operation.approximate == "tanh" else math.sqrt(0.5)
    scaled = writer.emit("Mul", [inner, number("factor", factor)], f"{output}_scaled")
    kind = "Tanh" if operation.approximate == "tanh" else "Erf"
    level = writer.emit(kind, [scaled], f"{output}_level")
    raised = writer.emit("Add", [level, number("one", 1.0)], f"{output}_raised")
    half = writer.emit("Mul", [raised, number("half", 0.5)], f"{output}_half")
    writer.emit("Mul", [inputs[0], half], output)


def _power(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    writer.emit("Pow", [*inputs, writer.floats(node, "exponent", torch.tensor(operation.exponent))], output)


def _standardise(writer: _Writer, node: Node, inputs: list[str], output: str) -> None:
    operation: Any = node.operation
    value = inputs[0]
    if operation.centred:
        mean = writer.emit("ReduceMean", [value], f"{output}_mean", axes=[-1], keepdims=1)
        value = writer.emit("Sub", [value, mean], f"{output}_centred")
    squares = writer.emit("Mul", [value, value], f"{output}_squares")
    variance = writer.emit("ReduceMean", [squares], f"{output}_variance", axes=[-1], keepdims=1)
    epsilon = writer.floats(node, "epsilon", torch.tensor(operation.epsilon))
    root = writer.emit("Sqrt", [writer.emit("Add", [variance, epsilon], f"{output}_above")], f"{output}_root")
    writer.emit("Div", [value, root], output)


def _plain(kind: str, attributes: Callable[[Any], dict[str, Any]] = lambda operation: {}) -> Emitter:
    return lambda writer, node, inputs, output: writer.emit(kind, inputs, output, **attributes(node.operation))


_EMITTERS: dict[type[nn.Module], Emitter] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.AvgPool2d: _pool,
    nn.MaxPool2d: _pool,
    nn.ReLU: _plain("Relu"),
    nn.LeakyReLU: _plain("LeakyRelu", lambda operation: {"alpha": float(operation.negative_slope)}),
    nn.Sigmoid: _plain("Sigmoid"),
    nn.Tanh: _plain("Tanh"),
    nn.ELU: _plain("Elu", lambda operation: {"alpha": float(operation.alpha)}),
    nn.GELU: _gelu,
    nn.SiLU: _times_gate("Sigmoid"),
    nn.Mish: _times_gate("Softplus", "Tanh"),
    nn.Hardswish: _times_gate("HardSigmoid", alpha=1 / 6, beta=0.5),
    nn.Softsign: _plain("Softsign"),
    Softplus: _plain("Softplus"),
    Erf: _plain("Erf"),
    Exp: _plain("Exp"),
    Log: _plain("Log"),
    Power: _power,
    Multiply: _plain("Mul"),
    MatrixProduct: _plain("MatMul"),
    Softmax: _plain("Softmax", lambda operation: {"axis": operation.dim + 1}),
    Standardise: _standardise,
    nn.Flatten: _plain("Flatten", lambda operation: {"axis": 1}),
    ScaleShift: _scale_shift,
    Reshape: _reshape,
    Permute: _permute,
    Index: _index,
    Pad: _pad,
    Add: _add,
    Subtract: _plain("Sub"),
    Concatenate: _plain("Concat", lambda operation: {"axis": operation.dim + 1}),
}
