import copy
import math
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

    def part(self, *shape):
        """Constants of a shape."""
        return self.matrix.flatten()[: math.prod(shape)].reshape(shape)

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
    "matmul of channels": lambda m, x: (x @ m.matrix[:16, :4].reshape(2, 8, 4)).flatten(1),
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
    "elu": lambda m, x: functional.elu(x - 0.5, 1.7).flatten(1),
    "selu": lambda m, x: functional.selu(x - 0.5).flatten(1),
    "celu": lambda m, x: functional.celu(x - 0.5, 0.3).flatten(1),
    "gelu": lambda m, x: functional.gelu(x - 0.5).flatten(1),
    "gelu by tanh": lambda m, x: functional.gelu(x - 0.5, approximate="tanh").flatten(1),
    "silu": lambda m, x: functional.silu(x - 0.5).flatten(1),
    "mish": lambda m, x: functional.mish(x - 0.5).flatten(1),
    "softplus": lambda m, x: functional.softplus(x - 0.5, 3.0).flatten(1),
    "log of sigmoid": lambda m, x: functional.logsigmoid(x - 0.5).flatten(1),
    "hard swish": lambda m, x: functional.hardswish(8 * x - 4).flatten(1),
    "hard sigmoid": lambda m, x: functional.hardsigmoid(8 * x - 4).flatten(1),
    "hard tanh": lambda m, x: functional.hardtanh(x - 0.5, -0.2, 0.3).flatten(1),
    "relu6": lambda m, x: functional.relu6(9 * x - 1).flatten(1),
    "prelu": lambda m, x: functional.prelu(x - 0.5, m.matrix[:2, 0]).flatten(1),
    "softsign": lambda m, x: functional.softsign(x - 0.5).flatten(1),
    "erf": lambda m, x: torch.erf(x - 0.5).flatten(1),
    "clamp": lambda m, x: x.clamp(0.2, 0.6).flatten(1),
    "clamp from below": lambda m, x: x.clamp(min=0.2).flatten(1),
    "absolute": lambda m, x: (x - 0.5).abs().flatten(1),
    "maximum": lambda m, x: torch.maximum(x, 0.7 - x).flatten(1),
    "minimum of a constant": lambda m, x: torch.minimum(x, m.scale).flatten(1),
    "powers": lambda m, x: (x**2 + x.abs().sqrt() + (x.abs() + 1) ** 1.5).flatten(1),
    "inverse powers": lambda m, x: ((x.abs() + 1).rsqrt() + 1 / (1 + x.abs())).flatten(1),
    "exp and log": lambda m, x: (x.exp() - (x.abs() + 0.1).log()).flatten(1),
    "product": lambda m, x: (x * torch.sigmoid(x)).flatten(1),
    "quotient": lambda m, x: (x / (1 + x.abs().sum((1, 2, 3), keepdim=True))).flatten(1),
    "sums": lambda m, x: x.sum(1).flatten(1) + x.mean((1, 3)).repeat(1, 8),
    "largest": lambda m, x: x.amax(1).flatten(1) - x.min(2)[0].sum((1, 2), keepdim=True)[:, 0],
    "variance": lambda m, x: x.var((2, 3)) + functional.normalize(x.flatten(1))[:, :2],
    "softmax": lambda m, x: torch.softmax(x, 1).flatten(1),
    "log of softmax": lambda m, x: (
        functional.log_softmax(x, 2).flatten(1) + torch.logsumexp(x, (1, 2, 3), keepdim=True).flatten(1)
    ),
    "layer norm": lambda m, x: functional.layer_norm(x, (6, 8), m.part(6, 8), m.part(6, 8) + 1).flatten(1),
    "group norm": lambda m, x: functional.group_norm(x, 1, m.matrix[:2, 0], m.matrix[:2, 1]).flatten(1),
    "instance norm": lambda m, x: functional.instance_norm(x, weight=m.matrix[:2, 0]).flatten(1),
    "root mean square": lambda m, x: functional.rms_norm(x, (8,), m.part(8), 1e-3).flatten(1),
    "attention": lambda m, x: functional.scaled_dot_product_attention(x, 2 * x, x.exp()).flatten(1),
    "attention to the past": lambda m, x: functional.scaled_dot_product_attention(
        x, 2 * x, x.exp(), is_causal=True
    ).flatten(1),
    "transposed convolution": lambda m, x: functional.conv_transpose2d(
        x, m.part(2, 2, 4, 3), m.part(4), (2, 3), (1, 2), (1, 0), 2, 2
    ).flatten(1),
    "transposed, cut": lambda m, x: functional.conv_transpose2d(x, m.part(2, 3, 2, 2), stride=1, padding=2).flatten(1),
    "convolution of rows": lambda m, x: functional.conv1d(x.flatten(2), m.part(2, 2, 3), None, 2, 1).flatten(1),
    "pools of rows": lambda m, x: (
        functional.max_pool1d(x.flatten(2), 3, 2, 1).flatten(1)
        + functional.avg_pool1d(x.flatten(2), 3, 2, 1).flatten(1)
    ),
    "nearest": lambda m, x: functional.interpolate(x, size=(5, 11)).flatten(1),
    "bilinear": lambda m, x: functional.interpolate(x, scale_factor=1.5, mode="bilinear").flatten(1),
    "bilinear to corners": lambda m, x: functional.interpolate(
        x, size=(5, 11), mode="bilinear", align_corners=True
    ).flatten(1),
    "bicubic": lambda m, x: functional.interpolate(x, scale_factor=2, mode="bicubic").flatten(1),
    "averages rounded up": lambda m, x: functional.avg_pool2d(x, 5, 3, 1, ceil_mode=True).flatten(1),
    "averages of what is there": lambda m, x: functional.avg_pool2d(
        x, 3, 2, 1, ceil_mode=True, count_include_pad=False
    ).flatten(1),
    "averages by a divisor": lambda m, x: functional.avg_pool2d(x, 3, 2, 1, divisor_override=4).flatten(1),
    "maxima rounded up": lambda m, x: functional.max_pool2d(x, (5, 4), (3, 3), 1, ceil_mode=True).flatten(1),
    "adaptive parts of two sizes": lambda m, x: functional.adaptive_avg_pool2d(x, (4, 5)).flatten(1),
    "reflected": lambda m, x: functional.pad(x, (1, 2, 3, 0), mode="reflect").flatten(1),
    "replicated": lambda m, x: functional.pad(x, (1, 2, 3, 0), mode="replicate").flatten(1),
    "circular": lambda m, x: functional.pad(x, (1, 2, 3, 0), mode="circular").flatten(1),
    "padded by a number": lambda m, x: functional.pad(x, (1, 2), value=0.5).flatten(1),
    "padded channels": lambda m, x: functional.pad(x, (0, 0, -1, 0, 1, 2)).flatten(1),
    "class token": lambda m, x: torch.cat([m.scale.expand(x.shape[0], 2, 1, 8), x], 2).flatten(1),
    "stacked": lambda m, x: torch.stack([x, 2 * x], 2).flatten(1),
    "repeated": lambda m, x: x.repeat(1, 2, 1, 3).flatten(1) + x[:, :1].expand(-1, 12, -1, -1).flatten(1)[:, :1],
    "rolled": lambda m, x: torch.roll(x, (1, -2), (2, 3)).flatten(1),
    "shuffled": lambda m, x: functional.pixel_shuffle(2 * functional.pixel_unshuffle(x, 2), 2).flatten(1),
    "picked": lambda m, x: x[:, :, [2, 0, 1]].flatten(1),
    "gated": lambda m, x: functional.glu(x, 1).flatten(1),
    "channels last": lambda m, x: (
        functional.linear(x.permute(0, 2, 3, 1), m.matrix[:5, :2]).permute(0, 3, 1, 2).flatten(1)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_operations(name):
    torch.manual_seed(0)
    assert_converts(Lambda(FUNCTIONS[name]))


REFUSED = {
    "classes in place of logits": (lambda m, x: x.flatten(1).argmax(1), "operation argmax .*end the module with these"),
    "steps": (lambda m, x: torch.round(x).flatten(1), "operation round .*it jumps"),
    "sums by letters": (lambda m, x: torch.einsum("bchw,bchv->bwv", x, x).flatten(1), "operation einsum .*matmul"),
    "sorted": (lambda m, x: x.flatten(1).sort(1)[0], "operation sort .*amax and max pooling"),
    "batch size": (lambda m, x: x.flatten(1) / x.shape[0], "div.*computing with the size of the batch"),
    "batch mean": (lambda m, x: x.flatten(1) - x.flatten(1).mean(0), "mean .*along the batch dimension"),
    "batch moved": (
        lambda m, x: torch.relu(x.flatten(1).permute(1, 0)).permute(1, 0),
        "operation relu .*moves the batch",
    ),
    "batch merged": (lambda m, x: x.view(-1, 8)[:, :3].reshape(-1, 36), "mixes or moves the batch"),
    "batch slice": (lambda m, x: (x + x[:1]).flatten(1), "slice .*batch is not supported"),
    "random": (lambda m, x: (x + torch.rand(8)).flatten(1), "operation rand .*random"),
    "dropout": (lambda m, x: functional.dropout(x, 0.5, True).flatten(1), "operation .*dropout"),
    "branch": (
        lambda m, x: (x if x.sum() > 0 else -x).flatten(1),
        "module Lambda cannot be traced: .*data-dependent",
    ),
    "crash": (lambda m, x: x.nothing(), "module Lambda cannot be traced: .*nothing"),
    "adaptive pool": (lambda m, x: functional.adaptive_max_pool2d(x, 5).flatten(1), "expected an integer ratio"),
    "jumping softplus": (lambda m, x: functional.softplus(x, 1.0, 2.0).flatten(1), "threshold of 14 or more"),
    "two-dimensional index": (lambda m, x: x[:, [0, 1], [2, 3]].flatten(1), "several dimensions at once"),
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
    mixed = copy.deepcopy(module)
    mixed[1].bias.data = mixed[1].bias.data.half()
    with pytest.raises(InvalidInputError, match="float16"):
        from_torch(mixed, SHAPE)
    module[1].weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN"):
        from_torch(module, SHAPE)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_held_exactly(kind):
    module = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3)).to(kind)
    network = from_torch(module, SHAPE)
    assert network.dtype == torch.float32
    assert torch.equal(network.nodes[1].operation.weight.to(kind), module[1].weight)


class Recurrent(nn.Module):
    """A recurrent layer over the rows of the image, and a dense one on what is left of it."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how
        sides = 2 if layer.bidirectional and how == "last output" else 1
        self.last = nn.Linear(layer.hidden_size * sides, 3)

    def forward(self, x):
        rows = x[:, 0]
        if self.how == "rows first":
            return self.last(self.layer(rows.permute(1, 0, 2))[0][-1])
        outputs, state = self.layer(rows)
        if self.how == "last output":
            return self.last(outputs[:, -1])
        state = state[0] if isinstance(state, tuple) else state
        return self.last(state[-1] if self.how == "last state" else state.squeeze(0))


RECURRENT = {
    "lstm": lambda: Recurrent(nn.LSTM(8, 5, batch_first=True), "last output"),
    "lstm, two layers, both ways": lambda: Recurrent(
        nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True), "last output"
    ),
    "lstm, state": lambda: Recurrent(nn.LSTM(8, 5, batch_first=True), "last state"),
    "gru, no bias": lambda: Recurrent(nn.GRU(8, 5, batch_first=True, bias=False), "squeezed state"),
    "gru, rows first": lambda: Recurrent(nn.GRU(8, 5), "rows first"),
    "rnn": lambda: Recurrent(nn.RNN(8, 5, batch_first=True), "last output"),
    "rnn of relus": lambda: Recurrent(nn.RNN(8, 5, batch_first=True, nonlinearity="relu"), "last state"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_written_out(name):
    torch.manual_seed(0)
    network = assert_converts(RECURRENT[name](), (1, 6, 8))
    assert len(network.activations) >= 6


def test_recurrent_layers_with_projections_are_refused():
    module = Recurrent(nn.LSTM(8, 5, batch_first=True, proj_size=3), "last output")
    module.last = nn.Linear(3, 3)
    with pytest.raises(UnsupportedOperationError, match="lstm with projections"):
        from_torch(module, (1, 6, 8))


class Transformer(nn.Module):
    def __init__(self, masked=False):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
        self.last = nn.Linear(8, 3)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6) if masked else None)

    def forward(self, x):
        return self.last(self.layer(x[:, 0], src_mask=self.mask).mean(1))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_its_heads_apart_from_the_batch(masked):
    torch.manual_seed(0)
    network = assert_converts(Transformer(masked), (1, 6, 8))
    assert any(type(node.operation).__name__ == "Softmax" for node in network.nodes)
