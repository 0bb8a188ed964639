"""Reads an ONNX file into canonical form, operator by operator; nothing but ``onnx`` itself is needed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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

from flowverify.errors import FlowverifyError, InvalidInputError, ModelFileError, UnsupportedOperationError
from flowverify.network.builder import Builder, Value
from flowverify.network.graph import Network
from flowverify.network.onnx_ml import DOMAIN, LOGITS, TRANSFORM, TRANSFORMS, rewritten
from flowverify.network.onnx_ml import HANDLERS as LEARNING_HANDLERS
from flowverify.network.onnx_operators import (
    ANY_DIMENSION,
    ANY_PLACE,
    HANDLERS,
    OPSET,
    check_value_first,
    merged,
    whole_shape,
    with_batch_first,
)
from flowverify.network.operations import first_line
from flowverify.network.reading import Ending, InputForm, Reading, input_form, softmax_over_classes
from flowverify.network.rounding import rounding_of_value

_OLDEST, _NEWEST = 7, onnx.defs.onnx_opset_version()
_CONSTANT_FIRST = ("Add", "Sub", "Mul", "Div", "MatMul", "Sum", "Max", "Min", "Mean", "Concat")
_FOLDABLE = (
    "Add", "Sub", "Mul", "Div", "Neg", "Gather", "Concat", "Slice", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Flatten", "Identity", "Cast", "ConstantOfShape", "Range", "Equal", "Where", "Expand", "Tile",
    "Sqrt", "Reciprocal", "Pow", "Exp", "Log", "Abs", "Max", "Min", "Clip", "ReduceSum", "ReduceProd", "ReduceMean",
    "ReduceMax", "ReduceMin", "Floor", "Ceil", "Mod", "Less", "Greater", "Not", "And", "Or", "Trilu",
    "MatMul", "Gemm", "Tanh", "Sigmoid", "Relu",  # what recurrent layers make of their first state
)  # fmt: skip
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Max", "Min")
_LARGEST_CONSTANT = 1 << 28
_AS_IT_IS = ("Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Sub")  # leaves the axes where they are
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
_CHANNELS_FIRST = ("AveragePool", "BatchNormalization", "Conv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
_RESHAPES = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # of an answer that is a vector
_COMPARED = 8  # random images on which a network is compared with its file
_WORSE = 64  # times the rounding that is seen: what another order of the sums may make of it


def read_onnx(path: str | Path, input_shape: Sequence[int] | None = None, reading: Reading | None = None) -> Network:
    """The network of an ONNX file that takes one image, in whatever shape, and answers with its classes.

    A batch dimension must be free or 1; where a network has it in one dimension with others, as the heads of an
    attention, what counts is what it makes of one image. Weights are kept in float64 where the file has float64 ones,
    else in float32. Where onnxruntime is installed the network is compared with it on a few images. What was taken for
    granted is said in the notes of the network.

    Args:
        path: the file.
        input_shape: (C, H, W); needed where the file's input is a vector of pixels or leaves sizes free.
        reading: what the file does not say about itself.

    Raises:
        ModelFileError: the file is missing, corrupt, or holds no valid network.
        UnsupportedOperationError: an operator that is not known, named with its node; no image has the shape of the
            input; the network computes something else than onnxruntime.
        InvalidInputError: ``input_shape`` or ``reading`` does not fit the file, or is needed.
    """
    path, reading = Path(path), reading or Reading()
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r}: expected an existing ONNX file")
    if input_shape is not None and (len(input_shape) != 3 or min(input_shape) < 1):
        raise InvalidInputError(f"input shape {tuple(input_shape)}: expected (channels, height, width)")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except Exception as error:  # a corrupt file can raise anything
        raise ModelFileError(f"model file {str(path)!r} is not valid ONNX: {first_line(error)}") from error
    with _named(path, InvalidInputError):
        entry, form = _input(model.graph, input_shape, reading.layout)
        reader = _Reader(model, entry, form, reading)
    with _named(path):
        network = reader.network()
        _compare(path, reader, network)
    several = len(model.graph.output) > 1
    network.notes = (form.note, *([f"output {reader.output!r} taken"] if several else []), *reader.ending.notes)
    return network


@contextmanager
def _named(path: Path, *callers: type[FlowverifyError]) -> Iterator[None]:
    """Names the file in errors; those that are not the callers' fault are the file's."""
    try:
        yield
    except Exception as error:  # a file that is valid ONNX can raise anything
        if isinstance(error, (UnsupportedOperationError, *callers)):
            raise type(error)(f"model file {str(path)!r}: {error}") from None
        raise ModelFileError(f"model file {str(path)!r} is not a valid network: {first_line(error)}") from error


def _input(
    graph: onnx.GraphProto, given: Sequence[int] | None, layout: str | None
) -> tuple[onnx.ValueInfoProto, InputForm]:
    """The file's input, and how images lie in it."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) != 1:
        raise UnsupportedOperationError(f"{len(inputs)} inputs: expected one")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
    text = f"input {inputs[0].name!r} of shape {['free' if size < 1 else size for size in sizes]}"
    if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        raise UnsupportedOperationError(f"{text} is not float32 or float64")
    return inputs[0], input_form(sizes, given, layout, _told_layout(graph, inputs[0].name, len(sizes), given), text)


def _told_layout(graph: onnx.GraphProto, name: str, rank: int, given: Sequence[int] | None) -> str | None:
    """The order of channels that the first operations show: those that change axes, or that know which are channels."""
    names = {name}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if names.isdisjoint(node.input):
            continue
        if node.op_type in _AS_IT_IS:
            names.update(node.output)
        elif node.op_type == "Transpose" and rank == 4:
            axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
            return "nhwc" if axes == _TO_CHANNELS_FIRST else None
        elif node.op_type in _CHANNELS_FIRST and rank == 4:
            return "nchw"
        elif node.op_type == "Reshape" and given is not None and rank < 4 and node.input[1] in stored:
            target = onnx.numpy_helper.to_array(stored[node.input[1]]).tolist()[1:]
            orders = {"nchw": list(given), "nhwc": [*given[1:], given[0]]}
            fitting = [order for order, sizes in orders.items() if sizes == target]
            return fitting[0] if len(fitting) == 1 else None
        else:
            return None
    return None


def _compare(path: Path, reader: _Reader, network: Network) -> None:
    """Runs the file itself on a few images.

    Raises:
        UnsupportedOperationError: it answers something else.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (_COMPARED, *network.input_shape)
    images = torch.rand(shape, generator=generator, dtype=torch.float64).to(network.dtype)
    images = torch.cat([images, torch.full_like(images[:1], 0.5)])
    expected = _answers(path, reader, reader.reading.normalised(images))
    if expected is None:
        return
    with torch.no_grad():
        found, expected = reader.ending.answer(network(images)), expected.reshape(len(images), -1)
    if found.shape == expected.shape:
        missed = (found - expected).abs().amax(1) - 1e-3 * expected.abs().amax(1) - 1e-5
        if bool((missed <= 0).all()) or bool((missed <= _rounding(network, images)).all()):
            return
    raise UnsupportedOperationError(
        f"the network as it was read answers {found[0, :3].tolist()}, where the file itself answers "
        f"{expected[0, :3].tolist()} for the same image"
    )


def _rounding(network: Network, images: Tensor) -> Tensor:
    """How far two computations may differ where large terms cancel, (B,); 0 where no rule says so.

    The rule is for the worst case, and grows with every layer: no more is allowed than many times what the precision of
    the network is seen to cost.
    """
    try:
        rounding = rounding_of_value(network, network.output, images).amax(1)
    except UnsupportedOperationError:
        return images.new_zeros(len(images))
    if network.dtype == torch.float64:
        return rounding
    seen = (copy.deepcopy(network).double()(images.double()) - network(images)).abs().amax()
    return torch.minimum(rounding, _WORSE * seen)


def _answers(path: Path, reader: _Reader, images: Tensor) -> Tensor | None:
    """What onnxruntime computes for images (B, C, H, W), one at a time; None where it is missing or refuses it."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        kind = np.float64 if "double" in entry.type else np.float32
        given = reader.form.arrange(images).numpy().astype(kind)
        alone = [row[None] if reader.form.batched else row for row in given]
        rows = [_numbers(session.run([reader.output], {entry.name: one})[0]) for one in alone]
    except Exception:  # what it cannot run, it cannot be compared with
        return None
    return torch.from_numpy(np.stack(rows)).double()


def _numbers(answer: Any) -> Any:
    """The array of an answer that may be a dictionary for each image."""
    return np.array([list(one.values()) for one in answer]) if isinstance(answer, list) else answer


class _Reader:
    """Walks through the nodes of a checked model."""

    def __init__(self, model: onnx.ModelProto, entry: onnx.ValueInfoProto, form: InputForm, reading: Reading) -> None:
        self.graph, self.form, self.reading, self.ending = model.graph, form, reading, Ending()
        self.output = _chosen_output(self.graph, reading.output)
        nodes = _nodes_before(self.graph.node, self.output)
        self.nodes = _nodes_before(rewritten(nodes, _constants(self.graph)), self.output)
        self.tail = _tail(self.nodes, self.output)
        usual = any(node.domain in ("", "ai.onnx") for node in nodes)
        self.opset = next(
            (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0 if usual else _NEWEST
        )
        if not _OLDEST <= self.opset <= _NEWEST:
            raise UnsupportedOperationError(f"operator set {self.opset}: expected {_OLDEST}..{_NEWEST}")
        self.known: dict[str, Any] = {"": None}
        self.wide: set[str] = set()  # constants of float32 that are held in float64, as they were computed
        for tensor in self.graph.initializer:
            self.known[tensor.name] = _tensor(onnx.numpy_helper.to_array(tensor))
        double = entry.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
        double |= any(value is not None and value.dtype == torch.float64 for value in self.known.values())
        self.builder = Builder(form.shape, torch.float64 if double else torch.float32)
        self.known[entry.name] = form.enter(self.builder, reading.normalise(self.builder, self.builder.input))

    def network(self) -> Network:
        for node in self.nodes:
            try:
                results = self._lower(node)
            except FlowverifyError as error:
                raise type(error)(f"operator {node.op_type} (node {self._label(node)!r}): {error}") from None
            for name, result in zip(node.output, results, strict=False):
                self.known[name] = result
            absent = len(node.output) - len(results)
            made = [*results, *[None] * absent]
            missing = [name for name, result in zip(node.output, made, strict=False) if name and result is None]
            if any(name in self._needed() for name in missing):
                where = f"operator {node.op_type} (node {self._label(node)!r})"
                raise UnsupportedOperationError(f"{where}: output {missing[0]!r} is not supported")
        output = self.known.get(self.output)
        if isinstance(output, Value):
            output = with_batch_first(self.builder, output, "output")
        if isinstance(output, Value) and output.merged:
            raise UnsupportedOperationError("an output with the batch in one dimension with others is not supported")
        if not isinstance(output, Value) or output.batch:
            raise UnsupportedOperationError("an output that does not depend on the input is not supported")
        return self.builder.finish(self.ending.logits(self.builder, output))

    def _needed(self) -> set[str]:
        return {self.output, *(name for node in self.nodes for name in node.input)}

    def _label(self, node: onnx.NodeProto) -> str:
        return node.name or (node.output[0] if node.output else node.op_type)

    def _lower(self, node: onnx.NodeProto) -> list[Any]:
        if node.op_type == _NAMED and self._label(node) in self.tail:
            return [self.known[node.input[0]]]
        handlers = LEARNING_HANDLERS if node.domain == DOMAIN else HANDLERS
        if node.domain not in ("", "ai.onnx", DOMAIN):
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
        ending = _ending(node) if self._label(node) in self.tail else None
        if node.op_type == _CLASSIFIER and ending is not None:
            self.ending.drop(ending)
            attributes[LOGITS] = True
        elif ending is not None:
            value = with_batch_first(self.builder, inputs[0], self._label(node))
            if self._keeps_order(node, value):
                self.ending.drop(ending)
                return [value]
        if node.op_type not in handlers:
            raise UnsupportedOperationError("is not supported")
        if node.op_type not in _CONSTANT_FIRST:
            check_value_first(inputs)
        inputs = self._arranged(node.op_type, inputs, self._label(node))
        if node.op_type in ("Softmax", "LogSoftmax"):
            attributes[OPSET] = self.opset
        if node.op_type == "Split":
            attributes["num_outputs"] = len(node.output)
        result = handlers[node.op_type](self.builder, inputs, attributes, self._label(node))
        if attributes:
            raise UnsupportedOperationError(f"attribute {min(attributes)!r} is not supported")
        results = result if isinstance(result, list) else [result]
        if any(isinstance(one, Value) and one.merged for one in inputs):
            results = [replace(one, merged=True) if isinstance(one, Value) else one for one in results]
        return results

    def _arranged(self, kind: str, inputs: list[Any], label: str) -> list[Any]:
        """The same inputs, with the batch where an operator takes it.

        Raises:
            UnsupportedOperationError: it takes the batch first alone, and it is elsewhere.
        """

        def elsewhere(inputs: list[Any]) -> bool:
            values = [one for one in inputs if isinstance(one, Value)]
            return any(one.merged or (one.batch > 0 and kind not in ANY_PLACE) for one in values)

        if not elsewhere(inputs):
            return inputs
        if kind not in ANY_DIMENSION:
            inputs = [with_batch_first(self.builder, one, label) if isinstance(one, Value) else one for one in inputs]
            if elsewhere(inputs):
                raise UnsupportedOperationError("the batch has been moved, expected the batch first")
            return inputs
        inputs = [merged(self.builder, one, label) if isinstance(one, Value) else one for one in inputs]
        rank = max(one.rank for one in inputs if isinstance(one, Value))
        most = max((one.ndim for one in inputs if isinstance(one, Tensor) and one.is_floating_point()), default=0)
        if most > rank and kind not in _BROADCAST:
            raise UnsupportedOperationError(f"a constant of more dimensions than the value's {rank}")
        if kind not in _BROADCAST:
            return inputs
        return [self._raised(one, max(rank, most), label) if isinstance(one, Value) else one for one in inputs]

    def _raised(self, value: Value, rank: int, label: str) -> Value:
        """A merged value with dimensions of size 1 in front, as numpy broadcasts it, to have at least ``rank``."""
        if value.rank >= rank:
            return value
        shape = (*(1,) * (rank - value.rank), *value.shape)
        return replace(self.builder.reshape(value, shape, label), merged=True)

    def _keeps_order(self, node: onnx.NodeProto, value: Value) -> bool:
        if node.op_type == "Sigmoid":
            return True
        default = 1 if node.op_type in ("Softmax", "LogSoftmax") and self.opset < 13 else -1
        axis = next((int(one.i) for one in node.attribute if one.name == "axis"), default)
        return softmax_over_classes(axis, value.shape)

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


def _chosen_output(graph: onnx.GraphProto, wanted: str | None) -> str:
    """The output that is wanted, or the only one that holds numbers, where the others name the class."""
    names = [str(entry.name) for entry in graph.output]
    if wanted is None:
        scores = [str(entry.name) for entry in graph.output if not _is_class(entry)]
        if len(scores) == 1:
            return scores[0]
    if wanted is None or wanted not in names:
        given = f"output {wanted!r}" if wanted is not None else f"{len(names)} outputs"
        raise InvalidInputError(f"{given}: expected output= one of {', '.join(names)} to be given")
    return wanted


def _is_class(entry: onnx.ValueInfoProto) -> bool:
    """Whether an output is an integer or a word."""
    kind = entry.type.tensor_type.elem_type if entry.type.HasField("tensor_type") else onnx.TensorProto.UNDEFINED
    return kind in (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.STRING)


def _constants(graph: onnx.GraphProto) -> dict[str, Any]:
    """Arrays by name, of no more than a few entries."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored.update((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")
    small = {name: tensor for name, tensor in stored.items() if math.prod(tensor.dims) <= 1}
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in small.items()}


def _nodes_before(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes that an output depends on, in the order of the file."""
    needed, found = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            found.append(node)
    return found[::-1]


_CLASSIFIER = "LinearClassifier"
_NAMED = "ZipMap"  # a dictionary from the names of classes to an array's entries, in its order


def _tail(nodes: Sequence[onnx.NodeProto], output: str) -> set[str]:
    """The labels of the nodes before an output that nothing else reads, and that may keep the order of its entries."""
    readers = Counter(name for node in nodes for name in node.input)
    made_by = {name: node for node in nodes for name in node.output}
    found: set[str] = set()
    name = output
    while (node := made_by.get(name)) is not None and (node.op_type in (*_RESHAPES, _NAMED) or _ending(node)):
        if readers[name] > (name != output):
            break
        found.add(node.name or node.output[0])
        if node.op_type == _CLASSIFIER:
            break
        name = node.input[0]
    return found


def _ending(node: onnx.NodeProto) -> str | None:
    """What of :data:`ORDER_KEPT` an operator is, or ends with."""
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    match node.op_type:
        case "Softmax" | "LogSoftmax" | "Sigmoid":
            return node.op_type
        case "LinearClassifier":
            return TRANSFORMS.get(attributes.get(TRANSFORM, b"NONE"))
        case "Normalizer" if attributes.get("norm", b"MAX") in (b"L1", b"L2"):
            return f"division by the {attributes['norm'].decode()} norm"
        case "LpNormalization":
            return f"division by the L{attributes.get('p', 2)} norm"
    return None


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
        case (("MatMul" | "Gemm"), [first, second, *_]):
            return float(np.prod([one.size / max(1, min(one.shape[-2:], default=1)) for one in (first, second)]))
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
