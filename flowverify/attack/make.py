"""Attacks by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.schedule import Schedule
from flowverify.registry import ATTACKS


def make_attack(name: str, model: nn.Module, **options: Any) -> BaseAttack:
    """The attack of this name, or MODULE:CLASS, on a model; ``options`` are those of its class.

    A mapping given as ``schedule`` holds the fields of a :class:`~flowverify.attack.schedule.Schedule`.

    Raises:
        UnknownNameError: no attack has this name.
        InvalidInputError: a model or an option that the attack does not take.
    """
    if isinstance(schedule := options.get("schedule"), Mapping):
        options["schedule"] = Schedule(**schedule)
    made: BaseAttack = ATTACKS.make(name, ATTACKS.options(name, options), model)
    return made
