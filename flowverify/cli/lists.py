"""What goes by a name, with its options: ``flowverify methods``, ``bounds``, ``grounds`` and so on.

Lists come from where the names are looked up, so that nothing is listed which is not there.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import typer

from flowverify.bounds.recipes import BOUNDS
from flowverify.cli.common import Command, Json, json_line, user_errors
from flowverify.registry import ATTACKS, DATASETS, ENGINES, METHODS, Registry


@dataclass(frozen=True)
class Item:
    """One name: what it is, in one line, and its options: (name, default, help)."""

    name: str
    description: str
    options: list[tuple[str, Any, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an option as an object."""
        options = [{"name": name, "default": default, "help": about} for name, default, about in self.options]
        return {"name": self.name, "description": self.description, "options": options}


def _registered(registry: Registry) -> Callable[[], Iterator[Item]]:
    def items() -> Iterator[Item]:
        for name, entry in registry.items():
            found = dataclasses.fields(registry.options_type(name)) if registry is not DATASETS else ()
            options = [
                (one.name, one.default if isinstance(one.default, _PLAIN) else None, str(one.metadata["help"]))
                for one in found
                if one.metadata.get("help")
            ]
            yield Item(name, entry.description, options)

    return items


_PLAIN = (bool, int, float, str)


def _bounds() -> Iterator[Item]:
    for name, bound in BOUNDS.items():
        yield Item(name, bound.description)


def _grounds() -> Iterator[Item]:
    from flowverify.transport.ground import GROUNDS

    for name, cost in GROUNDS.items():
        about = (inspect.getdoc(cost) or "").partition("\n")[0]
        yield from (Item(form, about) for form in cost.forms or (name,))


def _recipes() -> Iterator[Item]:
    from flowverify.training import RECIPES

    for name, recipe in RECIPES.items():
        hidden = "" if not recipe.hidden else f" ({', '.join(map(str, recipe.hidden))})"
        epochs = f"{recipe.epochs} epochs"
        yield Item(name, f"{recipe.architecture}{hidden} on {recipe.dataset}, loss {recipe.loss}, {epochs}")


LISTS: Mapping[str, tuple[str, Callable[[], Iterator[Item]]]] = {
    "methods": ("List the methods of certification (--method), with their options.", _registered(METHODS)),
    "engines": ("List what carries methods out (--engine), with their options.", _registered(ENGINES)),
    "bounds": ("List the bounds of vanilla and fine-tuned certification (--bound).", _bounds),
    "grounds": ("List the ground costs (--ground).", _grounds),
    "attacks": ("List the attacks (--attack), with their options.", _registered(ATTACKS)),
    "datasets": ("List the data sets (--dataset).", _registered(DATASETS)),
    "recipes": ("List the recipes of shipped models (train --recipe).", _recipes),
}


def add_lists(app: typer.Typer) -> None:
    """Gives the program a command for each list."""
    for name, (about, items) in LISTS.items():
        app.command(name, cls=Command, help=about)(_command(items))


def _command(items: Callable[[], Iterator[Item]]) -> Callable[..., None]:
    @user_errors
    def show(json: Json = False) -> None:
        found = list(items())
        if json:
            for one in found:
                typer.echo(json_line(one.to_json()))
            return
        width = max(len(one.name) for one in found)
        for one in found:
            typer.echo(f"{one.name:<{width}}  {one.description}")
            for name, default, about in one.options:
                value = "" if default is None else f"={default}"
                typer.echo(f"{'':<{width}}    --option {name}{value}: {about}")

    return show
