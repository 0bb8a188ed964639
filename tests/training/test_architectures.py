"""Architectures against their parameter counts, derived by hand."""

import pytest
import torch

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.training import build_architecture
from flowverify.training.recipe import build_network


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "parameters"),
    [
        ("linear", (1, 28, 28), (), 784 * 10 + 10),
        ("fc3", (1, 28, 28), (100, 100), 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10),
        ("fc3", (3, 5, 4), (7, 6), 60 * 7 + 7 + 7 * 6 + 6 + 6 * 10 + 10),
        # 16 kernels of 4x4x1, 32 of 4x4x16, then 32 channels of 7x7 pixels to 100 to 10
        ("wong-cnn", (1, 28, 28), (), 16 * 17 + 32 * 257 + 1568 * 100 + 100 + 1010),
        ("rnn", (3, 5, 4), (7,), 12 * 7 + 7 + 7 * 7 + 7 * 10 + 10),
        ("wong-cnn", (3, 9, 6), (), 16 * 49 + 32 * 257 + 64 * 100 + 100 + 1010),
    ],
)
def test_shapes_and_parameters(
    name: str, shape: tuple[int, int, int], hidden: tuple[int, ...], parameters: int
) -> None:
    network = build_architecture(name, shape, 10, hidden)
    assert network(torch.rand(2, *shape)).shape == (2, 10)
    assert sum(tensor.numel() for tensor in network.parameters()) == parameters


@pytest.mark.parametrize(("name", "hidden"), [("linear", ()), ("mlp", (5, 4)), ("wong-cnn", ()), ("rnn", (6,))])
def test_the_network_that_is_trained_computes_the_same(name: str, hidden: tuple[int, ...]) -> None:
    networks = []
    for build in (build_architecture, build_network):
        torch.manual_seed(0)
        networks.append(build(name, (2, 6, 5), 3, hidden))
    images = torch.rand(4, 2, 6, 5)
    torch.testing.assert_close(networks[0](images), networks[1](images))
    assert [len(list(network.parameters())) for network in networks] == [len(list(networks[0].parameters()))] * 2


def test_a_recurrent_network_is_torchs() -> None:
    own = build_architecture("rnn", (2, 6, 5), 3, (7,))
    torchs = torch.nn.RNN(10, 7, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        torchs.weight_ih_l0.copy_(own.read.weight)
        torchs.bias_ih_l0.copy_(own.read.bias)
        torchs.weight_hh_l0.copy_(own.recall.weight)
        torchs.bias_hh_l0.zero_()
        images = torch.rand(4, 2, 6, 5)
        rows = images.permute(0, 2, 1, 3).reshape(4, 6, 10)
        torch.testing.assert_close(own.answer(torchs(rows)[0][:, -1]), own(images))


def test_steps_of_a_recurrent_network_are_trained_together() -> None:
    network = build_network("rnn", (1, 6, 5), 3, (7,)).requires_grad_(True)
    network(torch.rand(4, 1, 6, 5)).sum().backward()
    weights = {id(node.operation.weight) for node in network.nodes if node.name.startswith("read")}
    assert len(weights) == 1 and len(list(network.parameters())) == 5
    assert all(bool((weight.grad != 0).any()) for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "message"),
    [
        ("fc3", (1, 8, 8), (5,), r"given hidden sizes \(5,\), expected 2"),
        ("linear", (1, 8, 8), (5, 5), "expected 0 of them"),
        ("linear", (8, 8), (), r"given input shape \(8, 8\)"),
        ("fc3", (1, 8, 8), (0, 5), "expected .* sizes >= 1"),
        ("wong-cnn", (1, 3, 8), (), "given images of 3x8 pixels, expected at least 4x4"),
    ],
)
def test_refuses(name: str, shape: tuple[int, int, int], hidden: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build_architecture(name, shape, 10, hidden)


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown architecture 'resnet': expected one of fc3, linear"):
        build_architecture("resnet", (1, 8, 8), 10)
