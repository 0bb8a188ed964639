"""Training on noisy images: what the losses show the network, and that a recipe learns from it."""

import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError
from flowverify.smoothing import Noise, SmoothedClassifier, Splitting
from flowverify.smoothing.classifier import accuracy_and_abstentions
from flowverify.training import LOSSES, BatchContext, Recipe, find_recipe, train


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def forward(self, images):
        self.seen = images
        return images.flatten(1)[:, :3] * 1.0


def shown(name, images, **options):
    recorder = Recorder()
    context = BatchContext(0, 0.0, torch.Generator().manual_seed(3))
    labels = torch.zeros(len(images), dtype=torch.int64)
    outcome = LOSSES[name](**options)(recorder, images, labels, context)
    assert outcome.loss.shape == () and outcome.logits.shape == (len(images), 3)
    return recorder.seen


def batch(count=200):
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("name", ["wasserstein-noise", "laplace-noise", "uniform-noise"])
def test_a_batch_shares_one_draw_in_units_of_each_images_mass(name):
    images = batch()
    added = (shown(name, images, sigma=0.05) - images) / images.sum(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(added, added[:1].expand_as(added), rtol=1e-3, atol=1e-5)
    assert float(added.std()) > 0.02
    own = (shown(name, images, sigma=0.05, shared=0) - images) / images.sum(dim=(1, 2, 3), keepdim=True)
    assert float((own - own[:1]).abs().amax((1, 2, 3))[1:].min()) > 0.02
    deviation = 0.05 * (1.0 if name == "laplace-noise" else 2.0)
    assert float(own[:, 0, 1:5, 1:5].std()) == pytest.approx(deviation, rel=0.05)


def test_mass_stays_on_flows():
    images = batch()
    for name, keeps in (("wasserstein-noise", True), ("uniform-noise", True), ("laplace-noise", False)):
        seen = shown(name, images, sigma=0.05)
        assert torch.allclose(seen.sum(dim=(1, 2, 3)), images.sum(dim=(1, 2, 3)), rtol=1e-4) is keeps


def test_splitting_shows_parts():
    images = batch(8)
    seen = shown("splitting-noise", images, step=0.2, block=3)
    splitting, generator = Splitting(0.2, 3), torch.Generator().manual_seed(3)
    shift = splitting.shifts[int(torch.randint(9, (), generator=generator))]
    t = torch.rand(8, 1, 1, 1, dtype=torch.float64, generator=generator) * 0.2
    torch.testing.assert_close(seen, splitting.show(images, t, shift).float())


def test_recipes_of_the_paper():
    for method, model in (("wasserstein-smoothing", "mnist-smooth"), ("laplace-smoothing", "mnist-laplace")):
        paper, shipped = find_recipe(method), find_recipe(model)
        assert (paper.epochs, paper.learning_rate, paper.schedule) == (200, 0.001, "constant")
        for recipe in (paper, shipped):
            assert (recipe.architecture, recipe.batch_size, recipe.optimizer) == ("wong-cnn", 128, "sgd")
            assert (recipe.momentum, recipe.weight_decay, recipe.loss_options["sigma"]) == (0.9, 5e-4, 0.01)
        assert paper.loss == shipped.loss


@pytest.mark.parametrize("options", [{"sigma": 0}, {"sigma": float("nan")}])
def test_bad_options(options):
    with pytest.raises(InvalidInputError, match="noise sigma"):
        LOSSES["wasserstein-noise"](**options)


def test_training_on_noise_makes_a_better_smoothed_classifier():
    from flowverify.data import load_dataset

    data, noise = load_dataset("digits")[:60], Noise(0.02)
    accuracies = []
    for loss, options in (("cross-entropy", {}), ("wasserstein-noise", {"sigma": 0.02, "shared": 0})):
        recipe = Recipe(
            "x", "digits", "fc3", epochs=12, hidden=(32, 32), batch_size=32, learning_rate=3e-3, loss=loss,
            loss_options=options,
        )  # fmt: skip
        found = SmoothedClassifier(train(recipe).network, noise).predict(data.images, data.labels, n=100)
        accuracies.append(sum(one.base_accuracy for one in found) / 60)
        assert accuracy_and_abstentions(found)[0] > 0.5
    assert accuracies[1] > accuracies[0] + 0.1
