"""Lifted bounds as an engine among others: see :mod:`flowverify.bounds.engine`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowverify.ball import Threat
from flowverify.bounds.engine import Batch, EngineOptions
from flowverify.bounds.intervals import Interval
from flowverify.bounds.lifted.engine import Chunks, LiftedBounds, _Batch, has_chord
from flowverify.bounds.lifted.moves import moves_of
from flowverify.network import Network
from flowverify.network.operations import is_affine


class LiftedEngine:
    """Neurons and margins by rows of moves. A cap is not made use of: the ball without it holds the one with it.

    Where all activations have chords, and moves stand for the ball exactly, CROWN over the same intervals is among the
    margins.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
        BoundError: a ground cost whose moves are too far from what its plans cost.
    """

    instead_of: tuple[str, ...] = ("crown",)

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None:
        self.notes: list[str] = []
        moves = moves_of(threat.ground, *network.input_shape[-2:])
        self.bounds = LiftedBounds(
            network, feasible=threat.positive, moves=moves, dtype=dtype, tolerance=options.lifted_tolerance,
            steps=options.lifted_steps, rate=options.lifted_rate, first_share=options.lifted_share,
        )  # fmt: skip
        # Windows grow by the reach of moves, up to the whole grid.
        self.numbers_per_value = len(moves) * min(32 * math.prod(moves.reach), 2 * network.grid.pixels)
        widest = max((math.prod(node.shape) for node in network.activations), default=1)
        self.images_at_once = max(1, options.lifted_entries // (2 * len(moves) * network.grid.pixels * widest))
        self.refines = options.lifted_steps > 0
        exact = threat.ground == "l1" or not moves.chained
        if not exact or not all(has_chord(node.operation) for node in network.activations):
            self.instead_of = ()

    def start(self, batch: Batch) -> LiftedRun:
        return LiftedRun(self.bounds, batch)


class LiftedRun:
    """One batch: rows are kept from value to value, and relaxed by the intervals known when they are needed."""

    def __init__(self, bounds: LiftedBounds, batch: Batch) -> None:
        self.batch, self.network = batch, bounds.network
        with torch.no_grad():
            self.own = _Batch(bounds, batch.ball.images, batch.ball.budget, {}, batch.warm_start, batch.effort)
        self.chunks: dict[str, Chunks] = {}
        self.asked: dict[str, Interval] = {}

    def tighten(self, name: str, wanted: Tensor) -> Interval:
        with torch.no_grad():
            self._relax_below(name)
            self.own.intervals[name] = self.asked[name] = self._known(name)
            self.chunks[name] = self.own.bound(name)
            return self.own.intervals[name]

    def margins(self, specification: Tensor) -> Tensor:
        with torch.no_grad():
            self._relax_below(self.network.output)
            return self.own.margins_of(specification, self.batch.margins)

    def _relax_below(self, name: str) -> None:
        """Relaxes the activations that stand before a value, where they are not yet.

        What has not been asked for is bounded exactly or settled, or others bound it: it has rows, but no use for
        their bounds.
        """
        for node in self.network.nodes:
            if not is_affine(node.operation) and node.name not in self.own.relaxations:
                read = node.inputs[0]
                if read == name:
                    return
                lower, upper = self._known(read)
                if read in self.chunks:
                    # Rows were made of what was open then, and rounding of others must not open more.
                    before = self.asked[read]
                    self.own.intervals[read] = torch.maximum(lower, before[0]), torch.minimum(upper, before[1])
                    chunks = self.chunks.pop(read)
                else:
                    self.own.intervals[read] = lower, upper
                    chunks = self.own.bound(read, tighten=False)
                self.own.relax_readers(read, chunks)
            if node.name == name:
                return

    def _known(self, name: str) -> Interval:
        """The tightest known interval, and the centre, which rounding may have left outside."""
        centre, (lower, upper) = self.own.values[name], self.batch.intervals[name]
        return torch.minimum(lower, centre), torch.maximum(upper, centre)
