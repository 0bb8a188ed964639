import copy
import os

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network import (
    Add,
    Concatenate,
    Graph,
    Index,
    Network,
    Node,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Subtract,
    fold,
    read_onnx,
    write_onnx,
)
from flowverify.network.curves import Erf, Exp, Log, Power, Softplus
from flowverify.network.operations import CANONICAL, MatrixProduct, Multiply, Softmax, Standardise

SHAPE = (2, 6, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sequential(*modules):
    return Network.sequential(SHAPE, [*modules, nn.Flatten()])


def several_inputs():
    shape = SHAPE
    return Network(
        shape,
        [
            Node("a", nn.ReLU(), ("input",), shape),
            Node("b", Add(), ("input", "a", "a"), shape),
            Node("c", Subtract(), ("b", "input"), shape),
            Node("d", Concatenate(2), ("c", "a", "b"), (2, 6, 24)),
            Node("e", nn.Flatten(), ("d",), (288,)),
        ],
    )


def products():
    shape = SHAPE
    return Network(
        shape,
        [
            Node("a", nn.Tanh(), ("input",), shape),
            Node("b", Multiply(), ("a", "input"), shape),
            Node("c", Permute((0, 2, 1)), ("a",), (2, 8, 6)),
            Node("d", MatrixProduct(), ("b", "c"), (2, 6, 6)),
            Node("e", nn.Flatten(), ("d",), (72,)),
        ],
    )


NETWORKS = {
    "linear": lambda: sequential(nn.Flatten(), nn.Linear(96, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)),
    "linear on rows": lambda: sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)),
    "convolution": lambda: sequential(nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 2), (1, 2), groups=2)),
    "average pool": lambda: sequential(nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1, count_include_pad=False)),
    "max pool": lambda: sequential(nn.MaxPool2d((2, 3), (1, 2), (0, 1), (2, 1))),
    "activations": lambda: sequential(nn.LeakyReLU(0.3), nn.Sigmoid(), nn.Tanh()),
    "scale": lambda: sequential(ScaleShift(torch.rand(2, 1, 1), 0.0), ScaleShift(1.0, torch.rand(8))),
    "scale and shift": lambda: sequential(ScaleShift(2.0, torch.rand(2, 6, 8)), ScaleShift()),
    "shapes": lambda: sequential(Reshape((4, 24)), Permute((1, 0)), Pad((1, 0, 2, 0))),
    "index": lambda: sequential(Index(2, slice(1, 7, 2)), Index(1, [2, -1, 2]), Index(0, -1)),
    "curves": lambda: sequential(nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()),
    "more curves": lambda: sequential(nn.Softsign(), Erf(), Softplus(), Log(), Exp(), Power(2.0), Power(1.5)),
    "normalised": lambda: sequential(Softmax(0), Standardise(0.1), Standardise(0.01, centred=False), Softmax(2)),
    "products": products,
    "several inputs": several_inputs,
}


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["input"]
    assert [entry.name for entry in session.get_outputs()] == ["output"]
    return torch.from_numpy(session.run(["output"], {"input": images.numpy()})[0])


def test_every_operation_is_written_somewhere():
    written = {type(node.operation) for make in NETWORKS.values() for node in make().nodes}
    assert written == set(CANONICAL)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    network = NETWORKS[name]()
    path = tmp_path / "network.onnx"
    write_onnx(network, path)
    images = torch.randn(3, *SHAPE)
    expected = network(images)
    torch.testing.assert_close(read_onnx(path)(images), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run(path, images), expected, rtol=1e-5, atol=1e-5)
    model = onnx.load(path)
    assert model.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 13)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("structure", ["dense", "convolution"])
def test_folded_network_with_reference_is_written(structure, tmp_path):
    network = sequential(
        ScaleShift(3.0, -0.1), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    folded = fold(network, structure)
    flow, reference = torch.randn(3, network.grid.edges), torch.rand(SHAPE)
    path = tmp_path / "folded.onnx"
    write_onnx(folded.with_reference(reference), path)
    expected = network(network.grid.apply(reference, flow))
    torch.testing.assert_close(run(path, folded.encode(flow)), expected, rtol=1e-4, atol=1e-5)


def test_graph_without_operations(tmp_path):
    write_onnx(Graph((4,), []), tmp_path / "identity.onnx")
    values = torch.randn(2, 4)
    assert torch.equal(run(tmp_path / "identity.onnx", values), values)


def test_double_precision_is_rounded(tmp_path):
    network = NETWORKS["linear"]().double()
    write_onnx(network, tmp_path / "network.onnx")
    read = read_onnx(tmp_path / "network.onnx")
    assert read.dtype == torch.float32
    assert torch.equal(read.nodes[1].operation.weight, network.nodes[1].operation.weight.float())
    network.nodes[1].operation.weight[0, 0] = 1e300
    with pytest.raises(InvalidInputError, match=r"'1_Linear' \(Linear\): given a weight too large for float32"):
        write_onnx(network, tmp_path / "network.onnx")


def test_the_same_network_gives_the_same_bytes(tmp_path):
    network = NETWORKS["convolution"]()
    for name, same in (("first", network), ("second", copy.deepcopy(network))):
        write_onnx(same, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ModelFileError, match=r"network.onnx' cannot be written: No space left on device"):
        write_onnx(NETWORKS["linear"](), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.onnx"]


def test_missing_folder(tmp_path):
    with pytest.raises(ModelFileError, match="cannot be written: No such file or directory"):
        write_onnx(NETWORKS["linear"](), tmp_path / "nowhere" / "network.onnx")
