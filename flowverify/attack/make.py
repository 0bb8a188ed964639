"""Attacks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from flowverify.attack.base import BaseAttack
from flowverify.attack.flow_descent import FlowDescent
from flowverify.attack.frank_wolfe import FrankWolfe
from flowverify.attack.minimal import MinimalRadius
from flowverify.attack.projected_sinkhorn import ProjectedSinkhorn
from flowverify.errors import UnknownNameError

ATTACKS: dict[str, Callable[..., BaseAttack]] = {
    kind.name: kind for kind in (FlowDescent, ProjectedSinkhorn, FrankWolfe, MinimalRadius)
}


def check_attack(name: object) -> str:
    """Returns the name of an attack, or raises UnknownNameError with the list of valid ones."""
    if not isinstance(name, str) or name not in ATTACKS:
        raise UnknownNameError("attack", name, tuple(ATTACKS))
    return name


def make_attack(name: str, model: nn.Module, **options: Any) -> BaseAttack:
    """The attack of this name on a model; ``options`` are those of its class.

    Raises:
        UnknownNameError: no attack has this name.
        InvalidInputError: a model or an option that the attack does not take.
    """
    return ATTACKS[check_attack(name)](model, **options)
