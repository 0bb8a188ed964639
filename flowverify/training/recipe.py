"""A recipe: all that decides the weights of a trained network, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import cos, pi
from typing import Annotated, Any

from pydantic import Field

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.settings import (
    Natural,
    Number,
    OneOf,
    Positive,
    PositiveNumber,
    Settings,
    Text,
    expected,
    read_settings,
    settings,
)

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "step")
Sizes = Annotated[tuple[Positive, ...], expected("integers >= 1")]


@settings
class Recipe(Settings):
    """How a network is trained.

    Raises:
        UnknownNameError: an unknown optimizer or schedule.
        InvalidInputError: a number outside its range.
    """

    name: Text = Field(description="The model's name.")
    dataset: Text = Field(
        description="digits, mnist, cifar10-sample, or the path of an .npz, of which a part is held out."
    )
    architecture: Text = Field(description="A name known to flowverify.training.build_architecture.")
    epochs: Positive = Field(description="How often each image is seen.")
    batch_size: Positive = Field(default=128, description="Images of a step.")
    learning_rate: PositiveNumber = Field(default=1e-3, description="Before the schedule.")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field(default="adam", description="adam or sgd.")
    momentum: Number = Field(default=0.0, description="Of sgd; for adam it must be 0.")
    weight_decay: Number = Field(default=0.0, description="The L2 penalty as torch's optimizers count it.")
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(
        default="cosine",
        description="Of the learning rate: constant, cosine down to 0 over all steps, or step: a tenth of it after "
        "each number of epochs in milestones.",
    )
    seed: Natural = Field(default=0, description="Of the initial weights, the order of the images, and the loss.")
    hidden: Sizes = Field(default=(), description="The architecture's hidden sizes.")
    loss: Text = Field(default="cross-entropy", description="A name known to flowverify.training.LOSSES.")
    loss_options: Annotated[Mapping[str, Any], expected("names and values")] = Field(
        default_factory=dict, description="Of the loss."
    )
    milestones: Sizes = Field(default=(), description="Of the schedule step.")
    shift: Natural = Field(
        default=0,
        description="Each image is moved, anew in each epoch, by up to so many pixels along each axis; what leaves the "
        "image is lost.",
    )

    def __post_init__(self) -> None:
        if self.momentum >= 1 or (self.optimizer == "adam" and self.momentum):
            raise InvalidInputError(
                f"recipe: given momentum {self.momentum} with {self.optimizer}, expected a momentum < 1 (0 with adam)"
            )
        if bool(self.milestones) != (self.schedule == "step") or list(self.milestones) != sorted(self.milestones):
            raise InvalidInputError(
                f"recipe milestones: given {self.milestones} with the schedule {self.schedule}, expected ascending "
                "numbers of epochs with step, none with another"
            )

    def rate_scale(self, progress: float, epoch: int) -> float:
        """What the schedule multiplies the learning rate by, after this share of all steps and so many epochs."""
        if self.schedule == "cosine":
            return 0.5 * (1 + cos(pi * progress))
        if self.schedule == "step":
            return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as values that JSON can hold; :meth:`from_dict` is the inverse."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {**values, **{key: list(values[key]) for key in ("hidden", "milestones")}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Reads a recipe.

        Raises:
            UnknownNameError: a key that is not a field of the recipe, or an unknown optimizer or schedule.
            InvalidInputError: a field without a default is missing, or a value is out of range.
        """
        return read_settings(cls, values, "recipe")


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; raises UnknownNameError with the names there are."""
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, list(RECIPES))
    return RECIPES[name]


def _on_noise(name: str, loss: str) -> Recipe:
    """Training of Levine & Feizi 2020 (Appendix C, Table 3)."""
    return Recipe(
        name=name,
        dataset="mnist",
        architecture="wong-cnn",
        epochs=200,
        learning_rate=1e-3,
        optimizer="sgd",
        momentum=0.9,
        weight_decay=5e-4,
        schedule="constant",
        loss=loss,
        loss_options={"sigma": 0.01},
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits-fc3",
            dataset="digits",
            architecture="fc3",
            hidden=(32, 32),
            epochs=40,
            batch_size=32,
            learning_rate=3e-3,
        ),
        Recipe(name="mnist-linear", dataset="mnist", architecture="linear", epochs=10),
        Recipe(name="mnist-fc3", dataset="mnist", architecture="fc3", hidden=(100, 100), epochs=12),
        Recipe(name="mnist-cnn", dataset="mnist", architecture="wong-cnn", epochs=8),
        Recipe(
            name="digits-certified",
            dataset="digits",
            architecture="mlp",
            hidden=(64, 32),
            epochs=150,
            batch_size=64,
            learning_rate=5e-3,
            loss="certified",
            loss_options={"radius": 0.4, "warm_up": 0.3, "clean_weight": 0.7},
        ),
        *(
            Recipe(
                name=name,
                dataset="mnist",
                architecture=architecture,
                hidden=hidden,
                epochs=epochs,
                loss="adversarial",
                loss_options={"attack": "frank-wolfe", "factor": 1.6, "every": 1, "iterations": 7},
            )
            for name, architecture, hidden, epochs in (
                ("mnist-adversarial", "fc3", (100, 100), 3),
                ("mnist-adversarial-cnn", "wong-cnn", (), 8),
            )
        ),
        Recipe(  # Wong et al. 2019, Appendix B.1: days on a processor, so no such model is shipped
            name="mnist-adversarial-sinkhorn",
            dataset="mnist",
            architecture="wong-cnn",
            epochs=20,
            optimizer="sgd",
            momentum=0.9,
            learning_rate=0.1,
            weight_decay=5e-4,
            schedule="step",
            milestones=(10,),
            loss="adversarial",
            loss_options={"attack": "sinkhorn"},
        ),
        *(
            Recipe(
                name=name,
                dataset="mnist",
                architecture="mlp",
                hidden=(200, 100),
                epochs=100,
                batch_size=512,
                learning_rate=3e-3,
                loss="certified",
                loss_options={"radius": radius, "warm_up": 0.25, "clean_weight": weight, "share": 0.5, "refresh": 4},
            )
            for name, radius, weight in (("mnist-certified", 0.45, 0.9), ("mnist-certified-wide", 0.6, 0.8))
        ),
        _on_noise("mnist-smooth", "wasserstein-noise"),
        _on_noise("mnist-laplace", "laplace-noise"),
        _on_noise("wasserstein-smoothing", "wasserstein-noise"),  # by the name of the method
        _on_noise("laplace-smoothing", "laplace-noise"),
        Recipe(
            name="mnist-splitting",
            dataset="mnist",
            architecture="wong-cnn",
            epochs=15,
            loss="splitting-noise",
            loss_options={"step": 0.16, "block": 5},
        ),
    )
}
"""Recipes by name: those of the shipped models have the models' names."""
