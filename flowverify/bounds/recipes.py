"""The balls that are bounded, with and without positivity, and the bounds: their names, what each is made of."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.errors import UnknownNameError

METHODS: dict[str, str] = {
    "vanilla": "the L1 ball in the flow domain (framework paper, Theorem 3)",
    "fine-tuned": "the flows of the L1 ball that lead to images, R + A delta >= 0 (Theorem 6)",
}


@dataclass(frozen=True)
class BoundRecipe:
    """Where the intervals of the activations, and the final margins, come from."""

    description: str
    intermediate_interval: bool  # interval propagation bounds the activations' inputs
    intermediate_crown: bool  # CROWN bounds them; with both, the tighter at every neuron
    final_interval: bool
    final_crown: bool
    final_alpha: bool = False


BOUNDS: dict[str, BoundRecipe] = {
    "ibp": BoundRecipe("intervals above an exact first layer", True, False, True, False),
    "crown-ibp": BoundRecipe("CROWN over interval bounds", True, False, False, True),
    "crown": BoundRecipe("CROWN for every layer", False, True, False, True),
    "alpha-crown": BoundRecipe("CROWN with optimised slopes", False, True, False, True, final_alpha=True),
    "best": BoundRecipe("the tighter of intervals and CROWN at every neuron", True, True, True, True),
}


def check_bound(bound: str) -> BoundRecipe:
    """The recipe of a bound, or raises UnknownNameError with the valid names."""
    if bound not in BOUNDS:
        raise UnknownNameError("bound", bound, tuple(BOUNDS))
    return BOUNDS[bound]


def check_method(method: str) -> str:
    """Returns the name of a method, or raises UnknownNameError with the valid ones."""
    if method not in METHODS:
        raise UnknownNameError("method", method, tuple(METHODS))
    return method
