"""Recipe files: read like the shipped recipes, and wrong ones named with what is right."""

import json
from pathlib import Path

import pytest

from flowverify.errors import DataError, FlowverifyError, InvalidInputError, UnknownNameError
from flowverify.training import RECIPES, Recipe, read_recipe

MINE = """
name: mine
dataset: digits
architecture: mlp
hidden: [8]
epochs: 2
loss: certified
loss_options: {radius: 0.2, share: 0.5}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_yaml_and_json_give_the_same(tmp_path: Path) -> None:
    expected = Recipe(
        "mine", "digits", "mlp", 2, hidden=(8,), loss="certified", loss_options={"radius": 0.2, "share": 0.5}
    )
    assert read_recipe(written(tmp_path, MINE)) == expected
    assert read_recipe(str(written(tmp_path, MINE, "mine.yml"))) == expected
    assert read_recipe(written(tmp_path, json.dumps(expected.to_dict()), "mine.JSON")) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_name_is_that_of_a_shipped_recipe(name: str) -> None:
    assert read_recipe(name) is RECIPES[name]


def test_base_gives_what_the_file_does_not(tmp_path: Path) -> None:
    base = RECIPES["digits-certified"]
    changed = read_recipe(
        written(tmp_path, "{name: mine, base: digits-certified, seed: 4, loss_options: {clean_weight: 1}}")
    )
    assert (changed.name, changed.seed, changed.epochs) == ("mine", 4, base.epochs)
    assert changed.loss_options == {**base.loss_options, "clean_weight": 1}
    plain = read_recipe(written(tmp_path, "{name: mine, base: digits-certified, loss: cross-entropy}"))
    assert plain.loss_options == {}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("epoch: 3", UnknownNameError, "unknown key 'epoch': expected one of .*epochs"),
        ("architecture: resnet", UnknownNameError, "unknown architecture 'resnet': expected one of .*mlp"),
        ("loss: certain", UnknownNameError, "unknown loss 'certain': expected one of .*certified"),
        (
            "loss_options: {radus: 1}",
            UnknownNameError,
            "of the loss certified 'radus': expected one of .*radius",
        ),
        (
            "loss_options: {bound: crown}",
            UnknownNameError,
            "certified training 'crown': expected one of crown-",
        ),
        ("loss_options: {radius: -1}", InvalidInputError, "given radius -1, expected a number >= 0"),
        ("loss_options: {radius: wide}", InvalidInputError, "given radius 'wide', expected a number"),
        (
            "loss_options: {clean_weight: 2}",
            InvalidInputError,
            "clean_weight 2, expected a number between 0 and 1",
        ),
        ("loss_options: {share: 0}", InvalidInputError, "given share 0, expected a number > 0"),
        ("loss_options: {own_radii: 1}", InvalidInputError, "given own_radii 1, expected true or false"),
        ("loss_options: {targets: 0}", InvalidInputError, "given targets 0, expected an integer >= 1"),
        ("loss_options: [1]", InvalidInputError, r"loss_options: given \[1\], expected names and values"),
        ("schedule: linear", UnknownNameError, "unknown schedule 'linear': expected one of constant, cosine, step"),
        ("schedule: step", InvalidInputError, "expected ascending numbers of epochs with step"),
        ("milestones: [3]", InvalidInputError, "expected ascending numbers of epochs with step, none with another"),
        ("hidden: 8", InvalidInputError, "hidden: given 8, expected integers >= 1"),
        ("hidden: [0]", InvalidInputError, r"hidden\[0\]: given 0, expected an integer >= 1"),
        ("epochs: many", InvalidInputError, "epochs: given 'many', expected an integer >= 1"),
        ("name: 7", InvalidInputError, "name: given 7, expected text"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(
    tmp_path: Path, change: str, error: type[FlowverifyError], message: str
) -> None:
    key = change.split(":")[0]
    text = "".join(line + "\n" for line in MINE.splitlines() if not line.startswith(f"{key}:")) + change
    with pytest.raises(error, match=rf"mine\.yaml: .*{message}"):
        read_recipe(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "1: 2"])
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"mine\.yaml: "):
        read_recipe(written(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        read_recipe(tmp_path / "absent.json")


def test_base_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="with a base has no name"):
        read_recipe(written(tmp_path, "base: digits-fc3"))


def test_steps_multiply_the_rate() -> None:
    recipe = Recipe("mine", "digits", "linear", 5, schedule="step", milestones=(2, 4))
    assert [recipe.rate_scale(0.0, epoch) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
