"""Recipes: what they accept, and that they survive JSON."""

import json
from typing import Any

import pytest

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.training import RECIPES, Recipe, find_recipe
from flowverify.training.losses import build_loss


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert find_recipe(recipe.name) is recipe


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": "lbfgs"}, UnknownNameError, "unknown optimizer 'lbfgs': expected one of adam, sgd"),
        ({"schedule": "steps"}, UnknownNameError, "unknown schedule 'steps'"),
        ({"epochs": 0}, InvalidInputError, "epochs: given 0, expected an integer >= 1"),
        ({"epochs": 1.5}, InvalidInputError, "epochs: given 1.5"),
        ({"batch_size": True}, InvalidInputError, "batch_size: given True"),
        ({"seed": -1}, InvalidInputError, "seed: given -1"),
        ({"learning_rate": 0}, InvalidInputError, "learning_rate: given 0, expected a number > 0"),
        ({"learning_rate": float("nan")}, InvalidInputError, "learning_rate: given nan"),
        ({"weight_decay": "none"}, InvalidInputError, "weight_decay: given 'none'"),
        ({"momentum": 0.9}, InvalidInputError, r"momentum < 1 \(0 with adam\)"),
        ({"momentum": 1.0, "optimizer": "sgd"}, InvalidInputError, "momentum < 1"),
        ({"epoch": 3}, UnknownNameError, "unknown key 'epoch': expected one of .*epochs"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.from_dict({**RECIPES["digits-fc3"].to_dict(), **change})


def test_missing_key_is_named() -> None:
    with pytest.raises(InvalidInputError, match="epochs: missing, expected this key"):
        Recipe.from_dict({"name": "mine", "dataset": "digits", "architecture": "linear"})


def test_unknown_recipe_and_loss_list_the_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown recipe 'fc3': expected one of .*mnist-fc3"):
        find_recipe("fc3")
    with pytest.raises(UnknownNameError, match="unknown loss 'hinge': expected one of .*cross-entropy"):
        build_loss("hinge", {})
    with pytest.raises(UnknownNameError, match="unknown option of the loss cross-entropy 'margin'"):
        build_loss("cross-entropy", {"margin": 1})
