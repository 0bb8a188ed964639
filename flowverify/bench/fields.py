"""Reading of a suite's mappings: every error names the key, what it holds, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowverify.errors import InvalidInputError
from flowverify.registry import Registry

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # YAML 1.1 takes 1e-3 for text


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """Plain YAML, where a key that is given twice is an error and not silently the last one."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        InvalidInputError: no such file, not UTF-8, not YAML, or a key twice in one mapping; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidInputError(f"suite {path}: cannot be read ({reason}), expected a YAML file") from error
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" line {mark.line + 1}"
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InvalidInputError(f"suite {path}:{where} {reason}, expected YAML") from error


class Fields:
    """A mapping of a suite with its place in the file, such as ``runs[2]``; keys are taken out one by one.

    Raises:
        InvalidInputError: what the file holds here is not a mapping.
    """

    def __init__(self, values: object, place: str) -> None:
        if not isinstance(values, Mapping):
            raise InvalidInputError(f"{place or 'suite'}: given {values!r}, expected keys with values")
        self._values = {str(key): value for key, value in values.items()}
        self.place = place
        self._known: list[str] = []

    def name(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str, default: Any = ...) -> Any:
        """The value as the file has it; without a default the key must be there."""
        self._known.append(key)
        if key in self._values:
            return self._values.pop(key)
        if default is ...:
            raise InvalidInputError(f"{self.name(key)}: missing, expected this key")
        return default

    def has(self, key: str) -> bool:
        return key in self._values

    def wrong(self, key: str, given: object, expected: str) -> InvalidInputError:
        return InvalidInputError(f"{self.name(key)}: given {given!r}, expected {expected}")

    def text(self, key: str, default: Any = ...) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or (not value.strip() and value != default):
            raise self.wrong(key, value, "text")
        return value

    def one_of(self, key: str, valid: Sequence[str], default: Any = ...) -> str:
        value = self.take(key, default)
        if value not in valid:
            raise self.wrong(key, value, f"one of {', '.join(valid)}")
        return str(value)

    def number(self, key: str, default: Any = ..., *, least: float = 0.0, above: bool = False) -> float:
        given = self.take(key, default)
        return self._number(key, given, least, above)

    def integer(self, key: str, default: Any = ..., *, least: int = 0) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, value, f"an integer >= {least}")
        return value

    def cap(self) -> float | None:
        """The largest value of a pixel, > 0, or None for no limit."""
        given = self.take("cap", None)
        return None if given is None else self._number("cap", given, 0.0, True)

    def names(self, key: str, valid: Sequence[str] | Registry | None = None, default: Any = ...) -> list[str]:
        """One name or a list of different names; those of a registry may be MODULE:CLASS."""
        value = self.take(key, default)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(isinstance(one, str) and one for one in listed):
            raise self.wrong(key, value, "a name or a list of names")
        if len(set(listed)) < len(listed):
            raise self.wrong(key, value, "names that differ")
        for one in listed:
            known = valid is None or one in valid or (isinstance(valid, Registry) and valid.is_outside(one))
            if not known and valid is not None:
                raise self.wrong(key, one, f"one of {', '.join(valid)}")
        return listed

    def radii(self, key: str) -> list[float | None]:
        """Numbers >= 0 in pixels, or [None] for ``search``."""
        value = self.take(key, "search")
        if value == "search":
            return [None]
        listed = value if isinstance(value, list) else [value]
        if not listed:
            raise self.wrong(key, value, "search, a radius or a list of radii")
        found = [self._number(key, one, 0.0, False) for one in listed]
        if len(set(found)) < len(found):
            raise self.wrong(key, value, "radii that differ")
        return list(found)

    def inside(self, key: str, default: Any = ...) -> Fields:
        """The mapping under a key."""
        return Fields(self.take(key, default), self.name(key))

    def each(self, key: str, read: Callable[[Fields], Any], default: Any = ...) -> list[Any]:
        """A list of mappings, each read by ``read``."""
        value = self.take(key, default)
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return [read(Fields(one, f"{self.name(key)}[{index}]")) for index, one in enumerate(value)]

    def finish(self) -> None:
        """Raises InvalidInputError for keys that nothing has taken."""
        if self._values:
            first = next(iter(self._values))
            raise InvalidInputError(f"{self.name(first)}: unknown key, expected one of {', '.join(self._known)}")

    def _number(self, key: str, value: object, least: float, above: bool) -> float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not least <= value < float("inf") or (above and value == least):  # type: ignore[operator]
            raise self.wrong(key, value, f"a number {'>' if above else '>='} {least:g}")
        return float(value)  # type: ignore[arg-type]
