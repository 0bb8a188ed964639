"""The engine of CROWN: backward linear bounds by auto_LiRPA, over the balls of its perturbation classes.

A ball is handed over in one of two coordinate systems (:class:`Domain`): images, or flows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.crown.backend import BoundedNetwork, handed_over, l1_ball
from flowverify.bounds.crown.perturbation import PerturbationFlowPolytope, PerturbationWasserstein
from flowverify.bounds.engine import Batch, DomainName, EngineOptions, largest, nothing
from flowverify.bounds.intervals import Interval
from flowverify.errors import BoundError, FoldError
from flowverify.network import Network, fold
from flowverify.network.lowering import lower
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


class CrownEngine:
    """CROWN (Zhang et al. 2018) for neurons and margins.

    auto_LiRPA gets the network rewritten in the operations that it bounds right
    (:func:`flowverify.bounds.crown.backend.handed_over`), and the intervals that are known; it decides nothing itself.

    Raises:
        UnsupportedOperationError, BoundError: auto_LiRPA cannot take the network.
    """

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None:
        self.network, self.options, self.notes = network, options, list[str]()
        self.chunk_entries = options.chunk_entries
        self._sample = _sample_images(network)
        self.lowered = lower(network, handed_over)
        self.domain = make_domain(self.lowered.graph.to(self._sample), options.domain, threat)
        self.host = self.hosted()
        self.width = max([self.domain.width, *(math.prod(node.shape) for node in network.nodes)])

    def hosted(self) -> BoundedNetwork:
        """The network as auto_LiRPA takes it; a new one, since a failed call leaves the old one unusable."""
        values = self.network.values(self._sample)
        read = [one.of(values[one.source]) for one in self.lowered.preactivations]
        return BoundedNetwork(self.domain.module, self.domain.inputs(self._sample), read)

    def start(self, batch: Batch) -> CrownRun:
        return CrownRun(self, batch)

    def places(self, name: str, chosen: Tensor) -> tuple[int, Tensor]:
        """Where entries of a value stand in what an activation of the rewritten network reads: which one, and at which
        positions (-1: nowhere, such as pixels that no window of a pool reaches).
        """
        readers = self.lowered.preactivations
        reading = [k for k, one in enumerate(readers) if one.source == name]
        whole = [k for k in reading if readers[k].windows is None]
        if whole or not reading:
            return (whole or [0])[0], chosen if whole else torch.full_like(chosen, -1)
        windows = readers[reading[0]].windows
        assert windows is not None
        pixels = math.prod(self.network.shape(name)[-2:])
        first = torch.full((pixels,), -1, dtype=chosen.dtype)
        flat = windows.flatten().flip(0)
        first[flat] = torch.arange(flat.numel(), dtype=chosen.dtype).flip(0)
        first = first.to(chosen.device)
        within = first[chosen % pixels]
        return reading[0], torch.where(within < 0, -1, chosen // pixels * flat.numel() + within)


class CrownRun:
    """One batch, as perturbed inputs of auto_LiRPA."""

    def __init__(self, engine: CrownEngine, batch: Batch) -> None:
        self.engine, self.batch = engine, batch
        self.inputs = engine.domain.inputs(batch.ball.images, batch.references)
        self.perturbation = engine.domain.perturbation(batch, engine.options.tolerance)

    def tighten(self, name: str, wanted: Tensor) -> Interval:
        """CROWN for the entries that are wanted of any image of the batch."""
        like = self.batch.intervals[name][0]
        lower, upper = (bound.flatten(1) for bound in nothing(like))
        chosen = wanted.flatten(1).any(0).nonzero().flatten()
        node, places = self.engine.places(name, chosen)
        chosen, places = chosen[places >= 0], places[places >= 0]
        if chosen.numel():
            width = self.engine.lowered.preactivations[node].of(like[:1]).numel()
            units = torch.zeros(chosen.numel(), width, dtype=like.dtype, device=like.device)
            units[torch.arange(chosen.numel()), places] = 1
            lower[:, chosen], upper[:, chosen] = self._crown(node, units.expand(len(like), *units.shape))
        return lower.reshape(like.shape), upper.reshape(like.shape)

    def margins(self, specification: Tensor) -> Tensor:
        return self._crown(None, specification)[0]

    def known(self) -> list[Interval | None]:
        """The intervals of what the activations of the rewritten network read, as far as there are any."""
        intervals = self.batch.intervals
        return [
            (one.of(intervals[one.source][0]), one.of(intervals[one.source][1])) if one.source in intervals else None
            for one in self.engine.lowered.preactivations
        ]

    def _crown(self, node: int | None, specification: Tensor) -> Interval:
        """CROWN in chunks of specifications, smaller ones where memory runs out."""
        engine, known = self.engine, self.known()
        lowers: list[Tensor] = []
        uppers: list[Tensor] = []
        total, start = specification.shape[1], 0
        while start < total:
            size = max(1, engine.chunk_entries // (engine.width * specification.shape[0]))
            if self.batch.warm_start is not None:
                self.batch.warm_start.at(("crown", node, start))
            part = specification[:, start : start + size]
            try:
                lower, upper = engine.host.crown(
                    self.inputs, self.perturbation, part, known, node=node, upper=node is not None
                )
            except MemoryError:
                if size == 1:
                    raise
                engine.chunk_entries //= 4
                engine.notes.append(f"out of memory: continued with chunks of {engine.chunk_entries} entries")
                continue
            assert lower is not None
            lowers.append(lower)
            uppers.append(lower if upper is None else upper)
            start += size
        return torch.cat(lowers, 1), torch.cat(uppers, 1)


class AlphaCrownEngine(CrownEngine):
    """CROWN, with optimised slopes for the margins (alpha-CROWN, Xu et al. 2021) where auto_LiRPA can optimise them."""

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None:
        super().__init__(network, threat, dtype, options)
        pools = any(isinstance(node.operation, nn.MaxPool2d) for node in network.nodes)
        self.optimises = bool(network.activations) and not pools
        if pools:
            self.notes.append("auto_LiRPA cannot optimise slopes through MaxPool2d: the bound is that of crown")

    def start(self, batch: Batch) -> CrownRun:
        return AlphaCrownRun(self, batch)


class AlphaCrownRun(CrownRun):
    """The margins of CROWN, or those with optimised slopes, whichever are larger."""

    engine: AlphaCrownEngine

    def margins(self, specification: Tensor) -> Tensor:
        engine, plain = self.engine, super().margins(specification)
        if not engine.optimises:
            return plain
        options = engine.options
        try:
            found = engine.host.alpha_crown(
                self.inputs,
                self.perturbation,
                specification,
                self.known(),
                iterations=options.alpha_iterations,
                learning_rate=options.alpha_learning_rate,
            )
        except BoundError as error:
            engine.optimises = False
            engine.notes.append(f"slopes are not optimised: {error}")
            engine.host = engine.hosted()
            return plain
        return largest([plain, found])


def _sample_images(network: Network) -> Tensor:
    """Two images to trace with."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *network.input_shape, generator=generator, dtype=torch.float64)
    parameter = next(network.parameters(), None)
    return images.to(network.dtype if parameter is None else parameter)
