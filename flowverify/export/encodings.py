"""The encodings of one question, "is there a misclassified image in the ball?", and who can answer each.

With delta = delta_mu + p - q and eps = radius * mass the question is: are there p, q >= 0 with sum(p + q) <= eps
and R + A delta >= 0 such that f_t >= f_y for some t != y? (Framework paper 2021, Theorem 6; without the second
constraint, Theorem 3.) Verifiers differ in what they take besides a box on the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowverify.errors import UnknownNameError

Form = Literal["split", "delta"]


@dataclass(frozen=True)
class Encoding:
    """One way of writing the question down.

    Attributes:
        form: the inputs of the network: "split" (p, q), or "delta" for tools with an L1 ball of their own.
        per_label: whether the outputs are margins of one label, so that a file serves that label only.
        penalised: whether constraints have become a penalty on the margins.
        reader: which verifier it is for, as the header of a property says.
    """

    name: str
    form: Form
    per_label: bool
    penalised: bool
    reader: str


ENCODINGS: dict[str, Encoding] = {
    "linear": Encoding(
        "linear",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "for Marabou, which decides it exactly. It has linear constraints on several INPUTS, and other readers "
            "misread it: the package vnnlib 0.0.1 drops terms without a word, alpha-beta-CROWN stops at an assertion. "
            "For other verifiers use the encoding outputs or penalty."
        ),
    ),
    "outputs": Encoding(
        "outputs",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "a box on the inputs, and constraints on outputs only: every reader parses it. A verifier must weigh "
            "several outputs in one conjunction to decide it; Marabou does."
        ),
    ),
    "penalty": Encoding(
        "penalty",
        "split",
        per_label=True,
        penalised=True,
        reader=(
            "a box on the inputs, and a sign for each output: for verifiers that know boxes only, such as "
            "alpha-beta-CROWN."
        ),
    ),
    "l1-penalty": Encoding(
        "l1-penalty",
        "delta",
        per_label=True,
        penalised=True,
        reader=(
            "for tools with an L1 ball of their own, such as alpha-beta-CROWN with `norm: 1`; use the configuration "
            "beside it. The box of this file alone is LARGER than the ball: unsat holds for the ball, sat may not."
        ),
    ),
}


def check_encoding(name: str) -> Encoding:
    """The encoding of this name, or UnknownNameError with the valid ones."""
    if name not in ENCODINGS:
        raise UnknownNameError("encoding", name, tuple(ENCODINGS))
    return ENCODINGS[name]
