"""Files of settings: dataclasses that pydantic checks, and one line with the key for everything that is wrong.

What an editor needs to complete and check such a file is the
JSON schema of its dataclass (:func:`json_schema`), with the description of every field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.functional_validators import WrapValidator
from pydantic_core import ArgsKwargs, PydanticCustomError, core_schema

from flowverify.errors import DataError, FlowverifyError, InvalidInputError, UnknownNameError

T = TypeVar("T")
_WORDS = {
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys with values",
    "bool_type": "true or false",
    "too_short": "at least one",
}
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+")  # YAML 1.1 takes 1e-3 for text


class SettingError(InvalidInputError):
    """A value that cannot be: ``place`` is its key, such as ``runs[2].cap``, ``reason`` says what was expected."""

    def __init__(self, place: str, reason: str) -> None:
        self.place, self.reason = place, reason
        super().__init__(f"{place}: {reason}")


def wrong(place: str, given: object, expected: str) -> SettingError:
    """The error for a key whose value is another one than expected."""
    return SettingError(place, f"given {given!r}, expected {expected}")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(kind: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked by their types, wherever they come from.

    Raises:
        UnknownNameError, SettingError: from its constructor, as from :func:`read_settings`.
    """
    made: Any = checked_dataclass(kind, frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    build: Callable[..., None] = made.__init__
    names = [field.name for field in dataclasses.fields(made)]

    @functools.wraps(build)
    def __init__(self: T, *values: Any, **named: Any) -> None:  # noqa: N807
        try:
            build(self, *values[len(names) :], **dict(zip(names, values, strict=False)), **named)
        except ValidationError as error:
            raise _first(error, "") from None

    made.__init__ = __init__
    return cast("type[T]", made)


@settings
class Settings:
    """The base of all settings: unknown keys are answered with those that there are."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        given = (values.kwargs or {}) if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, Mapping):
            raise unexpected("keys with values")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                reason = PydanticCustomError("unknown_key", "unknown key", {"valid": known})
                raise ValidationError.from_exception_data("", [{"type": reason, "loc": (str(key),), "input": key}])
        return values


def read_settings(kind: type[T], values: object, what: str, **context: Any) -> T:
    """The settings that a mapping holds.

    Args:
        what: the whole is called in messages.
        context: what validators of the fields need, such as the folder of the file.

    Raises:
        UnknownNameError: a key that there is not, or a name that is none of the valid ones.
        SettingError: a key is missing, or has a value that it cannot have.
    """
    try:
        return TypeAdapter(kind).validate_python(values, context=context)
    except ValidationError as error:
        raise _first(error, what) from None


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON schema of a file of these settings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(kind).json_schema()}


def _first(error: ValidationError, whole: str) -> FlowverifyError:
    """The first of the mistakes, as an error of ours; ``whole`` is what has no key."""
    first = error.errors(include_url=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    kind, context = first["type"], first.get("ctx", {})
    if kind == "unknown_key":
        return UnknownNameError("key", place, context["valid"])
    if kind == "unknown_name":
        return UnknownNameError(place, first["input"], context["valid"])
    if kind == "missing":
        return SettingError(place, "missing, expected this key")
    if kind == "refused":
        return SettingError(place, first["msg"])
    return wrong(place or whole, first["input"], _WORDS.get(kind, first["msg"]))


def expected(text: str) -> WrapValidator:
    """Says what was expected of a value that the type before it does not take."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["type"] in ("expected", "unknown_name"):
                raise  # knows better
            raise PydanticCustomError("expected", "{text}", {"text": text}) from None

    return WrapValidator(check)


def unexpected(text: str) -> PydanticCustomError:
    """What a validator raises for a value: ``text`` is what was expected instead."""
    return PydanticCustomError("expected", "{text}", {"text": text})


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a name that is one of ``valid``, and with ``outside`` also ``MODULE:CLASS``."""

    valid: Sequence[str]
    outside: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        named: dict[str, Any] = {"enum": list(self.valid)}
        return {"anyOf": [named, {"type": "string", "pattern": ":"}]} if self.outside else named

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and (value in self.valid or (self.outside and ":" in value)):
            return value
        names = [*self.valid, "MODULE:CLASS"] if self.outside else list(self.valid)
        raise PydanticCustomError("unknown_name", "unknown name", {"valid": names})


def several(item: Any) -> WrapValidator:
    """Marks a list for which a single value may stand; its values must differ."""

    def check(value: Any, handler: Callable[[Any], list[Any]]) -> list[Any]:
        listed = value if isinstance(value, list) else [value]
        try:
            found = handler(listed)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            if isinstance(value, list):
                raise
            raise PydanticCustomError(first["type"], "{text}", {"text": first["msg"], **first.get("ctx", {})}) from None
        if not found or len(set(found)) < len(found):
            raise unexpected("one or more" if not found else "values that differ")
        return found

    return WrapValidator(check, json_schema_input_type=item | list[item])


Text = Annotated[str, Field(pattern=r"\S"), expected("text")]
Natural = Annotated[int, Field(ge=0, strict=True), expected("an integer >= 0")]
Positive = Annotated[int, Field(ge=1, strict=True), expected("an integer >= 1")]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True), expected("a number >= 0")]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True), expected("a number > 0")]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain YAML, where a key that is given twice is an error and not silently the last one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, or of a JSON file by its suffix.

    Raises:
        DataError: no such file, not UTF-8, not YAML or JSON, or a key twice in one mapping; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}), expected YAML or JSON") from error
    try:
        if path.suffix.lower() == ".json":  # YAML takes no tabs
            return json.loads(text)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" line {mark.line + 1}"
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DataError(f"{path}:{where} {reason}, expected YAML or JSON") from error
