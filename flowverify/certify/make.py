"""From the name of a method to the certifier that carries it out."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from flowverify.certify.base import BaseCertifier
from flowverify.certify.domain import DomainName
from flowverify.certify.linear_certifier import LinearCertifier
from flowverify.certify.methods import LINEAR_METHODS, METHODS
from flowverify.certify.verify import Certifier
from flowverify.errors import UnknownNameError


def make_certifier(
    model: str | Path | nn.Module,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    input_shape: tuple[int, int, int] | None = None,
    domain: DomainName = "auto",
) -> BaseCertifier:
    """The certifier of this method; linear methods have no use for a bound or a domain.

    Raises:
        UnknownNameError: an unknown method or bound; and as the certifiers.
    """
    if method in LINEAR_METHODS:
        return LinearCertifier(model, method, input_shape=input_shape)
    if method in METHODS:
        return Certifier(model, method, bound, input_shape=input_shape, domain=domain)
    raise UnknownNameError("method", method, (*METHODS, *LINEAR_METHODS))
