"""What an engine is: one way to bound the values of a network over balls.

An engine is built for a network, a threat and a precision. For each batch of balls it starts a :class:`Run`, which
follows the composition (:class:`flowverify.bounds.margins.MarginBounds`) from the image upward: for one value after
another that an activation reads, in topological order, it is asked for an interval, given the tightest intervals that
are known of all values below; and at the end for the margins. A run may keep what it likes from value to value.

Engines leave rounding in float64 to the composition, which rests on the hypotheses of theory, section 15; networks with
steep operations it leaves to engines that carry their own.

Another engine is one class, named in :data:`flowverify.bounds.recipes.ENGINES` or as ``MODULE:CLASS``, and a bound that
makes use of it one entry of :data:`flowverify.bounds.recipes.BOUNDS`.

A :class:`WarmStart` carries what was found from one computation to the next.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.network import Network

if TYPE_CHECKING:
    from flowverify.bounds.intervals import Interval


class WarmStart:
    """What earlier computations found for the same images, by place in the computation, to start the next from.

    ``place`` is set by the caller before each bound computation; ``images`` are the rows of the batch that
    are being bounded. Starting values change the time and never the validity of a bound.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.place: Hashable = None
        self.images: Tensor = torch.arange(batch)
        self._kept: dict[Hashable, Tensor] = {}

    def at(self, place: Hashable, images: Tensor | None = None) -> WarmStart:
        """Sets the place, and the images where they are given; returns itself."""
        self.place = place
        if images is not None:
            self.images = images
        return self

    def guess(self, sign: int, count: int) -> Tensor | None:
        """Multipliers of shape (images, count) for the present place, or None."""
        return self.recall((self.place, sign), (count,))

    def keep(self, sign: int, multipliers: Tensor) -> None:
        """Remembers the multipliers found at the present place."""
        self.remember((self.place, sign), multipliers.double(), 0.0)

    def recall(self, key: Hashable, shape: Sequence[int]) -> Tensor | None:
        """What was remembered of the present images, (images, *shape), or None."""
        known = self._kept.get(key)
        return None if known is None or known.shape[1:] != tuple(shape) else known[self.images]

    def remember(self, key: Hashable, values: Tensor, otherwise: float) -> None:
        """Keeps values (images, *shape) of the present images; the other images get ``otherwise``."""
        known = self._kept.get(key)
        if known is None or known.shape[1:] != values.shape[1:]:
            known = torch.full((self.batch, *values.shape[1:]), otherwise, dtype=values.dtype)
            self._kept[key] = known
        known[self.images] = values.detach().to(known)


DomainName = Literal["auto", "image", "flow"]


@dataclass(frozen=True)
class EngineOptions:
    """What engines may be told; each takes what concerns it."""

    domain: DomainName = field(default="auto", metadata={"help": "coordinates in which CROWN runs"})
    tolerance: float | None = field(
        default=None, metadata={"help": "relative duality gap at which the search over a ball's multiplier stops"}
    )
    alpha_iterations: int = field(default=20, metadata={"help": "steps of alpha-crown's optimisation of slopes"})
    alpha_learning_rate: float = field(default=0.5, metadata={"help": "learning rate of these steps"})
    lifted_steps: int = field(
        default=8,
        metadata={"help": "steps up the gradient by which lifted bounds mix rows and chords"},
    )
    lifted_rate: float = field(default=0.3, metadata={"help": "learning rate of these steps"})
    lifted_share: float = field(default=0.9, metadata={"help": "share of rows from which these steps start"})
    lifted_tolerance: float = field(
        default=1e-2, metadata={"help": "relative gap at which lifted bounds stop searching a neuron's multiplier"}
    )
    lifted_entries: int = field(
        default=1 << 22, metadata={"help": "of rows of moves, of all images bounded at once: about what a cache holds"}
    )
    chunk_entries: int = field(
        default=1 << 25, metadata={"help": "images x specifications x widest layer in one backward pass"}
    )


@dataclass(frozen=True)
class Effort:
    """How tight margins need to be; less is asked for by a search that wants to know a sign.

    Attributes:
        rough: whether a bound that takes steps to improve may do without them.
        enough: a share of its clean margin above which a margin need not be raised; None for as tight as can be.
    """

    rough: bool = False
    enough: float | None = None


@dataclass(eq=False)
class Batch:
    """Balls that are being bounded, and what is known about them so far.

    Attributes:
        ball: with images in the precision of the bounds.
        intervals: the tightest known of each value by name, (B, *shape): of the values where the affine part ends
            exactly, and of every value above them up to the one that is being bounded.
        references: R of the masses of the images, (B, C, H, W), for engines that run in flow coordinates.
        warm_start: what an earlier call with these images found.
        effort: how tight the margins need to be.
        margins: lower bounds of the margins from other engines, (B, S); None before there are any.
        widened: whether what is known of affine values allows for rounding.
        runs: of the engines that bound it, by name.
    """

    ball: Ball
    references: Tensor | None = None
    warm_start: WarmStart | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)
    margins: Tensor | None = None
    widened: bool = False
    runs: dict[str, Run] = field(default_factory=dict)


class Run(Protocol):
    """One batch on its way through one engine.

    ``rows_above(name)`` (optional), of a batch of one ball: rows of moves above what an activation puts out, less what
    that is at the image, once the margins are known (:class:`flowverify.bounds.lifted.rows.ListedRows`); or None.
    """

    def tighten(self, name: str, wanted: Tensor) -> Interval:
        """Bounds (B, *shape) of a value that an activation reads, given ``batch.intervals`` of the values below.

        Args:
            wanted: which entries are worth the work, bool (B, *shape); the others, and those that the engine has no
                bound for, may be infinite.
        """
        ...

    def margins(self, specification: Tensor) -> Tensor:
        """Lower bounds (B, S) of linear functions (B, S, classes) of the output; NaN or -infinity for none.

        All intervals are known by now.
        """
        ...


class Engine(Protocol):
    """One way to bound one network; see the module.

    Attributes:
        notes: what it had to do without, or in another way, for the results to show.
        refines (optional): whether margins of less effort are looser, and cheaper.
        monotone (optional): whether bounds are no looser over a smaller ball, given intervals that are no looser.
        instead_of (optional): engines that a bound does not need beside it.
        images_at_once (optional): how many images it is fastest with.
        numbers_per_value (optional): how many it holds for each value of the widest layer, if they are more than 128.

    Raises, as it is built or as a run goes on:
        UnsupportedOperationError, BoundError: it cannot take the network. A bound that has another engine for the
            margins goes on without it.
    """

    notes: list[str]

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None: ...

    def start(self, batch: Batch) -> Run: ...


def nothing(like: Tensor) -> Interval:
    """The interval that holds every number, in the shape of a value."""
    return torch.full_like(like, -torch.inf), torch.full_like(like, torch.inf)


def largest(bounds: list[Tensor]) -> Tensor:
    """The largest of several lower bounds; what is not a number bounds nothing, and takes nothing from the others."""
    return torch.stack(bounds).nan_to_num(nan=-torch.inf).amax(0)
