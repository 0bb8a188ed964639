"""A recipe: all that decides the weights of a trained network, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import Any

from flowverify.errors import InvalidInputError, UnknownNameError

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        name: the model's name.
        dataset: a name known to :func:`flowverify.data.load_dataset`, or the path of an ``.npz``, of which a part is
            held out (:func:`flowverify.training.splits.load_splits`).
        architecture: a name known to :func:`flowverify.training.build_architecture`.
        hidden: its hidden sizes.
        optimizer: ``adam`` or ``sgd`` (with ``momentum``; for adam it must be 0).
        schedule: of the learning rate: ``constant``, ``cosine`` down to 0 over all steps, or ``step``: a tenth
            of it after each number of epochs in ``milestones``.
        weight_decay: the L2 penalty as torch's optimizers count it.
        loss: a name known to :data:`flowverify.training.LOSSES`, with its ``loss_options``.
        shift: each training image is moved, anew in each epoch, by up to so many pixels along each axis; what
            leaves the image is lost.
        seed: of the initial weights, the order of the images, and the loss.

    Raises:
        UnknownNameError: an unknown optimizer or schedule.
        InvalidInputError: a number outside its range.
    """

    name: str
    dataset: str
    architecture: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "cosine"
    seed: int = 0
    hidden: tuple[int, ...] = ()
    loss: str = "cross-entropy"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    milestones: tuple[int, ...] = ()
    shift: int = 0

    def __post_init__(self) -> None:
        for kind, given, valid in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if given not in valid:
                raise UnknownNameError(kind, given, valid)
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("shift", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidInputError(f"recipe {name}: given {value!r}, expected an integer >= {least}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise InvalidInputError(f"recipe {name}: given {value!r}, expected a number >= 0")
        if self.learning_rate == 0 or self.momentum >= 1 or (self.optimizer == "adam" and self.momentum):
            raise InvalidInputError(
                f"recipe: given learning_rate {self.learning_rate} and momentum {self.momentum} with "
                f"{self.optimizer}, expected a rate > 0 and a momentum < 1 (0 with adam)"
            )
        for name in ("name", "dataset", "architecture", "loss"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidInputError(f"recipe {name}: given {getattr(self, name)!r}, expected a name")
        for name in ("hidden", "milestones"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(entry) is int and entry >= 1 for entry in value):
                raise InvalidInputError(f"recipe {name}: given {value!r}, expected integers >= 1")
        if bool(self.milestones) != (self.schedule == "step") or list(self.milestones) != sorted(self.milestones):
            raise InvalidInputError(
                f"recipe milestones: given {self.milestones} with the schedule {self.schedule}, expected ascending "
                "numbers of epochs with step, none with another"
            )
        if not isinstance(self.loss_options, Mapping):
            raise InvalidInputError(f"recipe loss_options: given {self.loss_options!r}, expected names and values")

    def rate_scale(self, progress: float, epoch: int) -> float:
        """What the schedule multiplies the learning rate by, after this share of all steps and so many epochs."""
        if self.schedule == "cosine":
            return 0.5 * (1 + cos(pi * progress))
        if self.schedule == "step":
            return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as values that JSON can hold; :meth:`from_dict` is the inverse."""
        return {
            **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)},
            "hidden": list(self.hidden),
            "loss_options": dict(self.loss_options),
            "milestones": list(self.milestones),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Reads a recipe.

        Raises:
            UnknownNameError: a key that is not a field of the recipe.
            InvalidInputError: a field without a default is missing, or a value is out of range.
        """
        fields = {entry.name for entry in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise UnknownNameError("recipe key", key, sorted(fields))
        lists = {
            key: tuple(value) if isinstance(value, list | tuple) else value
            for key, value in ((key, values.get(key, ())) for key in ("hidden", "milestones"))
        }
        try:
            return cls(**{**values, **lists})
        except TypeError as error:
            raise InvalidInputError(f"recipe: given keys {sorted(values)}: {error}") from error


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; raises UnknownNameError with the names there are."""
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, list(RECIPES))
    return RECIPES[name]


def _on_noise(name: str, loss: str) -> Recipe:
    """Training of Levine & Feizi 2020 (Appendix C, Table 3)."""
    return Recipe(
        name,
        "mnist",
        "wong-cnn",
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
            "digits-fc3",
            "digits",
            "fc3",
            hidden=(32, 32),
            epochs=40,
            batch_size=32,
            learning_rate=3e-3,
        ),
        Recipe("mnist-linear", "mnist", "linear", epochs=10),
        Recipe("mnist-fc3", "mnist", "fc3", hidden=(100, 100), epochs=12),
        Recipe("mnist-cnn", "mnist", "wong-cnn", epochs=8),
        Recipe(
            "digits-certified",
            "digits",
            "mlp",
            hidden=(64, 32),
            epochs=150,
            batch_size=64,
            learning_rate=5e-3,
            loss="certified",
            loss_options={"radius": 0.4, "warm_up": 0.3, "clean_weight": 0.7},
        ),
        *(
            Recipe(
                name,
                "mnist",
                architecture,
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
            "mnist-adversarial-sinkhorn",
            "mnist",
            "wong-cnn",
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
                name,
                "mnist",
                "mlp",
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
            "mnist-splitting",
            "mnist",
            "wong-cnn",
            epochs=15,
            loss="splitting-noise",
            loss_options={"step": 0.16, "block": 5},
        ),
    )
}
"""Recipes by name: those of the shipped models have the models' names."""
