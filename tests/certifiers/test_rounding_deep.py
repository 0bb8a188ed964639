"""Bounds that allow for rounding themselves, against exact rational arithmetic: six layers whose terms cancel."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_rounding import Array, exact, moved, through
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Threat
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import BOUNDS
from flowverify.network import Network, RoundingBound, from_torch
from flowverify.network.rounding import RunningError, SumsOfTerms

SEEDS = int(os.environ.get("FLOWVERIFY_DEEP_NETWORKS", "8"))
DEPTH, WIDTH = 6, 4


class Deep:
    """A network of six layers, an image of which pixels and their sum are exact, and its exact values.

    An offset of up to 2^40 cancels: in the first layer, where the bias takes it away from every image of the same
    mass; or between two equal neurons of some layer. Its classes are tied to about what rounding leaves of the offset.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        leaky = seed % 3 == 2
        self.shape = (1, 2, 2) if seed % 2 else (1, 1, 4)
        layers: list[nn.Module] = [nn.Flatten()]
        for size in (4, *[WIDTH] * (DEPTH - 1)):
            layers += [nn.Linear(size, WIDTH), nn.LeakyReLU(0.25) if leaky else nn.ReLU()]
        self.module = nn.Sequential(*layers, nn.Linear(WIDTH, 3)).double().requires_grad_(False)
        linear = [layer for layer in self.module if isinstance(layer, nn.Linear)]
        for layer in linear:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64).abs())
        image = torch.randint(0, 1024, (1, *self.shape), generator=generator).double() / 1024
        image[0, 0, 0, 0] += 0.5
        self.image = image
        offset = 2.0 ** int(torch.randint(20, 41, (), generator=generator)) if seed % 4 else 2.0**27
        at = int(torch.randint(0, DEPTH + 1, (), generator=generator))
        if at == DEPTH:
            linear[0].weight += offset
            linear[0].bias.copy_(linear[0].bias.clamp(-1, 1) - offset * image.sum())
        else:
            linear[at].weight[1], linear[at].bias[1] = linear[at].weight[0], linear[at].bias[0]
            linear[at + 1].weight[:, 0], linear[at + 1].weight[:, 1] = offset, -offset
        own = exact(image[0])
        gap = offset * 2.0 ** float(torch.randint(-54, -44, (), generator=generator))
        for _ in range(2):
            wanted = [float(v) * gap for v in torch.randn(3, generator=generator)]
            values = logits_of(self.module, own)
            linear[-1].bias += torch.tensor([float(Fraction(w) - v) for w, v in zip(wanted, values, strict=True)])
        self.network = from_torch(self.module, self.shape).double()


def layer_of(layer: nn.Module, value: Array) -> Array:
    if isinstance(layer, nn.LeakyReLU):
        return np.where(value > 0, value, Fraction(layer.negative_slope) * value)
    return through(layer, value)


def logits_of(module: nn.Sequential, image: Array) -> Array:
    for layer in module:
        image = layer_of(layer, image)
    return image


def read_by_activations(module: nn.Sequential, image: Array) -> list[Array]:
    read = []
    for layer in module:
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            read.append(image)
        image = layer_of(layer, image)
    return read


def is_above(values: Tensor, exact_values: Array) -> bool:
    """Whether any number, NaN aside, is above the exact one."""
    pairs = zip(values.flatten().tolist(), exact_values.reshape(-1), strict=True)
    return any((math.isfinite(one) and Fraction(one) > other) or one == math.inf for one, other in pairs)


def violations(bound: str, seeds: range, threat: Threat) -> tuple[list[str], int]:
    """Intervals and margins that some image of the ball refutes, and how many margins were positive."""
    found, positive = [], 0
    for seed in seeds:
        deep = Deep(seed)
        own = exact(deep.image[0])
        budget = 0.0 if seed % 3 == 0 else 2.0 ** -(3 + 5 * (seed % 9)) * float(deep.image.sum())
        label = deep.network(deep.image).argmax(1)
        options = EngineOptions(alpha_iterations=2)
        engine = MarginBounds(deep.network, threat, bound, dtype=torch.float64, options=options)
        ball = threat.ball(deep.image, torch.tensor([budget], dtype=torch.float64))
        neurons = engine.neurons(ball)
        margins = engine.margins(ball, label)[0]
        positive += int((margins > 0).sum())
        others = [k for k in range(3) if k != int(label)]
        for point in moved(own, Fraction(budget)):
            values = logits_of(deep.module, point)
            if is_above(margins, np.array([values[int(label)] - values[k] for k in others], dtype=object)):
                found.append(f"seed {seed}: margin")
            reads = read_by_activations(deep.module, point)
            for layer, ((low, high), value) in enumerate(zip(neurons, reads, strict=True)):
                if is_above(low, value) or is_above(-high, -value):
                    found.append(f"seed {seed}: layer {layer}")
    return found, positive


@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_no_bound_is_above_an_exact_value(bound: str) -> None:
    counts = 0
    for positive in (True, False):
        seeds = SEEDS // 2 if bound == "alpha-crown" else SEEDS
        found, count = violations(bound, range(0 if positive else 1, seeds, 2), Threat(positive=positive))
        assert not found
        counts += count
    if bound != "ibp":
        assert counts > 0


def test_without_the_allowance_exact_values_refute_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr("flowverify.network.rounding.gamma", lambda network: 0.0)
    assert violations("ibp", range(SEEDS), Threat())[0]


def test_computed_outputs_are_within_what_is_allowed_at_the_image() -> None:
    off = 0.0
    for seed in range(3 * SEEDS):
        deep = Deep(seed)
        terms = SumsOfTerms(deep.network)
        (allowed,) = terms.at(deep.image)
        assert float(allowed) < float(RoundingBound(deep.network).margins(deep.image.flatten(1).sum(1)))
        values, (found,) = logits_of(deep.module, exact(deep.image[0])), deep.network(deep.image)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            error = abs(
                (Fraction(float(found[first])) - Fraction(float(found[second]))) - (values[first] - values[second])
            )
            assert error <= Fraction(float(allowed)), seed
            off = max(off, float(error))
    assert off > 0


def test_certificates_of_deep_networks_are_not_lost() -> None:
    """Nine layers of 100 neurons: sums before anything is known are beyond the margin, those over a ball are not."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(16, 100), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Linear(100, 100), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(100, 3)).requires_grad_(False)
    for layer in module:
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.randn_like(layer.weight) * (2 / layer.in_features) ** 0.5)
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    network = from_torch(module, (1, 4, 4))
    precise = from_torch(module.double(), (1, 4, 4))
    logits_at = precise(image)[0].sort(descending=True).values
    margin = float(logits_at[0] - logits_at[1])
    assert float(RoundingBound(precise).margins(image.flatten(1).sum(1))) > margin
    assert float(SumsOfTerms(precise).at(image)) < 1e-3 * margin
    (found,) = fv.make_certifier(network, "fine-tuned", "crown").certify(
        image, precise(image).argmax(1), fv.WassersteinBall(1e-4)
    )
    assert found.verdict == "certified"


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 6)])
def test_blocks_hold_the_largest_coefficient_of_their_pixels(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = math.prod(shape)
    network = Network.sequential(shape, [nn.Flatten(), nn.Linear(pixels, 7), nn.ReLU(), nn.Linear(7, 2)]).double()
    weight = next(iter(network.parameters()))
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    name = network.activations[0].inputs[0]
    moving = SumsOfTerms(network).start[name][1]
    # Every pixel is of one block, and a neuron's largest coefficient is that of a block.
    assert torch.allclose(moving.amax(0), weight.abs().amax(1), rtol=1e-5)
    monkeypatch.setattr("flowverify.network.rounding.PRODUCTS", 7 * pixels * 2)
    together = SumsOfTerms(network).start[name][1]
    assert bool((together >= moving).all())
    assert bool((together > moving).any())


def test_a_relu_that_is_off_passes_nothing_on() -> None:
    network = Network.sequential((1, 1, 2), [nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]).double()
    first, _, last, _ = network.parameters()
    first.copy_(torch.tensor([[-(2.0**40), 0], [0, 1]], dtype=torch.float64))
    last.copy_(torch.ones(2, 2, dtype=torch.float64))
    image = torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64)
    terms = SumsOfTerms(network)
    assert float(terms.at(image)) < 1e-9
    sums = RunningError(terms, torch.ones(1, dtype=torch.float64))
    relu = network.activations[0]
    unknown = torch.full((1, 2), 1.0, dtype=torch.float64)
    sums.enter(relu, {relu.inputs[0]: (-unknown, unknown)})
    assert float(sums.off(relu.name)[0, 0]) > 1e-3
