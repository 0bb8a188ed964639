"""Linear classifiers: certified radii in closed form, exactly, and by linear programming.

For f(x) = W x + b, an image x of label y and a class t, let w_t = W_t - W_y (as an image) and the margin
m_t = f_y(x) - f_t(x) > 0. Class t is reached by the images nu with w_t . (nu - x) >= m_t, a half-space, and
every radius below is min over t of a distance to it, divided by the mass of x. Source: framework paper (2021),
Appendix A.

The proof of the paper's Lemma 7 takes the edge j at which the signed coefficient (A^T w_t)_j is largest. It has
to be the largest absolute value, as the statement of the lemma has it: flow goes either way along an edge. With
the signed choice the radius is too large wherever the steepest edge points the other way (theory, section 8).

Linear programming (Lemma 8) is the reference for the exact radius. A certificate is that radius, and an image that
shows it cannot be larger.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowverify.ball import Ball, Threat, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.radius import confirm
from flowverify.errors import DependencyError, InvalidInputError, SolverError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.network import Network, affine_rows, is_affine, operation_name
from flowverify.quiet import quiet
from flowverify.registry import LINEAR, METHODS
from flowverify.results import Certificate, Verdict
from flowverify.transport.compiled import Backend
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.ground import parse_ground
from flowverify.transport.support import least_budget, nearest_image
from flowverify.witness import replay

CAPPED_TOLERANCE = 1.005  # of the search of radii with a cap
CAPPED_STEP = 1.15  # from radius to radius, until one fails


@dataclass(frozen=True)
class HalfSpaces:
    """The half-spaces of the classes t != y, in ascending order of t, for each image of a batch (float64).

    Attributes:
        images: x, (B, C, H, W).
        mass: of each image, (B,).
        normals: w_t = W_t - W_y, (B, classes - 1, C, H, W).
        margins: m_t = f_y(x) - f_t(x), (B, classes - 1); not positive where x is misclassified.
        classes: t, (B, classes - 1).
    """

    images: Tensor
    mass: Tensor
    normals: Tensor
    margins: Tensor
    classes: Tensor


@dataclass(frozen=True)
class LinearRadius:
    """Radii of a linear classifier, in pixels on normalised images.

    Attributes:
        radius: min over t, (B,); 0 where misclassified, infinite where no image of equal mass changes the class.
        by_class: for each class, (B, classes - 1), in the order of the half-spaces.
        target: the class t that attains the radius, (B,).
        nearest: an image at that distance with f_t >= f_y (on the boundary), (B, C, H, W); None where the
            method has none. For the L1 and L2 norms on flows it need not be an image: pixels may be negative.
    """

    radius: Tensor
    by_class: Tensor
    target: Tensor
    nearest: Tensor | None


def check_affine(network: Network) -> None:
    """Raises UnsupportedOperationError, naming the layer, unless a network is affine."""
    for node in network.nodes:
        if not is_affine(node.operation):
            raise UnsupportedOperationError(
                f"linear certification: layer {node.name!r} ({operation_name(node.operation)}) is not affine; expected "
                "a network of affine layers only"
            )


def half_spaces(network: Network, images: Tensor, labels: Tensor) -> HalfSpaces:
    """The half-spaces of an affine network, computed in float64.

    Raises:
        UnsupportedOperationError: the network is not affine; the message names the layer that is not.
    """
    check_affine(network)
    weights, bias = affine_rows(network, network.output)
    images = images.double()
    weights, bias = weights.to(images.device), bias.to(images.device)
    logits = images.flatten(1) @ weights.T + bias
    count, classes = logits.shape
    everything = torch.arange(classes, device=images.device).expand(count, classes)
    others = everything[everything != labels[:, None]].reshape(count, classes - 1)
    normals = weights[others] - weights[labels][:, None]
    return HalfSpaces(
        images=images,
        mass=images.flatten(1).sum(1),
        normals=normals.reshape(count, classes - 1, *images.shape[1:]),
        margins=logits.gather(1, labels[:, None]) - logits.gather(1, others),
        classes=others,
    )


def vanilla_radius(spaces: HalfSpaces) -> LinearRadius:
    """Lemma 7: min over t of m_t / max_j |(A^T w_t)_j|, the distance in the L1 norm on flows.

    The nearest point moves all of the budget along the one steepest edge.
    """
    slope = lipschitz_constant(spaces.normals)
    distances = _positive(spaces.margins) / slope
    distances = torch.where(slope > 0, distances, torch.inf)
    return _least(spaces, distances, _steepest_edge(spaces))


def l2_radius(spaces: HalfSpaces) -> LinearRadius:
    """min over t of m_t / ||A^T w_t||_2: the distance in the L2 norm on flows (Figure 4, middle).

    As ||delta||_2 <= ||delta||_1, it is a W1 certificate too, and never larger than the vanilla one.
    """
    right, down = spaces.normals.diff(dim=-1), spaces.normals.diff(dim=-2)
    squared = right.square().flatten(2).sum(-1) + down.square().flatten(2).sum(-1)
    norm = squared.sqrt()
    distances = torch.where(norm > 0, _positive(spaces.margins) / norm, torch.inf)
    # The flow m A^T w / ||A^T w||^2, applied: x + m A A^T w / ||A^T w||^2.
    divergence = torch.zeros_like(spaces.normals)
    divergence[..., 1:] += right
    divergence[..., :-1] -= right
    divergence[..., 1:, :] += down
    divergence[..., :-1, :] -= down
    step = torch.where(squared > 0, _positive(spaces.margins) / squared, 0.0)
    return _least(spaces, distances, spaces.images[:, None] + step[..., None, None, None] * divergence)


def exact_radius(
    spaces: HalfSpaces, *, backend: Backend = "auto", ground: str = "l1", nearest: bool = True
) -> LinearRadius:
    """Lemma 8 without a solver: min over t of the exact W1 from x to the half-space among images nu >= 0.

    For the p-th power of a distance, the exact W_p.

    One :func:`~flowverify.transport.support.least_budget` for all images and classes. ``nearest`` is a
    nonnegative image of the mass of x at that distance; None where it is not asked for.
    """
    found = least_budget(spaces.normals, spaces.images, spaces.margins, backend=backend, ground=ground)
    result = _least(spaces, found.budget, None)
    cost = parse_ground(ground)
    result = replace(result, radius=cost.radius(result.radius), by_class=cost.radius(result.by_class))
    if not nearest:
        return result
    chosen = (spaces.classes == result.target[:, None]).nonzero(as_tuple=True)
    normals, budget, bracket = (value[chosen][:, None] for value in (spaces.normals, found.budget, found.bracket))
    image = nearest_image(normals, spaces.images, budget, bracket, backend=backend, ground=ground)
    return replace(result, nearest=image[:, 0])


def capped_radius(spaces: HalfSpaces, radius: Tensor, threat: Threat) -> Tensor:
    """Radii (B,) that hold for images below the cap of a threat, at least those that hold without, ``radius`` (B,).

    The largest, to ``CAPPED_TOLERANCE``, at which the bound of :mod:`flowverify.transport.support` is below every
    margin; lower bounds of the exact ones. What is infinite or 0 stays as it is.
    """
    ball = threat.unlimited(spaces.images)
    limit = threat.cost.budget(torch.tensor(threat.largest_radius(ball.grid), dtype=torch.float64))
    low = threat.cost.budget(radius.clone())
    high = torch.full_like(low, torch.inf)
    active = (torch.isfinite(low) & (low > 0) & (low < limit)).nonzero().flatten()
    while active.numel():
        trial = torch.where(torch.isinf(high[active]), low[active] * CAPPED_STEP, (low[active] + high[active]) / 2)
        found = ball[active].with_budget(trial * spaces.mass[active]).support(spaces.normals[active])
        holds = (found.excess < spaces.margins[active]).all(1)
        low[active[holds]] = trial[holds]
        high[active[~holds]] = trial[~holds]
        active = active[(high[active] > low[active] * CAPPED_TOLERANCE) & (low[active] < limit)]
    return threat.cost.radius(low)


def _positive(margins: Tensor) -> Tensor:
    return margins.clamp(min=0)


def _steepest_edge(spaces: HalfSpaces) -> Tensor:
    """x with m_t / |(A^T w_t)_j| of mass moved along the steepest edge j, up its slope."""
    images = spaces.images[:, None].expand_as(spaces.normals).clone()
    for axis in (-1, -2):
        if spaces.normals.shape[axis] == 1:
            continue
        difference = spaces.normals.diff(dim=axis)
        largest = difference.abs().flatten(2).amax(-1)
        steepest = (largest >= lipschitz_constant(spaces.normals)) & (largest > 0)
        flat = difference.flatten(2)
        edge = flat.abs().argmax(-1, keepdim=True)
        slope = flat.gather(-1, edge)
        amount = torch.where(steepest[..., None], _positive(spaces.margins)[..., None] / slope, 0.0)
        flow = torch.zeros_like(flat).scatter(-1, edge, amount).reshape(difference.shape)
        moved = torch.zeros_like(images)
        size = moved.shape[axis] - 1
        moved.narrow(axis, 1, size).add_(flow)
        moved.narrow(axis, 0, size).sub_(flow)
        untouched = (images == spaces.images[:, None]).flatten(2).all(-1)
        images = torch.where(untouched[..., None, None, None], images + moved, images)
    return images


def _least(spaces: HalfSpaces, distances: Tensor, points: Tensor | None) -> LinearRadius:
    by_class = distances / spaces.mass[:, None]
    radius, position = by_class.min(1)
    nearest = None
    if points is not None:
        nearest = points[torch.arange(len(points), device=points.device), position]
    target = spaces.classes.gather(1, position[:, None]).squeeze(1)
    return LinearRadius(radius, by_class, target, nearest)


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


INSIDE = 1 - 1e-9  # the exact radius itself is a tie: what is certified is below it, and confirmed there
ROUNDED = 1 - 1e-11  # radii are computed to this
STEPS = 4e-9  # relative, of the radii at which that is tried
BEYOND = 1 + 1e-6  # a witness this much farther is misclassified beyond doubt of rounding


class LinearCertifier(BaseCertifier):
    """Lemma 8 of the framework paper, without a solver ("linear") or by linear programs ("linear-lp").

    Certificates have both ends: ``radius`` is certified, and at ``upper_radius`` some image is on the boundary. What is
    certified rests on the support function, evaluated at the radius, and a bound on the rounding of it all; no
    solver's word counts.
    "linear" is exact for every ground cost; with a cap it certifies less than the exact radius, and there is no upper
    end. "linear-lp" knows l1: other balls are covered by l1 balls, without an upper end.

    Raises:
        UnknownNameError: another method.
        UnsupportedOperationError: the network is not affine; the message names the layer that is not.
        DependencyError: "linear-lp" without cvxpy or HiGHS.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "linear",
        *,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        METHODS.check_family(method, LINEAR)
        super().__init__(model, method, "exact", input_shape)
        sample = torch.ones(1, *self.network.input_shape)
        half_spaces(self.network, sample, torch.zeros(1, dtype=torch.int64))
        self._program = LinearProgram(self.network.grid) if method == "linear-lp" else None

    @classmethod
    def check_network(cls, network: Network) -> None:
        check_affine(network)

    def prepare(self, threat: Threat | None = None) -> None:
        super().prepare(threat)
        if self._program is None:
            label = torch.zeros(1, dtype=torch.int64)
            image = torch.ones(1, *self.network.input_shape, device=self.device)
            self.radii(image, label, (threat or Threat()).ground)

    def radii(self, images: Tensor, labels: Tensor, ground: str = "l1") -> LinearRadius:
        """Exact radii with nearest images; see :class:`~flowverify.certifiers.linear.LinearRadius`.

        Raises:
            InvalidInputError: "linear-lp" with another ground cost than l1.
        """
        images, labels = self.check(images, labels, Threat(ground))
        spaces = half_spaces(self.network, images, labels)
        if self._program is None:
            return exact_radius(spaces, ground=ground)
        if ground != "l1":
            raise InvalidInputError(f"method linear-lp with ground cost {ground!r}: expected l1")
        return program_radius(spaces, self._program)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The exact radius of each image, just inside it; the whole simplex counts as the longest way on the grid."""
        return self._certificates(images, labels, threat or Threat(), None)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Certified below the exact radius; falsified beyond it, if the witness holds when it is replayed."""
        return self._certificates(images, labels, ball.threat, ball.radius)

    def witness(self, ball: Ball, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) of these balls, and whether each is misclassified.

        The witness is the image of the ball that goes farthest beyond the boundary of the nearest class (with a cap,
        nearly the farthest), and is replayed; see :mod:`flowverify.witness`.
        """
        images, labels = self.check(ball.images, labels, ball.threat)
        spaces = half_spaces(self.network, images, labels)
        nearest = exact_radius(spaces, ground=ball.threat.ground)
        position = nearest.by_class.argmin(1)
        normal = spaces.normals[torch.arange(len(position)), position]
        ball = ball.threat.ball(spaces.images, ball.budget.to(images.device))
        image = ball.pull_back(ball.threat.repair(spaces.images, ball.best_moves(normal).image))
        return image, torch.isfinite(replay(self.subject, ball, labels, image))

    def _certificates(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> list[Certificate]:
        """Of this radius, or for None of the largest."""
        start = time.perf_counter()
        images, labels = self.check(images, labels, threat)
        if not len(images):
            return []
        predictions, correct = self.clean(images, labels)
        spaces = half_spaces(self.network, images, labels)
        left = spaces.margins - self.allowance(images)[:, None]
        sure = replace(spaces, margins=torch.where(torch.isnan(left), -torch.inf, left))
        proven = (sure.margins > 0).all(1)
        failures: dict[int, str] = {}
        radii = self._solve(spaces, Threat(threat.ground), failures)
        if self._program is None and threat.cap is None:
            # What a budget takes off a margin is concave in it: the radius shrinks by the margin's share, and more.
            share = (sure.margins / spaces.margins).nan_to_num(nan=0.0).clamp(0, 1) * ROUNDED
            lower = (torch.tensor(radii, dtype=torch.float64) * share.amin(1).cpu()).tolist()
        else:
            lower = self._solve(sure, threat, failures)
        limit = threat.largest_radius(self.network.grid)
        certified = self._confirmed(spaces, torch.tensor(lower, dtype=torch.float64) * INSIDE, limit, threat)
        native = self._program is None or threat.ground == "l1"
        falsified = torch.zeros(len(images), dtype=torch.bool)
        if radius is not None and native:
            beyond = [i for i, exact in enumerate(radii) if i not in failures and radius >= exact * BEYOND]
            beyond = [i for i in beyond if bool(correct[i])]
            if beyond:
                own = threat.ball(images[beyond], threat.budget(radius, images[beyond]))
                falsified[beyond] = self.witness(own, labels[beyond])[1].cpu()
        seconds = (time.perf_counter() - start) / len(images)
        result = []
        for index, exact in enumerate(radii):
            inside = certified[index]
            at = inside if radius is None else radius
            if not bool(correct[index]) or index in failures:
                verdict = Verdict.ERROR if bool(correct[index]) else Verdict.MISCLASSIFIED
                at = 0.0 if radius is None else radius
            elif bool(proven[index]) and at <= inside and (inside > 0 or radius is not None):
                verdict = Verdict.CERTIFIED
            else:
                verdict = Verdict.FALSIFIED if falsified[index] else Verdict.UNKNOWN
            known = native and threat.cap is None and index not in failures
            upper = exact if known and exact <= limit and bool(correct[index]) else None
            result.append(
                self.certificate(
                    labels[index],
                    predictions[index],
                    verdict,
                    threat,
                    at,
                    seconds,
                    upper_radius=upper,
                    note=failures.get(index, ""),
                )
            )
        return result

    def _confirmed(self, spaces: HalfSpaces, radius: Tensor, limit: float, threat: Threat) -> list[float]:
        """These radii (B,), lowered where need be until the support functions prove them."""

        def evaluate(index: Tensor, radii: Tensor) -> Tensor:
            index = index.to(spaces.images.device)
            ball = threat.ball(spaces.images[index], threat.budget(radii, spaces.images[index]))
            excess = ball.support(spaces.normals[index]).excess
            left = spaces.margins[index] - excess - self.allowance(ball.images, ball.budget)[:, None]
            return (left.amin(1) if left.shape[1] else torch.full_like(ball.budget, torch.inf)).cpu()

        radius = torch.nan_to_num(radius, nan=0.0, posinf=torch.inf).clamp(max=limit)
        return confirm(evaluate, radius, torch.zeros_like(radius), STEPS)[0].tolist()

    def _solve(self, spaces: HalfSpaces, threat: Threat, failures: dict[int, str]) -> list[float]:
        """Exact radii, or what a cap makes of them; a program that was not solved is a failure of its image."""
        if self._program is None:
            exact = exact_radius(spaces, ground=threat.ground, nearest=False).radius
            return [float(one) for one in (exact if threat.cap is None else capped_radius(spaces, exact, threat))]
        radii = [0.0] * len(spaces.images)
        for index in range(len(radii)):
            part = slice(index, index + 1)
            own = HalfSpaces(
                spaces.images[part], spaces.mass[part], spaces.normals[part], spaces.margins[part], spaces.classes[part]
            )
            try:
                radii[index] = threat.cost.from_l1(float(program_radius(own, self._program).radius))
            except SolverError as error:
                failures[index] = str(error)
        return radii
