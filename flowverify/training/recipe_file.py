"""Recipes in files: YAML or JSON, the fields of :class:`flowverify.training.Recipe` by name.

name: mnist-mine         # required; with `base`, all else is as in that shipped recipe
base: mnist-certified
seed: 3
loss_options: {radius: 0.3}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowverify.errors import DataError, FlowverifyError, InvalidInputError
from flowverify.settings import json_schema, read_yaml
from flowverify.training.architectures import check_architecture
from flowverify.training.losses import build_loss
from flowverify.training.recipe import RECIPES, Recipe, find_recipe

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
