"""The two coordinate systems in which a ball can be handed to auto_LiRPA: images, and flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.crown.bounded import l1_ball
from flowverify.bounds.crown.perturbation import PerturbationFlowPolytope, PerturbationWasserstein
from flowverify.bounds.engine import Batch, DomainName
from flowverify.errors import FoldError
from flowverify.network import Network, fold
from flowverify.transport.distance import EXACT_MASS_TOLERANCE, FLOAT32_MASS_TOLERANCE
from flowverify.transport.references import flow_by_tree


class Domain(Protocol):
    """A module for auto_LiRPA, and the perturbed inputs that stand for balls around images."""

    name: str
    module: nn.Module
    width: int  # size of the perturbed input

    def inputs(self, images: Tensor, references: Tensor | None = None) -> Sequence[Tensor]: ...

    def perturbation(self, batch: Batch, tolerance: float | None) -> Any: ...


class ImageDomain:
    """The user's network untouched, with :class:`PerturbationWasserstein`; for every network."""

    name = "image"

    def __init__(self, network: Network) -> None:
        self.module: nn.Module = network
        self.width = network.grid.pixels

    def inputs(self, images: Tensor, references: Tensor | None = None) -> Sequence[Tensor]:
        return (images,)

    def perturbation(self, batch: Batch, tolerance: float | None) -> Any:
        threat = batch.ball.threat
        return PerturbationWasserstein(
            batch.ball.radius,
            ground=threat.ground,
            cap=threat.cap,
            feasible=threat.positive,
            tolerance=tolerance,
            warm_start=batch.warm_start,
        )


class FlowDomain:
    """The folded network on flows: auto_LiRPA's own L1 ball, or :class:`PerturbationFlowPolytope`.

    Without references each image is its own, R = mu and delta_mu = 0, which needs no transport plan and
    rounds nothing. With references the flows are those of the spanning tree.
    """

    name = "flow"

    def __init__(self, network: Network) -> None:
        self.folded = fold(network)
        self.module: nn.Module = self.folded
        self.width = self.folded.flow_shape[0] if len(self.folded.flow_shape) == 1 else 2 * network.grid.pixels

    def inputs(self, images: Tensor, references: Tensor | None = None) -> Sequence[Tensor]:
        if references is None:
            flow = images.new_zeros(images.shape[0], self.folded.grid.edges)
            references = images
        else:
            # Masses agree in float64; rounding the image to float32 is all that may part them.
            tolerance = EXACT_MASS_TOLERANCE if images.dtype == torch.float64 else FLOAT32_MASS_TOLERANCE
            flow = flow_by_tree(references.double(), images.double(), mass_tolerance=tolerance).to(images)
            references = references.to(images)
        return (self.folded.encode(flow), self.folded.offset(references).contiguous())  # auto_LiRPA takes views

    def perturbation(self, batch: Batch, tolerance: float | None) -> Any:
        ball = batch.ball
        if not ball.threat.positive:
            return l1_ball(ball.budget.to(ball.images))
        reference = ball.images if batch.references is None else batch.references.to(ball.images)
        return PerturbationFlowPolytope(
            ball.radius, reference, cap=ball.threat.cap, tolerance=tolerance, warm_start=batch.warm_start
        )


def make_domain(network: Network, name: DomainName, threat: Threat) -> Domain:
    """The named domain; "auto" is flows for vanilla (with l1 ground cost) and images for all else.

    Fine-tuned bounds are the same in both (theory, section 6), and images have half the coordinates. A network
    that cannot be folded is bounded in the image domain. The norm of a flow is the cost of its steps, so that only
    the l1 ball is a ball of flows.

    Raises:
        FoldError: flows were asked for by name, and the network cannot be folded.
    """
    flows = threat.ground == "l1" and not threat.positive and network.grid.edges
    if name == "flow" or (name == "auto" and flows):
        try:
            return FlowDomain(network)
        except FoldError:
            if name == "flow":
                raise
    return ImageDomain(network)
