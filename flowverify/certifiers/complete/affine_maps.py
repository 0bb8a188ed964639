"""A ReLU network as affine maps between its image, its ReLUs and its output, for bounds that run backwards.

Stage k is what the k-th ReLU reads (the last stage: the output). It is an affine function of the image (source 0)
and of the outputs of earlier ReLUs (sources 1, 2, ...): z_k = b_k + sum over s of W_ks a_s. Convolutions, pooling by
averages, scales and skip connections all lie inside these maps, as dense matrices.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.certifiers.complete.settings import DEFAULTS, AffineMapSettings
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, is_affine, operation_name
from flowverify.network.affine import drop_biases
from flowverify.network.graph import INPUT
from flowverify.network.rounding import gamma, magnitudes


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
    linear = copy.deepcopy(precise)
    drop_biases(linear)
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
        blocks: dict[tuple[str, int], Tensor] = {}
        for index, (source, shape, size) in enumerate(zip(sources, shapes, sizes, strict=True)):
            wanted = sorted(reached[index] & set(names))
            for name, rows in _columns(
                linear, sources, zeros, source, shape, size, wanted, settings.chunk_entries
            ).items():
                blocks[name, index] = rows.to(device)
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


def _columns(
    linear: Network,
    sources: list[str],
    zeros: list[Tensor],
    source: str,
    shape: tuple[int, ...],
    size: int,
    wanted: list[str],
    entries: int,
) -> dict[str, Tensor]:
    """The matrices from one source: images of its unit vectors under the maps without biases."""
    widest = max(math.prod(node.shape) for node in linear.nodes)
    chunk = max(1, entries // max(widest, size))
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    if not wanted:
        return {}
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        basis = torch.zeros(count, size, dtype=torch.float64)
        basis[torch.arange(count), torch.arange(start, start + count)] = 1
        own = {name: zero.expand(count, *zero.shape[1:]) for name, zero in zip(sources, zeros, strict=True)}
        values = _values(linear, {**own, source: basis.reshape(count, *shape)})
        for name in wanted:
            parts[name].append(values[name].flatten(1).T)
    return {name: torch.cat(columns, 1).contiguous() for name, columns in parts.items()}
