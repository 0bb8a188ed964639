"""The maximum over reference distributions, cert_F = max over R of cert_R (framework paper, Section 3.2.2).

The paper certifies the folded network f(Delta(R, .)) around a flow delta_mu with R + A delta_mu = mu, for
several R, and reports that the maximum over R improves certificates substantially (Figure 1). A certifier whose
bounds are exact functions of the set it is given cannot gain (theory, section 7), in one line:

    {R + A d : ||d - delta_mu||_1 <= eps} = {mu + A e : ||e||_1 <= eps},   with d = delta_mu + e,

so the set of images is the same for every R, and a linear bound a . d + b of the folded network is, in terms of
e, the same a . e plus the same constant. All bounds by linear relaxation (IBP, CROWN, alpha-CROWN) and all
linear programs are translation-covariant in this sense. What can differ between references is rounding, since
R and delta_mu are of size 1 and larger while eps is small; a search that stops at a tolerance; randomness in
the certifier; or a certifier that treats coordinates of delta unequally, for instance by clipping flows to a
box such as [0, 1] (which would not be sound). We measure the rest and report it.

The same holds for a complete certifier on the L1 ball of flows. The method is in the paper's Table 1, so it is here,
and can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import Ball, Threat
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.incomplete import Certifier, search_radius
from flowverify.certifiers.options import CompleteOptions, IncompleteOptions
from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.results import Certificate, Interrupted, Verdict
from flowverify.transport.distance import channel_masses
from flowverify.transport.references import flow_by_tree, make_reference

KINDS = ("uniform-random", "point", "image")


@dataclass(frozen=True)
class Reference:
    """A reference for each image of a batch, of the image's mass in every channel."""

    name: str
    images: Tensor  # (B, C, H, W), float64


@dataclass(frozen=True)
class ReferenceMaximum:
    """Certificates by reference, and for each image the best of them."""

    names: list[str]
    radii: Tensor  # (references, B)
    best: list[Certificate]


def sample_references(count: int, images: Tensor, *, seed: int = 0, pool: Tensor | None = None) -> list[Reference]:
    """``count`` references as in Figure 1: uniform noise, points and images in equal shares, in this order.

    Args:
        images: the images to be certified, (B, C, H, W).
        pool: images (N, C, H, W) to take references from; without it there are noise and points only.

    Raises:
        InvalidInputError: count < 1, or a pool of another shape.
    """
    if count < 1:
        raise InvalidInputError(f"references: given {count}, expected at least 1")
    grid, mass = Grid.of(images), channel_masses(images)
    kinds = KINDS if pool is not None else KINDS[:2]
    if pool is not None:
        grid.check_image(pool, "pool of references")
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(count):
        kind = kinds[index * len(kinds) // count]
        own_seed = int(torch.randint(2**31, (1,), generator=generator))
        drawn = None
        if kind == "image":
            assert pool is not None
            drawn = pool[own_seed % len(pool)]
        reference = make_reference(kind, grid, mass, seed=own_seed, images=drawn)
        result.append(Reference(f"R{index + 1} {kind}", reference))
    return result


def check_references(references: list[Reference], images: Tensor) -> None:
    """Raises InvalidInputError for a reference of another size, or of another mass than its image's."""
    for reference in references:
        if reference.images.shape != images.shape:
            raise InvalidInputError(
                f"reference {reference.name!r} of shape {tuple(reference.images.shape)}: expected that of the images, "
                f"{tuple(images.shape)}"
            )
        given, expected = channel_masses(reference.images), channel_masses(images)
        wrong = ((given - expected).abs() > 1e-6 * expected.sum(1, keepdim=True)).any(1).nonzero().flatten()
        if wrong.numel():
            at = int(wrong[0])
            raise InvalidInputError(
                f"reference {reference.name!r} of mass {given[at].tolist()}: expected {expected[at].tolist()}, "
                f"the mass of image {at}"
            )


def maximum_over_references(
    certifier: Certifier,
    images: Tensor,
    labels: Tensor,
    references: list[Reference],
    ground: str = "l1",
    *,
    tolerance: float | None = None,
    progress: Callable[[int], None] | None = None,
    cap: float | None = None,
) -> ReferenceMaximum:
    """The largest certified radius of each image under each reference, and over all of them.

    Args:
        certifier: of domain "flow", where references have a meaning.

    Raises:
        InvalidInputError: as :func:`check_references` and :func:`~flowverify.certifiers.incomplete.search_radius`.
    """
    check_references(references, images)
    found = [
        search_radius(
            certifier,
            images,
            labels,
            ground,
            tolerance=tolerance,
            progress=progress,
            references=reference.images,
            cap=cap,
        )
        for reference in references
    ]
    radii = torch.tensor([[one.radius for one in row] for row in found], dtype=torch.float64)
    best = []
    for index, winner in enumerate(radii.argmax(0).tolist()):
        seconds = sum(row[index].seconds for row in found)
        best.append(replace(found[winner][index], seconds=seconds, note=f"reference {references[winner].name}"))
    return ReferenceMaximum([reference.name for reference in references], radii, best)


class ReferenceCertifier(Certifier):
    """cert_F = max over sampled references of cert_R, as a method of its own (Table 1, "Ref.").

    Args:
        count: how many references; see :func:`sample_references`.
        pool: images to take references from, (N, C, H, W).
        seed: of the sampling. The references of an image do not depend on its batch.

    Raises:
        FoldError: the network cannot be folded, so that references have no meaning for it.
        InvalidInputError: count < 1.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "fine-tuned",
        bound: str = "best",
        *,
        count: int,
        pool: Tensor | None = None,
        seed: int = 0,
        options: IncompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        chosen = options or IncompleteOptions()
        super().__init__(
            model,
            method,
            bound,
            input_shape=input_shape,
            domain="flow",
            tolerance=chosen.tolerance,
            batch_size=chosen.batch_size,
        )
        if count < 1:
            raise InvalidInputError(f"references: given {count}, expected at least 1")
        self._count, self._pool, self._seed = count, pool, seed

    def references(self, images: Tensor) -> list[Reference]:
        """The references of these images."""
        return sample_references(self._count, images, seed=self._seed, pool=self._pool)

    def best_margins(self, ball: Ball, labels: Tensor) -> Tensor:
        """The largest margin that any reference proves, (B,) float64."""
        ball = ball.within(self.covers(ball.threat)[0])
        return torch.stack(
            [self.margins(ball, labels, references=one.images) for one in self.references(ball.images)]
        ).amax(0)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The largest radius that any reference certifies, with the name of that reference in the note."""
        if not len(images):
            return []
        threat = threat or Threat()
        references = self.references(images)
        return maximum_over_references(self, images, labels, references, threat.ground, cap=threat.cap).best


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
