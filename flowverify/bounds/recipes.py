"""The names of what bounds: the balls, with and without positivity, the engines, and the bounds made of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowverify.errors import DependencyError, UnknownNameError

if TYPE_CHECKING:
    from flowverify.bounds.engine import Engine

METHODS: dict[str, str] = {
    "vanilla": "the L1 ball in the flow domain (framework paper, Theorem 3)",
    "fine-tuned": "the flows of the L1 ball that lead to images, R + A delta >= 0 (Theorem 6)",
}

ENGINES: dict[str, str] = {
    "interval": "flowverify.bounds.interval_engine:IntervalEngine",
    "crown": "flowverify.bounds.crown.engine:CrownEngine",
    "alpha-crown": "flowverify.bounds.crown.engine:AlphaCrownEngine",
}
"""Classes on the protocol of :class:`flowverify.bounds.engine.Engine`, loaded when a bound asks for them."""


@dataclass(frozen=True)
class Bound:
    """A bound as a composition of engines, by name or ``MODULE:CLASS``.

    Attributes:
        neurons: who bounds what activations read: the tightest at every neuron, one activation after another, in this
            order. Interval propagation always decides first which neurons need a bound.
        margins: who bounds the margins: the largest.
    """

    description: str
    neurons: tuple[str, ...]
    margins: tuple[str, ...]


BOUNDS: dict[str, Bound] = {
    "ibp": Bound("intervals above an exact first layer", ("interval",), ("interval",)),
    "crown-ibp": Bound("CROWN over interval bounds", ("interval",), ("crown",)),
    "crown": Bound("CROWN for every layer", ("crown",), ("crown",)),
    "alpha-crown": Bound("CROWN with optimised slopes", ("alpha-crown",), ("alpha-crown",)),
    "best": Bound(
        "the tighter of intervals and CROWN at every neuron", ("interval", "crown"), ("interval", "crown")
    ),
}  # fmt: skip


def check_bound(bound: str | Bound) -> Bound:
    """The composition of a bound by its name, or raises UnknownNameError with the valid ones."""
    if isinstance(bound, Bound):
        return bound
    if bound not in BOUNDS:
        raise UnknownNameError("bound", bound, tuple(BOUNDS))
    return BOUNDS[bound]


def check_method(method: str) -> str:
    """Returns the name of a method, or raises UnknownNameError with the valid ones."""
    if method not in METHODS:
        raise UnknownNameError("method", method, tuple(METHODS))
    return method


def engine_class(name: str) -> type[Engine]:
    """The class of an engine.

    Raises:
        UnknownNameError: no name of :data:`ENGINES`, and no ``MODULE:CLASS`` that can be imported.
        DependencyError: it needs a library that is not there.
    """
    module, _, attribute = ENGINES.get(name, name).partition(":")
    try:
        found: type[Engine] = getattr(importlib.import_module(module), attribute)
    except DependencyError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError("engine of bounds", name, (*ENGINES, "MODULE:CLASS")) from error
    return found
