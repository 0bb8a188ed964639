"""Training of image classifiers, reproducible from a recipe and its seed."""

from flowverify.training.bounds import TrainableBounds
from flowverify.training.loop import EpochReport, TrainingResult, accuracy, train, train_and_save
from flowverify.training.losses import (
    LOSSES,
    Adversarial,
    BatchContext,
    BatchLoss,
    BatchOutcome,
    Certified,
    NoisyCrossEntropy,
    StatefulLoss,
)
from flowverify.training.recipe import ARCHITECTURES, RECIPES, Recipe, build_architecture, find_recipe, read_recipe

__all__ = [
    "ARCHITECTURES",
    "LOSSES",
    "RECIPES",
    "Adversarial",
    "BatchContext",
    "BatchLoss",
    "BatchOutcome",
    "Certified",
    "EpochReport",
    "NoisyCrossEntropy",
    "Recipe",
    "StatefulLoss",
    "TrainableBounds",
    "TrainingResult",
    "accuracy",
    "build_architecture",
    "find_recipe",
    "read_recipe",
    "train",
    "train_and_save",
]
