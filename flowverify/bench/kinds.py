"""The kinds of jobs by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flowverify.bench.attack_kind import Attack
from flowverify.bench.certify_kind import Certify
from flowverify.bench.instances_kind import Instances
from flowverify.bench.script_kind import Script
from flowverify.bench.tasks import Kind
from flowverify.errors import InvalidInputError, UnknownNameError

KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in (Certify(), Attack(), Instances(), Script())}


def find_kind(name: str) -> Kind[Any]:
    """The kind of this name, or of a user's class ``MODULE:CLASS``, which every worker must be able to import.

    Raises:
        UnknownNameError: no kind has this name.
        InvalidInputError: there is no such class, or it is no :class:`~flowverify.bench.tasks.Kind`.
    """
    if name in KINDS:
        return KINDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UnknownNameError("kind", name, (*KINDS, "MODULE:CLASS"))
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(f"kind {name!r}: {error}, expected a class MODULE:CLASS") from error
    if not isinstance(found, type) or not issubclass(found, Kind):
        raise InvalidInputError(f"kind {name!r}: {found!r}, expected a class derived from Kind")
    return found()
