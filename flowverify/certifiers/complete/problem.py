"""What is to be bounded: linear functions of what a network computes, over the images of a ball.

The steps of a search look at the problem in small: mostly in float32, and only at the pixels near the image's mass.
Nothing in that is a bound. What the steps lead to is bounded in float64 on all pixels, by
:func:`~flowverify.certifiers.complete.relaxation.lower_bound`, for which any multipliers will do (theory, section 16).

The network is affine maps between its image, its ReLUs and its output, for bounds that run backwards. Stage k is what
the k-th ReLU reads (the last stage: the output). It is an affine function of the image (source 0) and of the outputs of
earlier ReLUs (sources 1, 2, ...): z_k = b_k + sum over s of W_ks a_s. Convolutions, pooling by averages, scales and
skip connections all lie inside these maps, as dense matrices.

Affine operations and ReLUs are what searches know: :func:`relus_only` writes piecewise linear networks with these
alone. Both rewritings are exact but for the rounding of 1 - s, a constant like any other (theory, section 15):

- LeakyReLU of any slope s: s x + (1 - s) relu(x);
- a maximum pool: max(a, b) = a + relu(b - a), in pairs, then in pairs of these, and so on.

The rows of a batch, none of which depends on another, are shared out among threads: :class:`Workers`.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from flowverify.ball import Ball
from flowverify.bounds.lifted.moves import NEIGHBOURS
from flowverify.bounds.lifted.support import MoveRows, maximum
from flowverify.certifiers.options import DEFAULTS, AffineMapSettings, SearchSettings
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, is_affine, operation_name
from flowverify.network.affine import linear_part, matrix
from flowverify.network.graph import INPUT, Node
from flowverify.network.lowering import lower, pooling_windows
from flowverify.network.operations import Add, Index, Reshape, Subtract
from flowverify.network.rounding import gamma, magnitudes, reach
from flowverify.transport.compiled import Prepared


@dataclass(frozen=True)
class Stage:
    """b_k (n_k,) and the matrices W_ks (n_k, n_s) by source; sources without influence are absent."""

    bias: Tensor
    weights: dict[int, Tensor]


@dataclass(frozen=True)
class Rounding:
    """How far a bound may be off (:func:`~flowverify.certifiers.complete.relaxation.lower_bound`).

    Attributes:
        gamma: relative, to the sum of absolute values.
        magnitudes: P of each stage in two parts, (n_k, 2): first + reach * second is at least |z_k| on the ball, and
            the sum of absolute values that it is computed from (:mod:`flowverify.network.rounding`).
    """

    gamma: float
    magnitudes: tuple[Tensor, ...]

    def largest(self, stage: int, reach: float) -> Tensor:
        """P of a stage, (n_k,)."""
        parts = self.magnitudes[stage]
        return parts[:, 0] + reach * parts[:, 1]


@dataclass(frozen=True)
class AffineMaps:
    """The stages of a network in float64; ``stages[k]`` feeds ReLU k + 1, ``stages[-1]`` is the output.

    Attributes:
        names: of the values that the stages compute.
        pixels: of the image.
        rounding: of bounds that are computed with these maps; None where nothing is to be proven.
    """

    stages: tuple[Stage, ...]
    names: tuple[str, ...]
    pixels: int
    rounding: Rounding | None = None

    @property
    def layers(self) -> int:
        """How many ReLU layers there are."""
        return len(self.stages) - 1

    @property
    def widths(self) -> list[int]:
        """Neurons of each ReLU layer."""
        return [len(stage.bias) for stage in self.stages[:-1]]


def affine_maps(network: Network, settings: AffineMapSettings = DEFAULTS.maps) -> AffineMaps:
    """The affine maps of a network whose only activations are ReLUs, on its device.

    Raises:
        UnsupportedOperationError: another activation, named; or maps of more than ``settings.most_entries`` numbers.
    """
    for node in network.nodes:
        if not is_affine(node.operation) and not isinstance(node.operation, nn.ReLU):
            raise UnsupportedOperationError(
                f"complete certification: layer {node.name!r} is {operation_name(node.operation)}; expected affine "
                "layers and ReLU only"
            )
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    precise = copy.deepcopy(network).cpu().double()
    linear = linear_part(precise)
    relus = [node for node in precise.nodes if isinstance(node.operation, nn.ReLU)]
    names = [node.inputs[0] for node in relus] + [precise.output]
    sources = [INPUT, *(node.name for node in relus)]
    shapes = [precise.input_shape, *(node.shape for node in relus)]
    sizes = [math.prod(shape) for shape in shapes]
    reached = [_reached(precise, source) for source in sources]
    entries = sum(
        math.prod(_shape(precise, name)) * sizes[source]
        for name in set(names)
        for source in range(len(sources))
        if name in reached[source]
    )
    if entries > settings.most_entries:
        raise UnsupportedOperationError(
            f"complete certification: the network's affine maps have {entries:,} entries, expected at most "
            f"{settings.most_entries:,}"
        )
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    with torch.no_grad():
        constant = _values(precise, dict(zip(sources, zeros, strict=True)))
        blocks = {
            (name, index): rows.to(device)
            for index in range(len(sources))
            for name, rows in _matrices(linear, sources, zeros, index, sorted(reached[index] & set(names))).items()
        }
    stages = tuple(
        Stage(
            constant[name].flatten().to(device),
            {index: blocks[name, index] for index in range(len(sources)) if (name, index) in blocks},
        )
        for name in names
    )
    found = magnitudes(precise, relaxed=False)
    rounding = Rounding(gamma(precise), tuple(found[name].flatten(1).T.contiguous().to(device) for name in names))
    return AffineMaps(stages, tuple(names), sizes[0], rounding)


def _shape(network: Network, name: str) -> tuple[int, ...]:
    return network.input_shape if name == INPUT else network.node(name).shape


def _reached(network: Network, source: str) -> set[str]:
    """The values that depend on ``source`` through affine layers alone."""
    names = {source}
    for node in network.nodes:
        if is_affine(node.operation) and names & set(node.inputs):
            names.add(node.name)
    return names


def _values(network: Network, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    values = dict(sources)
    for node in network.nodes:
        if node.name not in values:
            values[node.name] = node.operation(*(values[name] for name in node.inputs))
    return values


def _matrices(
    linear: nn.Module, sources: list[str], zeros: list[Tensor], position: int, wanted: list[str]
) -> dict[str, Tensor]:
    """The matrices from one source to the wanted values, the other sources being 0."""
    assert isinstance(linear, Network)
    if not wanted:
        return {}
    sizes = [math.prod(_shape(linear, name)) for name in wanted]

    def values(units: Tensor) -> Tensor:
        own = {name: zero.expand(len(units), *zero.shape[1:]) for name, zero in zip(sources, zeros, strict=True)}
        found = _values(linear, {**own, sources[position]: units})
        return torch.cat([found[name].flatten(1) for name in wanted], 1)

    widest = max(sum(sizes), *(math.prod(node.shape) for node in linear.nodes))
    whole = matrix(values, zeros[position].shape[1:], like=zeros[position], widest=widest)
    parts = torch.split(whole, sizes)
    return {name: part.contiguous() for name, part in zip(wanted, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class RowsAbove:
    """Rows of moves above what some ReLUs put out: relu(z) <= value + gains . m for every flow m of the ball.

    Such bounds know that the budget is shared (theory, sections 16 and 21). They hold on the whole ball, and so on
    every node of a tree over it.

    Attributes:
        index: the neurons of each ReLU layer that have a row, (K_k,).
        values: what they put out at the image, (K_k,) a layer.
        gains: of one layer's rows after the other's, (K, ways, C, H, W), by the pixel that the mass leaves.
    """

    index: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gains: Tensor

    def __len__(self) -> int:
        return len(self.gains)

    def below(self, stage: int) -> RowsAbove:
        """Those of the layers below a stage."""
        count = sum(len(index) for index in self.index[:stage])
        return RowsAbove(self.index[:stage], self.values[:stage], self.gains[:count])

    def to(self, kind: torch.dtype) -> RowsAbove:
        """In this precision."""
        return RowsAbove(self.index, tuple(value.to(kind) for value in self.values), self.gains.to(kind))


@dataclass(frozen=True)
class Minimum:
    """min of c . nu over the ball, one row a function; with rows, of c . (image + A m) + g . m over its flows m.

    Attributes:
        value: a sound lower bound, exact to the tolerance, (N,).
        multiplier: to start the next search from, (N,).
        point: where it is attained, (N, pixels), if it was asked for.
        flow: which leads there, (N, ways, C, H, W), with rows.
    """

    value: Tensor
    multiplier: Tensor
    point: Tensor | None
    flow: Tensor | None = None


class SingleBall:
    """A batch of one ball (:class:`flowverify.ball.Ball`), with what is prepared for its image in each precision.

    With a cap minima are lower bounds, never looser than without.

    Attributes:
        image: (C, H, W); flat: the same, (pixels,).
        budget: mass times ground cost.
        positive: whether its points are images; otherwise they may have negative pixels.
        is_program: whether it is a polytope of flows on the grid's edges.
    """

    def __init__(self, ball: Ball) -> None:
        self.ball, self.image, self.budget = ball, ball.images[0], float(ball.budget[0])
        self.flat = self.image.flatten()
        threat = ball.threat
        self.positive = threat.positive
        self.is_program = threat.ground == "l1" and threat.cap is None
        self._prepared: dict[torch.dtype, Prepared] = {}

    @property
    def reach(self) -> float:
        """What multiplies the largest coefficient of a pixel in bounds on rounding."""
        return float(reach(self.image.double().sum(), self.budget))

    def window(self, rows: slice, columns: slice, kind: torch.dtype) -> SingleBall:
        """The ball of a part of the image, in this precision; a smaller one where mass could leave the window."""
        image = self.image[:, rows, columns].to(kind).contiguous()
        return SingleBall(Ball(self.ball.threat, image[None], self.ball.budget))

    def minimum(
        self,
        coefficients: Tensor,  # (N, pixels)
        guess: Tensor | None = None,
        tolerance: float = 1e-9,
        point: bool = False,
        gains: Tensor | None = None,  # g, (N, ways, C, H, W)
    ) -> Minimum:
        coefficients = coefficients.detach()
        if gains is not None:
            return self._minimum_with_rows(coefficients, gains.detach(), guess, tolerance, point)
        if self._compiled:
            excess, multiplier, nearest = self._solver(coefficients.dtype).solve(-coefficients, guess, tolerance, point)
            centre = coefficients @ self.flat  # not finite if any coefficient is not: then the excess says nothing
            value = torch.where(torch.isfinite(centre), centre - excess.to(centre), torch.nan)
            return Minimum(value, multiplier, nearest)
        found = self.ball.support(
            -coefficients.reshape(-1, *self.image.shape), guess=None if guess is None else guess[None],
            tolerance=tolerance, maximiser=point,
        )  # fmt: skip
        nearest = None if found.maximiser is None else found.maximiser[0].flatten(1)
        return Minimum(coefficients @ self.flat - found.excess[0], found.multiplier[0].double(), nearest)

    def _minimum_with_rows(
        self, coefficients: Tensor, gains: Tensor, guess: Tensor | None, tolerance: float, point: bool
    ) -> Minimum:
        whole = NEIGHBOURS.gains(coefficients.reshape(-1, *self.image.shape)).add_(gains).neg_()
        corner = torch.zeros(1, 2, dtype=torch.long, device=whole.device)
        found = maximum(
            MoveRows(whole[None, None], corner), self.image[None], torch.tensor([self.budget], dtype=torch.float64),
            feasible=self.positive, guess=None if guess is None else guess[None], tolerance=tolerance, flow=point,
        )  # fmt: skip
        flow, nearest = None, None
        if found.flow is not None:
            flow = found.flow[0, 0]
            nearest = self.flat + NEIGHBOURS.entering(flow).flatten(1)
        return Minimum(coefficients @ self.flat - found.value[0], found.multiplier[0], nearest, flow)

    @property
    def _compiled(self) -> bool:
        return self.positive and self.is_program and self.image.device.type == "cpu"

    def _solver(self, kind: torch.dtype) -> Prepared:
        if kind not in self._prepared:
            self._prepared[kind] = Prepared(self.image.to(kind), self.budget)
        return self._prepared[kind]

    def greatest_excess(self, coefficients: Tensor, error: Tensor, tolerance: float) -> Tensor:
        """An upper bound (N,), float64, of max c . (nu - image) for functions c (N, pixels) in any precision.

        Args:
            coefficients: c, each entry off by at most ``error`` (N,).

        The bound allows for them and for its own rounding: half a unit for each step of a scan, a subtraction, and
        the sum over the pixels. A unit of mass moves at a cost of at least 1, so that errors of c count with twice
        the budget.
        """
        kind = coefficients.dtype
        shaped = coefficients.reshape(-1, *self.image.shape)
        if not self.positive:
            slope = self.ball.support(shaped).multiplier[0].double()
            return self.budget * (slope * (1 + 4 * torch.finfo(kind).eps) + 2 * error)
        if self._compiled:
            excess = self._solver(kind).solve(coefficients, None, tolerance, False)[0]
        else:
            excess = self.ball.to(dtype=kind).support(shaped, tolerance=tolerance).excess[0].double()
        unit = torch.finfo(kind).eps / 2
        scanned = (sum(self.image.shape[1:]) + 4) * float(self.flat.sum()) * coefficients.abs().amax(1).double()
        return excess + unit * (scanned + (self.flat.numel() + 4) * excess) + 2 * self.budget * error


Part = TypeVar("Part")
Result = TypeVar("Result")

WORTH_A_THREAD = 8  # rows


class Workers:
    """Within ``with`` as many threads as torch had, and torch uses one in each of them; on the CPU.

    Outside of it, and in a thread of its own, work is done one after the other.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self._pool: ThreadPoolExecutor | None = None
        self._owner, self._threads = 0, 1

    def __enter__(self) -> Workers:
        threads = torch.get_num_threads()
        if self._device.type == "cpu" and threads > 1:
            torch.set_num_threads(1)
            self._pool, self._threads, self._owner = ThreadPoolExecutor(threads), threads, threading.get_ident()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)
            self._pool, self._threads = None, 1

    @property
    def count(self) -> int:
        """How many threads share the work of the one that asks."""
        return self._threads if threading.get_ident() == self._owner else 1

    def each(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """``function`` of every part, in order; the first exception is raised once all have ended."""
        if self._pool is None or self.count < 2 or len(parts) < 2:
            return [function(part) for part in parts]
        futures = [self._pool.submit(function, part) for part in parts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def parts(self, rows: Tensor, largest: int) -> list[Tensor]:
        """The rows in runs of at most ``largest``, and at least one run for each thread where there are enough."""
        if not len(rows):
            return []
        runs = max(-(-len(rows) // largest), min(self.count, max(1, len(rows) // WORTH_A_THREAD)))
        return list(torch.tensor_split(rows, runs))

    def dealt(self, size: int) -> list[Tensor]:
        """So many rows, dealt to the threads in turn."""
        hands = min(self.count, max(1, size // WORTH_A_THREAD))
        return [torch.arange(first, size, hands) for first in range(hands)]


@dataclass(frozen=True, eq=False)
class Problem:
    """min over the ball of specification . z_stage, one problem for each row of ``specification``.

    Attributes:
        maps: of the network.
        ball: around the image.
        stage: of the maps.
        specification: (R, n_stage).
        settings: of the search.
        workers: do chunks of rows at a time.
        above: rows of moves above ReLUs, on balls that are programmes; None for none.
    """

    maps: AffineMaps
    ball: SingleBall
    stage: int
    specification: Tensor
    settings: SearchSettings = DEFAULTS
    workers: Workers = field(default_factory=Workers)
    above: RowsAbove | None = None
    _reduced: dict[torch.dtype, tuple[AffineMaps, SingleBall, RowsAbove | None]] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def outputs(cls, maps: AffineMaps, ball: SingleBall, settings: SearchSettings = DEFAULTS) -> Problem:
        """Each of the network's outputs."""
        bias = maps.stages[-1].bias
        return cls(maps, ball, maps.layers, torch.eye(len(bias), dtype=bias.dtype, device=bias.device), settings)

    @property
    def first_share(self) -> float | None:
        """The share of rows that ascents begin with; None without rows."""
        return None if self.above is None else self.settings.ascent.first_share

    def at(self, stage: int, specification: Tensor) -> Problem:
        """Functions of another stage."""
        return replace(self, stage=stage, specification=specification)

    def rows(self, chosen: Tensor | slice) -> Problem:
        """These rows."""
        return replace(self, specification=self.specification[chosen])

    def on(self, ball: SingleBall) -> Problem:
        """Over another ball."""
        return replace(self, ball=ball, above=None, _reduced={})

    def under(self, above: RowsAbove | None) -> Problem:
        """With rows above ReLUs, if there are any."""
        return replace(self, above=above, _reduced={})

    def reduced(self, kind: torch.dtype = torch.float32) -> Problem:
        """In this precision, on a window of the image; its values are near the problem's own, and no bounds."""
        if kind not in self._reduced:
            self._reduced[kind] = self._reduce(kind)
        maps, ball, above = self._reduced[kind]
        return replace(self, maps=maps, ball=ball, specification=self.specification.to(kind), above=above, _reduced={})

    def _reduce(self, kind: torch.dtype) -> tuple[AffineMaps, SingleBall, RowsAbove | None]:
        rows, columns = self._window()
        image = self.ball.image
        places = torch.arange(self.maps.pixels, device=image.device).reshape(image.shape)
        window = places[:, rows, columns].flatten()
        stages = []
        for stage in self.maps.stages:
            weights = {s: (w[:, window] if s == 0 else w).to(kind).contiguous() for s, w in stage.weights.items()}
            stages.append(Stage(stage.bias.to(kind), weights))
        above = None if self.above is None else self.above.to(kind)
        return AffineMaps(tuple(stages), self.maps.names, len(window)), self.ball.window(rows, columns, kind), above

    def _window(self) -> tuple[slice, slice]:
        """The rows and columns near the mass; all of them where flows need no mass, as in cycles that rows reward."""
        found = []
        mass, margin = self.ball.image.sum(0) > 0, self.settings.ascent.window
        for axis, size in ((1, mass.shape[0]), (0, mass.shape[1])):
            held = mass.any(axis).nonzero().flatten()
            if self.ball.positive and self.above is None and len(held):
                found.append(slice(max(0, int(held[0]) - margin), min(size, int(held[-1]) + 1 + margin)))
            else:
                found.append(slice(0, size))
        return found[0], found[1]


def relus_only(network: Network) -> Network:
    """The same function; in float64, unless its activations are ReLUs as it is.

    Raises:
        UnsupportedOperationError: an activation that is not piecewise linear, named.
    """
    for node in network.activations:
        if not isinstance(node.operation, nn.ReLU | nn.LeakyReLU | nn.MaxPool2d):
            raise UnsupportedOperationError(
                f"complete certification: layer {node.name!r} is {operation_name(node.operation)}; expected affine "
                "layers and ReLU, LeakyReLU or MaxPool2d"
            )
    if all(isinstance(node.operation, nn.ReLU) for node in network.activations):
        return network
    apart: list[Node] = []
    for node in network.nodes:
        apart += _maximum(network, node) if isinstance(node.operation, nn.MaxPool2d) else [node]
    whole = Network(network.input_shape, copy.deepcopy(apart))
    return lower(whole, lambda operation: not isinstance(operation, nn.LeakyReLU)).graph


def _maximum(network: Network, node: Node) -> list[Node]:
    """The nodes of a maximum pool: the k-th pixels of all windows side by side, for each k, and their maximum."""
    assert isinstance(node.operation, nn.MaxPool2d)
    channels, height, width = network.shape(node.inputs[0])
    windows = pooling_windows(node.operation, height, width)
    nodes, shape = list[Node](), (channels, windows.shape[1])

    def emit(part: str, operation: nn.Module, *inputs: str, shape: tuple[int, ...] = shape) -> str:
        nodes.append(Node(f"{node.name}_{part}", operation, inputs, shape))
        return nodes[-1].name

    flat = emit("flat", Reshape((channels, height * width)), node.inputs[0], shape=(channels, height * width))
    rivals = [emit(f"member{k}", Index(1, places.tolist()), flat) for k, places in enumerate(windows)]
    while len(rivals) > 1:
        winners = list[str]()
        for first, second in zip(rivals[::2], rivals[1::2], strict=False):
            label = f"pair{len(nodes)}"
            ahead = emit(f"{label}_ahead", nn.ReLU(), emit(f"{label}_difference", Subtract(), second, first))
            winners.append(emit(label, Add(), first, ahead))
        rivals = winners + rivals[2 * len(winners) :]
    nodes.append(Node(node.name, Reshape(node.shape), (rivals[0],), node.shape))
    return nodes
