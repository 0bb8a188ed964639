"""Inputs in every shape that holds one image, and outputs whose order is what counts."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnknownNameError, UnsupportedOperationError
from flowverify.network import from_torch, read_onnx
from flowverify.network.reading import InputForm, Reading, input_form
from flowverify.network.rounding import rounding_of_value

COLOUR, GREY = (3, 4, 5), (1, 4, 5)


def weights(outputs: int, pixels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((outputs, pixels)).astype(np.float32)


def write(path, nodes, sizes, initializers, outputs=("out",), rank=2):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(sizes))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def dense(path, sizes, shape, *last, outputs=3, named=("out",)):
    """x, as one row, times a matrix: its columns are in the order of the entries of x."""
    pixels = int(np.prod(shape))
    nodes = [
        helper.make_node("Reshape", ["x", "row"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["scores" if last else "out"], transB=1),
        *last,
    ]
    constants = {"row": np.array([-1, pixels], np.int64), "w": weights(outputs, pixels)}
    return write(path, nodes, sizes, constants, named)


def entries(images: Tensor, layout: str) -> Tensor:
    return (images.permute(0, 2, 3, 1) if layout == "nhwc" else images).flatten(1)


SIZES = [
    (GREY, (None, 1, 4, 5), "nchw"),
    (GREY, (1, 1, 4, 5), "nchw"),
    (GREY, (None, 4, 5, 1), "nhwc"),
    (GREY, (None, 4, 5), "nchw"),
    (GREY, (1, 4, 5), "nchw"),
    (GREY, (4, 5), "nchw"),
    (GREY, (None, 20), "nchw"),
    (GREY, (1, 20, 1), "nchw"),
    (GREY, (1, 1, 20), "nchw"),
    (GREY, (20,), "nchw"),
    (GREY, (1, 1, 1, 20), "nchw"),
    (GREY, (None, 20, 1, 1), "nchw"),
    (GREY, (None, None, None, None), "nchw"),
    (COLOUR, (None, 3, 4, 5), "nchw"),
    (COLOUR, (None, 4, 5, 3), "nhwc"),
    (COLOUR, (3, 4, 5), "nchw"),
    (COLOUR, (4, 5, 3), "nhwc"),
]


@pytest.mark.parametrize(("shape", "sizes", "layout"), SIZES)
def test_inputs_of_every_shape(shape, sizes, layout, tmp_path) -> None:
    network = read_onnx(dense(tmp_path / "m.onnx", sizes, shape), shape)
    images = torch.rand(2, *shape)
    expected = entries(images, layout) @ torch.from_numpy(weights(3, images[0].numel())).T
    assert network.input_shape == shape
    torch.testing.assert_close(network(images), expected)
    assert network.notes[0].startswith("input (")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", [(None, 60), (60,), (1, 60, 1), (1, 1, 1, 60), (None, 60, 1, 1)])
def test_rows_of_coloured_pixels_need_an_order(sizes, layout, tmp_path) -> None:
    path = dense(tmp_path / "m.onnx", sizes, COLOUR)
    with pytest.raises(InvalidInputError, match=r"order of \(C, H, W\) or of \(H, W, C\)\? expected layout nchw or"):
        read_onnx(path, COLOUR)
    images = torch.rand(2, *COLOUR)
    network = read_onnx(path, COLOUR, Reading(layout=layout))
    expected = entries(images, layout) @ torch.from_numpy(weights(3, 60)).T
    torch.testing.assert_close(network(images), expected)
    assert network.notes[0].endswith("channels last" if layout == "nhwc" else "channels first")


def test_a_convolution_over_a_row_of_pixels_says_nothing_of_their_order(tmp_path) -> None:
    """Its one channel is no channel of the image. Files made by MATLAB begin so."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Flatten", ["c"], ["out"])]
    path = write(tmp_path / "m.onnx", nodes, (1, 1, 1, 60), {"w": weights(3, 60).reshape(3, 1, 1, 60)})
    with pytest.raises(InvalidInputError, match="expected layout nchw or nhwc to be given"):
        read_onnx(path, COLOUR)
    images = torch.rand(2, *COLOUR)
    for layout in ("nchw", "nhwc"):
        expected = entries(images, layout) @ torch.from_numpy(weights(3, 60)).T
        torch.testing.assert_close(read_onnx(path, COLOUR, Reading(layout=layout))(images), expected)
    assert read_onnx(path, (1, 1, 60)).input_shape == (1, 1, 60)
    assert read_onnx(path).input_shape == (1, 1, 60)


def test_a_reshape_tells_the_order_of_a_row(tmp_path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "image"], ["i"]),
        helper.make_node("Flatten", ["i"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["out"], transB=1),
    ]
    for sizes, layout in (((1, 3, 4, 5), "nchw"), ((1, 4, 5, 3), "nhwc")):
        path = write(tmp_path / "m.onnx", nodes, (1, 60), {"image": np.array(sizes, np.int64), "w": weights(3, 60)})
        images = torch.rand(2, *COLOUR)
        expected = entries(images, layout) @ torch.from_numpy(weights(3, 60)).T
        torch.testing.assert_close(read_onnx(path, COLOUR)(images), expected)


def test_the_first_transpose_tells_the_layout(tmp_path) -> None:
    """Without a word from outside, whatever the sizes."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Flatten", ["t"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["out"], transB=1),
    ]
    for height, width, channels in ((8, 8, 3), (4, 4, 4), (2, 3, 6)):
        pixels = channels * height * width
        path = write(tmp_path / "m.onnx", nodes, ("N", height, width, channels), {"w": weights(2, pixels)})
        network = read_onnx(path)
        assert network.input_shape == (channels, height, width)
        images = torch.rand(2, channels, height, width)
        torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(weights(2, pixels)).T)
        with pytest.raises(InvalidInputError, match="layout nchw: expected nhwc, as input 'x'"):
            read_onnx(path, reading=Reading(layout="nchw"))


def test_sizes_alone() -> None:
    def shape(*sizes, **more):
        return input_form(sizes, more.get("given"), more.get("layout"), more.get("told"), "input").shape

    assert shape(0, 3, 32, 32) == shape(0, 32, 32, 3) == (3, 32, 32)
    assert shape(0, 1, 28, 28) == shape(0, 28, 28, 1) == shape(0, 28, 28) == (1, 28, 28)
    assert shape(0, 8, 8, 8, layout="nhwc") == (8, 8, 8)
    assert shape(0, 0, 0, 0, given=(3, 5, 7), told="nchw") == (3, 5, 7)
    for sizes in ((0, 8, 8, 8), (0, 5, 6, 7), (8, 8, 8)):
        with pytest.raises(InvalidInputError, match="channels first or last"):
            shape(*sizes)
    with pytest.raises(InvalidInputError, match="channels first or last"):
        shape(0, 0, 0, 0, given=(3, 3, 3))
    with pytest.raises(InvalidInputError, match=r"input_shape \(3, 8, 8\): expected one that fits"):
        shape(0, 3, 8, 9, given=(3, 8, 8))
    for sizes in ((), (2, 3, 8, 8), (0, 1, 3, 8, 8)):
        with pytest.raises(UnsupportedOperationError, match="expected one image an entry"):
            shape(*sizes)
    assert InputForm((4, 5, 3), COLOUR, "nhwc").note == "input (N, 4, 5, 3): 3 x 4 x 5 images, channels last"


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Sigmoid"])
@pytest.mark.parametrize("after", [(), ("Identity",), ("Flatten",)])
def test_endings_that_keep_the_order_are_dropped(kind, after, tmp_path) -> None:
    names = ["scores", *(f"v{k}" for k in range(len(after))), "out"]
    last = [
        helper.make_node(op, [a], [b]) for op, (a, b) in zip((kind, *after), itertools.pairwise(names), strict=True)
    ]
    network = read_onnx(dense(tmp_path / "m.onnx", (None, 1, 4, 5), GREY, *last))
    images = torch.rand(2, *GREY)
    torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(weights(3, 20)).T)
    assert network.notes[1] == f"final {kind} dropped: the order of classes is the claim"


def test_a_softmax_over_something_else_stays(tmp_path) -> None:
    """Over an axis of size 1 it is constant: to drop it would invent an order."""
    last = [
        helper.make_node("Reshape", ["scores", "column"], ["c"]),
        helper.make_node("Softmax", ["c"], ["s"], axis=-1),
        helper.make_node("Flatten", ["s"], ["out"]),
    ]
    path = dense(tmp_path / "m.onnx", (None, 1, 4, 5), GREY, *last)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 3, 1], np.int64), "column"))
    onnx.save(model, path)
    network = read_onnx(path)
    assert len(network.notes) == 1
    torch.testing.assert_close(network(torch.rand(2, *GREY)), torch.ones(2, 3))


def test_a_softmax_of_one_answer_is_no_logit(tmp_path) -> None:
    """It is 1 for every image: the sign of what it reads decides nothing."""
    last = helper.make_node("Softmax", ["scores"], ["out"], axis=1)
    network = read_onnx(dense(tmp_path / "m.onnx", (None, 1, 4, 5), GREY, last, outputs=1))
    torch.testing.assert_close(network(torch.rand(5, *GREY)), torch.tensor([[0.0, 1.0]]).expand(5, 2))


@pytest.mark.parametrize("last", [(), (helper.make_node("Sigmoid", ["scores"], ["out"]),)])
def test_one_logit_is_two_classes(last, tmp_path) -> None:
    network = read_onnx(dense(tmp_path / "m.onnx", (None, 1, 4, 5), GREY, *last, outputs=1))
    images = torch.rand(40, *GREY)
    logit = images.flatten(1) @ torch.from_numpy(weights(1, 20)).T
    torch.testing.assert_close(network(images), torch.cat([torch.zeros_like(logit), logit], 1))
    assert network.notes[-1] == "one output: class 1 where its logit is positive, else class 0"


@pytest.mark.parametrize("named", [True, False], ids=["dictionaries", "an array"])
def test_scores_beside_the_class_as_scikit_learn_writes_them(tmp_path, named: bool) -> None:
    """The structure of skl2onnx for an MLPClassifier, with ``zipmap`` and without."""
    constants = {
        "w": weights(6, 20).T, "b": np.zeros(6, np.float32), "v": weights(3, 6).T, "c": np.ones(3, np.float32),
        "classes": np.array([4, 7, 9], np.int64), "shape": np.array([-1], np.int64),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Cast", ["X"], ["x"], to=TensorProto.FLOAT),
        node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Relu", ["a"], ["h"]),
        node("MatMul", ["h", "v"], ["n"]), node("Add", ["n", "c"], ["l"]), node("Softmax", ["l"], ["p"], axis=1),
        node("ArgMax", ["p"], ["k"], axis=1),
        node("ArrayFeatureExtractor", ["classes", "k"], ["e"], domain="ai.onnx.ml"),
        node("Reshape", ["e", "shape"], ["label"]),
    ]  # fmt: skip
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 3])
    if named:
        nodes.append(node("ZipMap", ["p"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=[4, 7, 9]))
        entries = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        scores = helper.make_value_info("scores", helper.make_sequence_type_proto(entries))
    else:
        nodes.insert(7, node("Identity", ["p"], ["scores"]))
    graph = helper.make_graph(
        nodes, "m", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 20])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, [None]), scores],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    network = read_onnx(path, (1, 4, 5))
    assert "output 'scores' taken" in network.notes
    assert "final Softmax dropped: the order of classes is the claim" in network.notes
    images = torch.rand(3, 1, 4, 5)
    w, v = torch.tensor(constants["w"]), torch.tensor(constants["v"])
    torch.testing.assert_close(network(images), (images.flatten(1) @ w).relu() @ v + 1)
    with pytest.raises(UnsupportedOperationError, match=r"ArrayFeatureExtractor|ArgMax"):
        read_onnx(path, (1, 4, 5), Reading(output="label"))


def test_one_of_several_outputs(tmp_path) -> None:
    twice = [helper.make_node("Neg", ["out"], ["other"]), helper.make_node("Exp", ["other"], ["strange"])]
    path = dense(tmp_path / "m.onnx", (None, 1, 4, 5), GREY, named=("out", "other", "strange"))
    model = onnx.load(path)
    model.graph.node.extend(twice)
    onnx.save(model, path)
    images = torch.rand(2, *GREY)
    expected = images.flatten(1) @ torch.from_numpy(weights(3, 20)).T
    torch.testing.assert_close(read_onnx(path, reading=Reading(output="out"))(images), expected)
    torch.testing.assert_close(read_onnx(path, reading=Reading(output="other"))(images), -expected)
    with pytest.raises(InvalidInputError, match="3 outputs: expected output= one of out, other, strange to be given"):
        read_onnx(path)
    with pytest.raises(InvalidInputError, match="output 'logits': expected output= one of out, other, strange"):
        read_onnx(path, reading=Reading(output="logits"))


def test_maps_of_one_pixel_are_classes(tmp_path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["out"])]
    kernel = np.random.default_rng(1).standard_normal((3, 1, 4, 5)).astype(np.float32)
    network = read_onnx(write(tmp_path / "m.onnx", nodes, (None, 1, 4, 5), {"w": kernel}, rank=4))
    images = torch.rand(2, *GREY)
    torch.testing.assert_close(network(images), images.flatten(1) @ torch.from_numpy(kernel).flatten(1).T)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.1307,), (0.3081,)), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0)), (None, (0.5,)), ((0.3,), None)]
)
def test_normalised_inputs(mean, std, tmp_path) -> None:
    """The file sees what it expects, and images stay as they are; the same for a module."""
    reading = Reading(mean=mean, std=std)
    module = nn.Sequential(nn.Flatten(), nn.Linear(60, 3, bias=False))
    module[1].weight.data = torch.from_numpy(weights(3, 60))
    images = torch.rand(2, *COLOUR)
    given = images.double()
    if mean is not None:
        given = given - torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
    if std is not None:
        given = given / torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
    for network in (
        read_onnx(dense(tmp_path / "m.onnx", (None, *COLOUR), COLOUR), reading=reading),
        from_torch(module, COLOUR, reading),
    ):
        torch.testing.assert_close(network(images), module(given.float()))
        torch.testing.assert_close(network.double()(images.double()), module.double()(given), rtol=1e-14, atol=1e-14)
        module.float()


def test_bad_readings(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="unknown layout 'chwn': expected one of nchw, nhwc"):
        Reading(layout="chwn")
    with pytest.raises(InvalidInputError, match=r"std \(0.5, 0.0\): expected finite numbers > 0"):
        Reading(std=(0.5, 0.0))
    with pytest.raises(InvalidInputError, match=r"mean \(nan,\): expected finite numbers"):
        Reading(mean=(float("nan"),))
    path = dense(tmp_path / "m.onnx", (None, *COLOUR), COLOUR)
    with pytest.raises(
        InvalidInputError, match=r"mean \(0.1, 0.2\): expected one number, or one for each of 3 channels"
    ):
        read_onnx(path, reading=Reading(mean=(0.1, 0.2)))


class Ended(nn.Module):
    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(20, outputs)
        self.kind = kind

    def forward(self, images: Tensor):
        scores = self.linear(images.flatten(1))
        match self.kind:
            case "softmax":
                return torch.softmax(scores, 1)
            case "log softmax, shaped":
                return nn.functional.log_softmax(scores, -1).reshape(-1, scores.shape[1], 1, 1)
            case "sigmoid":
                return torch.sigmoid(scores)
            case "two":
                return images, scores
        return scores


@pytest.mark.parametrize("kind", ["softmax", "log softmax, shaped", "sigmoid"])
def test_endings_of_modules(kind) -> None:
    module = Ended(kind, 3)
    network = from_torch(module, GREY)
    images = torch.rand(2, *GREY)
    torch.testing.assert_close(network(images), module.linear(images.flatten(1)))
    assert len(network.notes) == 1


@pytest.mark.parametrize("kind", ["", "sigmoid"])
def test_one_logit_of_modules(kind) -> None:
    module = Ended(kind, 1)
    network = from_torch(module, GREY)
    images = torch.rand(2, *GREY)
    logit = module.linear(images.flatten(1))
    torch.testing.assert_close(network(images), torch.cat([torch.zeros_like(logit), logit], 1))


def test_one_of_several_outputs_of_modules() -> None:
    module, images = Ended("two", 3), torch.rand(2, *GREY)
    torch.testing.assert_close(from_torch(module, GREY, Reading(output="1"))(images), module.linear(images.flatten(1)))
    with pytest.raises(UnsupportedOperationError, match="module that returns 2 values: expected output= a position"):
        from_torch(module, GREY)


def test_modules_with_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))

        def forward(self, images: Tensor) -> Tensor:
            return self.body(images.permute(0, 3, 1, 2))

    module, images = Last(), torch.rand(2, *COLOUR)
    network = from_torch(module, COLOUR, Reading(layout="nhwc"))
    torch.testing.assert_close(network(images), module.body(images))
    for layers in (nn.Sequential(nn.Flatten(), nn.Linear(60, 3)),):
        network = from_torch(layers, COLOUR, Reading(layout="nhwc"))
        torch.testing.assert_close(network(images), layers(images.permute(0, 2, 3, 1).contiguous()))


def test_a_file_that_is_read_wrongly_is_refused(tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    path = dense(tmp_path / "m.onnx", (None, *COLOUR), COLOUR)
    monkeypatch.setattr(InputForm, "arrange", lambda self, images: images.flip(-1))
    with pytest.raises(UnsupportedOperationError, match=r"answers \[.*\], where the file itself answers \["):
        read_onnx(path)


@pytest.mark.parametrize("wrong", [False, True])
def test_deep_networks_are_compared_as_sharply(wrong, tmp_path, monkeypatch) -> None:
    """A bound on rounding that multiplies from layer to layer would allow any answer: Marabou's network of six
    LeakyReLU layers has logits up to 10, and such a bound of 700,000."""
    pytest.importorskip("onnxruntime")
    generator, layers = np.random.default_rng(1), 7
    constants = {f"w{k}": generator.normal(0, 1, (20, 20)).astype(np.float32) for k in range(layers)}
    values = ["flat", *(f"v{k}" for k in range(layers - 1)), "out"]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"])]
    for k, (before, after) in enumerate(itertools.pairwise(values)):
        scores = [after] if k == layers - 1 else [f"s{k}"]
        nodes.append(helper.make_node("Gemm", [before, f"w{k}"], scores))
        if k < layers - 1:
            nodes.append(helper.make_node("LeakyRelu", scores, [after], alpha=0.1))
    path = write(tmp_path / "m.onnx", nodes, (None, *GREY), constants)
    network = read_onnx(path)
    images = torch.rand(4, *GREY)
    assert float(rounding_of_value(network, "out", images).min()) > 10 * float(network(images).abs().max())
    if wrong:
        monkeypatch.setattr(InputForm, "arrange", lambda self, images: images.flip(-1))
        with pytest.raises(UnsupportedOperationError, match="where the file itself answers"):
            read_onnx(path)
