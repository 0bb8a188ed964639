import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError
from flowverify.network import Network, ScaleShift, affine_rows, from_torch

SHAPE = (2, 4, 5)


class Branches(nn.Module):
    """An affine value that is reached along two branches."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2, 2)
        self.mix, self.last = nn.Linear(18 + 8, 5), nn.Linear(5, 3)

    def forward(self, x):
        both = torch.cat([self.left(x - 0.5).flatten(1), self.right(x).flatten(1)], 1)
        return self.last(torch.relu(self.mix(both)))


@pytest.mark.parametrize("chunk_entries", [1 << 23, 100])
def test_rows_and_bias_are_the_affine_map(chunk_entries, monkeypatch):
    monkeypatch.setattr("flowverify.network.affine.CHUNK_ENTRIES", chunk_entries)
    torch.manual_seed(0)
    network = from_torch(Branches().double(), SHAPE)
    images = torch.randn(6, *SHAPE, dtype=torch.float64)
    values = network.values(images)
    checked = 0
    for name in network.affine_of_input():
        rows, bias = affine_rows(network, name)
        torch.testing.assert_close(images.flatten(1) @ rows.T + bias, values[name].flatten(1), rtol=0, atol=1e-13)
        checked += 1
    assert checked >= 6


def test_rows_are_computed_in_double_and_rounded_once():
    network = Network.sequential(SHAPE, [ScaleShift(1 / 3, 100.0), nn.Flatten(), nn.Linear(40, 4)])
    name = network.nodes[-1].name
    exact, _ = affine_rows(network, name)
    rounded, bias = affine_rows(network, name, torch.float32)
    assert (exact.dtype, rounded.dtype, bias.dtype) == (torch.float64, torch.float32, torch.float32)
    assert torch.equal(exact.float(), rounded)
    assert network.dtype == torch.float32


def test_value_that_is_not_affine_is_refused():
    network = Network.sequential(SHAPE, [nn.Flatten(), nn.ReLU(), nn.Linear(40, 4)])
    assert network.affine_of_input() == {"input", "0_Flatten"}
    with pytest.raises(InvalidInputError, match=r"value '2_Linear': expected one that is affine"):
        affine_rows(network, "2_Linear")
    with pytest.raises(InvalidInputError, match=r"value 'nothing': expected one that is affine"):
        affine_rows(network, "nothing")
