"""Reads an ONNX file into canonical form, operator by operator; nothing but ``onnx`` itself is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.numpy_helper
import onnx.reference
import torch
from torch import Tensor

from flowverify.conventions import check_channels_first
from flowverify.errors import FlowverifyError, InvalidInputError, ModelFileError, UnsupportedOperationError
from flowverify.network.builder import Builder, Value
from flowverify.network.graph import Network
from flowverify.network.onnx_operators import ANY_PLACE, HANDLERS, OPSET, check_value_first, whole_shape
from flowverify.network.operations import first_line

_OLDEST, _NEWEST = 7, onnx.defs.onnx_opset_version()
_CONSTANT_FIRST = ("Add", "Sub", "Mul", "Div", "MatMul", "Sum", "Max", "Min", "Mean", "Concat")
_FOLDABLE = (
    "Add", "Sub", "Mul", "Div", "Neg", "Gather", "Concat", "Slice", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Flatten", "Identity", "Cast", "ConstantOfShape", "Range", "Equal", "Where", "Expand", "Tile",
    "Sqrt", "Reciprocal", "Pow", "Exp", "Log", "Abs", "Max", "Min", "Clip", "ReduceSum", "ReduceProd", "ReduceMean",
    "ReduceMax", "ReduceMin", "Floor", "Ceil", "Mod", "Less", "Greater", "Not", "And", "Or", "Trilu",
)  # fmt: skip
_LARGEST_CONSTANT = 1 << 28
_AS_IT_IS = ("Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Sub")  # leaves the axes where they are
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


def read_onnx(path: str | Path, input_shape: Sequence[int] | None = None) -> Network:
    """The network of an ONNX file, with inputs of shape (N, C, H, W) and one output (N, classes).

    N must be free or 1. Weights are kept in float64 where the file has float64 ones, else in float32.

    Args:
        path: the file.
        input_shape: (C, H, W); needed where the file's input is (N, pixels) or leaves sizes free.

    Raises:
        ModelFileError: the file is missing, corrupt, or holds no valid network.
        UnsupportedOperationError: an operator that is not known, named with its node; images with channels last: a
            Transpose to channels first is the first to change their axes, or their shape looks so
            (:func:`flowverify.conventions.check_channels_first`) and no ``input_shape`` says otherwise.
        InvalidInputError: ``input_shape`` does not fit the file's input.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r}: expected an existing ONNX file")
    if input_shape is not None and (len(input_shape) != 3 or min(input_shape) < 1):
        raise InvalidInputError(f"input shape {tuple(input_shape)}: expected (channels, height, width)")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # a corrupt file can raise anything
        raise ModelFileError(f"model file {str(path)!r} is not valid ONNX: {first_line(error)}") from error
    try:
        shape, vector = _input_shape(model.graph, input_shape)
        if not vector:
            _check_layout(model.graph, shape, settled=input_shape is not None)
        return _Reader(model, shape, vector).network()
    except UnsupportedOperationError as error:
        raise UnsupportedOperationError(f"model file {str(path)!r}: {error}") from None
    except _InputShapeError as error:
        raise InvalidInputError(f"model file {str(path)!r}: {error}") from None
    except Exception as error:  # so can a file that is valid ONNX
        raise ModelFileError(f"model file {str(path)!r} is not a valid network: {first_line(error)}") from error


class _InputShapeError(InvalidInputError):
    """The caller's input shape is at fault, not the file."""


def _input_shape(graph: onnx.GraphProto, given: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """The input shape (C, H, W), and whether the file's input is a vector of pixels."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise UnsupportedOperationError(f"{len(inputs)} inputs and {len(graph.output)} outputs: expected one of each")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
    text = f"input {inputs[0].name!r} of shape {['free' if size < 1 else size for size in sizes]}"
    if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        raise UnsupportedOperationError(f"{text} is not float32 or float64")
    if len(sizes) not in (2, 4) or sizes[0] not in (0, 1):
        raise UnsupportedOperationError(f"{text}: expected (N, C, H, W) or (N, pixels) with N free or 1")
    if given is None:
        if len(sizes) == 2:
            raise _InputShapeError(f"{text}: expected input_shape=(channels, height, width) to be given with it")
        if min(sizes[1:]) < 1:
            raise _InputShapeError(f"{text}: expected input_shape= to be given for the free sizes")
        return tuple(sizes[1:]), False
    shape = tuple(int(size) for size in given)
    whole = shape if len(sizes) == 4 else (int(np.prod(shape)),)
    if any(size not in (0, expected) for size, expected in zip(sizes[1:], whole, strict=True)):
        raise _InputShapeError(f"input_shape {shape}: expected one that fits {text}")
    return shape, len(sizes) == 2


def _check_layout(graph: onnx.GraphProto, shape: Sequence[int], settled: bool) -> None:
    """Refuses a file whose images have their channels last, by what it does to them first, or else by their shape.

    Args:
        settled: somebody else has said what the sizes are, so that a shape alone does not count against the file.
    """
    stored = {tensor.name for tensor in graph.initializer}
    entry = next(entry for entry in graph.input if entry.name not in stored)
    what = f"input {entry.name!r} of shape {['N', *shape]}"
    names = {entry.name}
    for node in graph.node:
        if names.isdisjoint(node.input):
            continue
        if node.op_type in _AS_IT_IS:
            names.update(node.output)
        elif node.op_type == "Transpose":
            axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
            if axes == _TO_CHANNELS_FIRST:
                raise UnsupportedOperationError(
                    f"{what}: is (N, H, W, C), channels last, as node {node.name or node.output[0]!r} (Transpose, perm "
                    f"{axes}) says; expected channels first, (N, C, H, W), with the transpose outside of the file"
                )
    if not settled:
        try:
            check_channels_first(shape, what)
        except InvalidInputError as error:
            raise UnsupportedOperationError(
                f"{error}; input_shape=(C, H, W) confirms that these are {shape[0]} channels"
            ) from None


class _Reader:
    """Walks through the nodes of a checked model."""

    def __init__(self, model: onnx.ModelProto, shape: Sequence[int], vector: bool) -> None:
        self.graph = model.graph
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if not _OLDEST <= self.opset <= _NEWEST:
            raise UnsupportedOperationError(f"operator set {self.opset}: expected {_OLDEST}..{_NEWEST}")
        self.known: dict[str, Any] = {"": None}
        self.wide: set[str] = set()  # constants of float32 that are held in float64, as they were computed
        for tensor in self.graph.initializer:
            self.known[tensor.name] = _tensor(onnx.numpy_helper.to_array(tensor))
        entry = next(entry for entry in self.graph.input if entry.name not in self.known)
        double = entry.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
        double |= any(value is not None and value.dtype == torch.float64 for value in self.known.values())
        self.builder = Builder(shape, torch.float64 if double else torch.float32)
        value = self.builder.input
        self.known[entry.name] = self.builder.reshape(value, (int(np.prod(shape)),), "pixels") if vector else value

    def network(self) -> Network:
        for node in self.graph.node:
            try:
                results = self._lower(node)
            except FlowverifyError as error:
                raise type(error)(f"operator {node.op_type} (node {self._label(node)!r}): {error}") from None
            for name, result in zip(node.output, results, strict=False):
                self.known[name] = result
            missing = [name for name in node.output[len(results) :] if name]
            if any(name in self._needed() for name in missing):
                where = f"operator {node.op_type} (node {self._label(node)!r})"
                raise UnsupportedOperationError(f"{where}: output {missing[0]!r} is not supported")
        output = self.known[self.graph.output[0].name]
        if not isinstance(output, Value) or output.batch:
            raise UnsupportedOperationError("an output that does not depend on the input is not supported")
        return self.builder.finish(output)

    def _needed(self) -> set[str]:
        read = {name for node in self.graph.node for name in node.input}
        return read | {entry.name for entry in self.graph.output}

    def _label(self, node: onnx.NodeProto) -> str:
        return node.name or (node.output[0] if node.output else node.op_type)

    def _lower(self, node: onnx.NodeProto) -> list[Any]:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedOperationError(f"the operator domain {node.domain!r} is not supported")
        inputs = [self.known[name] for name in node.input]
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Constant":
            return [_constant(attributes)]
        if node.op_type == "Shape":
            return [_shape(inputs[0], attributes)]
        if not any(isinstance(argument, Value) for argument in inputs):
            return self._fold(node, inputs)
        if node.op_type == "Cast":
            return [self._cast(inputs[0], attributes)]
        if node.op_type not in HANDLERS:
            raise UnsupportedOperationError("is not supported")
        if node.op_type not in _CONSTANT_FIRST:
            check_value_first(inputs)
        if node.op_type not in ANY_PLACE and any(isinstance(one, Value) and one.batch for one in inputs):
            raise UnsupportedOperationError("the batch has been moved, expected the batch first")
        if node.op_type in ("Softmax", "LogSoftmax"):
            attributes[OPSET] = self.opset
        if node.op_type == "Split":
            attributes["num_outputs"] = len(node.output)
        result = HANDLERS[node.op_type](self.builder, inputs, attributes, self._label(node))
        if attributes:
            raise UnsupportedOperationError(f"attribute {min(attributes)!r} is not supported")
        return result if isinstance(result, list) else [result]

    def _cast(self, value: Value, attributes: dict[str, Any]) -> Value:
        double = self.builder.dtype == torch.float64
        if attributes.get("to") != (onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT):
            raise UnsupportedOperationError("a change of precision is not supported")
        return value

    def _fold(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        """Evaluates a small operator on constants; what is declared float32, in float64 and without rounding it."""
        if node.op_type not in _FOLDABLE:
            raise UnsupportedOperationError("is not supported on constants")
        arrays = [None if value is None else value.numpy() for value in inputs]
        if _entries(node.op_type, arrays) > _LARGEST_CONSTANT:
            raise UnsupportedOperationError("a constant with so many entries is not supported")
        if len(node.output) != 1:
            raise UnsupportedOperationError("several results are not supported on constants")
        if node.op_type == "Cast" and node.input[0] in self.wide and _cast_to(node) == onnx.TensorProto.FLOAT:
            self.wide.add(node.output[0])
            return inputs
        given = {name: array for name, array in zip(node.input, arrays, strict=True) if array is not None}
        single = {name for name, array in given.items() if array.dtype == np.float32 or name in self.wide}
        feeds = {
            name: array.astype(np.float64) if name in single and node.op_type != "Cast" else array
            for name, array in given.items()
        }
        results: Any = onnx.reference.ReferenceEvaluator(self._model_of(node, feeds)).run(None, feeds)
        result = np.asarray(results[0])
        doubles = {name for name, array in given.items() if array.dtype == np.float64} - single
        if single and not doubles and result.dtype == np.float64 and node.op_type != "Cast":
            self.wide.add(node.output[0])
        return [_tensor(result)]

    def _model_of(self, node: onnx.NodeProto, feeds: dict[str, Any]) -> onnx.ModelProto:
        """A node alone, under the operator set of its file: for a node by itself the evaluator takes a newer one."""
        kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
        inputs = [onnx.helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = onnx.helper.make_graph([node], "constants", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])


def _cast_to(node: onnx.NodeProto) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == "to"), 0)


def _entries(operator: str, arrays: list[Any]) -> float:
    """How many entries an operator that makes large constants out of small ones would make."""
    match operator, [np.asarray(array, dtype=float) for array in arrays if array is not None]:
        case "ConstantOfShape", [shape]:
            return float(np.abs(shape).prod())
        case "Expand", [value, shape]:
            return float(np.abs(shape).prod()) * value.size
        case "Tile", [value, repeats]:
            return float(np.abs(repeats).prod()) * value.size
        case "Range", [start, limit, step]:
            return float((limit - start) / step)
        case (("ConstantOfShape" | "Expand" | "Range" | "Tile"), _):
            return float("inf")
    return 0.0


def _tensor(array: Any) -> Tensor:
    if isinstance(array, np.ndarray) and array.dtype == np.float16:
        array = array.astype(np.float32)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise UnsupportedOperationError(f"a constant of type {getattr(array, 'dtype', type(array))} is not supported")
    kept = array.astype(np.int64) if array.dtype.kind == "u" else np.array(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(kept).reshape(array.shape))


def _constant(attributes: dict[str, Any]) -> Tensor:
    if len(attributes) == 1:
        name, value = next(iter(attributes.items()))
        if name == "value":
            return _tensor(onnx.numpy_helper.to_array(value))
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
    raise UnsupportedOperationError(f"a constant with attributes {sorted(attributes)} is not supported")


def _shape(value: Any, attributes: dict[str, int]) -> Tensor:
    shape = whole_shape(value) if isinstance(value, Value) else list(value.shape)
    return torch.tensor(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], dtype=torch.int64)
