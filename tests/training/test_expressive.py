"""Losses between the worst case that intervals prove and the worst case that an attack finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowverify as fv
from flowverify.ball import Threat
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.network.subject import surplus
from flowverify.training import BatchContext, Recipe, train
from flowverify.training.losses import Certified, Expressive, SmallBalls, adversarial_images, build_loss

RADIUS = 0.2
FIXED = {"radius": RADIUS, "warm_up": 0.0, "own_radii": False, "clean_weight": 0.0}


def network() -> Network:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)]
    return Network.sequential((1, 8, 8), layers).requires_grad_(True)


def batch() -> tuple[Tensor, Tensor]:
    data = fv.load_dataset("digits")[:24]
    return data.images, data.labels


def value(loss: Any) -> Tensor:
    context = BatchContext(0, 0.5, torch.Generator().manual_seed(0), torch.arange(24), 24)
    found: Tensor = loss(network(), *batch(), context).loss
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_images_lie_in_their_balls_and_score_higher(steps: int) -> None:
    (images, labels), model = batch(), network()
    radii = torch.linspace(0, 0.4, len(images))
    found = adversarial_images(model, images, labels, radii, steps)
    distance = Threat().distance(images.double(), found.double(), mass_tolerance=1e-5)
    assert bool((distance <= radii * (1 + 1e-4) + 1e-6).all())
    torch.testing.assert_close(found.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=1e-5, atol=0)
    with torch.no_grad():
        before, after = (surplus(model(points), labels) for points in (images, found))
    assert float((after > before).float().mean()) > 0.9 and torch.equal(found[0], images[0])


@pytest.mark.parametrize("mix", ["losses", "scores"])
def test_weights_lead_from_the_attack_to_the_worst_case(mix: str) -> None:
    model, (images, labels) = network(), batch()
    ends = [value(Expressive(weight, mix, **FIXED)) for weight in (0.0, 0.3, 1.0)]
    found = adversarial_images(model, images, labels, torch.full((24,), RADIUS), 2)
    torch.testing.assert_close(ends[0], nn.functional.cross_entropy(model(found), labels))
    torch.testing.assert_close(ends[2], value(Certified(**FIXED)))
    assert ends[0] < ends[1] < ends[2]
    if mix == "losses":
        torch.testing.assert_close(ends[1], 0.7 * ends[0] + 0.3 * ends[2])
    else:  # the cross-entropy is convex in the scores
        assert ends[1] < 0.7 * ends[0] + 0.3 * ends[2]


def test_the_clean_weight_is_of_the_clean_loss() -> None:
    options = {**FIXED, "clean_weight": 0.25}
    images, labels = batch()
    clean = nn.functional.cross_entropy(network()(images), labels)
    torch.testing.assert_close(value(Expressive(0.3, **options)), 0.25 * clean + 0.75 * value(Expressive(0.3, **FIXED)))


def test_small_balls_lie_in_the_ball() -> None:
    """So that no worst case of theirs is worse, and the largest of them is the ball."""
    whole = value(Certified(**FIXED))
    torch.testing.assert_close(value(SmallBalls(1.0, **FIXED)), whole)
    found = [value(SmallBalls(small, **FIXED)) for small in (0.0, 0.3, 0.7)]
    assert found[0] < found[1] < found[2] < whole


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (
            "expressive",
            {"mix": "weights"},
            UnknownNameError,
            "unknown mix of expressive losses 'weights': exp",
        ),
        ("expressive", {"worst_weight": 1.5}, InvalidInputError, "given worst_weight 1.5, expected a number between 0"),
        ("expressive", {"attack_steps": 0}, InvalidInputError, "given attack_steps 0, expected an integer >= 1"),
        ("expressive", {"radius": -1}, InvalidInputError, "given radius -1, expected a number >= 0"),
        ("small-balls", {"small": True}, InvalidInputError, "given small True, expected a number between 0 and 1"),
        ("small-balls", {"tau": 1}, UnknownNameError, "unknown option of the loss small-balls 'tau': .*own_radii"),
    ],
)
def test_bad_options(loss: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_loss(loss, options)


@pytest.mark.parametrize("loss", ["expressive", "small-balls"])
def test_certifies_more_than_a_plain_network(loss: str) -> None:
    options = {"radius": 0.4, "warm_up": 0.3}
    recipe = Recipe(
        "mine", "digits", "mlp", hidden=(32, 16), epochs=20, batch_size=64, learning_rate=5e-3, loss=loss,
        loss_options=options,
    )  # fmt: skip
    result = train(recipe)
    data = fv.load_dataset("digits")[:60]
    assert result.history[-1].test_accuracy > 0.75
    # A plain network of this kind has 0.03.
    assert float(fv.certified_radius(result.network, data.images, data.labels, tolerance=0.05).median()) > 0.06
