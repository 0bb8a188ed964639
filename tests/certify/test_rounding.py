"""Certificates and bounds on rounding against exact rational arithmetic, on networks whose terms cancel.

The oracle reads the user's own module, weights as they are, and shares no code with the package.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowverify as fv
from flowverify.certify.complete.affine_maps import affine_maps
from flowverify.certify.complete.balls import FlowBall, Polytope
from flowverify.certify.complete.neuron_bounds import neuron_bounds
from flowverify.certify.complete.nodes import roots
from flowverify.certify.complete.relaxation import lower_bound
from flowverify.certify.margins import margin_specification
from flowverify.certify.verify import Certifier
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Index, Network, Pad, Permute, Reshape, RoundingBound, ScaleShift, from_torch
from flowverify.network.operations import CANONICAL, MULTIPLE_INPUTS
from flowverify.network.rounding import gamma, magnitudes, reach

COUNT = int(os.environ.get("FLOWVERIFY_ROUNDING_NETWORKS", "300"))

Array = Any  # of Fractions


def exact(tensor: Tensor) -> Array:
    flat = [Fraction(value) for value in tensor.detach().double().flatten().tolist()]
    return np.array(flat, dtype=object).reshape(tuple(tensor.shape))


def inverse_root(number: Fraction) -> Fraction:
    """1 / sqrt(number), to 200 bits."""
    scale = 1 << 600
    return Fraction(1 << 300, math.isqrt(number.numerator * scale // number.denominator))


def through(layer: nn.Module, value: Array) -> Array:
    """One layer of a module in evaluation mode, on one sample."""
    match layer:
        case nn.Flatten():
            return value.reshape(-1)
        case nn.Linear():
            return exact(layer.weight).dot(value) + exact(layer.bias)
        case nn.ReLU():
            return np.where(value > 0, value, Fraction(0))
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            assert layer.running_var is not None and layer.running_mean is not None
            variance, shape = exact(layer.running_var), (-1,) + (1,) * (value.ndim - 1)
            roots = np.array([inverse_root(v + Fraction(layer.eps)) for v in variance], dtype=object)
            scale = (exact(layer.weight) * roots).reshape(shape)
            return (value - exact(layer.running_mean).reshape(shape)) * scale + exact(layer.bias).reshape(shape)
        case nn.Conv2d():
            weight, bias = exact(layer.weight), exact(layer.bias)
            rows, columns = value.shape[1] - weight.shape[2] + 1, value.shape[2] - weight.shape[3] + 1
            result = np.empty((len(weight), rows, columns), dtype=object)
            for out, row, column in itertools.product(range(len(weight)), range(rows), range(columns)):
                window = value[:, row : row + weight.shape[2], column : column + weight.shape[3]]
                result[out, row, column] = (weight[out] * window).sum() + bias[out]
            return result
    raise AssertionError(layer)


def logits(module: nn.Sequential, image: Array) -> Array:
    for layer in module:
        image = through(layer, image)
    return image


def least_margin(module: nn.Sequential, image: Array, label: int) -> Fraction:
    values = logits(module, image)
    return values[label] - max(value for index, value in enumerate(values) if index != label)


def moved(image: Array, budget: Fraction) -> list[Array]:
    """The image, and every image that one move makes of it that spends the budget or empties its pixel."""
    result, flat = [image], image.reshape(-1)
    width = image.shape[2]
    for start, end in itertools.permutations(range(flat.size), 2):
        distance = abs(start // width - end // width) + abs(start % width - end % width)
        amount = min(flat[start], budget / distance)
        other = flat.copy()
        other[start] -= amount
        other[end] += amount
        result.append(other.reshape(image.shape))
    return result


def least_of_affine(module: nn.Sequential, image: Array, label: int, budget: Fraction) -> Fraction:
    """The least margin of an affine module over the whole ball: a fractional knapsack of moves, steepest first.

    A pixel's mass may go to one target and on to a farther one that pays more for each further step: only steps of the
    upper concave envelope of (distance, gain) are ever bought.
    """
    flat, width = image.reshape(-1), image.shape[2]
    nothing = logits(module, np.full_like(image, Fraction(0)))
    units = []
    for pixel in range(flat.size):
        unit = np.full(flat.size, Fraction(0), dtype=object)
        unit[pixel] = Fraction(1)
        units.append(logits(module, unit.reshape(image.shape)) - nothing)
    own, least = logits(module, image), None
    for other in range(len(own)):
        if other == label:
            continue
        gains = [unit[other] - unit[label] for unit in units]
        steps = []
        for start in range(flat.size):
            best: dict[int, Fraction] = {}
            for end in range(flat.size):
                distance = abs(start // width - end // width) + abs(start % width - end % width)
                best[distance] = max(best.get(distance, gains[end] - gains[start]), gains[end] - gains[start])
            at, gain = 0, Fraction(0)
            while True:
                slopes = [((value - gain) / (distance - at), distance) for distance, value in best.items() if distance > at]
                slope, farther = max(slopes, default=(Fraction(0), 0))
                if slope <= 0:
                    break
                steps.append((slope, (farther - at) * flat[start]))
                at, gain = farther, best[farther]
        left, total = budget, Fraction(0)
        for slope, cost in sorted(steps, reverse=True):
            total += slope * min(left, cost)
            left -= min(left, cost)
        margin = own[label] - own[other] - total
        least = margin if least is None else min(least, margin)
    assert least is not None
    return least


@dataclass
class Problem:
    module: nn.Sequential
    image: Tensor  # (1, C, H, W), float64
    affine: bool


def problem(seed: int) -> Problem:
    """A tiny network whose values are what is left of an offset of up to 2^50, with near ties between its classes.

    The offset is in the first layer's weights, and the bias takes it away from every image of the same mass (kinds 0, 2
    and 4); in a batch normalisation, whose mean is far away and whose bias brings it back (1 and 3); or in the second
    layer's weights of two hidden units that are equal (5).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    kind, single = seed % 6, bool(seed // 6 % 2)
    shape = ((1, 2, 2), (1, 1, 4), (1, 2, 3))[seed // 12 % 3]
    pixels, hidden = math.prod(shape), 4
    layers: list[list[nn.Module]] = [
        [nn.Flatten(), nn.Linear(pixels, 3)],
        [nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(pixels, 3)],
        [nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 3)],
        [nn.Flatten(), nn.Linear(pixels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3)],
        [nn.Conv2d(1, hidden, shape[1:]), nn.ReLU(), nn.Flatten(), nn.Linear(hidden, 3)],
        [nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3)],
    ]
    module = nn.Sequential(*layers[kind]).double().eval().requires_grad_(False)
    for layer in module:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for tensor in (layer.weight, layer.bias):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    # Pixels of 10 bits: their sum is exact.
    image = torch.randint(0, 1024, (1, *shape), generator=generator).double() / 1024
    image[0, 0, 0, 0] += 0.5
    power = int(uniform(0, 28 if single else 51))
    offset, first = 2.0**power, module[0] if kind == 4 else module[1]
    if kind in (1, 3):
        norm = module[0 if kind == 1 else 2]
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.running_mean is not None
        assert norm.running_var is not None
        for tensor, low, high in ((norm.running_var, 1e-3, 5), (norm.weight, 0.1, 2), (norm.running_mean, 0.5, 1)):
            tensor.copy_(torch.tensor([uniform(low, high) for _ in tensor]))
        norm.running_mean.mul_(offset)
        norm.bias.copy_(norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
    elif kind == 5:
        for tensor in (module[1].weight, module[1].bias):
            tensor[1] = tensor[0]
        second = module[3]
        assert isinstance(second, nn.Linear)
        second.weight[:, 0], second.weight[:, 1] = offset, -offset
    else:
        assert isinstance(first, nn.Linear | nn.Conv2d)
        first.weight += offset
        first.bias.copy_(first.bias.clamp(-1, 1) - offset * image.sum())
    if single:
        module = module.float()
    last, own = module[-1], exact(image[0])
    assert isinstance(last, nn.Linear)
    gap = offset * 2.0 ** uniform(-54, -42)
    for _ in range(2):  # the second time for what rounding the bias left over
        values = logits(module, own)
        wanted = [float(value) * gap for value in torch.randn(3, generator=generator)]
        last.bias += torch.tensor([float(w - v) for w, v in zip(wanted, values, strict=True)]).to(last.bias)
    return Problem(module, image, kind < 2)


METHODS = (
    ("vanilla", "ibp"), ("fine-tuned", "ibp"), ("vanilla", "crown"), ("fine-tuned", "crown"), ("fine-tuned", "best"),
    ("complete", "best"),
)  # fmt: skip


def refuted(seeds: range) -> tuple[Counter[str], list[str]]:
    """How many certificates there are by method, and those that an image of the ball refutes."""
    counts: Counter[str] = Counter()
    false: list[str] = []
    for seed in seeds:
        given = problem(seed)
        own = exact(given.image[0])
        mass = sum(own.reshape(-1))
        network = from_torch(given.module, tuple(given.image.shape[1:]))
        label = network.double()(given.image).argmax(1)
        network = from_torch(given.module, tuple(given.image.shape[1:]))
        method, bound = METHODS[seed // 6 % len(METHODS)]
        methods = [("linear", "best"), (method, bound)] if given.affine else [(method, bound)]
        for method, bound in methods:
            certifier = fv.make_certifier(network, method, bound)
            if method == "linear":
                found = certifier.search(given.image, label)
            else:
                ball = fv.WassersteinBall(2.0 ** -(20 + seed % 61) if seed // 36 % 2 else 0.0)
                found = certifier.certify(given.image, label, ball)
            if found[0].verdict != "certified":
                continue
            counts[method] += 1
            budget = Fraction(found[0].radius) * mass
            if given.affine:
                least = least_of_affine(given.module, own, int(label), budget)
            else:
                least = min(least_margin(given.module, point, int(label)) for point in moved(own, budget))
            if least <= 0:
                false.append(f"seed {seed}, {method} {bound}, radius {found[0].radius}: {float(least)}")
    return counts, false


@pytest.mark.parametrize("part", range(6))
def test_no_certificate_is_refuted_in_exact_arithmetic(part: int) -> None:
    counts, false = refuted(range(part, COUNT, 6))
    assert not false, false
    assert counts.total() >= COUNT // 60, counts
