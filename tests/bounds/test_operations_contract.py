"""The contract of operations (theory, section 19): each one, with each choice of options, by each engine.

Cases come from the list of canonical operations that the readers use: an operation that is added there is tested here.
At radius 0 the bounds equal the values, of what activations read and of the margins; at larger radii they contain the
values at a thousand points of the ball, vertices among them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from contracts import margins_at, samples, sparse_images
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.crown.backend import (
    BOUND_OPTIONS,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    handed_over,
    host_call,
    with_batch_axes,
)
from flowverify.bounds.engine import DomainName, EngineOptions
from flowverify.bounds.intervals import Interval
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import BOUNDS, ENGINES, Bound
from flowverify.bounds.relaxations import relaxable
from flowverify.certifiers.complete.neuron_bounds import neuron_bounds
from flowverify.certifiers.complete.problem import Problem, SingleBall, affine_maps
from flowverify.errors import UnsupportedOperationError
from flowverify.network import INPUT, Network, Node, ScaleShift
from flowverify.network.lowering import keeps_for_export, lower
from flowverify.network.operations import OPERATIONS, RECORDS, STEEP, operation_name, output_shape
from flowverify.training.bounds import TrainableBounds
from flowverify.transport.support import support

SQUARE, OBLONG, VECTOR = (2, 5, 5), (1, 5, 4), (6,)
RADIUS = 0.3
POINTS = 1000
FAR = 1500.0  # beyond the ends of look-up tables


@dataclass(frozen=True)
class Case:
    """One operation in one place: right on the image, between activations, or last."""

    operation: nn.Module
    shape: tuple[int, ...]
    place: str

    def __str__(self) -> str:
        return f"{self.operation}-{'x'.join(map(str, self.shape))}-{self.place}".replace(" ", "")


def cases() -> list[Case]:
    torch.manual_seed(0)
    found = []
    for record in OPERATIONS:
        for shape, places in ((SQUARE, ("first", "between")), (OBLONG, ("last",)), (VECTOR, ("between",))):
            if not record.affine:
                places = (*places, "last", "far")
            found += [
                Case(operation, shape, place) for operation in record.variants(shape) for place in dict.fromkeys(places)
            ]
    return found


class _Chain:
    """A network written down node by node."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.input_shape, self.nodes = tuple(shape), list[Node]()
        self.shapes = {INPUT: self.input_shape}

    def add(self, operation: nn.Module, *inputs: str) -> str:
        name = f"{len(self.nodes)}_{operation_name(operation)}"
        self.shapes[name] = output_shape(operation, [self.shapes[read] for read in inputs])
        self.nodes.append(Node(name, operation, inputs, self.shapes[name]))
        return name


@cache
def network_of(case: Case) -> Network:
    generator = torch.Generator().manual_seed(len(str(case)))
    state = torch.get_rng_state()
    torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
    shape = SQUARE if case.shape == VECTOR else case.shape
    chain, value = _Chain(shape), INPUT
    if case.shape == VECTOR:
        value = chain.add(nn.Flatten(), value)
    width = chain.shapes[value][0]
    if case.place != "first":
        mix = nn.Linear(width, VECTOR[0]) if case.shape == VECTOR else nn.Conv2d(width, width, 1)
        value = chain.add(mix, value)
        value = chain.add(ScaleShift(FAR, -FAR / 2) if case.place == "far" else nn.ReLU(), value)
    record = RECORDS[type(case.operation)]
    if record.tried_on is not None:
        low, high = record.tried_on
        value = chain.add(ScaleShift(high - low, low), chain.add(nn.Sigmoid(), value))
    count = record.arity or 2
    others = [chain.add(ScaleShift(-0.7, 0.1), value) for _ in range(count - 1)]
    value = chain.add(copy.deepcopy(case.operation), value, *others)
    if case.place != "last":
        value = chain.add(nn.ReLU(), value)
    if len(chain.shapes[value]) > 1:
        value = chain.add(nn.Flatten(), value)
    if case.place == "last":
        if chain.shapes[value] == (1,):
            value = chain.add(nn.Linear(1, 2), value)
    else:
        value = chain.add(nn.Linear(chain.shapes[value][0], 3), value)
    network = Network(chain.input_shape, chain.nodes).double()
    torch.set_rng_state(state)
    return network


@dataclass(frozen=True)
class Truth:
    """Images of a network, points of the balls around them, and the network's values there."""

    images: Tensor
    labels: Tensor
    budget: Tensor
    read: list[Tensor]  # by activations, at the images
    reached: list[Interval]  # by activations, over the points
    clean: Tensor
    least: Tensor


@cache
def ball(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, *shape), budgets (B,), and points of the balls (B, N, *shape), ends of linear functions among them."""
    images = sparse_images(shape, 2, 5)
    budget = RADIUS * images.flatten(1).sum(1)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 40, *shape, generator=generator, dtype=torch.float64)
    ends = support(rows, images, budget, maximiser=True).maximiser
    assert ends is not None
    return images, budget, torch.cat([samples(images, budget, POINTS), ends], 1)


@cache
def truth_of(case: Case) -> Truth:
    network = network_of(case)
    images, budget, points = ball(network.input_shape)
    with torch.no_grad():
        labels = network(images).argmax(1)
        values = network.values(points.flatten(0, 1))
        at_images = network.values(images)
        names = [node.inputs[0] for node in network.activations]
        reached = [(grouped.amin(1), grouped.amax(1)) for grouped in (values[n].unflatten(0, (2, -1)) for n in names)]
        clean, least = (margins_at(network, p, labels) for p in (images[:, None], points))
    return Truth(images, labels, budget, [at_images[n] for n in names], reached, clean[:, 0], least.amin(1))


def slack(values: Tensor) -> float:
    return 1e-9 * max(1.0, float(values.abs().max()))


def check_contains(found: Sequence[Interval], reached: Sequence[Interval], what: str) -> None:
    assert len(found) == len(reached)
    for (low, high), (least, largest) in zip(found, reached, strict=True):
        room = slack(torch.stack([least, largest]))
        assert (low <= least + room).all(), f"{what}: a lower bound is above a value"
        assert (high >= largest - room).all(), f"{what}: an upper bound is below a value"


def check_equals(found: Sequence[Interval], values: Sequence[Tensor], what: str) -> None:
    for bounds, value in zip(found, values, strict=True):
        for end in bounds:
            torch.testing.assert_close(end, value, rtol=0, atol=1e3 * slack(value), msg=f"{what} at radius 0")


ALL = cases()


def each_once(cases: list[Case]) -> list[Any]:
    """The cases as parameters; of each operation, each choice of options and each place is quick once."""
    groups: dict[type[nn.Module], list[Case]] = {}
    for case in cases:
        groups.setdefault(type(case.operation), []).append(case)
    quick: set[int] = set()
    for group in groups.values():
        choices, places = set[str](), set[tuple[str, tuple[int, ...]]]()
        # First those that show two new things at once.
        for new in (2, 1):
            for case in group:
                choice, place = str(case.operation), (case.place, case.shape)
                if (choice not in choices) + (place not in places) >= new:
                    quick.add(id(case))
                    choices.add(choice)
                    places.add(place)
    return [pytest.param(case, id=str(case), marks=[] if id(case) in quick else [pytest.mark.slow]) for case in cases]


def first_of_each(cases: list[Case]) -> list[Any]:
    """The cases as parameters; all but the first of each operation, place and shape are slow."""
    seen, found = set(), []
    for case in cases:
        key = type(case.operation), case.place, case.shape
        found.append(pytest.param(case, id=str(case), marks=[pytest.mark.slow] if key in seen else []))
        seen.add(key)
    return found


Setting = tuple[str, Bound, bool, DomainName]  # with positivity or without, and the coordinates
DOMAINS: dict[str, tuple[tuple[bool, DomainName], ...]] = {
    "first": ((True, "image"), (False, "auto")),
    "between": ((True, "image"), (False, "image")),
    "last": ((True, "image"),),
    "far": ((True, "image"),),
}


def settings(place: str) -> list[Setting]:
    """Every engine by itself, for neurons and margins, over every kind of ball; and what is made of several."""
    slow = {"alpha-crown"} if place != "far" else {"interval"}
    alone = [(name, Bound(name, (name,), (name,))) for name in ENGINES if name not in slow]
    found = [(name, bound, *domain) for name, bound in alone for domain in DOMAINS[place]]
    several = {"first": "crown-ibp", "last": "best"}.get(place)
    return [*found, *([(several, BOUNDS[several], *DOMAINS[place][-1])] if several else [])]


HOSTED = {nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.MaxPool2d}  # activations that CROWN's host gets


def refused(network: Network, bound: Bound) -> set[type[nn.Module]]:
    """The operations for which a bound has no engine for the margins left."""
    kinds = {type(node.operation) for node in network.activations}
    without = {"crown": kinds - HOSTED, "alpha-crown": kinds - HOSTED, "lifted": kinds & set(STEEP)}
    left = [name for name in bound.margins if not without.get(name)]
    return set() if left else set.union(*(without[name] for name in bound.margins))


def test_every_operation_and_option_is_tried() -> None:
    assert {type(case.operation) for case in ALL} == {record.kind for record in OPERATIONS}
    for record in OPERATIONS:
        tried = [case.operation for case in ALL if type(case.operation) is record.kind]
        for option in record.options:
            values = {str(getattr(operation, option)) for operation in tried}
            assert len(values) > 1, f"{record.name}: all cases have the same {option}"


@pytest.mark.parametrize("case", each_once(ALL))
def test_bounds_hold(case: Case) -> None:
    network, truth = network_of(case), truth_of(case)
    for name, bound, positive, domain in settings(case.place):
        threat = Threat(positive=positive)
        what = f"{name} over {threat.name}"
        options = EngineOptions(domain=domain, alpha_iterations=2)
        kinds = refused(network, bound)
        if kinds:
            with pytest.raises(UnsupportedOperationError, match="|".join(kind.__name__ for kind in kinds)):
                MarginBounds(network, threat, bound, dtype=torch.float64, options=options)
            continue
        engine = MarginBounds(network, threat, bound, dtype=torch.float64, options=options)
        ball = threat.ball(truth.images, truth.budget)
        points = ball.with_budget(0 * truth.budget)
        check_equals(engine.neurons(points), truth.read, what)
        margins = engine.margins(points, truth.labels)
        torch.testing.assert_close(
            margins, truth.clean, rtol=0, atol=1e3 * slack(truth.clean), msg=f"{what}: margins at radius 0"
        )
        check_contains(engine.neurons(ball), truth.reached, what)
        margins = engine.margins(ball, truth.labels)
        assert (margins <= truth.least + slack(truth.clean)).all(), f"{what}: a margin is above that of a point"
        assert not any("without" in note for note in engine.notes), engine.notes
        if name == "best":
            assert ({type(node.operation) for node in network.activations} <= HOSTED) == (not engine.notes), (
                engine.notes
            )


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("bound", ["crown", "alpha-crown", "best"])
@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Tanh])
def test_chords_of_saturated_activations_are_bounds(kind: type[nn.Module], bound: str, side: float) -> None:
    """A neuron reads from 1 to 3001 on one side of 0: a chord that begins at 500 would cut through the curve.

    The second neuron is nearly linear, and pulls to the far end, where the first one is flat.
    """
    activation, share = kind(), torch.linspace(0, 1, POINTS, dtype=torch.float64)
    network = Network.sequential((1, 1, 2), [nn.Flatten(), nn.Linear(2, 2), activation, nn.Linear(2, 2)]).double()
    first, last = network.nodes[1].operation, network.nodes[3].operation
    low, high = activation(torch.tensor([-0.02, 0.02], dtype=torch.float64))
    with torch.no_grad():
        first.get_parameter("weight").copy_(torch.tensor([[1500.0, -1500.0], [0.02 * -side, 0.02 * side]]) * -side)
        first.get_parameter("bias").copy_(torch.tensor([side * 1501.0, 0.0]))
        last.get_parameter("weight").copy_(torch.tensor([[side, 1.6 / float(high - low)], [0.0, 0.0]]))
        last.get_parameter("bias").zero_()
    image = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    points = torch.stack([share, 1 - share], 1).reshape(1, POINTS, 1, 1, 2)
    budget = torch.tensor([0.5], dtype=torch.float64)
    for label in (0, 1):
        labels = torch.tensor([label])
        least = margins_at(network, points, labels).amin(1)
        found = MarginBounds(network, bound=bound, dtype=torch.float64).margins(Threat().ball(image, budget), labels)
        assert (found <= least + 1e-9).all(), (found, least)


def relu_only(network: Network) -> bool:
    return all(isinstance(node.operation, nn.ReLU) for node in network.activations)


@pytest.mark.parametrize("kind", [record.kind for record in OPERATIONS], ids=lambda kind: kind.__name__)
def test_neuron_bounds_of_complete_methods_hold(kind: type[nn.Module]) -> None:
    chosen = [case for case in ALL if type(case.operation) is kind and case.place in ("first", "between")]
    for case in chosen:
        network, truth = network_of(case), truth_of(case)
        if not relu_only(network):
            with pytest.raises(UnsupportedOperationError, match=f"{kind.__name__}|Sigmoid"):
                affine_maps(network)
            continue
        maps = affine_maps(network)
        for index, (image, budget) in enumerate(zip(truth.images, truth.budget.tolist(), strict=True)):
            for amount in (0.0, budget):
                found = neuron_bounds(Problem.outputs(maps, SingleBall(Threat().ball(image, amount))), iterations=2)
                bounds = list(zip(found.lower, found.upper, strict=True))
                if amount:
                    own = [(least[index].flatten(), most[index].flatten()) for least, most in truth.reached]
                    check_contains(bounds, own, str(case))
                else:
                    check_equals(bounds, [value[index].flatten() for value in truth.read], str(case))


@pytest.mark.parametrize("kind", [record.kind for record in OPERATIONS], ids=lambda kind: kind.__name__)
def test_bounds_of_training_hold(kind: type[nn.Module]) -> None:
    for case in (case for case in ALL if type(case.operation) is kind):
        network, truth = network_of(case), truth_of(case)
        if network.is_affine:
            continue
        lines = all(relaxable(node.operation) for node in network.activations)
        for targets in (0, 1) if lines else (0,):
            for budget, least in ((torch.zeros_like(truth.budget), truth.clean), (truth.budget, truth.least)):
                _, worst = TrainableBounds(network, targets).bound(truth.images, truth.labels, budget)
                others = torch.ones_like(worst, dtype=torch.bool).scatter(1, truth.labels[:, None], False)
                margins = -worst.detach()[others].reshape(least.shape)
                bounded = torch.isfinite(margins)
                assert (margins <= least + slack(truth.clean))[bounded].all(), f"{case}: above the margin of a point"
                if least is truth.clean:
                    torch.testing.assert_close(margins[bounded], least[bounded], rtol=0, atol=1e3 * slack(truth.clean))


@pytest.mark.parametrize("keeps", [keeps_for_export, handed_over])
@pytest.mark.parametrize("kind", [record.kind for record in OPERATIONS], ids=lambda kind: kind.__name__)
def test_rewritten_networks_compute_the_same(kind: type[nn.Module], keeps: Callable[[nn.Module], bool]) -> None:
    for case in (case for case in ALL if type(case.operation) is kind):
        network, points = network_of(case), ball(network_of(case).input_shape)[2]
        kinds = {type(node.operation) for node in network.activations}
        others = kinds - ({nn.ReLU, nn.LeakyReLU} if keeps is keeps_for_export else HOSTED)
        if others:
            with pytest.raises(UnsupportedOperationError, match="|".join(other.__name__ for other in others)):
                lower(network, keeps)
            continue
        lowered = lower(network, keeps)
        assert all(keeps(node.operation) for node in lowered.graph.nodes), case
        batch = points[:, :20].flatten(0, 1)
        expected = network.values(batch)
        torch.testing.assert_close(lowered.graph(batch), expected[network.output], rtol=1e-12, atol=1e-9)
        read = [node.inputs[0] for node in lowered.graph.activations]
        assert len(read) == len(lowered.preactivations)
        values = lowered.graph.values(batch)
        for name, one in zip(read, lowered.preactivations, strict=True):
            torch.testing.assert_close(values[name], one.of(expected[one.source]), rtol=1e-12, atol=1e-9)


HANDED = [
    record.kind
    for record in OPERATIONS
    if (record.affine or record.kind in HOSTED) and record.kind not in (nn.AvgPool2d, nn.LeakyReLU)
]


@pytest.mark.parametrize("kind", HANDED, ids=lambda kind: kind.__name__)
def test_the_host_alone_bounds_what_it_is_handed(kind: type[nn.Module]) -> None:
    """auto_LiRPA's own CROWN over a box around the image: no bound of ours has a part in it.

    It may break down, as it does for neurons of a dense layer along the rows of an image; it must not be wrong.
    """
    chosen, broken = [case for case in ALL if type(case.operation) is kind and case.place in ("between", "last")], 0
    generator = torch.Generator().manual_seed(0)
    for case in chosen:
        graph = lower(network_of(case), handed_over).graph.double()
        images, _, _ = ball(graph.input_shape)
        corners = torch.rand(POINTS, *graph.input_shape, generator=generator, dtype=torch.float64) * 2 - 1
        corners[::2] = corners[::2].sign()
        with host_call(torch.float64), torch.no_grad():
            host = BoundedModule(with_batch_axes(graph), images, bound_opts=dict(BOUND_OPTIONS))
        for radius in (0.0, 0.1):
            box = PerturbationLpNorm(norm=float("inf"), eps=radius, x_L=images - radius, x_U=images + radius)
            try:
                with host_call(torch.float64), torch.no_grad():
                    low, high = host.compute_bounds(x=(BoundedTensor(images, box),), method="CROWN")
            except RuntimeError:
                broken += 1
                break
            values = graph((images[:, None] + radius * corners).flatten(0, 1)).unflatten(0, (2, -1))
            room = slack(values)
            assert (low <= values.amin(1) + room).all(), f"{case}: a lower bound is above a value"
            assert (high >= values.amax(1) - room).all(), f"{case}: an upper bound is below a value"
            if not radius:
                assert (high - low).abs().max() <= 1e3 * room, f"{case}: bounds at radius 0 are not the values"
    assert broken < len(chosen), "nothing was bounded"
