"""The question over the first layer's values instead of flows: fewer variables, and linear cuts for the ball.

f(nu) = tail(z) with z = W nu + b, and the ball is a convex set of images. So z is in the convex set
{z : a . z <= h(a) for all a}, h(a) = a . b + max of (a W) . nu over the ball, which the support function gives exactly
(theory, section 5; section 4 for vanilla). Any choice of directions a leaves a set that is larger, so "no
counterexample in it" is a proof. A point of it that is a counterexample may be the value of no image: then a direction
that separates it from the values of images is one more cut, and the question is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from flowverify.ball import Ball, Threat
from flowverify.bounds.backward import pull_back
from flowverify.bounds.intervals import Interval, intersect, propagate
from flowverify.bounds.relaxations import crosses_zero
from flowverify.errors import SolverError
from flowverify.export.networks import Parts, append_rows, margin_rows
from flowverify.export.program import Program, with_cuts, write_program
from flowverify.export.rounding import FloatArray
from flowverify.network import INPUT

MOST_CUTS = 256  # from hidden neurons, at the start
MIXTURES = 40  # steps towards the nearest value of an image
CLOSE = 1e-3  # of the squared distance: a direction that good is a cut
VIOLATED = 1e-6  # relative


@dataclass(frozen=True, eq=False)
class Refinement:
    """What a point that is no value of an image teaches: whether there is a new cut, and images near the point."""

    cut: bool
    images: Tensor  # (k, C, H, W), in the ball


class ReducedQuestion:
    """Is there a z within the cuts whose margin f_label - f_t is <= 0? One question for each t.

    Args:
        ball: one ball with l1 ground cost, float64; with positivity or without it.
    """

    def __init__(self, parts: Parts, ball: Ball, label: int) -> None:
        self.weight, self.bias = parts.weight, parts.bias
        self.ball, self.image = ball, ball.images[0]
        self.valid = Threat(ball.threat.ground).ball(ball.images, ball.budget)  # where counterexamples are
        self.graph = append_rows(parts.tail, margin_rows(parts.classes, label))
        self.middle = self.weight @ self.image.flatten() + self.bias
        self._intervals: dict[str, Interval] = {}
        self._directions = [torch.zeros(0, len(self.bias), dtype=torch.float64)]
        self._bound_values()
        identity = torch.eye(parts.classes - 1, dtype=torch.float64)
        rows, least = self._below(self.graph.output, -identity, self._intervals)
        reach = self.reach(rows)
        self.margins = -(reach + least)  # CROWN's lower bounds, (classes - 1,)
        shared = torch.cat(self._directions)
        reached = self.reach(shared)
        self.cuts = [
            (torch.cat([shared, rows[k, None]]), torch.cat([reached, reach[k, None]])) for k in range(len(rows))
        ]

    def reach(self, directions: Tensor) -> Tensor:
        """h(a) for rows a, (S, inputs) -> (S,)."""
        return directions @ self.middle + self._excess(directions @ self.weight)

    def program(self, target: int) -> Program:
        """The question about the margin at position ``target``, with all cuts found for it so far."""
        directions, reach = self.cuts[target]
        return with_cuts(self._program, target, directions.numpy(), reach.numpy())

    def refine(self, target: int, point: FloatArray) -> Refinement:
        """Adds the cuts that a counterexample (inputs,) violates: along its gradient, and towards the images."""
        wanted = torch.from_numpy(point)
        value = wanted.reshape(1, *self.graph.input_shape).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.graph(value)[0, target], value)
        vertex = self._furthest(-gradient.flatten())
        direction, nearest = self._nearest(wanted, vertex)
        directions = torch.stack([-gradient.flatten(), direction])
        reach = self.reach(directions)
        new = directions @ wanted > reach + VIOLATED * (1 + reach.abs())
        old, limits = self.cuts[target]
        self.cuts[target] = torch.cat([old, directions[new]]), torch.cat([limits, reach[new]])
        return Refinement(bool(new.any()), torch.stack([vertex, nearest]))

    def _excess(self, rows: Tensor) -> Tensor:
        """The maximum of c . (nu - image) over the ball for rows c over pixels, (S, pixels) -> (S,)."""
        return self.ball.support(rows.reshape(-1, *self.image.shape)).excess[0]

    def _bound_values(self) -> None:
        """Intervals of all that ReLUs read: exact for the input, the tighter of two methods behind it."""
        up, down = self._excess(self.weight), self._excess(-self.weight)
        shape = (1, *self.graph.input_shape)
        values: dict[str, Interval] = {INPUT: ((self.middle - down).reshape(shape), (self.middle + up).reshape(shape))}
        for node in self.graph.nodes:
            values[node.name] = propagate(node.operation, [values[name] for name in node.inputs])
            if any(isinstance(reader.operation, nn.ReLU) for reader in self.graph.consumers(node.name)):
                values[node.name] = self._tighten(node.name, values)
        read = {node.inputs[0] for node in self.graph.nodes if isinstance(node.operation, nn.ReLU)}
        self._intervals = {name: values[name] for name in (INPUT, *sorted(read - {INPUT}))}
        self._program = write_program(self.graph, self._intervals)

    def _tighten(self, name: str, values: dict[str, Interval]) -> Interval:
        lower, upper = (bound.flatten().clone() for bound in values[name])
        chosen = crosses_zero(values[name]).flatten().nonzero().flatten()
        if not chosen.numel():
            return values[name]
        identity = torch.zeros(len(chosen), len(lower), dtype=torch.float64)
        identity[torch.arange(len(chosen)), chosen] = 1
        low_rows, low = self._below(name, -identity, values)
        high_rows, high = self._below(name, identity, values)
        found = -(self.reach(low_rows) + low), self.reach(high_rows) + high
        lower[chosen], upper[chosen] = intersect(found, (lower[chosen], upper[chosen]))
        room = MOST_CUTS - sum(map(len, self._directions))
        open_ = (lower[chosen] < 0) & (upper[chosen] > 0)
        self._directions.append(torch.stack([low_rows[open_], high_rows[open_]], 1).flatten(0, 1)[: max(room, 0)])
        shape = values[name][0].shape
        return lower.reshape(shape), upper.reshape(shape)

    @torch.no_grad()
    def _below(self, name: str, rows: Tensor, intervals: dict[str, Interval]) -> tuple[Tensor, Tensor]:
        """Directions (S, inputs) and constants (S,) of functions of z that are nowhere less than rows of a value."""
        shaped = rows.reshape(1, len(rows), *self.graph.shape(name))
        found, constant = pull_back(self.graph, name, shaped, intervals)
        return found[INPUT][0].flatten(1), constant[0]

    def _furthest(self, direction: Tensor) -> Tensor:
        """The image of the ball with positivity whose value is furthest along a direction."""
        rows = (direction @ self.weight).reshape(1, *self.image.shape)
        found = self.valid.support(rows, maximiser=True).maximiser
        assert found is not None
        return found[0, 0]

    def _nearest(self, wanted: Tensor, vertex: Tensor) -> tuple[Tensor, Tensor]:
        """The direction from the nearest value of an image to a point, and that image.

        Frank-Wolfe, fully corrective: the best mixture of all images found, then the image furthest along the rest.
        """
        images = torch.stack([self.image, vertex])
        for _ in range(MIXTURES):
            points = images.flatten(1) @ self.weight.T + self.bias
            weights = _mixture(points.numpy(), wanted.numpy())
            rest = wanted - weights @ points
            nearest = torch.einsum("k,kchw->chw", weights, images)
            used = images[weights > 0]
            further = self._furthest(rest)
            gain = rest @ (self.weight @ (further - nearest).flatten())
            if gain <= CLOSE * rest @ rest:
                break
            images = torch.cat([used, further[None]])
        return rest, nearest


def _mixture(points: FloatArray, wanted: FloatArray) -> Tensor:
    """Weights w >= 0 of sum 1 with ||w @ points - wanted|| least."""
    scale = 1e3 * max(1.0, float(np.abs(points).max()))  # holds the sum near 1
    matrix = np.vstack([points.T, np.full((1, len(points)), scale)])
    try:
        weights = torch.from_numpy(nnls(matrix, np.append(wanted, scale), maxiter=100 * len(points))[0])
    except RuntimeError as error:
        raise SolverError(f"nonnegative least squares: {error}") from error
    return weights / weights.sum()
