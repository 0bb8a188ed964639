"""Lifted bounds: margins and neurons over Wasserstein balls, in the coordinates in which the budget is spent.

Relaxations of single neurons let every neuron spend the whole budget. Here each value v keeps its centre v0, its value
at the image, and a row P with v - v0 <= P . m for all flows m of the ball (theory, section 21). Affine operations are
merged backward, as in CROWN; an activation that is not settled takes max(s+ P, s- P), entry by entry, where it is
bounded by secants, or a piecewise linear one P less charges (section 22), and hands its coefficient on where one line
bounds it.

:class:`LiftedEngine` makes of these bounds an engine among others: see :mod:`flowverify.bounds.engine`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.engine import Batch, Effort, EngineOptions, WarmStart
from flowverify.bounds.intervals import Interval, intersect, propagate
from flowverify.bounds.lifted.mixture import Choice, Chord, MarginSearch, mixed
from flowverify.bounds.lifted.moves import NEIGHBOURS, Moves, moves_of
from flowverify.bounds.lifted.relaxations import Bend, PoolRelaxation, bent_rows, relax_pool, secants
from flowverify.bounds.lifted.rows import (
    Coefficients,
    ListedRows,
    SharedRows,
    StoredRows,
    WindowRows,
    added,
    listed,
    pull_back,
    rows_of_pixels,
    total,
)
from flowverify.bounds.lifted.support import MoveRows, maximum, maximum_value
from flowverify.bounds.margins import margin_specification
from flowverify.errors import UnsupportedOperationError
from flowverify.network import INPUT, Network, Node
from flowverify.network.operations import is_affine, is_elementwise_activation, operation_name

CHUNK_ENTRIES = 1 << 22  # of rows of moves at a time: about what a cache holds


@dataclass(frozen=True, eq=False)
class Relaxation:
    """How one activation is bounded around the centre of each ball.

    Attributes:
        above, below: slopes (B, *shape) of lines through the centre; above is 0 where there are rows instead.
        rows_above, rows_below: rows above f(z) - f(z0), and above f(z0) - f(z); 0 where there is a line.
    """

    above: Tensor
    below: Tensor
    rows_above: StoredRows | None
    rows_below: StoredRows | None
    chord: Chord | None = None

    @property
    def mixes(self) -> bool:
        """Whether there is a choice between rows and a chord anywhere."""
        return self.chord is not None and self.rows_above is not None

    def through(self, up: Coefficients, down: Coefficients, shape: tuple[int, ...]) -> Coefficients:
        """What is handed on to the activation's input: coefficients >= 0 above, and coefficients <= 0 below."""
        return Coefficients(up.data * up.taken(self.above) + down.data * down.taken(self.below), up.origins)


class LiftedBounds:
    """Lower bounds of margins of one network, batched over images.

    Args:
        network: in canonical form; it is copied.
        feasible: whether balls hold nonnegative images only (fine-tuned), or are the L1 balls of flows (vanilla).
        moves: in which rows are written: those of l1, or of another ground cost.
        dtype: precision of the bounds.
        tolerance: relative gap at which the search for a multiplier stops.
        steps: up the gradient, by which rows and chords are mixed for the margins; 0 for rows alone.
        rate, first_share: of these steps, and the share of rows that they start from.
        shortest: how many of these steps it takes until their pace says anything.
        trust: rows are made from secants where something else bounds a neuron to less than this share of its own bound.
        chunk_entries: how many entries of rows are held at a time.
        trained: bounds are differentiable in the network's weights, and it is not copied. Then secants stand where
            charges would, whose prices are no function that is differentiated.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """

    def __init__(
        self,
        network: Network,
        *,
        feasible: bool = True,
        moves: Moves = NEIGHBOURS,
        dtype: torch.dtype = torch.float64,
        tolerance: float = 1e-3,
        steps: int = 0,
        rate: float = 0.2,
        first_share: float = 0.9,
        shortest: int = 3,
        trust: float = 0.9,
        chunk_entries: int = CHUNK_ENTRIES,
        trained: bool = False,
    ) -> None:
        self.trained, self.steps, self.rate, self.first_share, self.shortest = (
            trained,
            steps,
            rate,
            first_share,
            shortest,
        )
        self.network = network if trained else copy.deepcopy(network).to(dtype)
        # Values whose rows are the same for all images, and of which all entries are worth having at once.
        pooled = {read for node in network.nodes if isinstance(node.operation, nn.MaxPool2d) for read in node.inputs}
        self.shared = network.affine_of_input() - pooled if trained else set[str]()
        self.moves, self.trust = moves, trust
        self.feasible, self.dtype, self.tolerance, self.chunk_entries = feasible, dtype, tolerance, chunk_entries
        for node in self.network.nodes:
            known = is_affine(node.operation) or is_elementwise_activation(node.operation)
            if not known and not isinstance(node.operation, nn.MaxPool2d):
                raise UnsupportedOperationError(
                    f"node {node.name!r}: lifted bounds have no rule for {operation_name(node.operation)}"
                )

    def lower_bounds(
        self,
        images: Tensor,
        labels: Tensor,
        budget: Tensor,
        known: Mapping[str, Interval] | None = None,
        warm: WarmStart | None = None,
    ) -> Tensor:
        """Lower bounds of f_y - f_t over the ball around each image, for the classes t other than y in ascending order.

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; converted to the engine's precision.
            labels: y, (B,).
            budget: what moves may cost, (B,): radius times mass for l1 ground cost.
            known: bounds (B, *shape) of values of the network from elsewhere, by name.
            warm: what earlier bounds of the same images found; taken as a start, and brought up to date.
        """
        with torch.no_grad():
            ball = _Batch(self, images, budget, known or {}, warm)
            ball.analyse()
            return ball.margins(labels)

    def intervals(
        self, images: Tensor, budget: Tensor, known: Mapping[str, Interval] | None = None
    ) -> dict[str, Interval]:
        """Bounds (B, *shape) of every value of the network, those that activations read by rows as well."""
        with torch.no_grad():
            ball = _Batch(self, images, budget, known or {})
            ball.analyse()
            return ball.intervals


class _Batch:
    """The analysis of one batch of balls."""

    def __init__(
        self,
        engine: LiftedBounds,
        images: Tensor,
        budget: Tensor,
        known: Mapping[str, Interval],
        warm: WarmStart | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.engine, self.network, self.known, self.warm = engine, engine.network, known, warm
        self.effort = Effort() if effort is None else effort
        self.steps = 0 if self.effort.rough else engine.steps
        self.images = images.to(engine.dtype)
        self.budget = budget.to(self.images.device)
        self.values = self.network.values(self.images)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(v.shape[1:]) for name, v in self.values.items()}
        eps = self.budget.to(self.images.dtype).reshape(-1, 1, 1, 1)
        loss = torch.minimum(self.images, eps) if engine.feasible else eps
        self.intervals: dict[str, Interval] = {INPUT: (self.images - loss, self.images + eps)}
        self.relaxations: dict[str, Relaxation | PoolRelaxation] = {}

    # Forward: intervals of every value, and relaxations of activations.

    def analyse(self) -> None:
        for node in self.network.nodes:
            if not is_affine(node.operation) and node.name not in self.relaxations:
                self._relax(node.inputs[0])
            self.enter(node)

    def enter(self, node: Node) -> None:
        found = propagate(node.operation, [self.intervals[name] for name in node.inputs])
        if node.name in self.known:
            found = intersect(found, self.known[node.name])
        centre = self.values[node.name]
        self.intervals[node.name] = torch.minimum(found[0], centre), torch.maximum(found[1], centre)

    def _relax(self, name: str) -> None:
        """Bounds what activations read, and relaxes all that read it."""
        self.relax_readers(name, self.bound(name))

    def bound(self, name: str, *, tighten: bool = True) -> Chunks:
        """Bounds what activations read by rows, where they may be on several pieces; returns the rows.

        Args:
            tighten: whether the rows bound it, too; not where bounds are known that they cannot improve.
        """
        readers = [node for node in self.network.consumers(name) if not is_affine(node.operation)]
        two_piece = all(isinstance(node.operation, nn.ReLU | nn.LeakyReLU) for node in readers)
        lower, upper = self.intervals[name]
        open_ = (lower < 0) & (upper > 0) if two_piece else upper > lower
        chunks: Chunks = []
        if bool(open_.any()):
            for query in self._queries(name, open_):
                rows, _ = self.rows(name, query.coefficients)
                # Where nothing needs their value, rows above pieces still take off what moves are charged.
                wanted = tighten or (two_piece and not self.engine.trained)
                multipliers = self._tighten(name, query, rows, two_piece, tighten) if wanted else None
                chunks.append((query, replace(rows, multipliers=multipliers)))
        return chunks

    def relax_readers(self, name: str, chunks: Chunks) -> None:
        """Relaxes every activation that reads a value, given the rows above it."""
        for node in self.network.consumers(name):
            if isinstance(node.operation, nn.MaxPool2d):
                self._relax_pool(node, chunks)
            elif not is_affine(node.operation):
                self._relax_elementwise(node, chunks)

    def _queries(self, name: str, open_: Tensor) -> list[_Query]:
        shape, batch = self.shapes[name], len(self.images)
        device, dtype = self.images.device, self.images.dtype
        anywhere = open_.any(0)
        moves = len(self.engine.moves) * math.prod(self.network.input_shape)
        if len(shape) == 3 and shape[1] * shape[2] > 1:
            channels, height, width = shape
            chosen = anywhere.any(0)
            chosen[0, 0] = chosen[min(1, height - 1), min(1, width - 1)] = True  # where windows stand is seen there
            places = chosen.nonzero()
            size = max(2, self.engine.chunk_entries // (batch * 2 * channels * moves))
            eye = torch.eye(channels, dtype=dtype, device=device)
            data = torch.cat([eye, -eye])[None, None, :, :, None, None]
            return [_Query(Coefficients(data, part), part, None) for part in torch.split(places, size)]
        flat = open_.flatten(1)
        if name in self.engine.shared:
            eye = torch.eye(flat.shape[1], dtype=dtype, device=device)
            data = torch.cat([eye, -eye]).reshape(1, 1, -1, *shape)
            every = torch.arange(flat.shape[1], device=device).expand(batch, -1)
            return [_Query(Coefficients(data, None), None, every)]
        size = max(1, self.engine.chunk_entries // (batch * 2 * moves))
        entries = (~flat).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(flat.sum(1).max())]
        queries = []
        for part in torch.split(entries, size, 1):
            units = torch.zeros(batch, part.shape[1], flat.shape[1], dtype=dtype, device=device)
            units.scatter_(2, part[..., None], 1.0)
            data = torch.cat([units, -units], 1).reshape(batch, 1, -1, *shape)
            queries.append(_Query(Coefficients(data, None), None, part))
        return queries

    def _tighten(self, name: str, query: _Query, rows: MoveRows, two_piece: bool, both: bool) -> Tensor:
        """Bounds by rows, and the multipliers of them.

        Args:
            both: whether the end that secants and charges have no use for is worth bounding, for chords.
        """
        centre = query.pick(self.values[name])  # (B, places, channels)
        lower, upper = (query.pick(bound) for bound in self.intervals[name])
        batch = len(self.images)
        settled = torch.full_like(centre, torch.inf)
        if two_piece:
            # One end is what secants need; a cheaper bound does for the other.
            open_ = (lower < 0) & (upper > 0)
            other = torch.full_like(centre, -torch.inf) if self.steps and both else settled
            for_upper = torch.where(open_, torch.where(centre < 0, -centre, other), settled)
            for_lower = torch.where(open_, torch.where(centre >= 0, centre, other), settled)
        else:
            for_upper = for_lower = torch.where(upper > lower, -settled, settled)
        enough = torch.stack([for_upper, for_lower], 2).reshape(batch, -1)
        value, multiplier = self.maximum(rows, enough, self._guess(name, query), self.engine.tolerance)
        self._keep(name, query, multiplier)
        rise, fall = value.to(centre.dtype).reshape(batch, len(query), 2, -1).nan_to_num(nan=torch.inf).unbind(2)
        low, high = torch.maximum(lower, centre - fall), torch.minimum(upper, centre + rise)
        self.intervals[name] = tuple(  # type: ignore[assignment]
            query.put(old, new) for old, new in zip(self.intervals[name], (low, high), strict=True)
        )
        return multiplier

    def maximum(
        self, rows: MoveRows, enough: Tensor, guess: Tensor | None, tolerance: float, *, gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The largest value of each row over the balls, and its multiplier, (B, Q * R); see ``support.maximum``.

        Args:
            gradient: whether it is differentiated in the rows.
        """
        options: dict[str, Any] = {
            "feasible": self.engine.feasible, "moves": self.engine.moves, "tolerance": tolerance, "enough": enough,
            "guess": guess,
        }  # fmt: skip
        if gradient or self.engine.trained:
            return maximum_value(rows, self.images, self.budget, options)
        found = maximum(rows, self.images, self.budget, **options)
        return found.value, found.multiplier

    def _guess(self, name: str, query: _Query) -> Tensor | None:
        if self.warm is None:
            return None
        known = self.warm.recall(("lifted", name), (2, *self.shapes[name]))
        return None if known is None else torch.stack([query.pick(one) for one in known.unbind(1)], 2).flatten(1)

    def _keep(self, name: str, query: _Query, multipliers: Tensor) -> None:
        if self.warm is None:
            return
        shape = (2, *self.shapes[name])
        known = self.warm.recall(("lifted", name), shape)
        known = multipliers.new_zeros(len(self.images), *shape) if known is None else known
        both = multipliers.reshape(len(self.images), len(query), 2, -1).unbind(2)
        ends = [query.put(old, new) for old, new in zip(known.unbind(1), both, strict=True)]
        self.warm.remember(("lifted", name), torch.stack(ends, 1), 0.0)

    def _relax_elementwise(self, node: Node, chunks: Chunks) -> None:
        name = node.inputs[0]
        centre, (lower, upper) = self.values[name], self.intervals[name]
        found = secants(node.operation, lower, centre, upper)
        moves = upper > lower
        bent_above = moves & (found.most_right > found.least_left)
        bent_below = moves & (found.least_right < found.most_left)
        within = (found.most_right + found.least_left) / 2 if not _pieces(node) else found.most_right
        above = torch.where(bent_above, 0.0, within)
        within = (found.least_right + found.most_left) / 2 if not _pieces(node) else found.least_right
        below = torch.where(bent_below, 0.0, within)
        convex = has_chord(node.operation) and getattr(node.operation, "negative_slope", 0.0) >= 0
        if convex and not self.engine.trained:
            rows_above = self._bent(name, chunks, bent_above, node.operation)
        else:
            rows_above = self._stored(name, chunks, bent_above, found.most_right, found.least_left, +1)
        rows_below = self._stored(name, chunks, bent_below, found.most_left, found.least_right, -1)
        chord = self._chord(node, bent_above) if has_chord(node.operation) else None
        self.relaxations[node.name] = Relaxation(above, below, rows_above, rows_below, chord)

    def _chord(self, node: Node, bent: Tensor) -> Chord:
        name, operation = node.inputs[0], node.operation
        flattest = float(getattr(operation, "negative_slope", 0.0))
        centre, (lower, upper) = self.values[name], self.intervals[name]
        value = self.values[node.name]
        tiny = torch.finfo(centre.dtype).tiny
        # From (lower, flattest * lower) to (upper, upper): upper and -lower are positive where bent.
        share = (upper / (upper - lower).clamp(min=tiny)).clamp(0, 1)
        slope = flattest + (1 - flattest) * share
        rise = (slope * (centre - lower) + flattest * lower - value).clamp(min=0)
        usual = torch.where(upper > -lower, torch.ones_like(centre), flattest)
        return Chord(bent, slope, rise, centre, value, flattest, usual)

    def _stored(
        self, name: str, chunks: Chunks, bent: Tensor, first: Tensor, second: Tensor, sign: int
    ) -> StoredRows | None:
        """max of the rows of ``first`` and ``second`` times z - z0 (or z0 - z, sign -1), where ``bent``."""
        if not bool(bent.any()):
            return None
        parts = []
        if name in self.engine.shared and chunks[0][0].entries is not None:
            query, rows = chunks[0]
            up = query.halves(rows.gains)[0 if sign > 0 else 1][0, 0]
            slopes = [query.pick(slope * bent)[:, 0] for slope in (first, second)]
            largest, least = torch.maximum(*slopes), torch.minimum(*slopes)
            return SharedRows(up.clamp(min=0), up.clamp(max=0), largest, least, self.shapes[name])
        for query, rows in chunks:
            up, down = query.halves(rows.gains.expand(len(self.images), *rows.gains.shape[1:]))
            up, down = (up, down) if sign > 0 else (down, up)

            def scaled(slope: Tensor, up: Tensor = up, down: Tensor = down, query: _Query = query) -> Tensor:
                factor = query.pick(slope)[..., None, None, None, None]
                result = factor.clamp(min=0) * up
                return result - factor.clamp(max=0) * down if bool((factor < 0).any()) else result

            rows_of = torch.maximum(scaled(first), scaled(second)) * query.pick(bent)[..., None, None, None, None]
            parts.append((query, rows, rows_of))
        return self._assembled(name, parts)

    def _bent(self, name: str, chunks: Chunks, bent: Tensor, operation: nn.Module) -> StoredRows | None:
        """Rows above f(z) - f(z0), where ``bent``, of a rising f of two pieces: less charges, or by secants.

        Secants where z is known better by other means than by its own rows, as its intervals are what they rest on.
        """
        if not bool(bent.any()):
            return None
        flattest, centre = float(getattr(operation, "negative_slope", 0.0)), self.values[name]
        lower, upper = self.intervals[name]
        found = secants(operation, lower, centre, upper)
        known = torch.where(centre < 0, upper - centre, centre - lower)
        engine, parts = self.engine, []
        for query, rows in chunks:
            bend = Bend(
                query.pick(bent), query.pick(centre), query.pick(known), query.pick(found.most_right),
                query.pick(found.least_left), flattest,
            )  # fmt: skip
            gains = bent_rows(rows, engine.moves, self.images, self.budget, engine.feasible, bend, engine.trust)
            parts.append((query, rows, gains))
        return self._assembled(name, parts)

    def _assembled(self, name: str, parts: list[tuple[_Query, MoveRows, Tensor]]) -> StoredRows:
        query, rows, gains = parts[0]
        if query.entries is not None:
            index = torch.cat([one.entries for one, _, _ in parts if one.entries is not None], 1)
            return ListedRows(index, torch.cat([part[:, 0] for _, _, part in parts], 1), self.shapes[name])
        channels, height, width = self.shapes[name]
        assert query.places is not None
        if len(rows.origins) == 1 and len(query) > 1:
            places = torch.cat([one.places for one, _, _ in parts if one.places is not None])
            at = places[:, 0] * width + places[:, 1]
            index = (torch.arange(channels, device=at.device) * height * width + at[:, None]).flatten()
            return ListedRows(
                index[None], torch.cat([part.flatten(1, 2) for _, _, part in parts], 1), self.shapes[name]
            )
        stored = gains.new_zeros(gains.shape[0], height, width, *gains.shape[2:])
        for one, _, part in parts:
            assert one.places is not None
            stored[:, one.places[:, 0], one.places[:, 1]] = part
        # Windows stand at stride * place + offset: two places that are always among those asked for tell both.
        origins = torch.cat([part.origins for _, part, _ in parts])
        places = torch.cat([one.places for one, _, _ in parts if one.places is not None])
        stride = []
        for axis in (0, 1):
            difference = places[:, axis] - places[0, axis]
            moved = difference.nonzero().flatten()[:1]
            stride.append(int((origins[moved, axis] - origins[0, axis]) // difference[moved]) if len(moved) else 0)
        offset = tuple(int(origins[0, axis] - stride[axis] * places[0, axis]) for axis in (0, 1))
        at = places * torch.tensor(stride, device=places.device) + torch.tensor(offset, device=places.device)
        assert torch.equal(at, origins), "windows of one map stand at equal steps"
        return WindowRows(stored, (stride[0], stride[1]), (offset[0], offset[1]))

    def _relax_pool(self, node: Node, chunks: Chunks) -> None:
        name, operation = node.inputs[0], node.operation
        assert isinstance(operation, nn.MaxPool2d)
        centre, (lower, upper) = self.values[name], self.intervals[name]
        one = torch.ones_like(centre)
        members = self._stored(name, chunks, one > 0, one, one, +1) if chunks else None
        size = (node.shape[1], node.shape[2])
        self.relaxations[node.name] = relax_pool(operation, lower, centre, upper, size, members)

    # Backward: rows above linear functions of a value.

    def rows(
        self,
        name: str,
        query: Coefficients,
        choices: Mapping[str, Choice] | None = None,
    ) -> tuple[MoveRows, Tensor | float]:
        """Rows and constants above the differences of linear functions of a value from what they are at the centre.

        Args:
            choices: how the activations that have a choice mix rows and chords; rows alone where there is none.
        """
        constant: Tensor | float = 0.0
        pending, parts = {name: query}, list[MoveRows]()
        for node in reversed(self.network.nodes):
            outer = pending.pop(node.name, None)
            if outer is None:
                continue
            shapes = [self.shapes[read] for read in node.inputs]
            if is_affine(node.operation):
                inner = pull_back(node.operation, outer, shapes, node.shape)
            else:
                relaxation = self.relaxations[node.name]
                up, down = (
                    Coefficients(part, outer.origins) for part in (outer.data.clamp(min=0), outer.data.clamp(max=0))
                )
                choice = None if choices is None else choices.get(node.name)
                if choice is not None:
                    assert isinstance(relaxation, Relaxation)
                    through, above, rise = mixed(relaxation, choice, up.data, down.data)
                    if relaxation.rows_above is not None and (choice.share.requires_grad or bool(choice.share.any())):
                        parts.append(relaxation.rows_above.combine(Coefficients(above, None)))
                    inner, constant = [Coefficients(through, None)], constant + rise
                    for read, part in zip(node.inputs, inner, strict=True):
                        pending[read] = added(pending[read], part, self.shapes[read]) if read in pending else part
                    continue
                if relaxation.rows_above is not None:
                    parts.append(relaxation.rows_above.combine(up))
                if relaxation.rows_below is not None:
                    parts.append(relaxation.rows_below.combine(Coefficients(-down.data, outer.origins)))
                inner = [relaxation.through(up, down, shapes[0])]
            for read, part in zip(node.inputs, inner, strict=True):
                pending[read] = added(pending[read], part, self.shapes[read]) if read in pending else part
        if INPUT in pending:
            parts.append(rows_of_pixels(pending[INPUT], self.network.input_shape, self.engine.moves))
        return total(parts, self.network.input_shape[-2:]), constant

    def margins(self, labels: Tensor) -> Tensor:
        logits = self.values[self.network.output]
        return self.margins_of(margin_specification(labels.to(logits.device), logits.shape[1], logits.dtype))

    def margins_of(self, specification: Tensor, others: Tensor | None = None) -> Tensor:
        """Lower bounds (B, S) of linear functions (B, S, classes) of the output.

        Args:
            others: lower bounds from elsewhere, (B, S): where they are enough, nothing is done.
        """
        logits, rises = self.values[self.network.output], -specification
        clean = -(rises @ logits[..., None]).squeeze(-1)
        goal = torch.full_like(clean, torch.inf) if self.effort.enough is None else self.effort.enough * clean
        best = torch.full_like(clean, -torch.inf) if others is None else others.to(clean)
        search = MarginSearch(self, rises, clean, goal, best)
        search.by_rows()
        if self.engine.steps:
            search.by_chords()
        if self.steps:
            search.by_mixtures()
        return search.best


Chunks = list[tuple["_Query", MoveRows]]


def has_chord(operation: nn.Module) -> bool:
    """Whether the operation is of two pieces, the right one of slope 1, the left one of no larger slope."""
    return isinstance(operation, nn.ReLU) or (isinstance(operation, nn.LeakyReLU) and operation.negative_slope <= 1)


@dataclass(frozen=True, eq=False)
class _Query:
    """Which entries of a value rows are asked for, upward and downward.

    Attributes:
        places: (places, 2), with all channels; or
        entries: (B, K), of each image's flattened value, in which an entry stands once.
    """

    coefficients: Coefficients
    places: Tensor | None
    entries: Tensor | None

    def __len__(self) -> int:
        return 1 if self.places is None else len(self.places)

    def pick(self, value: Tensor) -> Tensor:
        """(B, *shape) -> (B, places, entries)."""
        if self.entries is not None:
            return value.flatten(1).gather(1, self.entries)[:, None]
        assert self.places is not None
        return value[:, :, self.places[:, 0], self.places[:, 1]].transpose(1, 2)

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, R, ...) of rows asked for by this query -> upward and downward, each (B, places, entries, ...)."""
        if self.entries is not None:
            split = _split(values[:, 0], 1, (2, -1))[:, None]
        elif values.shape[1] == 1 and values.shape[2] > self.coefficients.data.shape[2]:
            split = _split(values[:, 0], 1, (len(self), 2, -1))  # grown to the whole grid
        else:
            split = _split(values.expand(-1, len(self), *values.shape[2:]), 2, (2, -1))
        return split[:, :, 0], split[:, :, 1]

    def put(self, value: Tensor, part: Tensor) -> Tensor:
        """The value with its picked entries replaced."""
        if self.entries is not None:
            return value.flatten(1).scatter(1, self.entries, part[:, 0]).reshape(value.shape)
        assert self.places is not None
        result = value.clone()
        result[:, :, self.places[:, 0], self.places[:, 1]] = part.transpose(1, 2)
        return result


def _split(values: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """One dimension as several."""
    return values.reshape(*values.shape[:dim], *sizes, *values.shape[dim + 1 :])


def _pieces(node: Node) -> bool:
    return isinstance(node.operation, nn.ReLU | nn.LeakyReLU)


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
        entries = options.lifted_entries * 32 // torch.finfo(dtype).bits
        self.images_at_once = max(1, entries // (2 * len(moves) * network.grid.pixels * widest))
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

    def rows_above(self, name: str) -> ListedRows | None:
        with torch.no_grad():
            relaxation = self.own.relaxations[name]
            if not isinstance(relaxation, Relaxation) or relaxation.chord is None or len(self.own.images) != 1:
                return None
            rows = relaxation.rows_above
            if rows is None or isinstance(rows, SharedRows) or self.own.engine.moves is not NEIGHBOURS:
                return None
            rows = listed(rows, self.network.input_shape[-2:])
            bent = relaxation.chord.bent.flatten()[rows.index[0]]  # the others have a line, and a row of zeros
            return ListedRows(rows.index[:, bent], rows.gains[:, bent], rows.shape)

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
