"""A recipe: all that decides the weights of a trained network, as plain values.

In files, YAML or JSON, they are the fields of :class:`Recipe` by name:

name: mnist-mine         # required; with `base`, all else is as in that shipped recipe
base: mnist-certified
seed: 3
loss_options: {radius: 0.3}

The architectures that they name take unnormalised pixels and return one score a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import cos, pi, prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from flowverify.errors import DataError, FlowverifyError, InvalidInputError, UnknownNameError
from flowverify.network import INPUT, Add, Index, Network, Node, Permute, Reshape
from flowverify.settings import (
    Natural,
    Number,
    OneOf,
    Positive,
    PositiveNumber,
    Settings,
    Text,
    expected,
    json_schema,
    read_settings,
    read_yaml,
    settings,
)
from flowverify.training.losses import build_loss

ARCHITECTURES = ("linear", "fc3", "mlp", "wong-cnn", "rnn")


def build_architecture(
    name: str, input_shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = ()
) -> nn.Module:
    """A freshly initialised network, (N, C, H, W) -> (N, classes), from torch's global random state.

    Args:
        name: ``linear`` (one affine layer); ``fc3`` (three affine layers with ReLU between, of the two
            ``hidden`` sizes); ``mlp`` (the same with any number >= 1 of them); ``wong-cnn`` (two 4x4
            convolutions of 16 and 32 channels with stride 2, then 100 hidden units: Wong and Kolter 2018, used
            by Wong et al. 2019 on MNIST); ``rnn`` (:class:`RecurrentRows`, of the size ``hidden``).
        input_shape: (C, H, W).
        hidden: two sizes for ``fc3``, one or more for ``mlp``, one for ``rnn``, none for the others.

    Raises:
        UnknownNameError: the architecture is not one of these.
        InvalidInputError: sizes that this architecture cannot be built with.
    """
    check_architecture(name)
    if len(input_shape) != 3 or min(*input_shape, classes, *hidden) < 1:
        raise InvalidInputError(
            f"architecture {name}: given input shape {tuple(input_shape)}, {classes} classes and hidden "
            f"sizes {tuple(hidden)}, expected (channels, height, width) and sizes >= 1"
        )
    expected = {"fc3": 2, "mlp": max(1, len(hidden)), "rnn": 1}.get(name, 0)
    if len(hidden) != expected:
        raise InvalidInputError(f"architecture {name}: given hidden sizes {tuple(hidden)}, expected {expected} of them")
    if name == "wong-cnn":
        return _wong_cnn(input_shape, classes)
    if name == "rnn":
        return RecurrentRows(input_shape, hidden[0], classes)
    return _fully_connected([prod(input_shape), *hidden, classes])


def build_network(name: str, input_shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = ()) -> Network:
    """:func:`build_architecture` in canonical form, with the same weights; what is trained."""
    module = build_architecture(name, input_shape, classes, hidden)
    if isinstance(module, RecurrentRows):
        return module.network()
    return Network.sequential(input_shape, list(module.children()))


def check_architecture(name: str) -> str:
    """Returns the name of an architecture, or raises UnknownNameError with the valid ones."""
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    return name


def _fully_connected(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _wong_cnn(input_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    channels, height, width = input_shape
    if min(height, width) < 4:
        raise InvalidInputError(
            f"architecture wong-cnn: given images of {height}x{width} pixels, expected at least 4x4"
        )
    features = 32 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


class RecurrentRows(nn.Module):
    """A recurrent network that reads an image row by row: h_t = relu(W x_t + b + U h_(t-1)) from h_0 = 0.

    x_t holds row t of every channel. The logits are an affine map of the state after the last row.
    """

    def __init__(self, input_shape: tuple[int, int, int], size: int, classes: int) -> None:
        super().__init__()
        self.input_shape = input_shape
        channels, _, width = input_shape
        self.read = nn.Linear(channels * width, size)
        self.recall = nn.Linear(size, size, bias=False)
        nn.init.eye_(self.recall.weight)  # a state begins as the sum of what was read (Le et al. 2015)
        self.answer = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 1, 3).flatten(2)
        state = self.read(rows[:, 0]).relu()
        for step in range(1, rows.shape[1]):
            state = (self.read(rows[:, step]) + self.recall(state)).relu()
        logits: Tensor = self.answer(state)
        return logits

    def network(self) -> Network:
        """The steps written out; they share their weights."""
        channels, height, width = self.input_shape
        size = self.read.out_features
        nodes = [
            Node("turned", Permute((1, 0, 2)), (INPUT,), (height, channels, width)),
            Node("rows", Reshape((height, channels * width)), ("turned",), (height, channels * width)),
        ]
        for step in range(height):
            nodes.append(Node(f"row_{step}", Index(0, step), ("rows",), (channels * width,)))
            nodes.append(Node(f"read_{step}", self.read, (f"row_{step}",), (size,)))
            summed = f"read_{step}"
            if step:
                nodes.append(Node(f"recalled_{step}", self.recall, (f"state_{step - 1}",), (size,)))
                summed = f"sum_{step}"
                nodes.append(Node(summed, Add(), (f"read_{step}", f"recalled_{step}"), (size,)))
            nodes.append(Node(f"state_{step}", nn.ReLU(), (summed,), (size,)))
        nodes.append(Node("answer", self.answer, (f"state_{height - 1}",), (self.answer.out_features,)))
        return Network(self.input_shape, nodes)


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
    validation: bool = Field(
        default=False,
        description="Train without the validation split and measure the accuracy on it: for choosing settings.",
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
        Recipe(
            name="digits-rnn",
            dataset="digits",
            architecture="rnn",
            hidden=(32,),
            epochs=60,
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
        Recipe(
            name="mnist-certified-lifted",
            dataset="mnist",
            architecture="mlp",
            hidden=(500,),
            epochs=60,
            batch_size=512,
            learning_rate=3e-3,
            loss="certified",
            loss_options={
                "radius": 0.45,
                "warm_up": 0.2,
                "clean_weight": 0.9,
                "share": 0.5,
                "refresh": 4,
                "bound": "lifted",
                "targets": 1,
            },
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


SUFFIXES = (".yaml", ".yml", ".json")


def read_recipe(source: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a file that ends in ``.yaml``, ``.yml`` or ``.json``.

    A field of a file with ``base`` replaces that of the shipped recipe; ``loss_options`` are merged with
    those of the base unless the file names a loss of its own.

    Raises:
        DataError: the file is missing or is not YAML or JSON.
        UnknownNameError: an unknown name, key, or option of the loss.
        InvalidInputError: a field is missing or has a value that it cannot have.
    """
    if Path(source).suffix.lower() not in SUFFIXES:
        return find_recipe(str(source))
    values = read_yaml(Path(source))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DataError(f"{source}: holds {type(values).__name__}, expected the fields of a recipe by name")
    try:
        if "base" in values:
            base = find_recipe(str(values.pop("base"))).to_dict()
            if "name" not in values:
                raise InvalidInputError("a recipe with a base has no name, expected one of its own")
            options = values.get("loss_options", {})
            if "loss" not in values and isinstance(options, dict):
                values["loss_options"] = {**base["loss_options"], **options}
            elif "loss" in values:
                base["loss_options"] = {}
            values = {**base, **values}
        recipe = Recipe.from_dict(values)
        check_architecture(recipe.architecture)
        build_loss(recipe.loss, recipe.loss_options)
    except FlowverifyError as error:
        error.args = (f"{source}: {error.args[0]}", *error.args[1:])
        raise
    return recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file: with ``base`` every field but the name has a default."""
    schema = json_schema(Recipe)
    base = {"description": "A shipped recipe, which gives what the file does not.", "enum": list(RECIPES)}
    required = [{"required": ["name", "base"]}, {"required": schema.pop("required")}]
    return {**schema, "properties": {"base": base, **schema["properties"]}, "anyOf": required}
