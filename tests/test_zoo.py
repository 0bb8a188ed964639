"""Shipped models: every card tells the truth, and a file that is not the card's is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowverify import zoo
from flowverify.ball import WassersteinBall
from flowverify.certifiers.incomplete import Certifier
from flowverify.data import Dataset, load_dataset
from flowverify.errors import InvalidInputError, ModelFileError, UnknownNameError
from flowverify.network import Network
from flowverify.training import RECIPES, Recipe, accuracy
from flowverify.zoo import Card, list_models, load_card, load_model, models_folder, record_certified, save_model

CARDS = list_models()
TAKE_LONG = {"mnist-certified", "mnist-certified-lifted", "mnist-certified-wide", "mnist-adversarial"}


def every_tenth(name: str) -> Dataset:
    root = os.environ.get("FLOWVERIFY_DATA")
    if name == "mnist" and (not root or not (Path(root) / "mnist").is_dir()):
        pytest.skip("needs the MNIST files in $FLOWVERIFY_DATA/mnist")
    data = load_dataset(name)
    return data[:: max(1, len(data) // 1000)]


def test_the_plain_models_are_shipped() -> None:
    assert {"digits-fc3", "mnist-linear", "mnist-fc3", "mnist-cnn", "digits-certified", "mnist-certified"} <= {
        card.name for card in CARDS
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
class TestEveryCard:
    def test_accuracy_is_what_the_card_says(self, card: Card) -> None:
        data = every_tenth(card.dataset)
        assert accuracy(load_model(card.name), data) == pytest.approx(card.clean_accuracy, abs=0.015)
        assert (card.clean_images, card.clean_split) == (len(load_dataset(card.dataset)), "test")
        # Among so many images, the share is a whole number of them.
        assert card.clean_accuracy * card.clean_images == pytest.approx(round(card.clean_accuracy * card.clean_images))

    def test_network_is_what_the_card_says(self, card: Card) -> None:
        model = load_model(card.name, card.input_shape)
        assert model(torch.rand(2, *card.input_shape)).shape == (2, card.classes)
        # A recurrent network is written out: its weights are there once a step.
        different = {tensor.numpy().tobytes(): tensor.numel() for tensor in model.parameters()}
        assert sum(different.values()) == card.parameters

    def test_recipe_is_the_one_that_trains_it_today(self, card: Card) -> None:
        assert Recipe.from_dict(card.recipe) == RECIPES[card.name]
        assert card.seed == card.recipe["seed"]
        assert card.command == f"flowverify train --recipe {card.name}"


@pytest.mark.parametrize(
    "card",
    [
        pytest.param(card, id=card.name, marks=[pytest.mark.slow] if card.name in TAKE_LONG else [])
        for card in CARDS
        if card.certified
    ],
)
def test_median_radius_is_what_the_card_says(card: Card) -> None:
    every_tenth(card.dataset)  # skips where the data are not there
    data = load_dataset(card.dataset)[: card.certified["images"]]
    data = data[:: max(1, len(data) // 50)]
    certifier = Certifier(load_model(card.name), card.certified["method"], card.certified["bound"])
    # About half of the images are certified at the median, more below it, fewer above.
    for factor, least, most in ((1.0, 0.4, 0.6), (0.6, 0.55, 1.0), (1.5, 0.0, 0.45)):
        ball = WassersteinBall(factor * card.certified["median_radius"])
        found = certifier.certify(data.images, data.labels, ball)
        share = sum(certificate.verdict == "certified" for certificate in found) / len(data)
        assert least <= share <= most, f"{share} at {factor} times the median"


def test_certified_radii_are_recorded(tmp_path: Path) -> None:
    shutil.copy(models_folder() / "digits-fc3.json", tmp_path)
    before = json.loads((tmp_path / "digits-fc3.json").read_text())
    certified = {"median_radius": 0.5, "images": 20}
    card = record_certified("digits-fc3", tmp_path, certified)
    assert card.certified == certified
    assert json.loads((tmp_path / "digits-fc3.json").read_text()) == {**before, "certified": certified}
    with pytest.raises(InvalidInputError, match="certified has images None, expected how many"):
        record_certified("digits-fc3", tmp_path, {"median_radius": 0.5})
    with pytest.raises(ModelFileError, match=r"absent\.json: cannot be read"):
        record_certified("absent", tmp_path, {})


class TestChecks:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A zoo of its own with digits-fc3 only."""
        for suffix in ("json", "onnx"):
            shutil.copy(models_folder() / f"digits-fc3.{suffix}", tmp_path)
        monkeypatch.setattr(zoo, "models_folder", lambda: tmp_path)
        return tmp_path

    def test_changed_weights_are_refused(self, folder: Path) -> None:
        content = bytearray((folder / "digits-fc3.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "digits-fc3.onnx").write_bytes(bytes(content))
        with pytest.raises(ModelFileError, match=r"digits-fc3\.onnx: SHA-256 is .*, expected .* by the model"):
            load_model("digits-fc3")

    def test_missing_weights_are_named(self, folder: Path) -> None:
        (folder / "digits-fc3.onnx").unlink()
        with pytest.raises(ModelFileError, match=r"digits-fc3\.onnx: no such file"):
            load_model("digits-fc3")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"extra": 1}, r"has unknown \['extra'\]"),
            ({"classes": "ten"}, "field classes is 'ten', expected int"),
            ({"input_shape": [1, 8]}, "expected three integers >= 1"),
            ({"file": "../other.onnx"}, "expected a file beside the card"),
            ({"name": "other"}, "card name is 'other', expected 'digits-fc3'"),
            ({"clean_images": 0}, "clean_images is 0, expected an integer >= 1"),
            ({"clean_images": True}, "clean_images is True, expected an integer >= 1"),
            ({"clean_split": "train"}, "clean_split is 'train', expected test, validation or held-out"),
            ({"certified": {"clean_accuracy": 0.9}}, "certified has images None, expected how many"),
        ],
    )
    def test_malformed_card_is_refused(self, folder: Path, change: dict[str, object], message: str) -> None:
        path = folder / "digits-fc3.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ModelFileError, match=message):
            load_card("digits-fc3")

    @pytest.mark.parametrize("field", ["clean_images", "clean_split"])
    def test_an_accuracy_of_unknown_images_is_refused(self, folder: Path, field: str) -> None:
        path = folder / "digits-fc3.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))
        with pytest.raises(ModelFileError, match=rf"card lacks \['{field}'\]"):
            load_card("digits-fc3")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "digits-fc3"}'])
    def test_broken_card_is_refused(self, folder: Path, text: str) -> None:
        (folder / "digits-fc3.json").write_text(text)
        with pytest.raises(ModelFileError, match=r"digits-fc3\.json"):
            list_models()


class TestLoadModel:
    def test_unknown_name_lists_the_models(self) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown model 'mnist-fc4': expected .*mnist-fc3"):
            load_model("mnist-fc4")

    def test_other_input_shape_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match=r"given input shape \(1, 28, 28\), expected \(1, 8, 8\)"):
            load_model("digits-fc3", (1, 28, 28))

    def test_path_and_module_give_the_same_scores_as_the_name(self) -> None:
        images = load_dataset("digits").images[:20]
        scores = load_model("digits-fc3")(images)
        path = models_folder() / "digits-fc3.onnx"
        torch.testing.assert_close(load_model(path)(images), scores)
        torch.testing.assert_close(load_model(str(path))(images), scores)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        torch.testing.assert_close(load_model(module, (1, 8, 8))(images), module(images))

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFileError, match=r"absent\.onnx"):
            load_model(tmp_path / "absent.onnx")

    def test_works_from_any_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert load_model("digits-fc3")(torch.rand(1, 1, 8, 8)).shape == (1, 10)

    def test_models_inside_the_package_come_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zoo, "files", lambda _: tmp_path / "flowverify")
        assert models_folder() == tmp_path / "models"
        (tmp_path / "flowverify" / "models").mkdir(parents=True)
        assert models_folder() == tmp_path / "flowverify" / "models"
        assert list_models() == []


FIELDS: dict[str, Any] = {
    "name": "tiny",
    "description": "a test",
    "architecture": "linear",
    "dataset": "digits",
    "input_shape": (1, 8, 8),
    "classes": 10,
    "clean_accuracy": 0.1,
    "clean_images": 539,
    "clean_split": "test",
    "command": "none",
    "seed": 0,
    "recipe": {},
    "trained_with": {},
    "license": "none",
}


class TestSaveModel:
    @pytest.fixture
    def network(self) -> Network:
        return Network.sequential((1, 8, 8), [nn.Flatten(), nn.Linear(64, 10)])

    def test_what_is_saved_can_be_loaded(
        self, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = save_model(network, tmp_path / "new", **FIELDS)
        monkeypatch.setattr(zoo, "models_folder", lambda: tmp_path / "new")
        assert card.parameters == 650 and list_models() == [card]
        images = torch.rand(3, 1, 8, 8)
        torch.testing.assert_close(load_model("tiny")(images), network(images))
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tiny.json", "tiny.onnx"]

    def test_incomplete_card_leaves_nothing_behind(self, network: Network, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"card lacks \['seed'\]"):
            save_model(network, tmp_path, **{key: FIELDS[key] for key in FIELDS if key != "seed"})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden"])
    def test_unusable_name_is_refused(self, network: Network, tmp_path: Path, name: str) -> None:
        with pytest.raises(InvalidInputError, match="model name"):
            save_model(network, tmp_path, **{**FIELDS, "name": name})

    def test_unwritable_folder_is_named(self, network: Network, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(ModelFileError, match="taken: cannot be written to"):
            save_model(network, tmp_path / "taken", **FIELDS)
