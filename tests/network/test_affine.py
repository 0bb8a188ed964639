import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError
from flowverify.network import Network, ScaleShift, affine_rows, from_torch
from flowverify.network.affine import linear_part, operation_matrices
from flowverify.network.operations import OPERATIONS

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


AFFINE = [record for record in OPERATIONS if record.affine]


@pytest.mark.parametrize("record", AFFINE, ids=lambda record: record.name)
@pytest.mark.parametrize("chunk_entries", [1 << 23, 70])
def test_matrices_of_an_operation_are_its_derivatives(record, chunk_entries, monkeypatch):
    monkeypatch.setattr("flowverify.network.affine.CHUNK_ENTRIES", chunk_entries)
    torch.manual_seed(0)
    tried = 0
    for operation in record.variants(SHAPE):
        operation = operation.double()
        shapes = [SHAPE] * (record.arity or 3)
        parts, constant = operation_matrices(operation, shapes, torch.zeros(0, dtype=torch.float64))
        points = [torch.randn(1, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        value = operation(*points)
        total = constant.clone()
        for position, part in enumerate(parts):
            rows = torch.cat(list(part)).T
            total = total + rows @ points[position].detach().flatten()
            entry = min(3, rows.shape[0] - 1)
            (slope,) = torch.autograd.grad(value.flatten()[entry], points[position], retain_graph=True)
            torch.testing.assert_close(rows[entry], slope.flatten(), rtol=0, atol=1e-13)
        torch.testing.assert_close(total, value.flatten().detach(), rtol=0, atol=1e-12)
        tried += 1
    assert tried


def test_no_constant_cancels_in_a_matrix():
    """f(e) - f(0) would lose the small entries beside a large constant."""
    layer = nn.Linear(2, 1, dtype=torch.float64)
    layer.load_state_dict({"weight": torch.tensor([[1e-9, 3.0]]), "bias": torch.tensor([1e9])})
    (part,), constant = operation_matrices(layer, [(2,)], torch.zeros(0, dtype=torch.float64))
    assert torch.equal(torch.cat(list(part)).T, layer.weight.detach())
    assert torch.equal(constant, layer.bias.detach())
    assert float(linear_part(layer)(torch.zeros(1, 2, dtype=torch.float64))) == 0.0
    assert float(layer.bias.detach()) == 1e9  # the layer keeps its own
