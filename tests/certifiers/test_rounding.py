"""Certificates and bounds on rounding against exact rational arithmetic, on networks whose terms cancel.

The oracle reads the user's own module, weights as they are, and shares no code with the package.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from contracts import quick
from test_neuron_bounds import single_ball
from torch import Tensor, nn

import flowverify as fv
from flowverify.bounds.margins import margin_specification
from flowverify.certifiers.complete.neuron_bounds import Roots, neuron_bounds, upper_bounds
from flowverify.certifiers.complete.nodes import roots
from flowverify.certifiers.complete.problem import Problem as Bounding
from flowverify.certifiers.complete.problem import affine_maps
from flowverify.certifiers.complete.relaxation import lower_bound
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.linear import HalfSpaces, LinearCertifier
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Index, Network, Pad, Permute, Reshape, RoundingBound, ScaleShift, from_torch
from flowverify.network.curves import Erf, Softplus
from flowverify.network.operations import CANONICAL, RECORDS, STEEP
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
                slopes = [
                    ((value - gain) / (distance - at), distance) for distance, value in best.items() if distance > at
                ]
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
        [
            nn.Flatten(),
            nn.Linear(pixels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 3),
        ],
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
    # Half of the margins are about as large as rounding errors, half of them larger than any.
    gap = offset * 2.0 ** (uniform(-54, -44) if uniform(0, 1) < 0.5 else uniform(-44, -30))
    for _ in range(2):  # the second time for what rounding the bias left over
        values = logits(module, own)
        wanted = [float(value) * gap for value in torch.randn(3, generator=generator)]
        last.bias += torch.tensor([float(w - v) for w, v in zip(wanted, values, strict=True)]).to(last.bias)
    return Problem(module, image, kind < 2)


METHODS = (
    ("vanilla", "ibp"), ("fine-tuned", "ibp"), ("vanilla", "crown"), ("fine-tuned", "crown"), ("fine-tuned", "best"),
    ("complete", "best"), ("vanilla", "lifted"), ("fine-tuned", "lifted"),
)  # fmt: skip


def converted(given: Problem) -> Network:
    return from_torch(given.module, tuple(given.image.shape[1:]))


def refuted(seeds: range) -> tuple[Counter[str], list[str], int]:
    """Certificates by method, those that an image of the ball refutes, and how many modules were refused.

    What is refused is a batch normalisation that has itself nothing but rounding to show.
    """
    counts: Counter[str] = Counter()
    false: list[str] = []
    refusals = 0
    for seed in seeds:
        given = problem(seed)
        own = exact(given.image[0])
        mass = sum(own.reshape(-1))
        try:
            network = converted(given)
        except UnsupportedOperationError as error:
            if seed % 6 not in (1, 3) or "does not compute the same output" not in str(error):
                raise
            refusals += 1
            continue
        label = copy.deepcopy(network).double()(given.image).argmax(1)
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
    return counts, false, refusals


@pytest.mark.parametrize("part", quick(range(6), 3))
def test_no_certificate_is_refuted_in_exact_arithmetic(part: int) -> None:
    counts, false, refusals = refuted(range(part, COUNT, 6))
    assert not false, false
    assert counts.total() >= COUNT // 60, counts
    assert refusals <= COUNT // 30


def test_radii_of_a_solver_that_errs_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LinearCertifier._solve

    def too_far(self: LinearCertifier, spaces: HalfSpaces, *others: Any) -> list[float]:
        # The radii of the margins as they are computed, without what their rounding takes away.
        return real(self, replace(spaces, margins=spaces.margins + self.allowance(spaces.images)[:, None]), *others)

    monkeypatch.setattr(LinearCertifier, "_solve", too_far)
    certified = 0
    for seed in (*range(0, 300, 6), *range(1, 300, 12)):
        given, own = problem(seed), exact(problem(seed).image[0])
        try:
            certifier = LinearCertifier(converted(given))
        except UnsupportedOperationError:
            continue
        label = certifier.precise(given.image).argmax(1)
        (found,) = certifier.search(given.image, label)
        if found.verdict == "certified":
            certified += 1
            budget = Fraction(found.radius) * sum(own.reshape(-1))
            assert least_of_affine(given.module, own, int(label), budget) > 0, seed
    assert certified >= 20


@pytest.mark.parametrize("part", range(6))
def test_margins_are_within_the_allowance(part: int) -> None:
    off = 0.0
    for seed in range(part, 90, 6):
        given = problem(seed)
        certifier = Certifier(converted(given), "fine-tuned", "ibp")
        values = logits(given.module, exact(given.image[0]))
        (found,) = certifier.precise(given.image)
        (allowance,) = certifier.allowance(given.image)
        for first, second in itertools.permutations(range(3), 2):
            error = abs(Fraction(float(found[first] - found[second])) - (values[first] - values[second]))
            assert error <= Fraction(float(allowance)), seed
            off = max(off, float(error))
    assert off > 0


def read_by_relus(module: nn.Sequential, value: Array) -> list[Array]:
    read = []
    for layer in module:
        if isinstance(layer, nn.ReLU):
            read.append(value)
        value = through(layer, value)
    return read


def outward(value: Array, direction: float) -> Tensor:
    """The nearest float64 numbers that are not on the inner side."""
    result = []
    for one in value.reshape(-1):
        nearest = float(one)
        inside = (one - Fraction(nearest)) * int(direction) > 0
        result.append(math.nextafter(nearest, direction * math.inf) if inside else nearest)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("at_the_image", [False, True])
def test_lower_bounds_with_any_multipliers_are_below_exact_margins(positive: bool, at_the_image: bool) -> None:
    """No multiplier that a search may come to makes a bound that exceeds a margin in the ball, not by one ulp.

    At the image alone with the best bounds of neurons that there are, so that nothing else makes up for rounding.
    """
    checked = with_rows = 0
    for seed in (*range(2, 120, 6), *range(5, 120, 6)):
        generator = torch.Generator().manual_seed(seed)
        given = problem(seed)
        network, own = converted(given).double(), exact(given.image[0])
        maps = affine_maps(network)
        budget = 0.0 if at_the_image else 2.0 ** -(1 + seed % 50) * float(given.image.sum())
        ball = single_ball(given.image[0], budget, positive)
        label = int(network(given.image).argmax())
        bounds = neuron_bounds(Bounding.outputs(maps, ball), iterations=1)
        if at_the_image:
            read = read_by_relus(given.module, own)
            bounds.lower, bounds.upper = ([outward(value, side) for value in read] for side in (-1, 1))
        specification = margin_specification(torch.tensor([label]), 3, torch.float64)[0]
        question = Bounding(maps, ball, maps.layers, specification)
        if not at_the_image:
            known = Roots(network, "lifted", 1e-6, 1 << 20).over(ball.ball, specification)
            bounds, question = neuron_bounds(question, known=known.neurons, iterations=1), question.under(known.above)
            with_rows += known.above is not None and len(known.above) > 0
        nodes = roots(torch.arange(2), bounds.lower, bounds.upper, question.first_share)
        for group in (nodes.multipliers.alpha, nodes.multipliers.gamma, nodes.multipliers.share):
            for layer in group:
                layer.copy_(torch.rand(layer.shape, generator=generator, dtype=torch.float64))
        for layer in nodes.multipliers.gamma:
            layer.sub_(0.5).mul_(10.0 ** float(12 * torch.rand((), generator=generator) - 3) * (seed % 4))
        found = lower_bound(nodes.relaxation(question), nodes.multipliers).value
        others = [t for t in range(3) if t != label]
        for point in [own] if at_the_image else moved(own, Fraction(budget)):
            values = logits(given.module, point)
            for bound, other in zip(found.tolist(), others, strict=True):
                assert math.isfinite(bound) and Fraction(bound) <= values[label] - values[other], seed
                checked += 1
    assert checked >= 80
    assert at_the_image or with_rows >= 5


def test_neuron_bounds_contain_exact_values() -> None:
    for seed in (*range(2, 90, 6), *range(5, 90, 6)):
        given = problem(seed)
        network = converted(given).double()
        maps = affine_maps(network)
        ball = single_ball(given.image[0], 1e-3 * float(given.image.sum()))
        bounds = neuron_bounds(Bounding.outputs(maps, ball), iterations=1)
        for point in moved(exact(given.image[0]), Fraction(ball.budget)):
            read = read_by_relus(given.module, point)
            for layer_value, low, high in zip(read, bounds.lower, bounds.upper, strict=True):
                for one, least, most in zip(layer_value.tolist(), low.tolist(), high.tolist(), strict=True):
                    assert Fraction(least) <= one <= Fraction(most), seed


def test_joint_limits_are_not_below_exact_sums() -> None:
    """At the image itself, where nothing but rounding parts the limit from the sum of neurons that it bounds."""
    off = []
    for seed in (*range(2, 120, 6), *range(5, 120, 6)):
        generator = torch.Generator().manual_seed(seed)
        given = problem(seed)
        maps = affine_maps(converted(given).double())
        ball = single_ball(given.image[0], 0.0)
        bounding = Bounding.outputs(maps, ball)
        bounds = neuron_bounds(bounding, iterations=1)
        nodes = roots(torch.arange(1), bounds.lower, bounds.upper)
        # Terms whose sum is zero: the offset cancels among the neurons.
        members, terms = torch.arange(4)[None], torch.randint(-8, 9, (1, 6, 4), generator=generator).double()
        terms[..., 3] = -terms[..., :3].sum(-1)
        found = upper_bounds(bounding, 0, nodes, torch.zeros(1, dtype=torch.int64), terms, members)[0]
        value = read_by_relus(given.module, exact(given.image[0]))[0]
        for row, limit in zip(exact(terms[0]), found.tolist(), strict=True):
            assert Fraction(limit) >= row.dot(value), seed
            off.append(float(Fraction(limit) - row.dot(value)))
    assert max(off) > 0


OPERATIONS: list[tuple[nn.Module, int]] = [
    (nn.Linear(4, 3), 1), (nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=2), 1), (nn.AvgPool2d(3, 2, 1), 1),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 1), (nn.MaxPool2d(2, 1, 1), 1), (nn.Flatten(), 1),
    (ScaleShift(torch.tensor([[[-2.0]], [[3.0]]]), -0.3), 1), (Reshape((4, 8)), 1), (Permute((2, 0, 1)), 1),
    (Index(0, (1, 0, -1)), 1), (Pad((1, 0, 2, 1)), 1), (nn.ReLU(), 1), (nn.LeakyReLU(-3.0), 1), (nn.LeakyReLU(0.1), 1),
    (nn.Sigmoid(), 1), (nn.Tanh(), 1), (nn.ELU(1.7), 1), (nn.ELU(-0.5), 1), (nn.GELU(), 1), (nn.GELU("tanh"), 1),
    (nn.SiLU(), 1), (nn.Mish(), 1), (nn.Hardswish(), 1), (nn.Softsign(), 1), (Softplus(), 1), (Erf(), 1),
    *((kind(0) if kind.__name__ == "Concatenate" else kind(), 2)
      for kind in CANONICAL if RECORDS[kind].arity != 1 and kind not in STEEP),
]  # fmt: skip


def test_every_canonical_operation_has_a_rule() -> None:
    assert {type(operation) for operation, _ in OPERATIONS} == set(CANONICAL) - set(STEEP)


@pytest.mark.parametrize(("operation", "arity"), OPERATIONS)
def test_magnitudes_are_at_least_the_values(operation: nn.Module, arity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scaled = ScaleShift(torch.tensor(-1.5), torch.tensor(0.25))
    first = fv.network.Graph((2, 4, 4), [fv.network.Node("scaled", scaled, ("input",), (2, 4, 4))])
    with torch.no_grad():
        shape = tuple(operation(*[torch.zeros(2, 2, 4, 4)] * arity).shape[1:])
    inputs = ("input", "scaled")[-arity:] if arity > 1 else ("scaled",)
    graph = fv.network.Graph((2, 4, 4), [*first.nodes, fv.network.Node("out", operation, inputs, shape)]).double()
    images = torch.rand(200, 2, 4, 4, generator=generator, dtype=torch.float64) ** 8
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2 - 1
    images[100:] *= signs[100:]  # vanilla balls have negative pixels
    for relaxed in (False, True):
        fixed, moving = magnitudes(graph, relaxed=relaxed)["out"]
        sums = images.abs().flatten(1).sum(1).reshape(-1, *([1] * len(shape)))
        assert bool((graph(images).abs() <= fixed + sums * moving).all())
    assert float(reach(torch.tensor(2.0), 1.0)) >= 2.0 + 2 * 1.0


def test_pixels_that_share_passes_make_magnitudes_larger_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network = converted(problem(5))
    alone = magnitudes(network, relaxed=True)
    monkeypatch.setattr("flowverify.network.rounding.PRODUCTS", 60)
    together = magnitudes(network, relaxed=True)
    assert all(bool((together[name] >= alone[name]).all()) for name in alone)
    assert bool((together[network.output] > alone[network.output]).any())


def test_an_operation_without_a_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(fv.network.rounding._LIPSCHITZ, nn.ReLU)
    with pytest.raises(UnsupportedOperationError, match="rounding: no rule for operation ReLU"):
        RoundingBound(converted(problem(2)))


@pytest.mark.parametrize("method", ["linear", "vanilla", "fine-tuned", "complete"])
def test_what_overflows_is_not_certified(method: str) -> None:
    """The values and their differences are finite, the sum of their absolute terms is not."""
    network = Network.sequential((1, 1, 2), [nn.Flatten(), nn.Linear(2, 2)]).double()
    weight, bias = network.parameters()
    weight.copy_(torch.tensor([[1e308, -1e308], [1e308, -1e308]], dtype=torch.float64))
    bias.copy_(torch.tensor([1.0, 0]))
    image, label = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    certifier = fv.make_certifier(network, method, "ibp")
    assert float(certifier.precise(image)[0, 0]) == 1
    assert not bool(torch.isfinite(certifier.allowance(image)))
    assert certifier.certify(image, label, fv.WassersteinBall(0.0))[0].verdict == "unknown"
    assert certifier.certify(image, label, fv.WassersteinBall(1e-3))[0].verdict == "unknown"
    if method in ("linear", "complete"):  # the others search in float32, which does not have such weights
        (found,) = certifier.search(image, label)
        assert (found.verdict, found.radius) == ("unknown", 0)


def test_a_single_pixel_is_certified_by_its_margin() -> None:
    network = Network.sequential((1, 1, 1), [nn.Flatten(), nn.Linear(1, 2)]).double()
    weight, bias = network.parameters()
    weight.zero_()
    image, label = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0])
    for size, verdict in ((1.0, "certified"), (2.0**52, "unknown")):
        bias.copy_(torch.tensor([size + 1, size], dtype=torch.float64))
        assert Certifier(network, "fine-tuned", "ibp").search(image, label)[0].verdict == verdict


def test_gamma_grows_with_the_network_and_says_nothing_about_one_that_is_too_large() -> None:
    small = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 3)])
    deep = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)])
    assert 4 * 2.0**-53 < gamma(small) < gamma(deep) < 1e-13
    assert math.isinf(gamma(_Counted()))


class _Counted(nn.Module):
    """As large as no network is."""

    input_shape = (1, 1 << 26, 1 << 26)
    nodes = ()
