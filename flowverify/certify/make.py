"""From the name of a method to the certifier that carries it out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from flowverify.certify.base import BaseCertifier
from flowverify.certify.domain import DomainName
from flowverify.certify.linear_certifier import LinearCertifier
from flowverify.certify.methods import LINEAR_METHODS, METHODS
from flowverify.certify.references import ReferenceCertifier
from flowverify.certify.verify import Certifier
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
) -> BaseCertifier:
    """The certifier of this method; linear methods have no use for a bound or a domain.

    Args:
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
    if references and method in METHODS:
        return ReferenceCertifier(model, method, bound, count=references, pool=pool, input_shape=input_shape)
    if method in LINEAR_METHODS:
        return LinearCertifier(model, method, input_shape=input_shape)
    if method in METHODS:
        return Certifier(model, method, bound, input_shape=input_shape, domain=domain)
    raise UnknownNameError("method", method, (*METHODS, *LINEAR_METHODS))
