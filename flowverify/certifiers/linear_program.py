"""Linear classifiers by linear programming (framework paper, Lemma 8): the reference for the exact radius."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowverify.certifiers.linear import HalfSpaces, LinearRadius
from flowverify.errors import DependencyError, SolverError
from flowverify.grid import Grid
from flowverify.quiet import quiet

REACHED = 1e-5  # of the margin: a flow that misses it by more reaches no other class


class LinearProgram:
    """min ||delta||_1 subject to x + A delta >= 0 and (A^T w) . delta >= m, for one grid.

    The problem is Lemma 8's with the image as its own reference (R = x, delta_x = 0), which any other
    reference only shifts. It is built and compiled once; image, normal and margin are parameters.

    Raises:
        DependencyError: cvxpy or HiGHS is not installed.
    """

    def __init__(self, grid: Grid) -> None:
        try:
            import cvxpy
            import highspy  # noqa: F401
        except ImportError as error:
            raise DependencyError(
                f"linear programs need cvxpy and HiGHS ({error}): pip install cvxpy highspy"
            ) from error
        self._cvxpy = cvxpy
        self._incidence = grid.incidence_scipy()
        pixels, edges = self._incidence.shape
        self._grid = grid
        self._image = cvxpy.Parameter(pixels, nonneg=True)
        self._gain = cvxpy.Parameter(edges)
        self._margin = cvxpy.Parameter(nonneg=True)
        self._flow = cvxpy.Variable(edges)
        self._problem = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.norm1(self._flow)),
            [self._image + self._incidence @ self._flow >= 0, self._gain @ self._flow >= self._margin],
        )

    def solve(
        self, image: NDArray[np.float64], normal: NDArray[np.float64], margin: float
    ) -> tuple[float, NDArray[np.float64]]:
        """The least ||delta||_1 and its delta, for flattened image and normal.

        Raises:
            SolverError: the solver stopped in any state but optimal; the message gives the state.
        """
        # HiGHS's tolerances are absolute: mass and gains are counted in units of their own, which round nothing.
        gain = self._incidence.T @ normal
        unit, steepest = _power_of_two(float(image.sum())), _power_of_two(float(np.abs(gain).max(initial=0.0)))
        self._image.value = image / unit
        self._gain.value = gain / steepest
        self._margin.value = margin / steepest / unit
        try:
            with quiet():
                self._problem.solve(solver=self._cvxpy.HIGHS)
        except self._cvxpy.error.SolverError as error:
            raise SolverError(f"linear program: HiGHS failed: {str(error).splitlines()[0]}") from error
        status: str = self._problem.status
        if status != self._cvxpy.OPTIMAL:
            raise SolverError(f"linear program: HiGHS ended with status {status!r}, expected 'optimal'")
        flow = np.asarray(self._flow.value) * unit
        if float(gain @ flow) < margin * (1 - REACHED):
            raise SolverError(
                f"linear program: HiGHS's flow gains {float(gain @ flow):g}, expected the margin, {margin:g}"
            )
        return float(self._problem.value) * unit, flow


def _power_of_two(size: float) -> float:
    """The power of two just above a number; 1 for 0."""
    return math.ldexp(1.0, math.frexp(size)[1]) if size > 0 else 1.0


def program_radius(spaces: HalfSpaces, program: LinearProgram | None = None) -> LinearRadius:
    """Lemma 8 as written: one linear program for each image and class, the smallest wins.

    A class that no image of equal mass reaches, because the margin exceeds what moving all mass to the best
    pixel gains, is at infinite distance; its program would be infeasible and is not posed.

    Raises:
        DependencyError: cvxpy or HiGHS is not installed.
        SolverError: a program that should have an optimum was not solved; the message gives the status.
    """
    grid = Grid.of(spaces.images)
    program = LinearProgram(grid) if program is None else program
    count, others = spaces.margins.shape
    distances = torch.full((count, others), torch.inf, dtype=torch.float64)
    points: Any = spaces.images[:, None].expand_as(spaces.normals).clone()
    best_gain = (spaces.images[:, None].flatten(3).sum(-1) * spaces.normals.flatten(3).amax(-1)).sum(-1)
    best_gain = best_gain - (spaces.images[:, None] * spaces.normals).flatten(2).sum(-1)
    for index in range(count):
        for other in range(others):
            margin = float(spaces.margins[index, other])
            if margin <= 0:
                distances[index, other] = 0
            elif margin <= float(best_gain[index, other]):
                value, flow = program.solve(
                    spaces.images[index].flatten().numpy(), spaces.normals[index, other].flatten().numpy(), margin
                )
                distances[index, other] = value
                points[index, other] += grid.divergence(torch.from_numpy(flow))
    by_class = distances / spaces.mass[:, None]
    radius, position = by_class.min(1)
    rows = torch.arange(count)
    nearest = points[rows, position].clamp(min=0)
    return LinearRadius(radius, by_class, spaces.classes[rows, position], nearest)
