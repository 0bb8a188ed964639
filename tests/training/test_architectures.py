"""Architectures against their parameter counts, derived by hand."""

import pytest
import torch

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.training import build_architecture


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "parameters"),
    [
        ("linear", (1, 28, 28), (), 784 * 10 + 10),
        ("fc3", (1, 28, 28), (100, 100), 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10),
        ("fc3", (3, 5, 4), (7, 6), 60 * 7 + 7 + 7 * 6 + 6 + 6 * 10 + 10),
        # 16 kernels of 4x4x1, 32 of 4x4x16, then 32 channels of 7x7 pixels to 100 to 10
        ("wong-cnn", (1, 28, 28), (), 16 * 17 + 32 * 257 + 1568 * 100 + 100 + 1010),
        ("wong-cnn", (3, 9, 6), (), 16 * 49 + 32 * 257 + 64 * 100 + 100 + 1010),
    ],
)
def test_shapes_and_parameters(
    name: str, shape: tuple[int, int, int], hidden: tuple[int, ...], parameters: int
) -> None:
    network = build_architecture(name, shape, 10, hidden)
    assert network(torch.rand(2, *shape)).shape == (2, 10)
    assert sum(tensor.numel() for tensor in network.parameters()) == parameters


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
