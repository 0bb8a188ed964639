import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network import load_network, write_onnx

SHAPE = (1, 4, 5)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 3))


def test_every_kind_of_source_gives_the_same_network(tmp_path):
    network = load_network(module(), SHAPE)
    path = tmp_path / "network.onnx"
    write_onnx(network, path)
    images = torch.rand(2, *SHAPE)
    for source in (network, path, str(path)):
        torch.testing.assert_close(load_network(source)(images), module()(images))
    assert load_network(network, SHAPE) is network


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="module Sequential without input_shape"):
        load_network(module())
    with pytest.raises(InvalidInputError, match=r"input shape \(1, 5, 4\): expected \(1, 4, 5\)"):
        load_network(load_network(module(), SHAPE), (1, 5, 4))
    with pytest.raises(InvalidInputError, match="network of type int: expected a path, a module or a Network"):
        load_network(3)
    with pytest.raises(ModelFileError, match="expected an existing ONNX file"):
        load_network(str(tmp_path / "nothing.onnx"))
