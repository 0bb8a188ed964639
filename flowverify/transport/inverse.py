"""Right inverses of the flow application map: a flow delta_mu with R + A delta_mu = mu.

Framework paper (2021), section 2.2: any such flow will do. :func:`flow_by_transport` (Algorithm 2) gives one
of the least l1 norm, which is W1(R, mu); :func:`flow_by_tree` gives one in closed form, without a solver.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport.distance import (
    EXACT_MASS_TOLERANCE,
    TransportPlan,
    balance,
    check_measures,
    transport_plan,
)


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
