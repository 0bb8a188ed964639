"""Reference distributions R of the flow domain (framework paper, section 2.2 and its experiments), and flows from
them.

A right inverse of the flow application map is a flow delta_mu with R + A delta_mu = mu; any will do.
:func:`flow_by_transport` (Algorithm 2) gives one of the least l1 norm, which is W1(R, mu); :func:`flow_by_tree` gives
one in closed form, without a solver.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.distance import (
    EXACT_MASS_TOLERANCE,
    TransportPlan,
    balance,
    channel_masses,
    check_measures,
    transport_plan,
)

REFERENCES: tuple[str, ...] = ("uniform-random", "point", "flat", "image")


def make_reference(
    kind: str,
    grid: Grid,
    mass: Tensor,  # (B,) or (B, C)
    *,
    seed: int = 0,
    images: Tensor | None = None,
    pixel: tuple[int, int] | None = None,
) -> Tensor:
    """References of the given masses, float64 (B, C, H, W).

    One pattern, which depends on ``kind``, ``grid`` and ``seed`` only, is scaled to the mass of each image of
    the batch, so a result does not depend on how images are batched.

    Args:
        kind: "uniform-random" (pixels uniform in [0, 1]), "point" (one pixel a channel), "flat" (constant),
            or "image" (``images``, the pattern of each entry of the batch).
        mass: mass of each channel, (B, C); or of each image, (B,), shared equally between the channels.
        seed: of "uniform-random", and of "point" without a pixel.
        images: only for "image": (B, C, H, W), or one for all: (1, C, H, W) or (C, H, W).
        pixel: only for "point": (row, column); drawn at random, for each channel, if it is None.

    Raises:
        UnknownNameError: the kind is unknown.
        InvalidInputError: a mass is negative, not finite or, over an image, 0; a shape does not fit; the
            pixel is not on the grid; "image" without images, or a channel without mass that is to get some.
    """
    masses = _check_mass(mass, grid)
    if kind == "uniform-random":
        pattern = torch.rand(1, *grid.image_shape, generator=_generator(seed), dtype=torch.float64)
    elif kind == "point":
        pattern = _point(grid, seed, pixel)
    elif kind == "flat":
        pattern = torch.ones(1, *grid.image_shape, dtype=torch.float64)
    elif kind == "image":
        pattern = _image(grid, images, masses)
    else:
        raise UnknownNameError("reference", kind, REFERENCES)
    total = channel_masses(pattern)
    scale = torch.where(total > 0, masses / total, 0.0)
    return pattern * scale[..., None, None]


def _check_mass(mass: Tensor, grid: Grid) -> Tensor:
    shape = tuple(mass.shape) if isinstance(mass, Tensor) else type(mass).__name__
    if not isinstance(mass, Tensor) or mass.ndim not in (1, 2):
        raise InvalidInputError(f"mass of shape {shape}: expected a tensor (B,) or (B, {grid.channels})")
    masses = mass.detach().cpu().to(torch.float64)
    if masses.ndim == 1:
        masses = (masses / grid.channels)[:, None].expand(-1, grid.channels)
    if masses.shape[1] != grid.channels:
        raise InvalidInputError(f"mass of shape {shape}: expected (B,) or (B, {grid.channels})")
    wrong = ~((torch.isfinite(masses) & (masses >= 0)).all(-1) & (masses.sum(-1) > 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise InvalidInputError(
            f"mass of image {first}: given {mass[first].tolist()}, expected finite values >= 0 and a positive sum"
        )
    return masses


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _point(grid: Grid, seed: int, pixel: tuple[int, int] | None) -> Tensor:
    if pixel is None:
        area = grid.height * grid.width
        index = torch.randint(area, (grid.channels,), generator=_generator(seed))
    else:
        row, column = pixel
        if not (0 <= row < grid.height and 0 <= column < grid.width):
            raise InvalidInputError(
                f"pixel {pixel}: expected a row in 0..{grid.height - 1} and a column in 0..{grid.width - 1}"
            )
        index = torch.full((grid.channels,), row * grid.width + column)
    pattern = torch.zeros(grid.channels, grid.height * grid.width, dtype=torch.float64)
    pattern[torch.arange(grid.channels), index] = 1.0
    return pattern.reshape(1, *grid.image_shape)


def _image(grid: Grid, images: Tensor | None, masses: Tensor) -> Tensor:
    if images is None:
        raise InvalidInputError("reference 'image': given images=None, expected a tensor of images")
    pattern = grid.check_image(check_measures(images)).detach().cpu().to(torch.float64)
    if pattern.shape[0] not in (1, masses.shape[0]):
        raise InvalidInputError(f"images: given {pattern.shape[0]}, expected 1 or {masses.shape[0]}, as in mass")
    if ((channel_masses(pattern) == 0) & (masses > 0)).any():
        raise InvalidInputError("images: a channel has mass 0.0, expected a positive one where mass is positive")
    return pattern


def flow_from_plan(plan: TransportPlan, grid: Grid) -> Tensor:
    """The flow that carries out a transport plan, float64 (edges,); framework paper, Algorithm 2.

    Each mass goes along its row to its target's column, then along that column to its target's row. A move
    is a pair of differences (+ where it starts, - where it ends); running sums turn them into flows. With row
    sums R and column sums mu of the plan, R + A flow = mu and ||flow||_1 <= the plan's l1 cost, with equality
    if the plan is optimal for the l1 ground cost.

    Raises:
        InvalidInputError: the plan's images do not have the grid's shape.
    """
    if plan.image_shape != grid.image_shape:
        raise InvalidInputError(f"plan of image shape {plan.image_shape}: expected {grid.image_shape}")
    moves = plan.row != plan.column
    row, column, mass = plan.row[moves], plan.column[moves], plan.mass[moves]
    corner = row - row % grid.width + column % grid.width
    empty = torch.zeros(grid.pixels, dtype=torch.float64)
    along_rows = empty.index_add(0, row, mass).index_add(0, corner, -mass).reshape(grid.image_shape)
    along_columns = empty.index_add(0, corner, mass).index_add(0, column, -mass).reshape(grid.image_shape)
    return grid.join(along_rows.cumsum(-1)[..., :-1], along_columns.cumsum(-2)[..., :-1, :])


def flow_by_transport(
    references: Tensor,  # (B, C, H, W)
    images: Tensor,  # (B, C, H, W)
    grid: Grid | None = None,
    *,
    mass_tolerance: float = EXACT_MASS_TOLERANCE,
) -> Tensor:
    """A flow of the least l1 norm from each reference to its image, float64 (B, edges).

    R + A delta = mu in each channel, and ||delta||_1 = W1(R, mu) for the l1 ground cost, unnormalised
    (framework paper, Theorem 1 and Algorithm 2). ``images`` is scaled to the references' mass where the two
    differ by no more than ``mass_tolerance``.

    Raises:
        InvalidInputError: an image is not a measure of positive mass, or shapes or masses differ.
        SolverError: no checked optimal plan was found.
    """
    grid, references, images = _prepare(references, images, grid, mass_tolerance)
    flows = [
        flow_from_plan(transport_plan(reference, image, "l1", mass_tolerance=mass_tolerance), grid)
        for reference, image in zip(references, images, strict=True)
    ]
    return torch.stack(flows) if flows else torch.zeros(0, grid.edges, dtype=torch.float64)


minimal_flow = flow_by_transport


def flow_by_tree(
    references: Tensor,  # (B, C, H, W)
    images: Tensor,  # (B, C, H, W)
    grid: Grid | None = None,
    *,
    mass_tolerance: float = EXACT_MASS_TOLERANCE,
) -> Tensor:
    """A flow along a spanning tree from each reference to its image, float64 (B, edges), differentiable.

    R + A delta = mu in each channel. The tree is every row and the first column: each row passes what it has
    too much of to its first pixel, and the first column settles it between the rows. The norm is not the
    least. Errors and ``mass_tolerance`` are those of :func:`flow_by_transport`, without the solver's.
    """
    grid, references, images = _prepare(references, images, grid, mass_tolerance)
    demand = images - references
    from_here_on = demand.flip(-1).cumsum(-1).flip(-1)  # (B, C, H, W): demand of the rest of the row
    down = torch.zeros_like(demand[..., :-1, :])
    down[..., 0] = from_here_on[..., 0].flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return grid.join(from_here_on[..., 1:], down)


def _prepare(
    references: Tensor, images: Tensor, grid: Grid | None, mass_tolerance: float
) -> tuple[Grid, Tensor, Tensor]:
    references, images = check_measures(references, "references"), check_measures(images, "images")
    grid = Grid.of(images) if grid is None else grid
    grid.check_image(references, "references")
    grid.check_image(images, "images")
    return grid, *balance(references, images, mass_tolerance, ("reference", "image"))
