"""From the name of a method to the certifier that carries it out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from flowverify.bounds.engine import DomainName
from flowverify.bounds.recipes import METHODS
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.certifier import CompleteCertifier, CompleteOptions
from flowverify.certifiers.complete.references import IMPOSSIBLE, ReferenceCompleteCertifier
from flowverify.certifiers.linear_certifier import LinearCertifier
from flowverify.certifiers.methods import COMPLETE_METHODS, LINEAR_METHODS
from flowverify.certifiers.references import ReferenceCertifier
from flowverify.certifiers.verify import Certifier
from flowverify.errors import InvalidInputError, UnknownNameError


def make_certifier(
    model: str | Path | nn.Module,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    input_shape: tuple[int, int, int] | None = None,
    domain: DomainName = "auto",
    references: int = 0,
    pool: Tensor | None = None,
    options: CompleteOptions | None = None,
) -> BaseCertifier:
    """The certifier of this method; linear and complete methods have no use for a bound or a domain.

    Args:
        options: of complete methods.
        references: with a number > 0, the maximum over so many references, which ``pool`` may provide.

    Raises:
        UnknownNameError: an unknown method or bound; and as the certifiers.
        InvalidInputError: references for a method that is exact: there is nothing to gain over the truth
            (framework paper, Table 1).
    """
    if references and method in LINEAR_METHODS:
        raise InvalidInputError(
            f"references with method {method}: it is exact, so no reference can gain (Table 1); expected vanilla or "
            "fine-tuned"
        )
    if references and method in ("complete", "milp"):
        raise InvalidInputError(f"references with method {method}: {IMPOSSIBLE}; expected vanilla-complete")
    if references and method == "vanilla-complete":
        return ReferenceCompleteCertifier(
            model, method, count=references, pool=pool, options=options, input_shape=input_shape
        )
    if method == "milp":
        from flowverify.certifiers.complete.milp import MilpCertifier

        return MilpCertifier(model, options=options, input_shape=input_shape)
    if method in COMPLETE_METHODS:
        return CompleteCertifier(model, method, options=options, input_shape=input_shape)
    if references and method in METHODS:
        return ReferenceCertifier(model, method, bound, count=references, pool=pool, input_shape=input_shape)
    if method in LINEAR_METHODS:
        return LinearCertifier(model, method, input_shape=input_shape)
    if method in METHODS:
        return Certifier(model, method, bound, input_shape=input_shape, domain=domain)
    raise UnknownNameError("method", method, (*METHODS, *LINEAR_METHODS, *COMPLETE_METHODS))
