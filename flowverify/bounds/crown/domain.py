"""The two coordinate systems in which a ball can be handed to auto_LiRPA: images, and flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flowverify.bounds.crown.bounded import l1_ball
from flowverify.bounds.crown.perturbation import PerturbationFlowPolytope, PerturbationWasserstein
from flowverify.bounds.warm_start import WarmStart
from flowverify.errors import FoldError, InvalidInputError
from flowverify.network import Network, fold
from flowverify.transport.distance import EXACT_MASS_TOLERANCE, FLOAT32_MASS_TOLERANCE
from flowverify.transport.ground import parse_ground
from flowverify.transport.inverse import flow_by_tree

DomainName = Literal["auto", "image", "flow"]


class Domain(Protocol):
    """A module for auto_LiRPA, and the perturbed inputs that stand for balls around images."""

    name: str
    module: nn.Module
    width: int  # size of the perturbed input

    def inputs(self, images: Tensor, references: Tensor | None) -> Sequence[Tensor]: ...

    def perturbation(
        self,
        images: Tensor,
        references: Tensor | None,
        budget: Tensor,
        tolerance: float | None,
        warm_start: WarmStart | None,
    ) -> Any: ...


class ImageDomain:
    """The user's network untouched, with :class:`PerturbationWasserstein`; for every network."""

    name = "image"

    def __init__(self, network: Network, feasible: bool, ground: str = "l1", cap: float | None = None) -> None:
        self.module: nn.Module = network
        self.feasible = feasible
        self.ground, self.cap = parse_ground(ground), cap
        self.width = network.grid.pixels

    def inputs(self, images: Tensor, references: Tensor | None) -> Sequence[Tensor]:
        return (images,)

    def perturbation(
        self,
        images: Tensor,
        references: Tensor | None,
        budget: Tensor,
        tolerance: float | None,
        warm_start: WarmStart | None,
    ) -> Any:
        radius = self.ground.radius(budget / images.flatten(1).double().sum(1))
        return PerturbationWasserstein(
            radius,
            ground=self.ground.name,
            cap=self.cap,
            feasible=self.feasible,
            tolerance=tolerance,
            warm_start=warm_start,
        )


class FlowDomain:
    """The folded network on flows: auto_LiRPA's own L1 ball, or :class:`PerturbationFlowPolytope`.

    Without references each image is its own, R = mu and delta_mu = 0, which needs no transport plan and
    rounds nothing. With references the flows are those of the spanning tree.
    """

    name = "flow"

    def __init__(self, network: Network, feasible: bool, cap: float | None = None) -> None:
        self.folded = fold(network)
        self.cap = cap
        self.module: nn.Module = self.folded
        self.feasible = feasible
        self.width = self.folded.flow_shape[0] if len(self.folded.flow_shape) == 1 else 2 * network.grid.pixels

    def inputs(self, images: Tensor, references: Tensor | None) -> Sequence[Tensor]:
        if references is None:
            flow = images.new_zeros(images.shape[0], self.folded.grid.edges)
            references = images
        else:
            # Masses agree in float64; rounding the image to float32 is all that may part them.
            tolerance = EXACT_MASS_TOLERANCE if images.dtype == torch.float64 else FLOAT32_MASS_TOLERANCE
            flow = flow_by_tree(references.double(), images.double(), mass_tolerance=tolerance).to(images)
            references = references.to(images)
        return (self.folded.encode(flow), self.folded.offset(references).contiguous())  # auto_LiRPA takes views

    def perturbation(
        self,
        images: Tensor,
        references: Tensor | None,
        budget: Tensor,
        tolerance: float | None,
        warm_start: WarmStart | None,
    ) -> Any:
        if not self.feasible:
            return l1_ball(budget.to(images.dtype))
        radius = budget / images.flatten(1).double().sum(1)
        return PerturbationFlowPolytope(
            radius,
            images if references is None else references.to(images),
            cap=self.cap,
            tolerance=tolerance,
            warm_start=warm_start,
        )


def make_domain(
    network: Network, name: DomainName, feasible: bool, ground: str = "l1", cap: float | None = None
) -> Domain:
    """The named domain; "auto" is flows for vanilla (with l1 ground cost) and images for all else.

    Fine-tuned bounds are the same in both (theory, section 6), and images have half the coordinates. A network
    that cannot be folded is bounded in the image domain. The norm of a flow is the cost of its steps, so that only
    the l1 ball is a ball of flows.

    Raises:
        FoldError: flows were asked for by name, and the network cannot be folded.
        InvalidInputError: flows were asked for by name, with another ground cost than l1.
    """
    if name == "flow" and ground != "l1":
        raise InvalidInputError(f"domain flow with ground cost {ground}: expected l1, or the domain image")
    if name == "image" or (name == "auto" and (feasible or not network.grid.edges or ground != "l1")):
        return ImageDomain(network, feasible, ground, cap)
    try:
        return FlowDomain(network, feasible, cap)
    except FoldError:
        if name == "flow":
            raise
        return ImageDomain(network, feasible, ground, cap)


def sample_images(network: Network) -> Tensor:
    """Two images to trace with."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *network.input_shape, generator=generator, dtype=torch.float64)
    parameter = next(network.parameters(), None)
    return images.to(network.dtype if parameter is None else parameter)
