"""From images and radii to the networks that they share and the properties that ask about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowverify.ball import WassersteinBall, check_images
from flowverify.errors import InvalidInputError
from flowverify.export.encodings import Encoding, check_encoding
from flowverify.export.inputs import FlowInputs
from flowverify.export.networks import ExportedNetwork, Parts, build, take_apart
from flowverify.export.properties import Property, make_property
from flowverify.export.references import file_reference, reference_pattern
from flowverify.export.rounding import FloatArray, scalar_up
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.transport.distance import channel_masses
from flowverify.transport.ground import l1_over_ground
from flowverify.transport.inverse import flow_by_tree


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        encoding: a name in :data:`flowverify.export.encodings.ENCODINGS`.
        radii: in pixels on normalised images, for the ground cost ``ground``.
        positivity: False leaves out R + A delta >= 0, for vanilla certification.
        reference: a name as in :data:`flowverify.export.references.NAMES`. l1-penalty centres its inputs on the
            image, so that no reference makes a difference to it.
        penalty_weight: lambda of the penalty; None for one that is exact.

    Raises:
        InvalidInputError: no radius, or one that is not a finite number > 0; a weight that is negative.
        UnknownNameError: an unknown encoding or ground cost.
    """

    encoding: str
    radii: tuple[float, ...]
    positivity: bool = True
    reference: str = "image"
    ground: str = "l1"
    penalty_weight: float | None = None

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if not self.radii:
            raise InvalidInputError("radii: given none, expected at least one")
        for radius in self.radii:
            if WassersteinBall(radius, self.ground).radius <= 0:
                raise InvalidInputError(f"radius: given {radius!r}, expected a finite number > 0 (pixels)")
        weight = self.penalty_weight
        if weight is not None and not 0 <= weight < float("inf"):
            raise InvalidInputError(f"penalty weight: given {weight!r}, expected a finite number >= 0")

    @property
    def method(self) -> str:
        """The method of certification that an answer amounts to."""
        return "fine-tuned" if self.positivity else "vanilla"


@dataclass(frozen=True, eq=False)
class Instance:
    """One image at one radius."""

    position: int  # in the batch
    label: int
    radius: float
    budget: float  # eps, rounded up to float32
    centre: FloatArray
    property: Property


@dataclass(frozen=True, eq=False)
class Export:
    """One network, and the instances that share it."""

    name: str
    network: ExportedNetwork
    instances: list[Instance]


@dataclass(frozen=True, eq=False)
class _Placed:
    """An image with its reference and the flow between them."""

    position: int
    label: int
    masses: Tensor  # (C,)
    pattern: Tensor  # (C, H, W): of mass 1 in every channel, or anything that the masses are not multiplied with
    reference: Tensor  # (C, H, W)
    flow: Tensor  # (edges,)
    error: float  # what delta_mu misses the image by, as a distance


def plan(network: Network, images: Tensor, labels: Tensor, request: Request) -> Iterator[Export]:
    """The exports of a batch of images (B, C, H, W), one network after the other.

    Images that share a reference pattern share a network; with the reference "image", and for l1-penalty, each has
    its own. Where outputs are margins, only images of one label share it.

    Raises:
        InvalidInputError: invalid images, labels or reference.
        FoldError, UnsupportedOperationError: the network cannot be exported.
    """
    encoding = check_encoding(request.encoding)
    images = check_images(images, network.grid).detach().cpu().double()
    parts = take_apart(network)
    groups: dict[tuple[int, ...], list[_Placed]] = {}
    for one in _place(images, labels, encoding, request.reference):
        own = encoding.form == "delta" or request.reference == "image"
        key: tuple[int, ...] = (one.position,) if own else (-1, one.label) if encoding.per_label else (-1,)
        groups.setdefault(key, []).append(one)
    for key, members in groups.items():
        yield _export(network, parts, encoding, request, members, own=key[0] >= 0)


def _place(images: Tensor, labels: Tensor, encoding: Encoding, name: str) -> Iterator[_Placed]:
    grid = Grid.of(images)
    pattern = reference_pattern(name, grid)
    masses = channel_masses(images)
    given = file_reference(Path(name), images) if pattern is None and name != "image" else None
    for position, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        own = masses[position]
        if encoding.form == "delta" or name == "image":
            unit, reference = image, image
        else:
            shape = given if given is not None else pattern
            assert shape is not None
            total = shape.sum((-1, -2))
            unit = shape / torch.where(total > 0, total, 1.0)[:, None, None]
            reference = unit * own[:, None, None]
        if reference is image:
            flow, error = torch.zeros(grid.edges, dtype=torch.float64), 0.0
        else:
            flow = flow_by_tree(reference[None], image[None], grid)[0]
            missed = float((grid.apply(reference, flow) - image).abs().sum())
            error = missed * max(1, grid.diameter)
        yield _Placed(position, int(label), own, unit, reference, flow, error)


def _export(
    network: Network, parts: Parts, encoding: Encoding, request: Request, members: Sequence[_Placed], own: bool
) -> Export:
    grid, first = network.grid, members[0]
    factor = l1_over_ground(request.ground)
    asked = [(one, radius) for one in members for radius in request.radii]
    budgets = [scalar_up(radius * factor * float(one.masses.sum()) * (1 + 1e-12) + one.error) for one, radius in asked]
    several_masses = any(not torch.equal(one.masses, first.masses) for one in members)
    base = first.pattern if several_masses else first.reference
    plain = FlowInputs(grid, encoding.form, base)
    most = [plain.most_flow(one.flow, budget) for (one, _), budget in zip(asked, budgets, strict=True)]
    budget_input = encoding.penalised and encoding.form == "split" and len(set(most)) > 1
    inputs = FlowInputs(grid, encoding.form, base, several_masses, budget_input)
    centres = np.stack(
        [inputs.centre(one.flow, one.masses, budget) for (one, _), budget in zip(asked, budgets, strict=True)]
    )
    built = build(
        parts,
        inputs,
        encoding,
        request.positivity,
        centres,
        np.array(budgets),
        label=first.label if encoding.per_label else None,
        most_flow=most[0],
        penalty_weight=request.penalty_weight,
    )
    instances = [
        Instance(
            one.position,
            one.label,
            radius,
            budget,
            centre,
            make_property(built, one.label, centre, limit, budget, one.reference.flatten().numpy()),
        )
        for (one, radius), budget, limit, centre in zip(asked, budgets, most, centres, strict=True)
    ]
    label = f"_label{first.label}" if encoding.per_label and not own else ""
    name = f"image{first.position}" if own else "shared"
    return Export(name + label, built, instances)
