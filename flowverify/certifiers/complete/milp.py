"""Certificates by mixed-integer programming: a second complete method, that shares no search with the first.

Its lower bounds need no solver's word. For rows G x <= h, columns 0 <= x <= u with a limit T on the sum of the first
ones (the flows), and any y >= 0,

    min c . x >= -y . h + T min(0, min over flows of r) + sum over the rest of min(r x_low, r x_high),  r = c + G^T y

(weak duality; theory, section 16). HiGHS's linear programs propose y; the right side is computed here, in float64, less
what rounding may have added to it (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Where it is
not enough, a binary is fixed to either side: a tree that covers all phases. A side is empty if the right side is
positive for c = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor, nn

from flowverify.ball import Threat, WassersteinBall
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.deadline import Deadline
from flowverify.certifiers.complete.program import Array, NetworkProgram, Objective, gamma
from flowverify.certifiers.options import DEFAULTS, CompleteOptions, ProgramSettings
from flowverify.errors import InvalidInputError, SolverError
from flowverify.network.rounding import TINY
from flowverify.quiet import quiet
from flowverify.results import Certificate, Verdict

_OPTIMAL, _INFEASIBLE = 0, 2  # SciPy's codes


@dataclass(frozen=True)
class _Node:
    """The least and largest value of each column, and the multipliers of the node above."""

    lower: Array
    upper: Array
    prices: Array


class DualProof:
    """Proofs for one program and budget.

    Args:
        budget: mass times pixels, at most that of the program's bounds.
        deadline: where no proof came out until then, there is none.
    """

    def __init__(
        self, program: NetworkProgram, budget: float, deadline: Deadline, settings: ProgramSettings = DEFAULTS.program
    ) -> None:
        self._program, self._deadline, self._settings = program, deadline, settings
        self._total = budget / program.unit
        self._system, self._right = program.system, program.right
        self._transposed = program.system.T.tocsr()
        self._sizes = abs(self._transposed).tocsr()
        self._gamma = gamma(2 * sum(program.system.shape) + 16)

    def least(self, objective: Objective, enough: float) -> float:
        """A lower bound on the objective over the ball and all phases; minus infinity where none came out in time.

        It exceeds ``enough`` if such a proof was found; the search ends where there can be none.
        """
        columns = len(self._program.upper)
        start = _Node(np.zeros(columns), self._program.upper, np.zeros(len(self._right)))
        open_, least = [start], np.inf
        while open_:
            node = open_.pop()
            bound = self._bound(objective, node.prices, node)
            if not bound > enough:
                if self._deadline.stop():
                    return -np.inf
                bound, prices, point = self._solve(objective, node)
                if not bound > enough:
                    neuron = None if point is None else self._choose(node, prices, point)
                    if neuron is None:
                        return float(bound)
                    open_ += self._split(node, neuron, prices)
                    continue
            least = min(least, bound)
        return float(least)

    def _solve(self, objective: Objective, node: _Node) -> tuple[float, Array, Array | None]:
        """The best bound of a node, its multipliers, and the optimum of its relaxation; infinite if it is empty."""
        columns, rows = len(self._program.upper), len(self._right)
        if not columns:
            return self._bound(objective, node.prices, node), node.prices, None
        spent = np.zeros((1, columns))
        spent[0, : self._program.flows] = 1.0
        system = sparse.vstack([self._system, sparse.csr_array(spent)]).tocsr()
        right = np.append(self._right, self._total)
        bounds = np.stack([node.lower, node.upper], 1)
        solution = self._linear_program(objective.cost, system, right, bounds)
        if solution.status == _OPTIMAL:
            prices = np.maximum(0.0, -solution.ineqlin.marginals[:rows])
            return self._bound(objective, prices, node), prices, solution.x
        if solution.status == _INFEASIBLE:
            # How far the rows are from holding together: the multipliers of that prove the node empty.
            slack = np.append(np.full(rows, -1.0), 0.0)[:, None]
            apart = self._linear_program(
                np.append(np.zeros(columns), 1.0), sparse.hstack([system, sparse.csr_array(slack)]).tocsr(), right,
                np.concatenate([bounds, [[0.0, np.inf]]]),
            )  # fmt: skip
            if apart.status == _OPTIMAL:
                prices = np.maximum(0.0, -apart.ineqlin.marginals[:rows])
                if self._bound(Objective(np.zeros(columns), 1.0, 0.0, 0.0), prices, node) > 0:
                    return np.inf, prices, None
        return -np.inf, node.prices, None

    def _bound(self, objective: Objective, prices: Array, node: _Node) -> float:
        """The right side of weak duality, rounded down; minus infinity where it is not a number."""
        flows = self._program.flows
        with np.errstate(all="ignore"):
            reduced = objective.cost + self._transposed @ prices
            reduced = reduced - self._gamma * (np.abs(objective.cost) + self._sizes @ prices)
            moved = self._total * min(0.0, float(reduced[:flows].min(initial=0.0)))
            rest = reduced[flows:]
            terms = np.minimum(rest * node.lower[flows:], rest * node.upper[flows:])
            paid = prices * self._right
            value = moved + terms.sum() - paid.sum()
            magnitude = abs(moved) + np.abs(terms).sum() + np.abs(paid).sum()
            value = objective.size * (value - self._gamma * magnitude) + objective.constant
            value = value - self._gamma * (abs(objective.size) * magnitude + abs(objective.constant)) - objective.error
        return float(value - TINY) if np.isfinite(value) else -np.inf

    def _choose(self, node: _Node, prices: Array, point: Array) -> int | None:
        """The neuron farthest from its ReLU, in what its upper lines cost the bound; None if all have one phase."""
        program = self._program
        free = node.lower[program.neurons[:, 1]] < node.upper[program.neurons[:, 1]]
        output = point[program.neurons[:, 0]]
        rows, scales = program.rows, program.scales
        above = (self._right - self._system @ point)[rows[:, 0]] * scales[:, 1] / scales[:, 0]  # a - z
        gap = np.where(free, np.minimum(output, above), 0.0)
        gap = np.where(gap > self._settings.apart, gap, 0.0)
        if not gap.any():
            return None
        weight = (prices[rows[:, 1:]] / scales[:, 2:]).sum(1) * scales[:, 0]
        score = gap * weight
        return int((score if score.any() else gap).argmax())

    def _split(self, node: _Node, neuron: int, prices: Array) -> list[_Node]:
        """Both sides: the output is z, or 0."""
        output, phase = self._program.neurons[neuron]
        raised, lowered = node.lower.copy(), node.upper.copy()
        raised[phase] = 1.0
        lowered[[phase, output]] = 0.0
        return [_Node(raised, node.upper, prices), _Node(node.lower, lowered, prices)]

    def _linear_program(self, cost: Array, system: Any, right: Array, bounds: Array) -> Any:
        tolerance, left = self._settings.solver_tolerance, self._deadline.seconds_left
        options = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance}
        if left < np.inf:
            options["time_limit"] = max(0.01, left)
        with quiet():
            return linprog(cost, A_ub=system, b_ub=right, bounds=bounds, method="highs", options=options)


THREAT = Threat()  # the only one that the program knows
MASS_ROUNDING = 1 + 1e-12  # a budget is a product with a sum over the pixels


class MilpCertifier(BaseCertifier):
    """The exact answer by HiGHS, on the flows that lead to images, with neurons' bounds from fine-tuned CROWN.

    For small networks, and as an oracle. HiGHS's word proves nothing: a certificate rests on

    - the neurons' bounds, which are CROWN's (:class:`flowverify.bounds.margins.MarginBounds`), widened by what
      rounding may change in them;
    - a bound for every other class, over a tree of phases, by weak duality in our own arithmetic, rounding included
      (:mod:`flowverify.certifiers.complete.milp`). HiGHS only proposes the multipliers.

    What HiGHS takes for proven and this does not confirm is ``unknown``, or ``timeout`` where time ran out.
    Counterexamples are replayed. With branch and bound (``complete``) it shares the support function, by which the
    neurons of the first layer are bounded, and the replay.

    Raises:
        UnsupportedOperationError: an activation other than ReLU, named.
        DependencyError: auto_LiRPA cannot be used.
    """

    batched = False

    def __init__(
        self,
        model: str | Path | nn.Module,
        method: str = "milp",
        *,
        options: CompleteOptions | None = None,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(model, method, "highs", input_shape)
        self.options = CompleteOptions() if options is None else options
        # Built once without bounds, so that what is unsupported comes out first.
        empty = [(torch.zeros(1, *n.shape), torch.zeros(1, *n.shape)) for n in self.network.activations]
        NetworkProgram(self.network, torch.ones(self.network.input_shape), 1.0, empty)
        self._bounds = MarginBounds(self.network, Threat(), "crown", dtype=torch.float64)

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        """Decides each image at the radius of ``ball``: one program for each other class.

        Raises:
            InvalidInputError: another ground cost than l1, or a cap.
            Interrupted: at Ctrl-C, with what is known until then.
        """
        return self._each(images, labels, ball.threat, ball.radius)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        """The least distance to a counterexample of each image; raises as :meth:`certify`."""
        return self._each(images, labels, threat or THREAT, None)

    def program(self, image: Tensor, radius: float) -> NetworkProgram:
        """The program for one image (C, H, W), with bounds that hold up to this radius.

        Raises:
            SolverError: bounds that are not finite.
        """
        image = image.double()
        budget = self._budget(image, radius)
        bounds = self._bounds.neurons(THREAT.ball(image, budget))
        return NetworkProgram(self.network, image, budget, bounds)

    def _each(self, images: Tensor, labels: Tensor, threat: Threat, radius: float | None) -> list[Certificate]:
        if threat != THREAT:
            raise InvalidInputError(
                f"method milp with ground cost {threat.ground!r} and cap {threat.cap}: expected l1 and no cap"
            )

        def one(image: Tensor, label: Tensor, prediction: Tensor) -> Certificate:
            if radius is None:
                return self._search(image, label, prediction)
            return self._decide(image, label, prediction, radius)

        return self.one_by_one(images, labels, threat, radius, one)

    def _budget(self, image: Tensor, radius: float) -> float:
        return float(THREAT.budget(radius, image[None])) * MASS_ROUNDING

    def _decide(self, image: Tensor, label: Tensor, prediction: Tensor, radius: float) -> Certificate:
        nearest, deadline = self._nearest(image, label), self.options.deadline()
        program, budget = self.program(image, radius), self._budget(image, radius)
        proof, least = self._proof(program, budget, deadline), math.inf
        for other in self._others(int(label)):
            if deadline.stop():
                least = -math.inf
                break
            found = program.least_margin(int(label), other, budget, self._share(deadline))
            if found.infeasible:
                raise SolverError("mixed-integer program: HiGHS finds the ball empty, which has the image itself")
            if found.image is not None:
                nearest.offer(torch.from_numpy(found.image).to(image)[None])
            if nearest.radius <= radius:
                break
            if least > 0:
                least = min(least, proof.least(program.margin(int(label), other), 0.0))
        verdict = Verdict.TIMEOUT if deadline.stop() else Verdict.UNKNOWN
        if nearest.radius <= radius:
            verdict = Verdict.FALSIFIED
        elif least > 0:
            verdict = Verdict.CERTIFIED
        margin = least if math.isfinite(least) else None
        return self._certified(nearest, label, prediction, verdict, radius, margin, deadline.elapsed)

    def _search(self, image: Tensor, label: Tensor, prediction: Tensor) -> Certificate:
        nearest, deadline = self._nearest(image, label), self.options.deadline()
        if self.options.adversary is not None:
            nearest.ask(self.options.adversary)
        nearest.descend()
        limit = THREAT.largest_radius(self.network.grid)
        upper = min(nearest.radius * (1 + 1e-6), limit)
        program = self.program(image, upper)
        least = upper
        for other in self._others(int(label)):
            if deadline.stop():
                least = 0.0
                break
            found = program.least_budget(int(label), other, self._budget(image, upper), self._share(deadline))
            cheapest = image.new_tensor([max(0.0, found.bound)])
            least = min(least, float(THREAT.radius(cheapest, image[None])))
            if found.image is not None:
                # The optimum is a tie; a little farther the class changes.
                point, centre = torch.from_numpy(found.image).to(image), image.flatten()
                nearest.offer(torch.stack([point, centre + (1 + 1e-6) * (point - centre)]), descend=True)
        radius, margin = 0.0, None
        first, farthest = min(least, nearest.radius), min(nearest.radius, limit)
        for trial in self._trials(first, limit) + (self._trials(farthest, limit) if first < farthest else []):
            margin = self._proven(program, image, int(label), trial, deadline)
            if margin is not None:
                radius = trial
                break
        verdict = Verdict.TIMEOUT if deadline.stop() else Verdict.UNKNOWN
        if margin is not None and (radius > 0 or limit == 0):
            verdict = Verdict.CERTIFIED
        seconds, note = deadline.elapsed, ""
        if radius < limit and not nearest.radius <= radius * (1 + self.options.tolerance):
            why = f"the nearest image by HiGHS, at radius {first:.6g}, is a tie to within its tolerances"
            note = f"bracket not closed: {'out of budget' if deadline.stop() else why}"
        return self._certified(nearest, label, prediction, verdict, radius, margin, seconds, note)

    def _proven(
        self, program: NetworkProgram, image: Tensor, label: int, radius: float, deadline: Deadline
    ) -> float | None:
        """The least margin that is proven at this radius, if it is positive for all classes."""
        proof, least = self._proof(program, self._budget(image, radius), deadline), math.inf
        for other in self._others(label):
            least = min(least, proof.least(program.margin(label, other), 0.0))
            if not least > 0:
                return None
        return least

    def _nearest(self, image: Tensor, label: Tensor) -> NearestCounterexample:
        return NearestCounterexample(
            self.subject, image, int(label), THREAT, settings=self.options.settings.counterexamples
        )

    def _proof(self, program: NetworkProgram, budget: float, deadline: Deadline) -> DualProof:
        return DualProof(program, budget, deadline, self.options.settings.program)

    def _share(self, deadline: Deadline) -> float | None:
        """The seconds for one program; None for no limit."""
        left = deadline.seconds_left
        return None if left == math.inf else self.options.settings.program.solver_share * left

    def _trials(self, radius: float, limit: float) -> list[float]:
        """Radii to prove, up to the distance of a nearest image; the limit itself, which nothing is beyond."""
        shares = self.options.settings.program.shares
        return ([limit] if radius >= limit else []) + [share * radius for share in shares if radius > 0]

    def _others(self, label: int) -> list[int]:
        return [t for t in range(self.network.num_classes) if t != label]

    def _certified(
        self,
        nearest: NearestCounterexample,
        label: Tensor,
        prediction: Tensor,
        verdict: Verdict,
        radius: float,
        margin: float | None,
        seconds: float,
        note: str = "",
    ) -> Certificate:
        upper = nearest.radius if math.isfinite(nearest.radius) else None
        return self.certificate(
            label, prediction, verdict, THREAT, radius, seconds, margin=margin, upper_radius=upper, note=note,
            witness=nearest.witness,
        )  # fmt: skip
