"""Writes properties as VNN-LIB 1.0, in the dialect that all its readers share, or as VNN-LIB 2.0.

The shared dialect: one statement a line, comments on lines of their own, plain decimals, coefficients of 1 and -1 as
``(+ X_0 (- X_3))``, one pair of bounds a variable, ``(assert (or (and ...) (and ...)))`` for what is unsafe.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowverify.errors import UnknownNameError
from flowverify.export.properties import Comparison, Property
from flowverify.export.rounding import decimal

VERSIONS = ("1.0", "2.0")


def write_property(prop: Property, comments: Sequence[str], version: str = "1.0") -> str:
    """The text of a file.

    Raises:
        UnknownNameError: another version than "1.0" and "2.0".
    """
    if version not in VERSIONS:
        raise UnknownNameError("VNN-LIB version", version, VERSIONS)
    inputs = len(prop.lower)
    lines = [f"; {line}" for line in comments]
    if version == "1.0":
        lines += [f"(declare-const X_{k} Real)" for k in range(inputs)]
        lines += [f"(declare-const Y_{k} Real)" for k in range(prop.outputs)]
    else:
        lines += [
            "(vnnlib-version <2.0>)",
            "(declare-network f",
            f"  (declare-input X float32 [1,{inputs}])",
            f"  (declare-output Y float32 [1,{prop.outputs}])",
            ")",
        ]
    names = {kind: f"{kind}_%d" if version == "1.0" else f"{kind}[0,%d]" for kind in ("X", "Y")}
    for k, (low, high) in enumerate(zip(prop.lower.tolist(), prop.upper.tolist(), strict=True)):
        name = names["X"] % k
        lines.append(f"(assert (>= {name} {decimal(low)}))")
        lines.append(f"(assert (<= {name} {decimal(high)}))")
    lines += [f"(assert {_comparison(one, names)})" for one in prop.constraints]
    if len(prop.unsafe) == 1:  # a disjunction of one is more than some readers take
        lines += [f"(assert {_comparison(one, names)})" for one in prop.unsafe[0]]
    else:
        cases = (f"(and {' '.join(_comparison(one, names) for one in case)})" for case in prop.unsafe)
        lines.append(f"(assert (or {' '.join(cases)}))")
    return "\n".join(lines) + "\n"


def _comparison(one: Comparison, names: dict[str, str]) -> str:
    name = names[one.variable]
    plus, minus = [name % k for k in one.plus], [name % k for k in one.minus]
    if len(plus) == 1 and len(minus) == 1 and one.bound == 0:
        return f"({one.relation} {plus[0]} {minus[0]})"
    terms = [*plus, *(f"(- {text})" for text in minus)]
    left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
    return f"({one.relation} {left} {decimal(one.bound)})"
