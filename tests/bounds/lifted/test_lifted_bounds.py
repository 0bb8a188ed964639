"""Lifted bounds against exact margins, linear programmes, CROWN and attacks; and what breaks when they are broken."""

from __future__ import annotations

import pytest
import torch
from contracts import descend, exact_margins, largest_gain, margins_at, quick, random_network, samples, sparse_images
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Threat
from flowverify.bounds.lifted import engine, relaxations
from flowverify.bounds.lifted.engine import LiftedBounds
from flowverify.bounds.lifted.mixture import MarginSearch
from flowverify.bounds.lifted.moves import moves_of
from flowverify.bounds.lifted.relaxations import Secants, secants
from flowverify.bounds.margins import MarginBounds, margin_specification
from flowverify.certifiers.incomplete import Certifier
from flowverify.errors import UnsupportedOperationError
from flowverify.network import INPUT, Network, Node, ScaleShift
from flowverify.network.operations import Add, output_shape

RADII = (0.05, 0.3, 1.0)


def tiny(seed: int) -> tuple[Network, Tensor, Tensor]:
    """Up to 6 ReLUs in one or two layers above a 3x3 image."""
    hidden = ([2 + seed % 4], [3, 3], [2, 4])[seed % 3]
    layers: list[nn.Module] = [nn.Flatten()]
    width = 9
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    network = random_network((1, 3, 3), [*layers, nn.Linear(width, 2 + seed % 2)], seed)
    image = sparse_images((1, 3, 3), 1, seed)
    return network, image, network(image).argmax(1)


def margins_by(
    bound: str, network: Network, images: Tensor, labels: Tensor, budget: Tensor, positive: bool = True
) -> Tensor:
    threat = Threat(positive=positive)
    return MarginBounds(network, threat, bound, dtype=torch.float64).margins(threat.ball(images, budget), labels)


@pytest.mark.parametrize("part", quick(range(4), 2))
def test_never_above_the_exact_least_margin(part: int) -> None:
    gap = []
    for seed in range(part, 40, 4):
        network, image, label = tiny(seed)
        budget = RADII[seed % 3] * image.flatten(1).sum(1)
        least = torch.tensor(exact_margins(network, image[0], int(label), float(budget)), dtype=torch.float64)
        for steps in (0, 8):
            found = LiftedBounds(network, steps=steps).lower_bounds(image, label, budget)[0]
            assert (found <= least + 1e-9).all(), (seed, steps)
            gap.append(float((least - found).mean()))
    assert min(gap) < 1e-2  # the bound is not void


@pytest.mark.slow
def test_never_above_the_exact_least_margin_of_200_networks() -> None:
    for seed in range(40, 240):
        network, image, label = tiny(seed)
        budget = RADII[seed % 3] * image.flatten(1).sum(1)
        least = torch.tensor(exact_margins(network, image[0], int(label), float(budget)), dtype=torch.float64)
        found = LiftedBounds(network, steps=4).lower_bounds(image, label, budget)[0]
        assert (found <= least + 1e-9).all(), seed


@pytest.mark.parametrize("feasible", [True, False])
def test_equals_the_linear_programme_for_affine_networks(feasible: bool) -> None:
    network = random_network((2, 4, 3), [nn.Conv2d(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(60, 3)], 0)
    images = sparse_images((2, 4, 3), 2, 0)
    budget = 0.2 * images.flatten(1).sum(1)
    labels = network(images).argmax(1)
    found = LiftedBounds(network, feasible=feasible, tolerance=1e-8).lower_bounds(images, labels, budget)
    expected = margins_by("ibp", network, images, labels, budget, positive=feasible)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    if feasible:
        basis = torch.eye(24, dtype=torch.float64).reshape(-1, 2, 4, 3)
        zero = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
        rises = -margin_specification(labels, 3, torch.float64)
        rows = torch.einsum("bsk,pk->bsp", rises, network(basis) - network(zero))
        clean = margins_at(network, images[:, None], labels)[:, 0]
        for image in range(2):
            for row in range(2):
                gain = largest_gain(rows[image, row], images[image], float(budget[image]))
                assert float(clean[image, row]) - gain == pytest.approx(float(found[image, row]), abs=1e-7)


def batch_of(network: Network, images: Tensor, budget: Tensor, **options: object) -> engine._Batch:
    ball = engine._Batch(LiftedBounds(network, steps=1, **options), images, budget, {})  # type: ignore[arg-type]
    with torch.no_grad():
        ball.analyse()
    return ball


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_with_no_share_of_rows_it_is_crown(slope: float) -> None:
    """One hidden layer, whose bounds are exact for both."""
    network = random_network((1, 5, 5), [nn.Conv2d(1, 4, 3), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(36, 4)], 3)
    images = sparse_images((1, 5, 5), 3, 2)
    budget, labels = 0.3 * images.flatten(1).sum(1), network(images).argmax(1)
    ball = batch_of(network, images, budget, tolerance=1e-8)
    rises = -margin_specification(labels, 4, torch.float64)
    clean = margins_at(network, images[:, None], labels)[:, 0]
    infinite = torch.full_like(clean, torch.inf)
    search = MarginSearch(ball, rises, clean, infinite, -infinite)
    search.by_chords()
    found = search.best
    crown = margins_by("crown", network, images, labels, budget)
    # auto_LiRPA gets LeakyReLU as s x + (1 - s) relu(x), which is relaxed alike.
    torch.testing.assert_close(found, crown, rtol=1e-6, atol=1e-6)
    mixed = LiftedBounds(network, steps=3).lower_bounds(images, labels, budget)
    assert (mixed >= crown - 1e-4 * crown.abs() - 1e-6).all()


def by_relus(network: Network, slope: float) -> Network:
    """A chain of Linear and LeakyReLU as one of ReLUs, twice as many: leaky(z) = relu(z) - slope relu(-z)."""
    weights = [(one.weight, one.bias) for one in (node.operation for node in network.nodes) if hasattr(one, "weight")]
    weights[1:] = [(torch.cat([weight, -slope * weight], 1), bias) for weight, bias in weights[1:]]
    weights[:-1] = [(torch.cat([weight, -weight]), torch.cat([bias, -bias])) for weight, bias in weights[:-1]]
    layers: list[nn.Module] = [nn.Flatten()]
    for weight, _ in weights:
        layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
    found = Network.sequential(network.input_shape, layers[:-1]).double()
    for value, given in zip(found.parameters(), (value for pair in weights for value in pair), strict=True):
        value.copy_(given)
    return found


@pytest.mark.parametrize("slope", quick([-3.0, 0.3, -0.5, 3.0], 1))
def test_no_slope_of_the_left_piece_takes_a_bound_above_the_least_margin(slope: float) -> None:
    """Negative ones, too, which take rows downward to the upper side."""
    layers = [nn.Flatten(), nn.Linear(9, 2), nn.LeakyReLU(slope), nn.Linear(2, 2), nn.LeakyReLU(slope), nn.Linear(2, 3)]
    gap = []
    for seed in range(4):
        network = random_network((1, 3, 3), layers, seed)
        image, known = sparse_images((1, 3, 3), 1, seed), by_relus(network, slope)
        label, budget = network(image).argmax(1), RADII[seed % 3] * image.flatten(1).sum(1)
        torch.testing.assert_close(known(image), network(image))
        least = torch.tensor(exact_margins(known, image[0], int(label), float(budget)), dtype=torch.float64)
        for feasible, steps in ((True, 0), (True, 5), (False, 0)):
            found = LiftedBounds(network, steps=steps, feasible=feasible).lower_bounds(image, label, budget)[0]
            assert (found <= least + 1e-9).all(), (seed, feasible, steps)
            gap.append(float((least - found).mean()))
    assert min(gap) < 1e-2


def residual() -> Network:
    nodes: list[Node] = []
    shapes = {INPUT: (2, 6, 6)}

    def add(operation: nn.Module, *inputs: str) -> str:
        name = f"n{len(nodes)}"
        shapes[name] = output_shape(operation, [shapes[read] for read in inputs])
        nodes.append(Node(name, operation, inputs, shapes[name]))
        return name

    torch.manual_seed(0)
    start = add(nn.ReLU(), add(nn.Conv2d(2, 4, 3, stride=2, padding=1), INPUT))
    body = add(nn.Conv2d(4, 4, 3, padding=1), add(nn.ReLU(), add(nn.Conv2d(4, 4, 3, padding=1), start)))
    joined = add(nn.ReLU(), add(Add(), body, start))
    shorter = add(
        Add(), add(nn.Conv2d(4, 4, 3, stride=2, padding=1), joined), add(nn.Conv2d(4, 4, 1, stride=2), joined)
    )
    pooled = add(nn.MaxPool2d(2, 1), add(nn.Tanh(), shorter))
    add(nn.Linear(4, 3), add(nn.Flatten(), pooled))
    return Network((2, 6, 6), nodes).double()


NETWORKS = {
    "dense": random_network(
        (1, 4, 4), [nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)], 1
    ),
    "convolutional": random_network(
        (1, 7, 6),
        [
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(80, 6), nn.ReLU(), nn.Linear(6, 3),
        ],
        2,
    ),
    "residual": residual(),
}  # fmt: skip


@pytest.mark.parametrize("feasible", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_and_no_sample_is_below(name: str, feasible: bool) -> None:
    network = NETWORKS[name]
    images = sparse_images(network.input_shape, 3, 5)
    labels = network(images).argmax(1)
    clean, before = margins_at(network, images[:, None], labels)[:, 0], None
    for radius in (0.0, 0.05, 0.2, 0.8):
        budget = radius * images.flatten(1).sum(1)
        intervals = LiftedBounds(network, feasible=feasible).intervals(images, budget)
        points = torch.cat([samples(images, budget, 300), descend(network, images, labels, budget)], 1)
        least = margins_at(network, points, labels).amin(1)
        for steps in (0, 5):
            found = LiftedBounds(network, feasible=feasible, steps=steps).lower_bounds(images, labels, budget)
            assert (found <= least + 1e-9).all()
            if radius == 0:
                torch.testing.assert_close(found, clean)
            if steps == 0:
                assert before is None or (found <= before + 1e-3 * (1 + before.abs())).all()  # less for more
                before = found
        for node, values in network.values(points.flatten(0, 1)).items():
            low, high = intervals[node]
            reached = values.unflatten(0, (3, -1))
            assert (low <= reached.amin(1) + 1e-9).all()
            assert (high >= reached.amax(1) - 1e-9).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_chunks_precisions_and_the_torch_path_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    images = sparse_images(network.input_shape, 3, 6)
    labels, budget = network(images).argmax(1), 0.1 * images.flatten(1).sum(1)
    whole = LiftedBounds(network, tolerance=1e-6)
    expected = whole.lower_bounds(images, labels, budget)
    scale = float(expected.abs().max())
    alone = torch.cat([whole.lower_bounds(images[k : k + 1], labels[k : k + 1], budget[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4 * scale)
    chunked = LiftedBounds(network, tolerance=1e-6, chunk_entries=1)
    torch.testing.assert_close(chunked.lower_bounds(images, labels, budget), expected, rtol=0, atol=1e-9 * scale)
    single = LiftedBounds(network, tolerance=1e-6, dtype=torch.float32)
    torch.testing.assert_close(
        single.lower_bounds(images, labels, budget).double(), expected, rtol=0, atol=1e-4 * scale
    )
    monkeypatch.setattr("flowverify.bounds.lifted.support.use_compiled", lambda backend, images: False)
    swept = whole.lower_bounds(images, labels, budget)  # searches on where the kernel has enough, so may be tighter
    assert (swept >= expected - 1e-2 * scale).all()
    assert (swept <= expected + 0.1 * scale).all()


def test_bounds_from_elsewhere_are_used_where_they_are_tighter() -> None:
    network = NETWORKS["dense"]
    images = sparse_images((1, 4, 4), 1, 6)
    budget, labels = 0.3 * images.flatten(1).sum(1), network(images).argmax(1)
    bounds = LiftedBounds(network)
    own = bounds.intervals(images, budget)
    points = network.values(samples(images, budget, 500)[0])
    known = {name: (v.amin(0, keepdim=True), v.amax(0, keepdim=True)) for name, v in points.items() if name != INPUT}
    tighter = bounds.intervals(images, budget, known)
    for name in known:
        assert (tighter[name][0] >= own[name][0] - 1e-12).all()
        assert (tighter[name][1] <= own[name][1] + 1e-12).all()
    before = bounds.lower_bounds(images, labels, budget)
    assert (bounds.lower_bounds(images, labels, budget, known) >= before - 1e-9).all()


@pytest.mark.parametrize(
    "operation", [nn.ReLU(), *(nn.LeakyReLU(s) for s in (0.1, 1.0, 3.0, -0.5)), nn.Sigmoid(), nn.Tanh()], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_secants_are_extreme_slopes_from_the_centre(operation: nn.Module, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = (
        torch.randn(400, 3, generator=generator, dtype=torch.float64)
        * torch.tensor([0.3, 1.0, 3.0, 20.0]).repeat(100)[:, None]
    )
    ends[:10, 1] = 0.0
    low, centre, high = ends.to(dtype).sort(1).values.unbind(1)
    found = secants(operation, low[None], centre[None], high[None])
    share = torch.linspace(0, 1, 301, dtype=torch.float64)[1:, None]
    slack = 1e-5 if dtype == torch.float32 else 1e-9  # of the differences here
    for end, most, least in ((high, found.most_right, found.least_right), (low, found.most_left, found.least_left)):
        z0, far = centre.double(), (end - centre).double()
        slopes = (operation(z0 + share * far) - operation(z0)) / (share * far)
        moving = far.abs() > 1e-3
        over, under = most[0].double() - slopes.amax(0), slopes.amin(0) - least[0].double()
        assert (over[moving] >= -slack).all()
        assert (under[moving] >= -slack).all()
        # Tight, but for the slope at the centre itself, which steps of a three-hundredth may miss.
        wide = moving & (far.abs() < 3)
        assert (over[wide] <= 0.02).all()
        assert (under[wide] <= 0.02).all()


def test_an_operation_without_a_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_elementwise_activation", lambda operation: False)
    with pytest.raises(UnsupportedOperationError, match="lifted bounds have no rule for ReLU"):
        LiftedBounds(NETWORKS["dense"])
    with pytest.raises(UnsupportedOperationError, match="no rule for Softplus"):
        secants(nn.Softplus(), torch.zeros(1), torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("count", [3, 8])
def test_the_example_on_paper(count: int) -> None:
    """Theory, section 21: CROWN loses a factor of (n + 1) / 2, rows lose nothing."""
    budget, distance = 1.0, 0.25
    reading = nn.Linear(2 * count, count)
    above = nn.Linear(count, 2)
    network = Network.sequential((1, 1, 2 * count), [nn.Flatten(), reading, nn.ReLU(), above]).double()
    layers = [node.operation for node in network.nodes if isinstance(node.operation, nn.Linear)]
    layers[0].weight.copy_(torch.eye(2 * count)[::2])
    layers[0].bias.fill_(-3.0 - distance)
    layers[1].weight.copy_(torch.stack([torch.zeros(count), torch.ones(count)]))
    layers[1].bias.copy_(torch.tensor([10.0, 0.0]))
    image, label = torch.full((1, 1, 1, 2 * count), 3.0, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    given = image, label, torch.tensor([budget], dtype=torch.float64)
    reach = budget - distance
    assert float(LiftedBounds(network).lower_bounds(*given)) == pytest.approx(10 - reach)
    crown = margins_by("crown", network, *given)
    assert float(crown) == pytest.approx(10 - (count + 1) * reach / 2)


def test_a_vanilla_ball_may_have_the_better_rows_and_is_asked_after_the_fine_tuned_one() -> None:
    layers = [nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    network, image = random_network((1, 3, 3), layers, 110), sparse_images((1, 3, 3), 1, 110)
    label, ball = network(image).argmax(1), Threat().ball(image, 0.3 * image.flatten(1).sum(1))
    certifier = Certifier(network, "fine-tuned", "lifted")
    own, vanilla = (
        float(LiftedBounds(network, feasible=feasible).lower_bounds(image, label, ball.budget).min())
        for feasible in (True, False)
    )
    assert own < vanilla - 0.1
    assert Threat(positive=False) in certifier.covers(Threat())


# Mutants: each of these breaks the bound, and is seen to.


def fails(network: Network, images: Tensor, labels: Tensor, budget: Tensor, least: Tensor) -> bool:
    return bool((LiftedBounds(network).lower_bounds(images, labels, budget) > least + 1e-6).any())


def caught() -> bool:
    for seed in range(12):
        network, image, label = tiny(seed)
        budget = 0.5 * image.flatten(1).sum(1)
        least = torch.tensor([exact_margins(network, image[0], int(label), float(budget))], dtype=torch.float64)
        if fails(network, image, label, budget, least):
            return True
    return False


def test_secants_from_the_wrong_side_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not caught()

    def wrong(operation: nn.Module, lower: Tensor, centre: Tensor, upper: Tensor) -> Secants:
        right = relaxations.secants(operation, lower, centre, upper)
        return Secants(right.least_left, right.most_right, right.most_left, right.least_right)

    monkeypatch.setattr(engine, "secants", wrong)
    assert caught()


def test_a_missing_edge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.rows_of_pixels

    def without_moves_up(*given: object) -> object:
        rows = real(*given)  # type: ignore[arg-type]
        rows.gains[..., 3, :, :, :] = -1e3
        return rows

    monkeypatch.setattr(engine, "rows_of_pixels", without_moves_up)
    assert caught()


def test_attacks_stay_above_on_a_shipped_network() -> None:
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:6]
    right = network(data.images).argmax(1) == data.labels
    images, labels = data.images[right], data.labels[right]
    budget = 0.05 * images.flatten(1).double().sum(1)
    double = network.double()
    found = LiftedBounds(double, steps=5).lower_bounds(images, labels, budget)
    crown = margins_by("crown", double, images, labels, budget)
    least = margins_at(double, descend(double, images, labels, budget), labels).amin(1)
    assert (found <= least + 1e-9).all()
    assert float(found.amin(1).mean()) > float(crown.amin(1).mean())


@pytest.mark.parametrize("ground", ["l1", "l2"])
@pytest.mark.parametrize("feasible", [True, False])
def test_a_pool_falls_no_further_than_its_other_members(ground: str, feasible: bool) -> None:
    """p = max(x0, 0.5) falls from 1 while x2 rises: a row of x0 alone would have their sum stay where it is."""
    scale, shift = torch.tensor([[[1.0, 0.0, 1.0]]]), torch.tensor([[[0.0, 0.5, 1.0]]])
    last = nn.Linear(2, 2)
    network = Network.sequential((1, 1, 3), [ScaleShift(scale, shift), nn.MaxPool2d((1, 2), 1), nn.Flatten(), last])
    with torch.no_grad():
        network.nodes[-1].operation.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        network.nodes[-1].operation.bias.copy_(torch.tensor([2.2, 0.0]))
    image = torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=torch.float64)
    moved = torch.tensor([[[[0.2, 0.0, 0.8]]]], dtype=torch.float64)  # at a cost of 2 each, 1.6 in all
    logits = network.double()(moved)[0]
    for steps in (0, 5):
        bounds = LiftedBounds(network, feasible=feasible, moves=moves_of(ground, 1, 3), steps=steps)
        found = bounds.lower_bounds(image, torch.tensor([0]), torch.tensor([1.6]))
        assert float(found[0, 0]) <= float(logits[0] - logits[1]) + 1e-9
