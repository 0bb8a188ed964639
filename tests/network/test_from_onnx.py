import random

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from flowverify.errors import FlowverifyError, InvalidInputError, ModelFileError, UnsupportedOperationError
from flowverify.network import read_onnx
from flowverify.network.reading import Reading

SHAPE = (2, 6, 8)
PIXELS = 96
GENERATOR = np.random.default_rng(0)


def constant(*shape, dtype=np.float32):
    return GENERATOR.standard_normal(shape).astype(dtype)


def numbers(*values):
    return np.array(values, dtype=np.int64)


def node(kind, inputs, output="y", **attributes):
    name = f"the_{kind}" if output == "y" else f"the_{kind}_{output}"
    return helper.make_node(kind, inputs, [output], name=name, **attributes)


def model_of(nodes, constants, shape=("batch", *SHAPE), opset=13, outputs=("out",), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, ["n", "classes"]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def write(tmp_path, model):
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def flattened(*nodes):
    """The nodes, then Flatten from "y" to "out"."""
    return [*nodes, helper.make_node("Flatten", ["y"], ["out"], name="last")]


def chain(kind, constants=None, opset=13, after=(), **attributes):
    constants = constants or {}
    inputs = ["x", *("" if array is None else name for name, array in constants.items())]
    stored = {name: array for name, array in constants.items() if array is not None}
    return flattened(node(kind, inputs, **attributes)), stored, opset


def on_vectors(*nodes):
    return [helper.make_node("Flatten", ["x"], ["f"], name="first"), *nodes]


CASES = {
    "Gemm": (
        on_vectors(node("Gemm", ["f", "w", "b"], "out", alpha=0.5, beta=2.0)),
        {"w": constant(PIXELS, 3), "b": constant(3)},
        13,
    ),
    "Gemm transposed": (
        on_vectors(node("Gemm", ["f", "w"], "out", transB=1)),
        {"w": constant(3, PIXELS)},
        13,
    ),
    "Gemm scalar bias": (
        on_vectors(node("Gemm", ["f", "w", "b"], "out")),
        {"w": constant(PIXELS, 3), "b": constant(1, 1)},
        13,
    ),
    "MatMul": (on_vectors(node("MatMul", ["f", "w"], "out")), {"w": constant(PIXELS, 3)}, 13),
    "MatMul of channels": (flattened(node("MatMul", ["x", "w"])), {"w": constant(1, 2, 8, 5)}, 13),
    "MatMul of channels left": (flattened(node("MatMul", ["w", "x"])), {"w": constant(2, 5, 6)}, 13),
    "MatMul left": (flattened(node("MatMul", ["w", "x"])), {"w": constant(5, 6)}, 13),
    "Add": chain("Add", {"c": constant(2, 1, 1)}),
    "Add two": (flattened(node("Relu", ["x"], "r"), node("Add", ["x", "r"])), {}, 13),
    "Sub": chain("Sub", {"c": constant(1, 2, 1, 1)}),
    "Sub from": (flattened(node("Sub", ["c", "x"])), {"c": constant()}, 13),
    "Sub two": (flattened(node("Relu", ["x"], "r"), node("Sub", ["r", "x"])), {}, 13),
    "Mul": (flattened(node("Mul", ["c", "x"])), {"c": constant(6, 8)}, 13),
    "Div": chain("Div", {"c": constant(2, 1, 1)}),
    "Neg": chain("Neg"),
    "Sum": (flattened(node("Relu", ["x"], "r"), node("Sum", ["c", "r", "x"])), {"c": constant(8)}, 13),
    "Conv": chain(
        "Conv",
        {"w": constant(4, 1, 3, 2), "b": constant(4)},
        group=2,
        strides=[2, 1],
        dilations=[1, 2],
        pads=[1, 2, 1, 2],
    ),
    "Conv asymmetric": chain("Conv", {"w": constant(3, 2, 3, 2)}, pads=[0, 1, 2, 0]),
    "Conv same upper": chain("Conv", {"w": constant(3, 2, 3, 2)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv same lower": chain("Conv", {"w": constant(3, 2, 2, 4)}, auto_pad="SAME_LOWER"),
    "Conv valid": chain("Conv", {"w": constant(3, 2, 2, 4)}, auto_pad="VALID", kernel_shape=[2, 4]),
    "Relu": chain("Relu"),
    "LeakyRelu": chain("LeakyRelu", alpha=0.25),
    "LeakyRelu default": chain("LeakyRelu"),
    "Sigmoid": (flattened(node("Sigmoid", ["x"], "s"), node("Neg", ["s"])), {}, 13),
    "Tanh": chain("Tanh"),
    "Flatten": chain("Flatten", axis=-3),
    "Reshape of rows": (
        [
            node("Reshape", ["x", "rows"], "r"),
            node("Gemm", ["r", "w", "b"], "g"),
            node("Softmax", ["g"], "s", axis=1),
            node("Concat", ["s", "r"], "c", axis=1),
            node("Reshape", ["c", "back"], "a"),
            node("Conv", ["a", "k"]),
            helper.make_node("Flatten", ["y"], ["out"], name="last"),
        ],
        {
            "rows": numbers(-1, 8),
            "w": constant(8, 4),
            "b": constant(4),
            "back": numbers(-1, 2, 6, 12),
            "k": constant(1, 2, 3, 3),
        },
        13,
    ),
    "Reshape": chain("Reshape", {"s": numbers(0, -1, 4)}),
    "Reshape batch free": chain("Reshape", {"s": numbers(-1, 4, 24)}),
    "Transpose": chain("Transpose", perm=[0, 2, 3, 1]),
    "Squeeze": (
        flattened(node("Gather", ["x", "i"], "g", axis=1), node("Squeeze", ["g", "a"])),
        {"i": numbers(1), "a": numbers(1)},
        13,
    ),
    "Squeeze 11": (
        flattened(node("Gather", ["x", "i"], "g", axis=1), node("Squeeze", ["g"], axes=[1])),
        {"i": numbers(1)},
        11,
    ),
    "Unsqueeze": chain("Unsqueeze", {"a": numbers(-1, 2)}),
    "Unsqueeze 11": chain("Unsqueeze", {}, 11, axes=[1]),
    "Slice": chain("Slice", {"s": numbers(1, -1), "e": numbers(-1, -7), "a": numbers(3, 2), "t": numbers(2, -2)}),
    "Slice reversed": chain("Slice", {"s": numbers(-1), "e": numbers(-(2**63)), "a": numbers(-1), "t": numbers(-1)}),
    "Slice 9": chain("Slice", {}, 9, starts=[1, 0], ends=[4, 2**31 - 1], axes=[2, 3]),
    "Slice default axes": chain("Slice", {"s": numbers(0, 1), "e": numbers(2**63 - 1, 2)}),
    "Gather": chain("Gather", {"i": np.array(-2, dtype=np.int64)}, axis=2),
    "Gather list": chain("Gather", {"i": numbers(3, 0, -1)}, axis=-1),
    "Concat": (flattened(node("Relu", ["x"], "r"), node("Concat", ["x", "r"], axis=2)), {}, 13),
    "Split": (
        [helper.make_node("Split", ["x", "s"], ["p", "y"], axis=3), *flattened()],
        {"s": numbers(3, 5)},
        13,
    ),
    "Pad": chain("Pad", {"p": numbers(0, 0, 1, 2, 0, 0, 3, 0), "v": np.array(0, dtype=np.float32)}),
    "Pad axes": chain("Pad", {"p": numbers(1, 2), "v": None, "a": numbers(-1)}, 18),
    "Pad 9": chain("Pad", {}, 9, pads=[0, 0, 1, 2, 0, 0, 3, 0], mode="constant"),
    "AveragePool": chain("AveragePool", kernel_shape=[2, 3], strides=[2, 1], pads=[1, 1, 1, 1]),
    "AveragePool padding counted": chain("AveragePool", kernel_shape=[2, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "AveragePool asymmetric": chain("AveragePool", kernel_shape=[2, 3], pads=[1, 0, 0, 2]),
    "AveragePool asymmetric counted": chain("AveragePool", kernel_shape=[2, 3], pads=[1, 0, 0, 2], count_include_pad=1),
    "AveragePool same": chain("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "GlobalAveragePool": chain("GlobalAveragePool"),
    "ReduceMean": chain("ReduceMean", axes=[2, -1], keepdims=0),
    "ReduceMean 18": chain("ReduceMean", {"a": numbers(2, 3)}, 18),
    "MaxPool": chain("MaxPool", kernel_shape=[2, 3], strides=[2, 1], pads=[1, 1, 1, 1], dilations=[2, 1]),
    "BatchNormalization": chain(
        "BatchNormalization",
        {"g": constant(2), "b": constant(2), "m": constant(2), "v": abs(constant(2))},
        epsilon=0.1,
    ),
    "Identity": chain("Identity"),
    "Dropout": chain("Dropout"),
    "Cast": chain("Cast", to=TensorProto.FLOAT),
    "Constant": (
        flattened(
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(constant(2, 1, 1))),
            node("Add", ["x", "c"]),
        ),
        {},
        13,
    ),
    "Elu": chain("Elu", alpha=1.7),
    "Selu": chain("Selu"),
    "Selu 7": chain("Selu", {}, 7, alpha=1.5, gamma=2.0),
    "Celu": chain("Celu", alpha=0.3),
    "Gelu": chain("Gelu", {}, 20),
    "Gelu by tanh": chain("Gelu", {}, 20, approximate="tanh"),
    "Mish": chain("Mish", {}, 18),
    "Softplus": chain("Softplus"),
    "Softsign": chain("Softsign"),
    "HardSigmoid": chain("HardSigmoid", alpha=0.4),
    "HardSwish": chain("HardSwish", {}, 14),
    "PRelu": chain("PRelu", {"s": constant(2, 1, 1)}),
    "PRelu shared": chain("PRelu", {"s": constant(1)}),
    "Shrink": chain("Shrink", lambd=0.25, bias=0.25),
    "Erf": chain("Erf"),
    "Abs": chain("Abs"),
    "Clip": chain("Clip", {"a": np.array(-0.5, dtype=np.float32), "b": np.array(0.25, dtype=np.float32)}),
    "Clip from below": chain("Clip", {"a": np.array(-0.5, dtype=np.float32)}),
    "Clip 7": chain("Clip", {}, 7, min=-0.5, max=0.25),
    "Exp": chain("Exp"),
    "Sqrt and Log": (
        flattened(node("Abs", ["x"], "a"), node("Add", ["a", "c"], "b"), node("Sqrt", ["b"], "r"), node("Log", ["r"])),
        {"c": constant(1) ** 2 + 1},
        13,
    ),
    "Reciprocal": (
        flattened(
            node("Exp", ["x"], "e"),
            node("Reciprocal", ["e"], "r"),
            node("Div", ["x", "r"], "q"),
            node("Div", ["c", "r"], "d"),
            node("Add", ["q", "d"]),
        ),
        {"c": constant(8)},
        13,
    ),
    "Pow": chain("Pow", {"p": np.array(2, dtype=np.float32)}),
    "Max": (
        flattened(node("Relu", ["x"], "r"), node("Neg", ["x"], "n"), node("Max", ["r", "c", "n"])),
        {"c": constant(8)},
        13,
    ),
    "Min": (flattened(node("Relu", ["x"], "r"), node("Min", ["c", "r"])), {"c": constant(8)}, 13),
    "Mean": (flattened(node("Relu", ["x"], "r"), node("Mean", ["x", "r"])), {}, 13),
    "Mul two": (flattened(node("Relu", ["x"], "r"), node("Mul", ["x", "r"])), {}, 13),
    "MatMul two": (flattened(node("Transpose", ["x"], "r", perm=[0, 1, 3, 2]), node("MatMul", ["x", "r"])), {}, 13),
    "Softmax": chain("Softmax", axis=1),
    "Softmax 11": chain("Softmax", {}, 11, axis=2),
    "LogSoftmax": chain("LogSoftmax"),
    "LayerNormalization": chain("LayerNormalization", {"s": constant(6, 8), "b": constant(6, 8)}, 17, axis=2),
    "InstanceNormalization": chain("InstanceNormalization", {"s": constant(2), "b": constant(2)}, epsilon=0.01),
    "GroupNormalization": chain("GroupNormalization", {"s": constant(2), "b": constant(2)}, 21, num_groups=1),
    "LRN": chain("LRN", size=3, alpha=0.5),
    "ReduceSum": chain("ReduceSum", {"a": numbers(1, -1)}, keepdims=0),
    "ReduceSum 11": chain("ReduceSum", {}, 11, axes=[3]),
    "ReduceMax": chain("ReduceMax", axes=[2]),
    "ReduceMin": chain("ReduceMin", axes=[1, 2], keepdims=0),
    "ReduceL1": chain("ReduceL1", axes=[1]),
    "ReduceL2": chain("ReduceL2", axes=[1]),
    "ReduceLogSumExp": chain("ReduceLogSumExp", axes=[1]),
    "GlobalMaxPool": chain("GlobalMaxPool"),
    "LpPool": chain("LpPool", kernel_shape=[2, 3], strides=[2, 1], p=1),
    "LpPool of squares": chain("LpPool", kernel_shape=[2, 3], pads=[1, 0, 1, 0], p=2),
    "GlobalLpPool": chain("GlobalLpPool", p=1),
    "MaxPool asymmetric": chain("MaxPool", kernel_shape=[2, 2], pads=[1, 0, 0, 0]),
    "MaxPool rounded up": chain("MaxPool", kernel_shape=[5, 5], strides=[2, 2], ceil_mode=1),
    "MaxPool same": chain("MaxPool", kernel_shape=[2, 3], strides=[2, 3], auto_pad="SAME_LOWER"),
    "AveragePool rounded up": chain("AveragePool", {}, 19, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "AveragePool rounded up, counted": chain(
        "AveragePool", {}, 19, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1
    ),
    "ConvTranspose": chain(
        "ConvTranspose",
        {"w": constant(2, 2, 3, 2), "b": constant(4)},
        group=2,
        strides=[2, 3],
        pads=[1, 0, 0, 1],
        output_padding=[1, 0],
    ),
    "ConvTranspose same": chain("ConvTranspose", {"w": constant(2, 3, 3, 3)}, strides=[2, 2], auto_pad="SAME_UPPER"),
    "ConvTranspose to a size": chain(
        "ConvTranspose", {"w": constant(2, 3, 3, 3)}, strides=[2, 2], output_shape=[12, 16]
    ),
    "Conv of sequences": (
        flattened(node("Reshape", ["x", "s"], "r"), node("Conv", ["r", "w"], strides=[2], pads=[1, 0])),
        {"s": numbers(0, 2, 48), "w": constant(3, 2, 3)},
        13,
    ),
    "Resize nearest": chain(
        "Resize",
        {"r": None, "s": np.array([1, 1, 2, 1.5], np.float32)},
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "Resize linear": chain("Resize", {"r": None, "s": None, "z": numbers(1, 2, 9, 5)}, mode="linear"),
    "Resize to corners": chain(
        "Resize",
        {"r": None, "s": np.array([1, 1, 2, 1.5], np.float32)},
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "Resize 10": chain("Resize", {"s": np.array([1, 1, 2, 3], np.float32)}, 10, mode="nearest"),
    "Upsample": chain("Upsample", {"s": np.array([1, 1, 2, 2], np.float32)}, 9, mode="linear"),
    "Upsample 7": chain("Upsample", {}, 7, mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]),
    "Expand": (
        flattened(node("ReduceMax", ["x"], "r", axes=[1]), node("Expand", ["r", "s"])),
        {"s": numbers(3, 1, 1)},
        13,
    ),
    "Tile": chain("Tile", {"s": numbers(1, 2, 1, 3)}),
    "DepthToSpace": (
        flattened(node("SpaceToDepth", ["x"], "s", blocksize=2), node("DepthToSpace", ["s"], blocksize=2, mode="CRD")),
        {},
        13,
    ),
    "Gather table": chain("Gather", {"i": np.array([[3, 0], [1, 1]], dtype=np.int64)}, axis=2),
    "Concat constant": (
        flattened(node("Concat", ["c", "x", "d", "x"], axis=2)),
        {"c": constant(1, 2, 1, 8), "d": constant(1, 2, 3, 8)},
        13,
    ),
    "Split evenly": ([helper.make_node("Split", ["x"], ["p", "y"], axis=3), *flattened()], {}, 11),
    "Split 18": ([helper.make_node("Split", ["x"], ["p", "q", "y"], axis=3, num_outputs=3), *flattened()], {}, 18),
    "Pad by a number": chain("Pad", {"p": numbers(*[0] * 7, 1), "v": np.array(1, dtype=np.float32)}),
    "Pad by edges": chain("Pad", {"p": numbers(0, 0, 1, 2, 0, 0, 0, 1)}, mode="edge"),
    "Pad by mirrors": chain("Pad", {"p": numbers(0, 0, 1, 2, 0, 0, 0, 1)}, mode="reflect"),
    "Pad cuts": chain("Pad", {"p": numbers(*[0] * 6, 2, -1)}),
    "Pad channels": chain("Pad", {"p": numbers(0, 1, *[0] * 6)}),
    "channels last inside": (
        flattened(
            node("Transpose", ["x"], "l", perm=[0, 2, 3, 1]),
            node("MatMul", ["l", "w"], "m"),
            node("Transpose", ["m"], "y", perm=[0, 3, 1, 2]),
        ),
        {"w": constant(2, 3)},
        13,
    ),
    "Constant number": (
        flattened(helper.make_node("Constant", [], ["c"], value_float=1.5), node("Add", ["x", "c"])),
        {},
        13,
    ),
}


ONE_BY_ONE = ("Resize linear", "Concat constant")  # they hold the size of the batch, which is 1


def runtime(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", ["batch", 1])
def test_every_operator_agrees_with_onnxruntime(name, batch, tmp_path):
    nodes, constants, opset = CASES[name]
    model = model_of(nodes, constants, (batch, *SHAPE), opset)
    network = read_onnx(write(tmp_path, model))
    images = torch.randn(3, *SHAPE)
    if batch == 1 or opset < 10 or name in ONE_BY_ONE:
        expected = torch.cat([runtime(model, image[None]) for image in images])
    else:
        expected = runtime(model, images)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


def test_flatten_of_everything(tmp_path):
    """For one image the row of all entries is the batch of one."""
    weight = constant(PIXELS, 3)
    nodes = [node("Flatten", ["x"], "f", axis=0), node("Gemm", ["f", "w"], "out")]
    images = torch.rand(2, *SHAPE)
    network = read_onnx(write(tmp_path, model_of(nodes, {"w": weight}, shape=(1, *SHAPE))))
    torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(weight))


def test_reshape_by_computed_shape(tmp_path):
    nodes = [
        node("Shape", ["x"], "s"),
        node("Gather", ["s", "zero"], "n", axis=0),
        node("Unsqueeze", ["n", "axis"], "n1"),
        node("Concat", ["n1", "rest"], "target", axis=0),
        node("Reshape", ["x", "target"], "out"),
    ]
    constants = {"zero": np.array(0, dtype=np.int64), "axis": numbers(0), "rest": numbers(-1)}
    network = read_onnx(write(tmp_path, model_of(nodes, constants)))
    images = torch.randn(3, *SHAPE)
    assert torch.equal(network(images), images.flatten(1))


def test_double_precision_is_kept(tmp_path):
    nodes = on_vectors(node("MatMul", ["f", "w"], "out"))
    weight = constant(PIXELS, 3, dtype=np.float64)
    network = read_onnx(write(tmp_path, model_of(nodes, {"w": weight})))
    assert network.dtype == torch.float64
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(weight), rtol=0, atol=1e-12)


def test_vector_input(tmp_path):
    path = write(tmp_path, model_of([node("MatMul", ["x", "w"], "out")], {"w": constant(PIXELS, 3)}, ("n", PIXELS)))
    network = read_onnx(path, SHAPE, Reading(layout="nchw"))
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(network(images), runtime(onnx.load(path), images.flatten(1)), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        InvalidInputError, match=r"model.onnx.*input 'x' of shape \['free', 96\]: expected input_shape="
    ):
        read_onnx(path)
    with pytest.raises(InvalidInputError, match=r"input_shape \(1, 6, 8\): expected one that fits"):
        read_onnx(path, (1, 6, 8))
    with pytest.raises(InvalidInputError, match=r"input shape \(96,\): expected \(channels, height, width\)"):
        read_onnx(path, (96,))


def test_free_sizes(tmp_path):
    path = write(tmp_path, model_of(flattened(node("Relu", ["x"])), {}, ("n", 2, "h", "w")))
    assert read_onnx(path, SHAPE).num_classes == PIXELS
    with pytest.raises(InvalidInputError, match="to be given for the free sizes"):
        read_onnx(path)
    with pytest.raises(InvalidInputError, match=r"input_shape \(3, 6, 8\): expected one that fits"):
        read_onnx(path, (3, 6, 8))


def two_values(kind):
    return flattened(node("Relu", ["x"], "r"), node(kind, ["x", "r"])), {}, 13


REFUSED = {
    "unknown": (chain("Det"), r"operator Det \(node 'the_Det'\): is not supported"),
    "branch": (chain("Sign"), "operator Sign .*it jumps; Clip"),
    "sorted": (
        ([helper.make_node("TopK", ["x", "k"], ["y", "i"], name="top"), *flattened()], {"k": numbers(2)}, 13),
        "operator TopK .*ReduceMax and MaxPool are the nearest",
    ),
    "classes in place of logits": (chain("ArgMax", axis=1), "operator ArgMax .*end the file with these"),
    "shape of the data": (chain("NonZero"), "operator NonZero .*Gather with a constant index"),
    "jumping shrink": (chain("Shrink", lambd=0.5, bias=0.25), "operator Shrink .*jumps"),
    "third norm": (chain("LpPool", kernel_shape=[2, 2], p=3), "operator LpPool .*order 3"),
    "clip to nothing": (
        chain("Clip", {"a": np.array(1, dtype=np.float32), "b": np.array(0, dtype=np.float32)}),
        "operator Clip .*ascending",
    ),
    "power of a value": (two_values("Pow"), "operator Pow .*one constant exponent"),
    "matrices of other channels": (
        chain("MatMul", {"w": constant(3, 8, 5)}),
        r"operator MatMul .*samples of shape \(2, 6, 8\)",
    ),
    "vector first": (
        (flattened(node("MatMul", ["w", "x"])), {"w": constant(6)}, 13),
        "operator MatMul .*constant vector",
    ),
    "other ranks": (
        (
            flattened(
                node("Gather", ["x", "i"], "r", axis=1), node("Squeeze", ["r", "a"], "q"), node("Add", ["x", "q"])
            ),
            {"a": numbers(1), "i": numbers(0)},
            13,
        ),
        "operator Add .*expected as many dimensions",
    ),
    "whole mean": (chain("ReduceMean"), "operator ReduceMean .*the batch among them"),
    "region": (
        chain(
            "Resize",
            {"roi": constant(8), "s": np.array([1, 1, 2, 2], np.float32)},
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        "operator Resize .*region",
    ),
    "flatten": (chain("Flatten", axis=2), "operator Flatten .*axis=2"),
    "batch transposed": (chain("Transpose", perm=[1, 0, 2, 3]), "operator Flatten .*batch first"),
    "transpose default": (chain("Transpose"), "operator Flatten .*batch first"),
    "batch reshaped": (chain("Reshape", {"s": numbers(2, -1)}), "operator Reshape .*mixes the batch"),
    "batch in one row": (chain("Reshape", {"s": numbers(-1)}), "operator Flatten .*batch first"),
    "a constant of more dimensions": (
        (
            flattened(node("Reshape", ["x", "s"], "r"), node("MatMul", ["r", "c"])),
            {"s": numbers(-1, 8), "c": constant(1, 8, 8)},
            13,
        ),
        "operator MatMul .*more dimensions than the value's 2",
    ),
    "an answer in pieces": (
        ([node("Reshape", ["x", "s"], "out")], {"s": numbers(-1, 48)}, 13),
        "batch in one dimension with others",
    ),
    "batch gathered": (chain("Gather", {"i": numbers(0)}, axis=0), "operator Gather .*batch dimension"),
    "batch sliced": (
        chain("Slice", {"s": numbers(0), "e": numbers(1), "a": numbers(0)}),
        "operator Slice .*batch",
    ),
    "batch concatenated": (chain("Concat", axis=0), "operator Concat .*batch"),
    "batch unsqueezed": (chain("Unsqueeze", {"a": numbers(0)}), "operator Unsqueeze .*expected 1..4"),
    "batch averaged": (chain("ReduceMean", axes=[0]), "operator ReduceMean .*batch"),
    "squeeze all": (chain("Squeeze"), "Squeeze without axes"),
    "huge pad": (chain("Pad", {"p": numbers(*[0] * 7, 2**40)}), "padding .* is not supported"),
    "pool dilated": (
        chain("AveragePool", {}, 19, kernel_shape=[2, 2], dilations=[2, 2]),
        "average pooling with dilation",
    ),
    "training": (
        chain("BatchNormalization", {n: abs(constant(2)) for n in "gbmv"}, 14, training_mode=1),
        "inference mode",
    ),
    "transposed": (
        (on_vectors(node("Gemm", ["f", "w"], "out", transA=1)), {"w": constant(1, 3)}, 13),
        "Gemm that transposes",
    ),
    "precision": (chain("Cast", to=TensorProto.DOUBLE), "change of precision"),
    "old": (chain("Relu", {}, 6), r"operator set 6: expected 7"),
    "constant output": (
        ([node("Identity", ["c"], "out")], {"c": constant(1, 3)}, 13),
        "does not depend on the input",
    ),
    "random": (
        ([node("RandomNormal", [], "r", shape=[8]), *flattened(node("Add", ["x", "r"]))], {}, 13),
        "operator RandomNormal .*not supported on constants",
    ),
    "second output": (
        ([helper.make_node("MaxPool", ["x"], ["m", "out"], kernel_shape=[2, 2])], {}, 13),
        "output 'out' is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_operators_are_named(name, tmp_path):
    (nodes, constants, opset), message = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=rf"model file '.*model.onnx': .*{message}"):
        read_onnx(write(tmp_path, model_of(nodes, constants, opset=opset)))


def test_unknown_attribute_is_refused(tmp_path, monkeypatch):
    model = model_of(chain("Relu")[0], {})
    monkeypatch.setattr("onnx.checker.check_model", lambda model: None)
    model.graph.node[0].attribute.append(helper.make_attribute("consumed", 1))
    with pytest.raises(UnsupportedOperationError, match=r"Relu .*attribute 'consumed' is not supported"):
        read_onnx(write(tmp_path, model))


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((2, *SHAPE), TensorProto.FLOAT, r"shape \[2, 2, 6, 8\]: expected one image an entry: \(N, C, H, W\)"),
        (("n", 1, *SHAPE), TensorProto.FLOAT, r"expected one image an entry: \(N, C, H, W\)"),
        (("n", *SHAPE), TensorProto.FLOAT16, "not float32 or float64"),
    ],
)
def test_inputs_that_are_not_images_are_refused(shape, kind, message, tmp_path):
    with pytest.raises(UnsupportedOperationError, match=message):
        read_onnx(write(tmp_path, model_of(flattened(node("Relu", ["x"])), {}, shape, kind=kind)))


def small_model():
    nodes = on_vectors(node("Gemm", ["f", "w", "b"], "g"), node("Relu", ["g"], "out"))
    return model_of(nodes, {"w": constant(PIXELS, 3), "b": constant(3)})


INVALID = {
    "NaN": (
        lambda model: model.graph.initializer[1].CopyFrom(numpy_helper.from_array(constant(3) * np.nan, "b")),
        "a bias with NaN",
    ),
    "shape": (
        lambda model: model.graph.initializer[0].CopyFrom(numpy_helper.from_array(constant(95, 3), "w")),
        "linear weight of shape",
    ),
    "short data": (lambda model: setattr(model.graph.initializer[0], "raw_data", b"1234"), ""),
    "missing value": (lambda model: model.graph.initializer.pop(), ""),
    "image output": (
        lambda model: model.graph.output[0].CopyFrom(helper.make_tensor_value_info("x", 1, ["batch", *SHAPE])),
        "",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_networks(name, tmp_path):
    change, message = INVALID[name]
    model = small_model()
    change(model)
    with pytest.raises(ModelFileError, match=rf"^model file '.*model.onnx' is not (a )?valid [^\n]*{message}[^\n]*$"):
        read_onnx(write(tmp_path, model))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ModelFileError, match="nothing.onnx': expected an existing ONNX file"):
        read_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(ModelFileError, match="expected an existing ONNX file"):
        read_onnx(tmp_path)
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    with pytest.raises(ModelFileError, match="empty.onnx' is not valid ONNX"):
        read_onnx(empty)


def test_corrupt_files_raise_only_our_errors(tmp_path):
    data = small_model().SerializeToString()
    source = random.Random(0)
    path = tmp_path / "corrupt.onnx"
    messages = []
    for attempt in range(400):
        if attempt % 4 == 0:
            corrupt = data[: source.randrange(len(data))]
        elif attempt % 4 == 1:
            corrupt = source.randbytes(source.randrange(200))
        else:
            changed = bytearray(data)
            for _ in range(source.randrange(1, 6)):
                position = source.randrange(len(data)) if attempt % 4 == 2 else source.randrange(150)
                changed[position if source.random() < 0.5 else -1 - position] = source.randrange(256)
            corrupt = bytes(changed)
        path.write_bytes(corrupt)
        try:
            read_onnx(path)
        except FlowverifyError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all("corrupt.onnx" in message and "\n" not in message for message in messages)


def test_huge_constants_are_refused(tmp_path):
    nodes = [
        node("ConstantOfShape", ["s"], "c"),
        *flattened(node("Add", ["x", "c"])),
    ]
    with pytest.raises(UnsupportedOperationError, match="ConstantOfShape .*so many entries"):
        read_onnx(write(tmp_path, model_of(nodes, {"s": numbers(2**20, 2**20)})))
    nodes = [node("MatMul", ["column", "row"], "c"), *flattened(node("Add", ["x", "c"]))]
    with pytest.raises(UnsupportedOperationError, match="MatMul .*so many entries"):
        read_onnx(write(tmp_path, model_of(nodes, {"column": constant(2**15, 1), "row": constant(1, 2**15)})))


def test_constants_and_values_of_fewer_dimensions_are_broadcast(tmp_path):
    """As recurrent layers written out step by step have them: what is made of a constant state, added to a step."""
    nodes = [
        node("Reshape", ["x", "rows"], "r"),  # (6, 8)
        node("MatMul", ["state", "weights"], "m"), node("Tanh", ["m"], "t"), node("Add", ["t", "r"], "a"),  # (1, 6, 8)
        *flattened(node("Add", ["a", "r"])),
    ]  # fmt: skip
    stored = {"rows": numbers(-1, 8), "state": constant(1, 1, 4), "weights": constant(4, 8)}
    model, images = model_of(nodes, stored), torch.rand(3, *SHAPE)
    expected = torch.cat([runtime(model, image[None]) for image in images])
    torch.testing.assert_close(read_onnx(write(tmp_path, model))(images), expected, rtol=1e-5, atol=1e-6)


def recurrent(kind, gates, hidden=3, **attributes):
    """Rows of the first channel as a sequence: steps first, as exporters write it."""
    sides = 2 if attributes.get("direction") == "bidirectional" else 1
    constants = {
        "zero": np.array(0, dtype=np.int64), "one": numbers(1),
        "w": constant(sides, gates * hidden, 8), "r": constant(sides, gates * hidden, hidden),
        "b": constant(sides, 2 * gates * hidden), "flat": numbers(0, -1),
    }  # fmt: skip
    nodes = [
        node("Gather", ["x", "zero"], "rows", axis=1),
        node("Transpose", ["rows"], "steps", perm=[1, 0, 2]),
        helper.make_node(kind, ["steps", "w", "r", "b"], ["all", "last"], hidden_size=hidden, **attributes),
    ]
    return nodes, constants


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "gates", "attributes"),
    [
        ("LSTM", 4, {}),
        ("GRU", 3, {}),
        ("GRU", 3, {"linear_before_reset": 1}),
        ("RNN", 1, {}),
        ("RNN", 1, {"activations": ["Relu"]}),
    ],
)
def test_recurrent_operators_agree_with_onnxruntime(kind, gates, attributes, direction, tmp_path):
    if "activations" in attributes and direction == "bidirectional":
        attributes = {"activations": ["Relu", "Relu"]}
    nodes, constants = recurrent(kind, gates, direction=direction, **attributes)
    ends = [
        node("Transpose", ["all"], "by_image", perm=[2, 0, 1, 3]),
        node("Flatten", ["by_image"], "whole"),
        node("Transpose", ["last"], "sides", perm=[1, 0, 2]),
        node("Reshape", ["sides", "flat"], "state"),
        node("Concat", ["whole", "state"], "out", axis=1),
    ]
    model = model_of([*nodes, *ends], constants, opset=14)
    network, images = read_onnx(write(tmp_path, model)), torch.randn(3, *SHAPE)
    torch.testing.assert_close(network(images), runtime(model, images), rtol=1e-5, atol=1e-5)


def test_old_recurrent_structure(tmp_path):
    """As torch's older exporter ends it: Squeeze of the directions, then the last step by Gather."""
    nodes, constants = recurrent("LSTM", 4)
    ends = [node("Squeeze", ["all", "one"], "h"), node("Gather", ["h", "last_step"], "out", axis=0)]
    model = model_of([*nodes, *ends], constants | {"last_step": np.array(-1, dtype=np.int64)})
    network, images = read_onnx(write(tmp_path, model)), torch.randn(3, *SHAPE)
    torch.testing.assert_close(network(images), runtime(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13])
def test_constants_are_computed_under_the_operator_set_of_the_file(opset, tmp_path):
    """x.view(x.size(0), -1) as torch wrote it: axes were attributes before set 13."""
    axes = {} if opset >= 13 else {"axes": [0]}
    nodes = [
        node("Shape", ["x"], "s"),
        node("Gather", ["s", "zero"], "n", axis=0),
        node("Unsqueeze", ["n", "axis"] if opset >= 13 else ["n"], "n1", **axes),
        node("Concat", ["n1", "rest"], "target", axis=0),
        node("Reshape", ["x", "target"], "out"),
    ]
    constants = {"zero": np.array(0, dtype=np.int64), "rest": numbers(-1)} | (
        {"axis": numbers(0)} if opset >= 13 else {}
    )
    network, images = read_onnx(write(tmp_path, model_of(nodes, constants, opset=opset))), torch.randn(3, *SHAPE)
    assert torch.equal(network(images), images.flatten(1))


def test_half_precision_weights_are_held_exactly(tmp_path):
    weight = constant(PIXELS, 3).astype(np.float16)
    nodes = on_vectors(node("Cast", ["w"], "wide", to=TensorProto.FLOAT), node("MatMul", ["f", "wide"], "out"))
    network, images = read_onnx(write(tmp_path, model_of(nodes, {"w": weight}))), torch.randn(2, *SHAPE)
    assert network.dtype == torch.float32
    torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(weight).float())


def test_external_data(tmp_path):
    weight = constant(PIXELS, 3)
    model = model_of(on_vectors(node("MatMul", ["f", "w"], "out")), {"w": weight})
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= weight.nbytes
    images = torch.randn(2, *SHAPE)
    expected = images.flatten(1) @ torch.from_numpy(weight)
    torch.testing.assert_close(read_onnx(tmp_path / "model.onnx")(images), expected, rtol=1e-5, atol=1e-5)
