"""Complete methods against the enumeration of all patterns of active ReLUs, one linear program each."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from contracts import exact_margins, quick, random_network, sparse_images
from torch import Tensor, nn

from flowverify import Network, WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.milp import MilpCertifier
from flowverify.certifiers.options import CompleteOptions

COUNT = int(os.environ.get("FLOWVERIFY_TINY_NETWORKS", "16"))


def tiny(seed: int) -> tuple[Network, Tensor, int, float]:
    """A network of at most 8 ReLUs in one or two layers, a 4x4 image, its class, a radius."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(2, 5, (2,), generator=generator).tolist() if seed % 2 else [3 + seed // 2 % 6]
    layers: list[nn.Module] = [nn.Flatten()]
    width = 16
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    network = random_network((1, 4, 4), [*layers, nn.Linear(width, 3)], seed)
    image = sparse_images((1, 4, 4), 1, seed)
    return network, image, int(network(image).argmax(1)), (0.05, 0.3, 1.0)[seed % 3]


@pytest.mark.parametrize("part", quick(range(4), 2))
def test_equal_to_the_enumeration_of_all_patterns(part: int) -> None:
    verdicts = set()
    for seed in range(part, COUNT, 4):
        network, image, label, radius = tiny(seed)
        exact = min(exact_margins(network, image[0], label, radius * float(image.sum())))
        ball = WassersteinBall(radius)
        certifier = CompleteCertifier(network, options=CompleteOptions(timeout=None, nodes=20000))
        found = certifier.least_margin(image[0], label, ball)
        assert found.lower - 1e-6 <= exact <= found.upper + 1e-6, (seed, exact, found)
        assert found.upper - found.lower <= 1e-6, (seed, found)
        expected = "certified" if exact > 1e-6 else "falsified" if exact < -1e-6 else None
        if expected is not None:
            labels = torch.tensor([label])
            verdict = certifier.certify(image, labels, ball)[0].verdict
            assert verdict == expected, (seed, exact)
            assert MilpCertifier(network).certify(image, labels, ball)[0].verdict == expected, (seed, exact)
            verdicts.add(str(verdict))
    assert verdicts <= {"certified", "falsified"}
    assert verdicts


@pytest.mark.parametrize("seed", [4, 7, 10])
def test_mixed_integer_program_gives_the_value_and_the_distance(seed: int) -> None:
    network, image, label, radius = tiny(seed)
    budget = radius * float(image.sum())
    exact = exact_margins(network, image[0], label, budget)
    certifier = MilpCertifier(network)
    program = certifier.program(image[0], budget)
    others = [t for t in range(3) if t != label]
    for other, value in zip(others, exact, strict=True):
        assert program.least_margin(label, other, budget, None).bound == pytest.approx(value, abs=1e-6)
    labels = torch.tensor([label])
    by_program, by_tree = certifier.search(image, labels)[0], CompleteCertifier(network).search(image, labels)[0]
    assert by_program.upper_radius is not None
    assert by_program.radius == pytest.approx(by_program.upper_radius, rel=1e-4)
    assert by_tree.radius <= by_program.upper_radius
    assert by_program.radius <= by_tree.upper_radius <= by_tree.radius * 1.0101  # type: ignore[operator]
    at, beyond = (
        min(exact_margins(network, image[0], label, by_program.radius * factor * float(image.sum())))
        for factor in (0.999, 1.001)
    )
    assert at > 0 > beyond


def test_a_class_that_no_image_of_this_mass_leaves() -> None:
    network, image, label, _ = tiny(1)
    farthest = float(network.grid.diameter)
    assert min(exact_margins(network, image[0], label, farthest * float(image.sum()))) > 0
    for certifier in (MilpCertifier(network), CompleteCertifier(network)):
        found = certifier.search(image, torch.tensor([label]))[0]
        assert found.verdict == "certified"
        assert found.radius == farthest
        assert found.upper_radius is None


def dead(seed: int) -> tuple[Network, Tensor, int]:
    """2 or 3 ReLUs in one or two layers above a 3x3 image; without biases images on which all ReLUs are off tie."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [2 + seed % 2] * (1 + seed % 3 // 2)
    biased = seed % 4 == 3
    layers: list[nn.Module] = [nn.Flatten()]
    width = 9
    for size in hidden:
        layers += [nn.Linear(width, size, bias=biased), nn.ReLU()]
        width = size
    network = random_network((1, 3, 3), [*layers, nn.Linear(width, 2 + seed % 5 // 3, bias=biased)], seed)
    image = torch.rand(1, 1, 3, 3, generator=generator, dtype=torch.float64)
    image = image * (torch.rand(image.shape, generator=generator) < (0.4, 1.0)[seed % 2]) + 0.01
    return network, image, int(network(image).argmax(1))


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_brackets_close_to_a_percent_around_the_radius_where_the_margin_ends(part: int) -> None:
    ties = 0
    for seed in range(part, COUNT, 2):
        network, image, label = dead(seed)
        certifier = CompleteCertifier(network, options=CompleteOptions(timeout=None, nodes=20000))
        labels = torch.tensor([label])
        if not bool(certifier.clean(image, labels)[1]):
            continue
        search = certifier.start(image[0], label)
        search.run(certifier.options.deadline())
        end = min(search.upper, search.undecided, search.limit)
        assert search.proven <= end <= max(search.proven * 1.0101, 1e-8), seed
        assert min(exact_margins(network, image[0], label, search.proven)) > 0, seed
        assert search.proven == end or min(exact_margins(network, image[0], label, end)) <= 1e-9, seed
        if not search.finished:
            found = certifier.search(image, labels)[0]
            assert found.radius == search.radius(search.proven)
            undecided = search.radius(search.undecided)
            assert search.tie and f"from radius {undecided:.6g} on, a tie to within rounding" in found.note
            assert min(exact_margins(network, image[0], label, end)) >= -1e-9, seed
            ties += 1
    assert ties


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("method", ["complete", "vanilla-complete"])
def test_an_affine_network_has_nothing_to_split(method: str, cap: float | None) -> None:
    torch.manual_seed(2)  # where the bound for a cap does not decide
    image = torch.rand(1, 1, 4, 4).double()
    network = Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 3)]).double()
    label = int(network(image).argmax(1))
    certifier = CompleteCertifier(network, method)
    for radius in (0.01, 0.2, 2.0):
        exact = min(exact_margins(network, image[0], label, radius * float(image.sum())))
        found = certifier.certify(image, torch.tensor([label]), WassersteinBall(radius, "l1", cap))[0]
        if method == "complete" and cap is None:
            assert found.verdict == ("certified" if exact > 0 else "falsified"), (radius, exact)
        assert found.verdict != "certified" or exact > 0 or cap is not None


def test_one_pixel_whose_leaf_ties() -> None:
    network = random_network((1, 1, 1), [nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)], 0)
    first, last = network.nodes[1].operation, network.nodes[3].operation
    with torch.no_grad():
        for parameter, values in (
            (first.weight, [[1.0]]), (first.bias, [-1.0]), (last.weight, [[1.0], [-1.0]]), (last.bias, [0.0, -1e-13]),
        ):  # fmt: skip
            parameter.copy_(torch.tensor(values))
    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for method in ("complete", "vanilla-complete"):
        found = CompleteCertifier(network, method).certify(image, torch.tensor([0]), WassersteinBall(0.5))[0]
        assert found.verdict in ("unknown", "certified")


def test_where_float32_rounds_the_first_counterexamples_away_a_bracket_says_so() -> None:
    """Logits of 3000 differ by less than their units in the last place on 2% of the way beyond the exact radius."""
    values = {
        (1, "weight"): [
            [-0.0026188523042947054, 0.0014530082698911428, -0.0027957463171333075, 0.0012962513137608767,
             -0.002620912389829755, 0.0009071563254110515, 0.005620327312499285, 0.0013673815410584211,
             0.002590437885373831],
            [-0.0014524407451972365, -0.0003017006965819746, 0.0017001595115289092, -0.002395031740888953,
             0.002529437653720379, 0.00280523463152349, 0.0006056806305423379, -4.2312942241551355e-05,
             0.002228493569418788],
            [-0.002093883929774165, 0.0006063100881874561, -0.00011653624096652493, 0.002885404508560896,
             -0.0015311789466068149, 0.001140278996899724, -0.0003520358877722174, 0.0006737062940374017,
             0.0016813918482512236],
        ],
        (1, "bias"): [0.00040066707879304886, 0.0022494143340736628, -0.0009004423627629876],
        (3, "weight"): [
            [1048576.5, 1048571.6875, 1048577.25], [1048586.125, 1048590.75, 1048572.6875],
            [1048550.4375, 1048571.5, 1048581.25],
        ],
        (3, "bias"): [4.444112300872803, 4.20331335067749, 4.436844825744629],
    }  # fmt: skip
    layers = [nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 3)]
    with torch.no_grad():
        for (index, name), numbers in values.items():
            layers[index].get_parameter(name).copy_(torch.tensor(numbers))
    network = Network.sequential((1, 3, 3), layers)
    image = torch.tensor([[[0.625, 0.375, 0.3125], [1.0, 0.5625, 0.125], [0.25, 0.625, 0.125]]], dtype=torch.float64)
    certifier = CompleteCertifier(network, options=CompleteOptions(timeout=None, nodes=2000))
    search = certifier.start(image, 0)
    search.run(certifier.options.deadline())
    assert search.tie and search.proven < search.undecided <= search.proven * 1.0101
    assert search.undecided * 1.0101 < search.upper < search.budget(0.095)
    assert search.proven < search.nearest.disputed < search.upper
    before, at, beyond = (
        min(exact_margins(copy.deepcopy(network).double(), image, 0, budget))
        for budget in (search.proven, search.undecided, search.upper / 1.01)
    )
    assert before > -1e-6 and abs(at) < 5e-5 and -2e-4 < beyond < 0  # the bracket is 1% wide
    found = certifier.search(image[None], torch.tensor([0]))[0]
    assert found.note.endswith(
        f"from radius {search.radius(search.undecided):.6g} on, a tie to within rounding of torch.float32"
    )
    assert found.witness is not None and int(network(found.witness[None].float()).argmax()) != 0
