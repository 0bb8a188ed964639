"""Affine parts of networks as rows, and folded with the flows into one layer."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from flowverify.errors import FoldError, InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.network import Network, ScaleShift, affine_rows, fold, from_torch
from flowverify.network.affine import linear_part, operation_matrices
from flowverify.network.operations import OPERATIONS, Pad, Permute, Reshape

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


DOUBLE = 1e-12
SINGLE = 1e-5


def network_of(shape, *modules, seed=0, dtype=torch.float64):
    """A chain with random weights, the offsets of ScaleShift included."""
    torch.manual_seed(seed)
    modules = [module() if isinstance(module, type) else module for module in modules]
    network = Network.sequential(shape, modules)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape) / math.sqrt(max(1, parameter[0].numel())))
    return network.to(dtype)


def flows_of(network, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, network.grid.edges, generator=generator, dtype=torch.float64).to(network.dtype)


def assert_folds(network, structure, tolerance):
    """f(R + A delta) = folded(encode(delta), offset(R)), and the same with one reference baked in."""
    folded = fold(network, structure)
    grid = network.grid
    flow = flows_of(network)
    reference = torch.rand(3, *network.input_shape, dtype=torch.float64).to(network.dtype)
    expected = network(grid.apply(reference, flow))
    scale = float(expected.abs().max())
    encoded = folded.encode(flow)
    assert tuple(encoded.shape[1:]) == folded.flow_shape
    assert torch.equal(folded.decode(encoded), flow)
    found = folded(encoded, folded.offset(reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
    baked = folded.with_reference(reference[:1])
    torch.testing.assert_close(baked(encoded), network(grid.apply(reference[:1], flow)), rtol=0, atol=tolerance * scale)
    assert folded.num_classes == network.num_classes
    return folded


def mlp_parts():
    return [nn.Flatten, nn.Linear(20, 7), nn.ReLU, nn.Linear(7, 3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.float64, DOUBLE)])
@pytest.mark.parametrize(
    "start",
    [
        [],
        [ScaleShift(torch.tensor(2.5), torch.tensor(-0.3))],
        [ScaleShift(torch.rand(1, 4, 5) + 0.5, torch.rand(4, 5))],
        [Permute((0, 2, 1))],
        [Reshape((2, 10)), nn.Linear(10, 10)],
        [nn.Conv2d(1, 1, 3, padding=1)],
        [Pad((1, 0, 0, 1)), nn.AvgPool2d(2, 1)],
        [nn.Flatten(), nn.Linear(20, 20), ScaleShift(torch.rand(20), torch.rand(20))],
    ],
    ids=["plain", "scalar", "per pixel", "permute", "reshape", "convolution", "average pool", "linear twice"],
)
def test_dense_fold_of_affine_start(start, dtype, tolerance):
    network = network_of((1, 4, 5), *start, *mlp_parts(), dtype=dtype)
    folded = assert_folds(network, "auto", tolerance)
    assert folded.structure == "dense"
    assert folded.first_shape == (7,)
    assert [node.name for node in folded.remainder.nodes] == [node.name for node in network.nodes[-2:]]


CONVOLUTIONS = [
    {"in_channels": 1, "out_channels": 2, "kernel_size": 3},
    {"in_channels": 3, "out_channels": 2, "kernel_size": 3, "padding": 1},
    {"in_channels": 1, "out_channels": 2, "kernel_size": 4, "stride": 2, "padding": 1},
    {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 1, "out_channels": 3, "kernel_size": (2, 3), "stride": (3, 2), "padding": (0, 2)},
    {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "groups": 3, "padding": 1},
    {
        "in_channels": 3,
        "out_channels": 3,
        "kernel_size": (3, 2),
        "groups": 3,
        "dilation": (2, 3),
        "padding": 2,
    },
    {"in_channels": 1, "out_channels": 2, "kernel_size": 1, "stride": 3},
    {
        "in_channels": 1,
        "out_channels": 2,
        "kernel_size": 2,
        "dilation": 2,
        "padding": 3,
        "stride": 2,
        "bias": False,
    },
]


def cnn(options, start=(), dtype=torch.float64, after=()):
    options = dict(options)
    shape = (options["in_channels"], 7, 6)
    convolution = nn.Conv2d(**options)
    parts = [*start, convolution, *after]
    size = Network.sequential(shape, [*parts, nn.Flatten()]).num_classes
    return network_of(shape, *parts, nn.ReLU, nn.Flatten, nn.Linear(size, 4), dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.float64, DOUBLE)])
@pytest.mark.parametrize("structure", ["dense", "convolution"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_fold_of_convolutions(options, structure, dtype, tolerance):
    assert assert_folds(cnn(options, dtype=dtype), structure, tolerance).structure == structure


@settings(max_examples=12, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sides=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.sampled_from([1, 3]),
    grouped=st.booleans(),
)
def test_dense_and_convolution_are_one_function(kernel, stride, padding, dilation, sides, channels, grouped):
    sizes = zip(kernel, dilation, padding, (7, 6), strict=True)
    assume(all((taps - 1) * step < size + 2 * pad for taps, step, pad, size in sizes))
    options = {
        "in_channels": channels,
        "out_channels": 3,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": channels if grouped else 1,
    }
    normalise = ScaleShift(torch.rand(channels, 1, 1) + 0.5, torch.rand(channels, 1, 1))
    network = cnn(options, [normalise, Pad(sides)])
    assert_folds(network, "convolution", DOUBLE)
    by_rows = fold(network, "dense").first.weight
    planes = fold(network, "convolution")
    unit_flows = torch.eye(network.grid.edges, dtype=torch.float64)
    torch.testing.assert_close(planes.first_layer(planes.encode(unit_flows)).flatten(1).T, by_rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(planes.first_layer_rows(), by_rows, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sides", [(0, 3, 0, 0), (0, 0, 1, 3), (2, 0, 0, 3)])
def test_asymmetric_padding_before_the_convolution(sides):
    assert_folds(cnn(CONVOLUTIONS[3] | {"padding": 0}, [Pad(sides)]), "convolution", DOUBLE)


def test_normalisation_and_batch_norm_around_the_convolution():
    before = ScaleShift(torch.tensor([[[2.0]], [[3.0]], [[4.0]]]), torch.rand(3, 7, 6))
    after = ScaleShift(torch.tensor([[[0.5]], [[2.0]]]), torch.rand(2, 1, 1))
    network = cnn(CONVOLUTIONS[1], [before, ScaleShift(2.0, 1.0)], after=[after, nn.AvgPool2d(2)])
    folded = assert_folds(network, "convolution", DOUBLE)
    assert folded.first_shape == (2, 7, 6)
    assert type(folded.remainder.nodes[0].operation) is nn.AvgPool2d
    assert fold(network, "dense").first_shape == (2, 3, 3)


def test_entries_of_the_planes_that_are_not_edges_have_no_effect():
    network = cnn(CONVOLUTIONS[1])
    folded = fold(network, "convolution")
    planes = folded.encode(flows_of(network))
    offset = folded.offset(torch.rand(3, *network.input_shape, dtype=torch.float64))
    outside = planes + 100 * (1 - network.grid.planes_mask(torch.float64))
    assert not torch.equal(outside, planes)
    torch.testing.assert_close(folded(outside, offset), folded(planes, offset), rtol=0, atol=0)
    baked = folded.with_reference(torch.rand(3, 7, 6, dtype=torch.float64))
    torch.testing.assert_close(baked(outside), baked(planes), rtol=0, atol=0)


def test_auto_takes_the_cheaper_structure():
    one_window = {"in_channels": 1, "out_channels": 2, "kernel_size": (7, 6)}
    assert fold(cnn(one_window)).structure == "dense"
    assert fold(cnn(CONVOLUTIONS[0])).structure == "convolution"
    assert fold(network_of((1, 4, 5), *mlp_parts())).structure == "dense"


def test_float32_first_layer_is_rounded_once():
    network = network_of((1, 4, 5), ScaleShift(1 / 0.3, -0.4), *mlp_parts(), dtype=torch.float32)
    exact = fold(network.double(), "dense").first.weight
    assert torch.equal(fold(network.float(), "dense").first.weight, exact.float())


def test_fold_does_not_share_weights_with_the_network():
    network = network_of((1, 4, 5), *mlp_parts(), dtype=torch.float32)
    fold(network).double()
    assert network.dtype == torch.float32


def test_linear_network_leaves_the_identity():
    network = network_of((1, 4, 5), nn.Flatten, nn.Linear(20, 3))
    folded = assert_folds(network, "auto", DOUBLE)
    assert folded.remainder.nodes == ()
    assert folded.num_classes == 3


def test_first_layer_rows_are_w1_times_the_incidence_matrix():
    network = network_of((1, 4, 5), *mlp_parts())
    rows, bias = affine_rows(network, network.nodes[1].name)
    torch.testing.assert_close(rows, network.nodes[1].operation.weight, rtol=0, atol=0)
    torch.testing.assert_close(bias, network.nodes[1].operation.bias, rtol=0, atol=0)
    expected = rows @ torch.from_numpy(Grid(4, 5).incidence_scipy().toarray())
    torch.testing.assert_close(fold(network).first.weight, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("structure", ["dense", "convolution"])
def test_folded_network_can_be_traced(structure):
    network = cnn(CONVOLUTIONS[3])
    folded = fold(network, structure)
    flow, reference = folded.encode(flows_of(network)), torch.rand(3, 1, 7, 6, dtype=torch.float64)
    traced = torch.jit.trace(folded, (flow[:1], folded.offset(reference[:1])))
    offset = folded.offset(reference)
    torch.testing.assert_close(traced(flow, offset), folded(flow, offset), rtol=0, atol=0)


class Residual(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1) if stem else nn.Identity()
        self.inner = nn.Conv2d(2 if stem else 1, 2 if stem else 1, 3, padding=1)
        self.last = nn.Linear(60 if stem else 30, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.last((x + self.inner(torch.relu(x) if isinstance(self.stem, nn.Conv2d) else x)).flatten(1))


def test_fold_stops_at_a_residual_connection_after_the_first_convolution():
    network = from_torch(Residual(stem=True).double(), (1, 5, 6))
    folded = assert_folds(network, "convolution", DOUBLE)
    assert folded.first_shape == (2, 5, 6)


def test_fold_refuses_what_it_cannot_fold():
    with pytest.raises(FoldError, match=r"value 'input' is read by .*Conv2d.*Add"):
        fold(from_torch(Residual(stem=False), (1, 5, 6)))
    with pytest.raises(FoldError, match=r"first operation, '0_ReLU' \(ReLU\), is not affine"):
        fold(network_of((1, 4, 5), nn.ReLU, *mlp_parts()))

    class Twice(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            return x + x

    with pytest.raises(FoldError, match=r"'\w+' meets other values in 'add\w*' \(Add\) before the first Linear"):
        fold(from_torch(Twice(), (1, 2, 2)))
    with pytest.raises(FoldError, match=r"start with a convolution.*'0_Flatten' \(Flatten\) comes before"):
        fold(network_of((1, 4, 5), *mlp_parts()), "convolution")
    with pytest.raises(FoldError, match=r"start with a convolution.*\(ScaleShift\) comes before"):
        fold(cnn(CONVOLUTIONS[0], [ScaleShift(torch.rand(1, 7, 6), 0.0)]), "convolution")
    with pytest.raises(FoldError, match="there is no Conv2d"):
        fold(network_of((1, 4, 5), ScaleShift(2.0), nn.ReLU, *mlp_parts()), "convolution")
    with pytest.raises(UnknownNameError, match="unknown fold structure 'sparse'"):
        fold(network_of((1, 4, 5), *mlp_parts()), "sparse")


def test_wrong_shapes_are_refused():
    folded = fold(network_of((1, 4, 5), *mlp_parts()))
    with pytest.raises(InvalidInputError, match=r"reference of shape \(2, 1, 4, 5\): expected one image"):
        folded.with_reference(torch.zeros(2, 1, 4, 5, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"reference of shape \(1, 1, 5, 4\)"):
        folded.offset(torch.zeros(1, 1, 5, 4, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"flow of shape \(1, 30\)"):
        folded.encode(torch.zeros(1, 30))
    with pytest.raises(InvalidInputError, match=r"flow input of shape \(1, 30\)"):
        folded.decode(torch.zeros(1, 30))
