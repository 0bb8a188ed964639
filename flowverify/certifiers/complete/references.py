"""The maximum over references for a complete certifier on the L1 ball of flows (framework paper, Table 1).

Every reference R names the same set of points, R + A delta_mu = mu being the centre of all of them, so no reference
can gain more than rounding (theory, section 7). The method is in the paper's table, so it is here, and can be measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.options import CompleteOptions
from flowverify.certifiers.references import sample_references
from flowverify.errors import InvalidInputError
from flowverify.results import Certificate, Interrupted, Verdict
from flowverify.transport.inverse import flow_by_tree

IMPOSSIBLE = (
    "a complete certifier on the polytope of images returns the exact radius, so reference fine-tuning cannot be "
    "applied (framework paper, Table 1)"
)


class ReferenceCompleteCertifier(CompleteCertifier):
    """cert_F = max over sampled references of "vanilla-complete", each with its share of the time.

    Args:
        count, pool, seed: see :func:`flowverify.certifiers.references.sample_references`.

    Raises:
        InvalidInputError: method "complete", to which references cannot be applied; count < 1.
        UnknownNameError, UnsupportedOperationError: as :class:`CompleteCertifier`.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "vanilla-complete",
        *,
        count: int,
        pool: Tensor | None = None,
        seed: int = 0,
        options: CompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if count < 1:
            raise InvalidInputError(f"references: given {count}, expected at least 1")
        if method == "complete":
            raise InvalidInputError(f"references with method complete: {IMPOSSIBLE}; expected vanilla-complete")
        chosen = CompleteOptions() if options is None else options
        shared = replace(chosen, timeout=None if chosen.timeout is None else chosen.timeout / count)
        super().__init__(model, method, options=shared, input_shape=input_shape)
        self._count, self._pool, self._seed = count, pool, seed

    def _one(
        self, image: Tensor, label: Tensor, prediction: Tensor, threat: Threat, asked: float | None
    ) -> Certificate:
        found: list[Certificate] = []
        for reference in sample_references(self._count, image[None], seed=self._seed, pool=self._pool):
            # The centre as the flow domain has it: the image, but for the rounding of the way over the reference.
            flow = flow_by_tree(reference.images.double(), image[None])
            centre = self.network.grid.apply(reference.images.double().to(image), flow)[0]
            try:
                certificate = super()._one(centre.clamp(min=0), label, prediction, threat, asked)
            except Interrupted as stopped:
                raise Interrupted([_best([*found, *stopped.certificates])]) from None
            note = "; ".join(filter(None, [f"reference {reference.name}", certificate.note]))
            found.append(replace(certificate, note=note))
            if asked is not None and certificate.verdict in (Verdict.CERTIFIED, Verdict.FALSIFIED):
                break
        return _best(found)


def _best(found: list[Certificate]) -> Certificate:
    """The strongest certificate, with the time of all."""
    winner = max(found, key=lambda one: (one.verdict is Verdict.CERTIFIED, one.radius))
    return replace(winner, seconds=sum(one.seconds for one in found))
