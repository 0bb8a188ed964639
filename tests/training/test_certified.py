"""Certified training: what it certifies, and how each image gets its radius."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.errors import InvalidInputError
from flowverify.network import Network
from flowverify.training import RECIPES, BatchContext, Certified, Recipe, TrainableBounds, train
from flowverify.training.losses import DECAY, DROP, GROWTH, STEP

SHORT = Recipe(
    "mine",
    "digits",
    "mlp",
    hidden=(32, 16),
    epochs=25,
    batch_size=64,
    learning_rate=5e-3,
    loss="certified",
    loss_options={"radius": 0.4, "warm_up": 0.3},
)


def median_radius(network: Network) -> float:
    data = fv.load_dataset("digits")[:150]
    return float(fv.certified_radius(network, data.images, data.labels, tolerance=0.05).median())


@pytest.fixture(scope="module")
def plain_radius() -> float:
    return median_radius(train(replace(SHORT, loss="cross-entropy", loss_options={})).network)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1.4),
        ({"bound": "crown-ibp", "targets": 3}, 1.6),
        pytest.param({"own_radii": False, "radius": 0.1}, 1.4, marks=pytest.mark.slow),
        pytest.param({"share": 0.5, "refresh": 4}, 1.6, marks=pytest.mark.slow),
    ],
    ids=["own radii", "crown-ibp", "one radius", "half of the batch"],
)
def test_certifies_more_than_a_plain_network(options, factor, plain_radius):
    result = train(replace(SHORT, loss_options={**SHORT.loss_options, **options}))
    assert result.history[-1].test_accuracy > 0.75
    assert median_radius(result.network) > factor * plain_radius


@pytest.mark.parametrize(
    ("bound", "rate", "options", "certified"),
    [
        ("ibp", 3e-3, {"warm_up": 0.8, "clean_weight": 0.8}, 0.15),
        pytest.param("crown-ibp", 1e-3, {"warm_up": 0.5}, 0.6, marks=pytest.mark.slow),
        pytest.param("lifted", 1e-3, {"warm_up": 0.5, "targets": 1, "share": 0.25}, 0.6, marks=pytest.mark.slow),
    ],
)
def test_convolutions_are_trained(bound, rate, options, certified):
    recipe = replace(SHORT, architecture="wong-cnn", hidden=(), epochs=12, batch_size=100, learning_rate=rate)
    options = {"radius": 0.01, "own_radii": False, "bound": bound, **options}
    last = train(replace(recipe, loss_options=options)).history[-1]
    assert last.test_accuracy > 0.75 and last.metrics["certified"] > certified


class TestLoss:
    @pytest.fixture
    def network(self) -> Network:
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)]
        return Network.sequential((1, 8, 8), layers).requires_grad_(True)

    @pytest.fixture
    def batch(self):
        data = fv.load_dataset("digits")[:20]
        return data.images, data.labels

    def context(self, progress: float = 0.5, count: int = 20) -> BatchContext:
        return BatchContext(0, progress, torch.Generator(), torch.arange(count), 30)

    def test_is_the_mix_of_clean_and_worst_case(self, network, batch):
        images, labels = batch
        loss = Certified(radius=0.2, warm_up=1.0, clean_weight=0.3, own_radii=False)
        outcome = loss(network, images, labels, self.context())
        logits, worst = TrainableBounds(network).bound(images, labels, 0.1 * images.flatten(1).sum(1))
        entropy = nn.functional.cross_entropy
        torch.testing.assert_close(outcome.loss, 0.3 * entropy(logits, labels) + 0.7 * entropy(worst, labels))
        torch.testing.assert_close(outcome.logits, network(images))
        assert outcome.metrics["radius"] == pytest.approx(0.1)
        right = (worst - torch.nn.functional.one_hot(labels, 10) * 1e9).amax(1) < 0
        assert outcome.metrics["certified"] == pytest.approx(float(right.float().mean()))

    def test_share_of_the_batch_has_a_worst_case(self, network, batch):
        images, labels = batch
        loss = Certified(radius=0.1, warm_up=0.0, clean_weight=0.5, own_radii=False, share=0.25)
        outcome = loss(network, images, labels, self.context())
        _, worst = TrainableBounds(network).bound(images[:5], labels[:5], 0.1 * images[:5].flatten(1).sum(1))
        clean = nn.functional.cross_entropy(network(images), labels)
        torch.testing.assert_close(outcome.loss, (clean + nn.functional.cross_entropy(worst, labels[:5])) / 2)
        assert outcome.logits.shape == (20, 10)

    def test_each_image_has_its_own_radius(self, network, batch):
        images, labels = batch
        loss = Certified(radius=0.1, warm_up=0.0)
        with torch.no_grad():  # some images are right, others wrong
            labels = torch.where(torch.arange(20) % 2 == 0, network(images).argmax(1), (labels + 1) % 10)
        correct = network(images).argmax(1) == labels
        assert 0 < int(correct.sum()) < 20
        loss(network, images, labels, self.context())
        first = loss.state_dict()["radii"]
        torch.testing.assert_close(first[:20], torch.where(correct, STEP * 0.5, 0.0))
        assert bool((first[20:] == 0).all())
        loss.load_state_dict({"radii": torch.full((30,), 0.08)})
        outcome = loss(network, images, labels, self.context())
        second = loss.state_dict()["radii"][:20]
        grown = min(0.1, 0.08 * GROWTH + STEP * 0.5)
        expected = torch.tensor([grown, 0.08 * DECAY, 0.08 * DROP])
        kind = (second[:, None] - expected).abs().argmin(1)
        torch.testing.assert_close(second, expected[kind])
        assert torch.equal(kind == 2, ~correct)
        assert float((kind == 0).float().mean()) == pytest.approx(outcome.metrics["certified"])

    def test_radius_never_exceeds_the_limit(self, network, batch):
        images, labels = batch
        loss = Certified(radius=0.1, warm_up=1.0)
        loss.load_state_dict({"radii": torch.full((30,), 0.08)})
        assert loss(network, images, labels, self.context(0.25)).metrics["radius"] == pytest.approx(0.025)

    def test_needs_a_network(self, batch):
        with pytest.raises(InvalidInputError, match=r"given a module Sequential, expected a flowverify\.network"):
            Certified()(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), *batch, self.context())

    def test_needs_positions_for_own_radii(self, network, batch):
        with pytest.raises(InvalidInputError, match="expected a context with positions of the images"):
            Certified()(network, *batch, BatchContext(0, 0.5, torch.Generator()))


def test_any_network_that_converts_can_be_trained():
    start = fv.load_model("digits-fc3")
    result = train(replace(SHORT, epochs=2), network=start)
    assert result.network.operations[1].weight.shape == start.operations[1].weight.shape
    assert not torch.equal(result.network.operations[1].weight, start.operations[1].weight)
    other = Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 10)])
    with pytest.raises(InvalidInputError, match=r"network from \(1, 4, 4\) to 10 classes: expected from \(1, 8, 8\)"):
        train(SHORT, network=other)


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].loss == "certified"])
def test_shipped_recipes_have_options_that_exist(name):
    Certified(**RECIPES[name].loss_options)
