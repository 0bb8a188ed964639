import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import aten, from_torch

SHAPE = (2, 6, 8)
PIXELS = 96


class Lambda(nn.Module):
    """A module of one function, with two constants."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.rand(2, 1, 1) + 0.5)
        self.register_buffer("matrix", torch.randn(PIXELS, 5))

    def forward(self, x):
        return self.function(self, x)


def assert_converts(module, shape=SHAPE):
    module.eval()
    before = copy.deepcopy(module.state_dict())
    network = from_torch(module, shape)
    dtype = network.dtype
    images = torch.randn(4, *shape, dtype=torch.float64).to(dtype)
    expected = module(images).detach()
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-6 * max(1, float(expected.abs().max())))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    return network


def randomise(module):
    """Gives batch normalisations statistics that matter."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 2)
                layer.bias.data.normal_()
    return module


def test_sequential_is_converted_layer_by_layer(monkeypatch):
    monkeypatch.setattr(sys.modules["flowverify.network.from_torch"], "_from_export", None)
    torch.manual_seed(0)
    network = assert_converts(
        randomise(
            nn.Sequential(
                nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", bias=False), nn.BatchNorm2d(3), nn.ReLU(True)),
                nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 1)),
                nn.LeakyReLU(0.2),
                nn.AvgPool2d(2, padding=1, count_include_pad=False),
                nn.Dropout2d(),
                nn.MaxPool2d((2, 1), stride=1),
                nn.Sigmoid(),
                nn.Identity(),
                nn.Flatten(1, 2),
                nn.Linear(5, 2),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(24, 6),
                nn.BatchNorm1d(6, affine=False),
                nn.Dropout(),
                nn.Linear(6, 3, bias=False),
            )
        )
    )
    assert network.is_sequential
    assert network.nodes[0].name == "0_Conv2d"


def test_double_precision_is_kept():
    assert assert_converts(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).double()).dtype == torch.float64


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return functional.relu(x + self.second(functional.relu_(self.norm(self.first(x)))))


def test_residual_network():
    torch.manual_seed(0)
    blocks = [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        ResidualBlock(4),
        ResidualBlock(4),
        nn.AdaptiveAvgPool2d(1),
    ]
    network = assert_converts(randomise(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4, 3))))
    assert not network.is_sequential
    assert [type(node.operation).__name__ for node in network.activations] == ["ReLU"] * 4


class RowReader(nn.Module):
    """A recurrent network over the rows of the image."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.last = nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        for row in range(6):
            h = torch.tanh(self.read(x[:, 0, row, :]) + self.keep(h))
        return self.last(h)


def test_recurrent_network_shares_its_weights():
    network = assert_converts(RowReader(), (1, 6, 8))
    assert len(network.activations) == 6
    assert len(list(network.parameters())) == 6


FUNCTIONS = {
    "add constants": lambda m, x: (1 + (x - m.scale) + 0.5).flatten(1),
    "subtract from": lambda m, x: (m.scale - x).flatten(1) - 2,
    "from a number": lambda m, x: (1 - x).flatten(1),
    "scale": lambda m, x: -((x * m.scale / 3) / m.scale * 2).flatten(1),
    "weighted sum": lambda m, x: torch.sub(torch.add(x, x, alpha=2), x, alpha=0.5).flatten(1),
    "difference": lambda m, x: x.flatten(1) - torch.relu(x).flatten(1),
    "in place": lambda m, x: x.clone().mul_(2).add_(1).flatten(1).relu_(),
    "addmm": lambda m, x: torch.addmm(m.matrix[0], x.flatten(1), m.matrix, beta=2, alpha=3),
    "matmul": lambda m, x: x.reshape(x.size(0), -1) @ m.matrix,
    "matmul vector": lambda m, x: x.reshape(-1, 4, 24) @ m.matrix[:24, 0],
    "matmul left": lambda m, x: (m.matrix[:6, :5].t() @ x).flatten(1),
    "linear on rows": lambda m, x: functional.linear(x, m.matrix[:8, :].t()).flatten(1),
    "views": lambda m, x: x.view(x.size(0), -1).unsqueeze(1).squeeze(1).view(-1, 4, 24).contiguous().flatten(1),
    "unflatten": lambda m, x: x.flatten(1).unflatten(1, (3, 32)).flatten(-2),
    "permute": lambda m, x: x.permute(0, 3, 1, 2).transpose(-1, 1).flatten(1),
    "slices": lambda m, x: x[:, -1, 1:-1:2, ::3].flatten(1),
    "flip": lambda m, x: x.flip(-1)[:, 0].flatten(1),
    "cat": lambda m, x: torch.cat([x, torch.tanh(x)], dim=-1).flatten(1),
    "stack free": lambda m, x: torch.cat([a.flatten(1) for a in reversed(x.unbind(1))], 1),
    "chunk": lambda m, x: x.chunk(3, dim=3)[2].flatten(1) - x.split(3, dim=3)[2].flatten(1),
    "split sizes": lambda m, x: x.split([1, 7], dim=3)[1].flatten(1),
    "index": lambda m, x: x.index_select(2, torch.tensor([3, 0])).flatten(1),
    "average pool": lambda m, x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False).flatten(1),
    "adaptive pool": lambda m, x: functional.adaptive_avg_pool2d(x, (3, 2)).flatten(1),
    "max pool": lambda m, x: functional.max_pool2d(x, 2, 1, 1).flatten(1),
    "pool rounded up": lambda m, x: functional.max_pool2d(x, 2, ceil_mode=True).flatten(1),
    "mean": lambda m, x: x.mean((2, 3)) + x.mean((-1, -2), keepdim=True).flatten(1),
    "pad": lambda m, x: functional.pad(x, (1, 0, 2, 3)).flatten(1),
    "zeros": lambda m, x: x.flatten(1) + torch.zeros_like(x).flatten(1) + torch.zeros(x.shape[0], PIXELS),
    "dropout": lambda m, x: functional.dropout(x, 0.5, m.training).flatten(1),
    "softened": lambda m, x: 2 * torch.sigmoid(functional.leaky_relu(x, 0.3)).flatten(1),
    "to": lambda m, x: x.to(torch.float32).detach().flatten(1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_operations(name):
    torch.manual_seed(0)
    assert_converts(Lambda(FUNCTIONS[name]))


REFUSED = {
    "softmax": (
        lambda m, x: 2 * torch.softmax(x.flatten(1), 1),
        r"operation softmax \(softmax\): is not supported",
    ),
    "gelu": (lambda m, x: functional.gelu(x).flatten(1), "operation gelu"),
    "product": (lambda m, x: (x * x).flatten(1), r"operation mul .*both depend on the input"),
    "quotient": (lambda m, x: (1 / (x + 5)).flatten(1), r"operation (reciprocal|div)"),
    "batch size": (lambda m, x: x.flatten(1) / x.shape[0], "div.*computing with the size of the batch"),
    "batch mean": (lambda m, x: x.flatten(1) - x.flatten(1).mean(0), "mean .*along the batch dimension"),
    "batch moved": (lambda m, x: x.flatten(1).permute(1, 0).permute(1, 0), r"operation \w+ .*(mixes|batch)"),
    "batch merged": (lambda m, x: x.view(-1, 8)[:, :3].reshape(-1, 36), "mixes or moves the batch"),
    "batch slice": (lambda m, x: (x + x[:1]).flatten(1), "slice .*batch is not supported"),
    "random": (lambda m, x: (x + torch.rand(8)).flatten(1), "operation rand .*random"),
    "dropout": (lambda m, x: functional.dropout(x, 0.5, True).flatten(1), "operation .*dropout"),
    "branch": (
        lambda m, x: (x if x.sum() > 0 else -x).flatten(1),
        "module Lambda cannot be traced: .*data-dependent",
    ),
    "crash": (lambda m, x: x.nothing(), "module Lambda cannot be traced: .*nothing"),
    "adaptive pool": (lambda m, x: functional.adaptive_avg_pool2d(x, 5).flatten(1), "expected an integer ratio"),
    "pad value": (lambda m, x: functional.pad(x, (1, 1), value=1.0).flatten(1), "anything but zeros"),
    "crop": (lambda m, x: functional.pad(x, (-1, 0, 0, 0)).flatten(1), r"padding \(-1"),
    "pool rounded up": (lambda m, x: functional.avg_pool2d(x, 5, ceil_mode=True).flatten(1), "rounded up"),
    "precision": (lambda m, x: x.double().flatten(1), "torch.float64 is not supported"),
    "two outputs": (lambda m, x: (x.flatten(1), x), "returns 2 values: expected output= a position, 0 to 1"),
    "constant": (lambda m, x: torch.zeros(x.shape[0], 3), "does not depend on the input"),
    "scan": (lambda m, x: x.flatten(1).cumsum(1), "operation cumsum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_operations_are_named(name):
    function, message = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=message):
        from_torch(Lambda(function), SHAPE)


def test_stateful_module_is_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return x.flatten(1) * self.seen

    with pytest.raises(UnsupportedOperationError, match="changes its own state"):
        from_torch(Counter(), SHAPE)


def test_hooked_layer_is_traced():
    linear = nn.Linear(PIXELS, 3)
    linear.register_forward_hook(lambda module, inputs, output: -output)
    network = assert_converts(nn.Sequential(nn.Flatten(), linear))
    assert network.nodes[-1].name.startswith("neg")


def test_wrong_conversion_is_noticed(monkeypatch):
    monkeypatch.setitem(aten.HANDLERS, "neg", lambda builder, arguments, label: arguments["self"])
    with pytest.raises(UnsupportedOperationError, match="converted form does not compute the same output"):
        from_torch(Lambda(lambda m, x: (-x).flatten(1)), SHAPE)


def test_layer_errors_name_the_layer():
    with pytest.raises(InvalidInputError, match=r"layer 1 \(Linear\): linear weight of shape \(3, 5\)"):
        from_torch(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), SHAPE)
    with pytest.raises(UnsupportedOperationError, match=r"layer 0 \(Conv2d\): .*padding_mode='reflect'"):
        from_torch(nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten()), SHAPE)
    with pytest.raises(UnsupportedOperationError, match=r"layer 0 \(Flatten\): .*batch"):
        from_torch(nn.Sequential(nn.Flatten(0, 1)), SHAPE)


def test_bad_input_shape_and_weights():
    module = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3))
    with pytest.raises(InvalidInputError, match=r"input shape \(96,\): expected \(channels, height, width\)"):
        from_torch(module, (96,))
    with pytest.raises(InvalidInputError, match="float16"):
        from_torch(copy.deepcopy(module).half(), SHAPE)
    module[1].weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN"):
        from_torch(module, SHAPE)
