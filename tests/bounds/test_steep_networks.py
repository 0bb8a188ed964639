"""Networks with products of values: their bounds carry their own rounding, and are good enough for a transformer."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Threat
from flowverify.bounds.margins import MarginBounds
from flowverify.network import Network, Node, from_torch
from flowverify.network.curves import Exp, Power
from flowverify.network.operations import MatrixProduct, Multiply, Softmax, Standardise
from flowverify.network.rounding import RoundingBound


class Block(nn.Module):
    """A layer of a transformer, written as torch's own is not: the batch stays first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.own = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, value: Tensor) -> Tensor:
        batch, count, width = value.shape
        query, key, content = (
            part.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for part in self.project(self.before(value)).chunk(3, 2)
        )
        shares = (query @ key.transpose(2, 3) * (width // self.heads) ** -0.5).softmax(3)
        value = value + self.join((shares @ content).transpose(1, 2).reshape(batch, count, width))
        return value + self.own(self.between(value))


class VisionTransformer(nn.Module):
    """Of the sizes of VNN-COMP's `vit`: patches of 16 pixels of images of 32, 3 heads, 2 layers, width 48."""

    def __init__(self, width: int = 48, heads: int = 3, layers: int = 2, patch: int = 16, size: int = 32) -> None:
        super().__init__()
        count = (size // patch) ** 2 + 1
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        value = self.patches(images).flatten(2).transpose(1, 2)
        value = torch.cat([self.token.expand(images.shape[0], -1, -1), value], 1) + self.place
        return self.head(self.norm(self.blocks(value))[:, 0])


def test_a_vision_transformer_is_certified() -> None:
    torch.manual_seed(0)
    module = VisionTransformer().eval()
    image = torch.rand(3, 32, 32)
    label = int(module(image[None]).argmax())
    found = fv.certify(module, image, label, fv.WassersteinBall(5e-5))
    assert found.verdict == "certified"
    assert "zonotope in place of lifted" in found.note
    logits = module(image[None])[0].detach()
    clean = float(logits[label] - logits[torch.arange(10) != label].max())
    assert 0.8 * clean < found.margin < clean


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_recurrent_network_is_certified(layer: type[nn.Module]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.last = layer(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.read(images[:, 0])[0][:, -1])

    torch.manual_seed(0)
    module = Reader().eval()
    image = torch.rand(1, 8, 8)
    label = int(module(image[None]).argmax())
    found = fv.certify(module, image, label, fv.WassersteinBall(0.01))
    assert found.verdict == "certified"


def exact(network: Network, image: Tensor) -> dict[str, Any]:
    """All values in many digits, by the definitions of the operations."""

    def numbers(tensor: Tensor) -> Any:
        return np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1)(tensor.detach().numpy())

    values: dict[str, Any] = {"input": numbers(image)}
    for node in network.nodes:
        given, operation = [values[read] for read in node.inputs], node.operation
        first = given[0]
        match operation:
            case nn.Flatten():
                found = first.reshape(-1)
            case nn.Linear():
                found = first @ numbers(operation.weight).T + numbers(operation.bias)
            case Multiply():
                found = first * given[1]
            case MatrixProduct():
                found = first @ given[1]
            case Exp():
                found = np.frompyfunc(mpmath.exp, 1, 1)(first)
            case Power():
                found = first ** mpmath.mpf(operation.exponent)
            case Softmax():
                shares = np.frompyfunc(mpmath.exp, 1, 1)(first)
                found = shares / shares.sum(operation.dim, keepdims=True)
            case Standardise():
                centred = first - first.mean(-1, keepdims=True)
                variance = (centred**2).mean(-1, keepdims=True) + mpmath.mpf(operation.epsilon)
                found = centred / np.frompyfunc(mpmath.sqrt, 1, 1)(variance)
            case _:
                raise NotImplementedError(operation)
        values[node.name] = found
    return values


def steep(seed: int) -> Network:
    """Rows that are standardised, attend to each other and end in terms that nearly cancel."""
    torch.manual_seed(seed)
    shape = (1, 4, 5)
    last = nn.Linear(16, 3)
    nodes = [
        Node("rows", nn.Linear(5, 4), ("input",), (1, 4, 4)),
        Node("norm", Standardise(1e-5), ("rows",), (1, 4, 4)),
        Node("scores", MatrixProduct(), ("norm", "rows"), (1, 4, 4)),
        Node("shares", Softmax(2), ("scores",), (1, 4, 4)),
        Node("squares", Power(2.0), ("rows",), (1, 4, 4)),
        Node("large", Exp(), ("squares",), (1, 4, 4)),
        Node("product", Multiply(), ("large", "shares"), (1, 4, 4)),
        Node("flat", nn.Flatten(), ("product",), (16,)),
        Node("last", last, ("flat",), (3,)),
    ]
    network = Network(shape, nodes).double()
    with torch.no_grad():  # weights of the last layer differ by little: their margins are rounding
        last.weight.copy_(1e7 * last.weight[:1] + 1e-9 * last.weight)
    return network


@pytest.mark.parametrize("bound", ["ibp", "zonotope", "best"])
def test_bounds_at_the_image_hold_in_exact_arithmetic(bound: str) -> None:
    near = 0
    for seed in range(12):
        network = steep(seed)
        image = torch.rand(1, 1, 4, 5, dtype=torch.float64)
        label = torch.tensor([0])
        engine = MarginBounds(network, Threat(), bound, dtype=torch.float64)
        ball = Threat().ball(image, torch.tensor([0.0], dtype=torch.float64))
        found = engine.margins(ball, label)[0]
        with mpmath.workdps(50):
            values = exact(network, image[0])
            logits = values[network.output]
            margins = [float(logits[0] - logits[other]) for other in (1, 2)]
            for node, (low, high) in zip(network.activations, engine.neurons(ball), strict=True):
                ends = zip(
                    low.flatten().tolist(), values[node.inputs[0]].reshape(-1), high.flatten().tolist(), strict=True
                )
                assert all(mpmath.mpf(a) <= value <= mpmath.mpf(b) for a, value, b in ends), (seed, node.name)
        computed = network(image)[0]
        near += sum(abs(float(computed[0] - computed[k + 1]) - margins[k]) > 0 for k in range(2))
        assert all(found[k] <= margins[k] for k in range(2)), (seed, found, margins)
        assert all(math.isfinite(found[k]) for k in range(2))
    assert near, "no margin was rounded"


def test_steep_networks_are_not_allowed_for_a_second_time() -> None:
    assert not RoundingBound(steep(0)).margins(torch.ones(2, dtype=torch.float64)).any()


def test_reading_keeps_what_a_square_is() -> None:
    class Square(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images * images).flatten(1)

    network = from_torch(Square(), (1, 2, 2))
    assert any(isinstance(node.operation, Power) for node in network.nodes)
