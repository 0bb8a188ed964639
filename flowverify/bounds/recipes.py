"""The names of what bounds: the engines, and the bounds made of them; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import OUTSIDE, Entry, Registry, imported, is_outside

ENGINES = Registry(
    "engine of bounds",
    {
        "interval": Entry(
            "interval arithmetic above an exact first layer", "flowverify.bounds.intervals:IntervalEngine"
        ),
        "crown": Entry("CROWN, by auto_LiRPA", "flowverify.bounds.crown.engine:CrownEngine"),
        "alpha-crown": Entry("CROWN with optimised slopes", "flowverify.bounds.crown.engine:AlphaCrownEngine"),
        "zonotope": Entry(
            "affine forms, through products of values as well", "flowverify.bounds.zonotope:ZonotopeEngine"
        ),
        "lifted": Entry("rows of moves, which share the budget", "flowverify.bounds.lifted.engine:LiftedEngine"),
    },
)
"""Classes on the protocol of :class:`flowverify.bounds.engine.Engine`, loaded when a bound asks for them."""


@dataclass(frozen=True)
class Bound:
    """A bound as a composition of engines, by name or ``MODULE:CLASS``.

    Attributes:
        neurons: who bounds what activations read: the tightest at every neuron, one activation after another, in this
            order. Interval propagation always decides first which neurons need a bound.
        margins: who bounds the margins: the largest.
        otherwise: who takes the place of an engine that does not know an operation; nobody if empty.
    """

    description: str
    neurons: tuple[str, ...]
    margins: tuple[str, ...]
    otherwise: str = ""


BOUNDS: dict[str, Bound] = {
    "ibp": Bound("intervals above an exact first layer", ("interval",), ("interval",)),
    "crown-ibp": Bound("CROWN over interval bounds", ("interval",), ("crown",)),
    "crown": Bound("CROWN for every layer", ("crown",), ("crown",)),
    "alpha-crown": Bound("CROWN with optimised slopes", ("alpha-crown",), ("alpha-crown",)),
    "lifted": Bound("moves that share the budget, over intervals", ("interval", "lifted"), ("interval", "lifted")),
    "zonotope": Bound("affine forms over intervals", ("interval", "zonotope"), ("interval", "zonotope")),
    "best": Bound(
        "lifted bounds, CROWN where they do without chords or are not exact, zonotopes for what neither knows",
        ("interval", "lifted", "crown"), ("interval", "lifted", "crown"), "zonotope",
    ),
}  # fmt: skip


def check_bound(bound: str | Bound) -> Bound:
    """The composition of a bound: of its name, or MODULE:NAME of a :class:`Bound` of somebody else's.

    Raises:
        UnknownNameError: no bound has this name.
        InvalidInputError: there is no such object, or it is no bound.
    """
    if isinstance(bound, Bound):
        return bound
    if bound in BOUNDS:
        return BOUNDS[bound]
    if not is_outside(bound):
        raise UnknownNameError("bound", bound, (*BOUNDS, OUTSIDE))
    try:
        found = imported(bound)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(f"bound {bound!r}: {error}, expected a Bound as {OUTSIDE}") from error
    if not isinstance(found, Bound):
        raise InvalidInputError(f"bound {bound!r}: {found!r}, expected a Bound")
    return found
