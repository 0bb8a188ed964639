"""Files of settings: mistakes are named by their keys, and the schema says the same as the reader."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field
from typer.testing import CliRunner

from flowverify.cli import app
from flowverify.errors import DataError, InvalidInputError, UnknownNameError
from flowverify.settings import Number, OneOf, Positive, Settings, Text, read_settings, read_yaml, settings, several
from flowverify.training import RECIPES

Colour = Annotated[str, OneOf(("red", "green"), outside=True)]


@settings
class Inner(Settings):
    """What is inside."""

    sizes: Annotated[list[Positive], several(Positive)] = Field(description="Sizes.")
    colours: Annotated[list[Colour], several(Colour)] = Field(["red"], description="Colours.")
    share: Number | None = Field(None, description="A share.")


@settings
class Outer(Settings):
    """The file."""

    name: Text = Field(description="A name.")
    on: bool = Field(False, strict=True, description="On or off.")
    inner: list[Inner] = Field([], description="Several.")


def outer(**inner):
    return {"name": "a", "inner": [{"sizes": [1]}, {"sizes": 2, **inner}]}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], InvalidInputError, r"^file: given \[\], expected keys with values"),
        ({}, InvalidInputError, "^name: missing, expected this key"),
        ({"name": " "}, InvalidInputError, "^name: given ' ', expected text"),
        ({"name": "a", "nam": 1}, UnknownNameError, "^unknown key 'nam': expected one of inner, name, on"),
        ({"name": "a", "on": 1}, InvalidInputError, "^on: given 1, expected true or false"),
        ({"name": "a", "inner": {}}, InvalidInputError, "^inner: given {}, expected a list"),
        (outer(size=3), UnknownNameError, r"^unknown key 'inner\[1\]\.size': expected one of colours, share, sizes"),
        (outer(sizes="3"), InvalidInputError, r"^inner\[1\]\.sizes: given '3', expected an integer >= 1"),
        (outer(sizes=[3, 0]), InvalidInputError, r"^inner\[1\]\.sizes\[1\]: given 0, expected an integer >= 1"),
        (outer(sizes=[3, 3]), InvalidInputError, r"^inner\[1\]\.sizes: given \[3, 3\], expected values that differ"),
        (outer(sizes=[]), InvalidInputError, r"^inner\[1\]\.sizes: given \[\], expected one or more"),
        (outer(colours="r"), UnknownNameError, r"^unknown inner\[1\]\.colours 'r': expected one of MODULE:CLASS, gre"),
        (outer(share=True), InvalidInputError, r"^inner\[1\]\.share: given True, expected a number >= 0"),
        (outer(share=float("nan")), InvalidInputError, r"^inner\[1\]\.share: given nan, expected a number >= 0"),
    ],
)
def test_mistakes_are_named_by_their_keys(values, error, message):
    with pytest.raises(error, match=message):
        read_settings(Outer, values, "file")


def test_values_are_checked_wherever_they_come_from():
    inner = read_settings(Inner, {"sizes": 3, "colours": ["green", "my.module:Class"]}, "file")
    assert inner == Inner(sizes=[3], colours=["green", "my.module:Class"])
    with pytest.raises(InvalidInputError, match="^sizes: given 0, expected an integer >= 1"):
        replace(inner, sizes=0)
    with pytest.raises(UnknownNameError, match="unknown key 'size'"):
        Inner(size=3)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "a: [1e-3, 1.e3, -2E+1, 1_0, e3, 1e]", [1e-3, 1e3, -20.0, 10, "e3", "1e"]),
        ("a.json", '{\t"a":\t1}', 1),
    ],
)
def test_numbers_with_exponents_and_json_with_tabs(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_yaml(tmp_path / name) == {"a": expected}


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.yaml", "a: 1\na: 2"), ("a.yml", "a: !!python/none x")])
def test_files_that_cannot_be_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: .*expected YAML or JSON"):
        read_yaml(tmp_path / name)


def schema_of(*command):
    result = CliRunner().invoke(app, [*command, "--schema"])
    assert result.exit_code == 0, result.output
    Draft202012Validator.check_schema(schema := json.loads(result.stdout))
    return Draft202012Validator(schema)


SUITES = sorted((Path(__file__).parents[1] / "benchmarks" / "suites").glob("*.yaml"))
RUN = {"methods": "vanilla"}
SUITE = {"name": "a", "runs": [RUN]}


class TestSchemas:
    def test_suites_fit(self):
        schema = schema_of("bench")
        for path in SUITES:
            schema.validate(read_yaml(path))
        schema.validate({**SUITE, "runs": [{"kind": "mine:Kind", "own": 3}, {"radii": [0.1, 1]}, {"radii": "search"}]})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"names": "a"},
            {"runs": []},
            {"runs": [{"methods": "vanila"}]},
            {"runs": [{"kind": "attack"}]},
            {"runs": [{"kind": "dance"}]},
            {"runs": [{"cap": 0}]},
            {"budget": {"seconds": "long"}},
            {"comparisons": [{"claim": "a"}]},
        ],
    )
    def test_what_the_reader_refuses_does_not_fit(self, wrong):
        assert not schema_of("bench").is_valid({**SUITE, **wrong})

    def test_every_field_is_described(self):
        for command in ("bench", "train"):
            schema = schema_of(command).schema
            for kind in (schema, *schema.get("$defs", {}).values()):
                for name, field in kind["properties"].items():
                    assert field.get("description", "").endswith("."), name

    def test_recipes_fit(self):
        schema = schema_of("train")
        for recipe in RECIPES.values():
            schema.validate(recipe.to_dict())
        schema.validate({"name": "mine", "base": "digits-fc3", "seed": 3})
        for wrong in (
            {"name": "mine"},
            {"name": "mine", "base": "gone"},
            {"name": "mine", "base": "digits-fc3", "seed": -1},
        ):
            assert not schema.is_valid(wrong)
