"""Radius search, and certificates as users get them: exact where the exact radius is known, sound where it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contracts import descend, least_radius, margins_at, random_network, samples, sparse_images
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Ball, Threat
from flowverify.bounds.crown.backend import BoundedNetwork
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds, margin_specification
from flowverify.bounds.recipes import BOUNDS
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.radius import Bracket, MarginFunction, RadiusSettings, bracket, prove
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.registry import INCOMPLETE
from flowverify.registry import METHODS as NAMES
from flowverify.results import Verdict

MLP = [nn.Flatten(), nn.Linear(25, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)]
CNN = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]

METHODS = NAMES.family(INCOMPLETE)


def problem(layers: list[nn.Module], seed: int = 0, count: int = 6) -> tuple[Network, Tensor, Tensor]:
    network = random_network((1, 5, 5), layers, seed)
    images = sparse_images((1, 5, 5), count, seed + 1)
    return network, images, network(images).argmax(1)


def radii(model: Any, images: Tensor, labels: Tensor, *args: Any, **options: Any) -> Tensor:
    return fv.certified_radius(model, images, labels, *args, **options)


@pytest.mark.parametrize("seed", range(3))
def test_linear_networks_to_one_percent(seed: int) -> None:
    network, images, labels = problem([nn.Flatten(), nn.Linear(25, 4)], seed)
    found = radii(network, images, labels)
    vanilla = radii(network, images, labels, "vanilla")
    finer = radii(network, images, labels, tolerance=1e-3)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        exact = min(least_radius(network, image, label), network.grid.diameter)
        assert exact * 0.985 <= float(found[index]) <= exact * (1 + 1e-9)
        assert exact * 0.996 <= float(finer[index]) <= exact * (1 + 1e-9)
    assert (vanilla <= 1.01 * found).all()  # both searches end within 1% of their exact radii
    assert (vanilla < 0.95 * found).any()


@pytest.mark.parametrize("bound", BOUNDS)
def test_radii_are_sound_and_fine_tuned_ones_larger(bound: str) -> None:
    network, images, labels = problem(CNN, 2, 3)
    count = 2 if bound == "alpha-crown" else 3
    images, labels = images[:count], labels[:count]
    vanilla, found = (radii(network, images, labels, method, bound) for method in METHODS)
    assert (1.01 * found >= vanilla).all()  # to the tolerance of the search
    assert (found > 0).all()
    budget = found * images.flatten(1).sum(1)
    points = torch.cat([samples(images, budget, 500), descend(network, images, labels, budget, 6)], 1)
    assert (margins_at(network, points, labels) > 0).all()


def test_certificates_are_nested_and_agree_with_the_search() -> None:
    network, images, labels = problem(MLP, 1)
    found = fv.search_radius(Certifier(network), images, labels)
    for index, certificate in enumerate(found):
        assert certificate.verdict is Verdict.CERTIFIED
        assert certificate.margin is not None
        assert certificate.margin > 0
        for share, verdict in ((0.25, Verdict.CERTIFIED), (1.0, Verdict.CERTIFIED), (1.2, Verdict.UNKNOWN)):
            ball = fv.WassersteinBall(certificate.radius * share)
            assert fv.certify(network, images[index], labels[index], ball).verdict is verdict


def test_the_batch_does_not_matter() -> None:
    network, images, labels = problem(MLP, 3, 7)
    certifier = Certifier(network)
    seen: list[int] = []
    together = [certificate.radius for certificate in fv.search_radius(certifier, images, labels)]
    apart = [c.radius for c in fv.search_radius(certifier, images, labels, batch_size=3, progress=seen.append)]
    assert seen == [3, 3, 1]
    # Steps towards mixtures turn on which of two equal pieces a gradient takes, which rounding decides: each end holds.
    assert apart == pytest.approx(together, rel=0.06)
    steady = Certifier(network, bound="crown")
    whole, parts = (fv.search_radius(steady, images, labels, batch_size=size) for size in (7, 3))
    assert [one.radius for one in parts] == pytest.approx([one.radius for one in whole], rel=1e-3)
    images_back = radii(network, images.flip(0), labels.flip(0)).flip(0)
    torch.testing.assert_close(images_back, torch.tensor(together, dtype=torch.float64), rtol=0.06, atol=0)


def test_a_constant_network_is_robust_to_the_diameter() -> None:
    network, images, _ = problem([nn.Flatten(), nn.Linear(25, 4), nn.ReLU(), nn.Linear(4, 2)])
    for parameter in network.parameters():
        parameter.zero_()
    network.nodes[-1].operation.load_state_dict({"weight": torch.zeros(2, 4), "bias": torch.tensor([1.0, 0.0])})
    for method in METHODS:
        found = radii(network, images, torch.zeros(6, dtype=torch.int64), method)
        assert (found == 8.0).all()  # 4 rows down and 4 columns to the right: no plan costs more
    half = radii(network, images, torch.zeros(6, dtype=torch.int64), ground="l2")
    torch.testing.assert_close(half, torch.full_like(half, 8 / math.sqrt(2)))


def test_l2_ground_lies_between_l1_over_sqrt_two_and_l1() -> None:
    network, images, labels = problem(MLP, 1)
    # Single moves charge less, and steps towards mixtures are not monotone.
    for bound, slack, tolerance in (("crown", 1.011, 0.011), ("best", 1.08, 0.02)):
        first, second = (radii(network, images, labels, bound=bound, ground=ground) for ground in ("l1", "l2"))
        converted = radii(network, images, labels, bound=bound, ground="l2", domain="flow")
        torch.testing.assert_close(converted, first / math.sqrt(2), rtol=tolerance, atol=0)
        assert (second > 1.05 * converted).all() and (second <= first * slack).all()
    certificate = fv.certify(network, images[0], labels[0], fv.WassersteinBall(float(second[0]), ground="l2"))
    assert (certificate.verdict, certificate.ground) == (Verdict.CERTIFIED, "l2")
    beyond = fv.WassersteinBall(float(first[0]) * 1.02, ground="l2")
    assert fv.certify(network, images[0], labels[0], beyond).verdict is Verdict.UNKNOWN


SETTINGS = RadiusSettings()
ZEROS = torch.tensor([0.004, 0.03, 0.06, 0.2, 1.7, 9.0], dtype=torch.float64)


def falling(zeros: Tensor, exponent: float, trials: list[int]) -> MarginFunction:
    """3 - c r^p, with these zeros; notes how many are asked for each time."""

    def evaluate(rows: Tensor, budgets: Tensor) -> Tensor:
        trials.append(len(rows))
        return 3 * (1 - (budgets / zeros[rows]) ** exponent)

    return evaluate


def searched(evaluate: MarginFunction, limit: float = 5.0, rough: MarginFunction | None = None) -> list[Bracket]:
    zero, clean = torch.zeros(6, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)
    return bracket(evaluate, zero, clean, clean, limit, 0.01, SETTINGS, rough=rough)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5, 2.5])
def test_searches_predict_the_zero_of_a_power(exponent: float) -> None:
    trials: list[int] = []
    exact = falling(ZEROS, exponent, trials)
    brackets = searched(exact, rough=falling(0.9 * ZEROS, exponent, []))
    assert sum(trials) <= 2 * 6  # rough margins have led to near the zeros, all but the largest of which count
    trials.clear()
    found, margin = prove(exact, brackets, torch.full((6,), 3.0, dtype=torch.float64), 0.01, SETTINGS)
    assert sum(trials) == 6  # whatever is proposed is proven at once
    assert (margin > 0).all() and (margin == exact(torch.arange(6), found)).all()
    least = ZEROS.clamp(max=5.0) / (1 + SETTINGS.inside * 0.01) * (1 - 2e-3)
    assert ((found >= least) & (found <= 5.0)).all()


@pytest.mark.parametrize("kink", [0.97, 0.9, 0.7, 0.3])
@pytest.mark.parametrize("bend", [1.0, 2.0, 4.0])
def test_margins_with_a_kink_are_searched_to_near_their_zero(kink: float, bend: float) -> None:
    """Where another bound takes over, what was learnt before predicts too much."""

    def exact(rows: Tensor, budgets: Tensor) -> Tensor:
        share = budgets / ZEROS[rows]
        slow = 3 - 0.5 * share**0.8
        after = (3 - 0.5 * kink**0.8) * (1 - ((share - kink).clamp(min=0) / (1 - kink)) ** bend)
        return torch.where(share < kink, slow, after)

    found, margin = prove(exact, searched(exact, 20.0), torch.full((6,), 3.0, dtype=torch.float64), 0.01, SETTINGS)
    assert (margin > 0).all() and (margin == exact(torch.arange(6), found)).all()
    assert (found >= 0.97 * ZEROS).all(), found / ZEROS


def test_margins_that_are_just_below_zero_for_long_are_left_behind() -> None:
    """As where two logits are zero together: a prediction between the image and a trial is no better than the trial."""
    search = Bracket(0.0, 0.1, 1.2, 0.02, 0.63, 1e-7)
    trials = 0
    while not search.finished and trials < 20:
        trial, trials = search.trial(), trials + 1
        search.update(trial, 0.1 - trial if trial < 0.1 else -1e-11)
    assert search.finished and 0.098 < search.low < 0.1


def test_a_tie_at_the_image_itself_ends_a_search() -> None:
    """Less what rounding may hide, the clean margin is below 0; margins in float32 say otherwise."""
    for margin in (1e-9, -1e-9, math.nan):

        def evaluate(rows: Tensor, budget: Tensor, margin: float = margin) -> Tensor:
            return torch.full_like(budget, margin)

        zero, clean = torch.zeros(1, dtype=torch.float64), torch.tensor([-1e-13], dtype=torch.float64)
        for rough in (evaluate, None):
            found = bracket(evaluate, zero, clean, clean, 2.0, 0.01, RadiusSettings(), rough=rough)
            budget, _ = prove(lambda rows, budget: torch.full_like(budget, -1.0), found, clean, 0.01, RadiusSettings())
            assert float(budget) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_what_is_proven_has_a_positive_margin_where_searches_were_wrong(seed: int) -> None:
    """Margins in the end are other ones: smaller, larger, rough, or not a number."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.5 + torch.rand(6, generator=generator, dtype=torch.float64)
    search = falling(ZEROS, 1.5, [])

    def exact(rows: Tensor, budgets: Tensor) -> Tensor:
        ripple = torch.sin(1e3 * budgets) * (seed % 3) / 3
        margins = falling(share * ZEROS, 1.2, [])(rows, budgets) + ripple
        return torch.where(rows == 5, torch.nan, margins)

    clean = torch.full((6,), 3.0, dtype=torch.float64)
    found, margin = prove(exact, searched(search), clean, 0.01, SETTINGS)
    known = found[:5] > 0
    assert known.all() and found[5] == 0 and margin[5] == clean[5]
    assert (margin[:5] > 0).all() and (margin[:5] == exact(torch.arange(5), found[:5])).all()
    if seed % 3 == 0:
        assert (found[:5] >= 0.93 * (share * ZEROS)[:5].minimum(1.05 * ZEROS[:5])).all()


def test_a_misclassified_image_is_a_verdict() -> None:
    network, images, labels = problem(MLP)
    wrong = (labels + 1) % 3
    labels = torch.where(torch.arange(6) < 3, labels, wrong)
    for certificates in (
        fv.search_radius(Certifier(network), images, labels),
        fv.certify_batch(network, images, labels, fv.WassersteinBall(1e-3)),
    ):
        verdicts = [certificate.verdict for certificate in certificates]
        assert verdicts == [Verdict.CERTIFIED] * 3 + [Verdict.MISCLASSIFIED] * 3
        assert all(certificate.margin is None for certificate in certificates[3:])
    assert (radii(network, images, labels)[3:] == 0).all()


def test_optimistic_single_precision_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search in float32 is told margins that are far too good; what comes out must hold all the same."""
    network, images, labels = problem(MLP, 1)
    honest = radii(network, images, labels)
    genuine = MarginBounds.margins

    def optimistic(self: MarginBounds, *args: Any, **options: Any) -> Tensor:
        bounds = genuine(self, *args, **options)
        return bounds + 0.5 * bounds.abs().max() if self.dtype == torch.float32 else bounds

    monkeypatch.setattr(MarginBounds, "margins", optimistic)
    found = radii(network, images, labels)
    monkeypatch.undo()
    budget = found * images.flatten(1).sum(1)
    exact, vanilla = (
        MarginBounds(network, threat, dtype=torch.float64).margins(threat.ball(images, budget), labels)
        for threat in (Threat(), Threat(positive=False))
    )
    assert (torch.maximum(exact.amin(1), vanilla.amin(1)) > 0).all()
    assert (found <= honest * 1.03).all()


@pytest.mark.parametrize("method", METHODS)
def test_small_chunks_change_nothing(method: str) -> None:
    network, images, labels = problem(CNN)
    threat = Threat(positive=method == "fine-tuned")
    ball = threat.ball(images, 0.2 * images.flatten(1).sum(1))
    whole = MarginBounds(network, threat, dtype=torch.float64).margins(ball, labels)
    for entries in (1, 1000, 50_000):
        bounds = MarginBounds(network, threat, dtype=torch.float64, options=EngineOptions(chunk_entries=entries))
        torch.testing.assert_close(bounds.margins(ball, labels), whole, rtol=1e-9, atol=1e-9)


def test_out_of_memory_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, labels = problem(CNN)
    ball = fv.WassersteinBall(0.01)
    expected = fv.certify_batch(network, images, labels, ball, bound="crown")
    genuine, refused = BoundedNetwork.crown, []

    def crown(self: BoundedNetwork, inputs: Any, ball: Any, specification: Tensor, *args: Any, **options: Any) -> Any:
        if len(refused) < 1:
            refused.append(specification.shape)
            raise MemoryError("no room")
        return genuine(self, inputs, ball, specification, *args, **options)

    monkeypatch.setattr(BoundedNetwork, "crown", crown)
    found = fv.certify_batch(network, images, labels, ball, bound="crown")
    assert refused
    assert "out of memory" in found[0].note
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.verdict is theirs.verdict
        assert ours.margin == pytest.approx(theirs.margin, rel=1e-9)


def test_margins_in_ascending_order_of_class() -> None:
    rows = margin_specification(torch.tensor([1, 0]), 3, torch.float64)
    assert rows.tolist() == [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]]]


def test_nan_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, labels = problem(MLP)

    def overflow(self: MarginBounds, ball: Ball, *args: Any, **options: Any) -> Tensor:
        return ball.images.new_full((len(ball), 2), math.nan)

    monkeypatch.setattr(MarginBounds, "margins", overflow)
    ball = fv.WassersteinBall(0.01)
    assert {c.verdict for c in fv.certify_batch(network, images, labels, ball)} == {Verdict.UNKNOWN}
    assert (radii(network, images, labels) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, r"label 3 \(image 2\): expected a class of the model, 0 to 2"),
        ({"labels": torch.tensor([-1, 0, 0])}, r"label -1 \(image 0\)"),
        ({"labels": torch.zeros(3)}, r"labels of type torch.float32 and length 3: expected 3 integers"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"length 2: expected 3 integers"),
        ({"images": torch.ones(3, 1, 4, 5)}, r"images of shape \(3, 1, 4, 5\)"),
        ({"images": -torch.ones(3, 1, 5, 5)}, r"images: value -1.0 at .*, expected finite and >= 0"),
        ({"images": torch.full((3, 1, 5, 5), math.nan)}, r"images: value nan"),
        ({"images": torch.zeros(3, 1, 5, 5)}, r"images: image 0 has mass 0.0, expected a positive mass"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    network, images, labels = problem(MLP, 0, 3)
    given = {"images": images, "labels": labels, **change}
    certifier = Certifier(network)
    with pytest.raises(InvalidInputError, match=message):
        certifier.certify(given["images"], given["labels"], fv.WassersteinBall(0.1))
    with pytest.raises(InvalidInputError, match=message):
        fv.search_radius(certifier, given["images"], given["labels"])


def test_bad_names_and_options() -> None:
    network, images, labels = problem(MLP, 0, 3)
    with pytest.raises(UnknownNameError, match="unknown method 'exact': expected one of fine-tuned"):
        Certifier(network, "exact")
    with pytest.raises(UnknownNameError, match="unknown bound 'magic': expected one of MODULE:CLASS, alpha-crown"):
        Certifier(network, "vanilla", "magic")
    with pytest.raises(UnknownNameError, match="unknown ground cost 'l3'"):
        fv.search_radius(Certifier(network), images, labels, "l3")
    for tolerance in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInputError, match="expected a number between 0 and 1"):
            fv.search_radius(Certifier(network), images, labels, tolerance=tolerance)
    with pytest.raises(InvalidInputError, match="expected one image; use certify_batch"):
        fv.certify(network, images, labels[0], fv.WassersteinBall(0.1))


def test_one_pixel_cannot_be_perturbed() -> None:
    network = random_network((1, 1, 1), [nn.Flatten(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 3)], 0)
    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for method in METHODS:
        found = fv.certify_batch(network, image, network(image).argmax(1), fv.WassersteinBall(3.0), method)
        assert found[0].verdict is Verdict.CERTIFIED


def test_empty_batches_and_images_that_require_gradients() -> None:
    network, images, labels = problem(MLP, 0, 3)
    certifier = Certifier(network)
    assert certifier.certify(images[:0], labels[:0], fv.WassersteinBall(0.1)) == []
    assert fv.search_radius(certifier, images[:0], labels[:0]) == []
    plain, tracked = (radii(network, given, labels) for given in (images, images.clone().requires_grad_(True)))
    assert torch.equal(plain, tracked)
    for size in (0, -1):
        with pytest.raises(InvalidInputError, match=f"batch size {size}: expected at least 1"):
            fv.search_radius(certifier, images, labels, batch_size=size)


def test_a_search_begins_where_it_is_told_to() -> None:
    asked: list[Tensor] = []
    zero, clean = torch.zeros(6, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)

    def evaluate(rows: Tensor, budgets: Tensor) -> Tensor:
        asked.append(budgets)
        return 3 * (1 - budgets / ZEROS[rows])

    begin = torch.tensor([0.001, 0.02, math.nan, 1e-12, 40.0, 2.0], dtype=torch.float64)
    bracket(evaluate, zero, clean, clean, 5.0, 0.01, SETTINGS, first=begin)
    assert asked[0].tolist() == [0.001, 0.02, SETTINGS.first, SETTINGS.smallest, 5.0, 2.0]


@pytest.mark.parametrize("ground", ["l1", "l2", "l2^2"])
def test_of_an_affine_network_the_linear_part_is_all(ground: str) -> None:
    """What the first trial is a share of ends the margin to the runner-up exactly, whatever the network's scale."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(25, 2)]
    network, images, labels = problem(layers, 4)
    exact = fv.certified_radius(network, images, labels, "linear", ground=ground)
    certifier, threat = Certifier(network), Threat(ground)
    ball = threat.unlimited(images)
    clean = (network(images).double().diff(dim=1)[:, 0]).abs()
    budget = certifier._linear_budgets(ball, labels, clean.detach())
    found = threat.cost.radius(budget)
    usual = (exact > 0) & torch.isfinite(exact) & (exact < 2)
    assert usual.any()
    # Steps on the concave gain lead there from above or below: to within a few parts in a hundred after three.
    torch.testing.assert_close(found[usual], exact[usual], rtol=0.1, atol=0.0)
