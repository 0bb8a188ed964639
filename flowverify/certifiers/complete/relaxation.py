"""Lower bounds of linear functions of a stage, by a Lagrangian dual that any multipliers make sound.

For rho_k in R^n and a ReLU a_k = relu(z_k) with z_k in [l, u], adding rho_k . (z_k(...) - z_k) changes nothing
where z_k is the network's own. Minimising over the pairs (z_k, a_k) of the ReLU's convex hull and over the ball
separately can only lose, and does so by a vertex of the hull: with the coefficient A on a,

    min over the hull of A a - rho z = min(-rho l, 0, (A - rho) u)     l < 0 < u
                                     = min((A - rho) l, (A - rho) u)   l >= 0, where a = z
                                     = min(-rho l, -rho u)             u <= 0, where a = 0

The coefficients of the stage below are then rho_k W_k. CROWN (Zhang et al. 2018) is rho = slope * A; alpha-CROWN
(Xu et al. 2021) optimises the slopes of unstable neurons with A > 0; the multipliers of split neurons, l or u = 0,
are beta-CROWN's (Wang et al. 2021): rho = A - beta or beta. At its best it is the LP relaxation (Ehlers 2017; dual:
Dvijotham et al. 2018). Proof: theory, section 16.

Joint limits, below, go beyond the relaxation of single neurons. To sum_i max(up_i z_i, -down_i z_i) <= limit belongs a
theta >= 0: theta times the difference of both sides may be added, which makes neuron i steeper, with U = sum of theta
up_i above 0 and D = sum of theta down_i below:

    min over the hull = min((rho + D) (-l), 0, (A + U - rho) u)     l < 0 < u

It is 0 for rho between -D and A + U, if there is any such: alpha in [0, 1] chooses it. Otherwise rho is the chord's,
that makes both ends equal. Neurons with one phase have rho = A + U or -D. To all, gamma is added, free on splits.

Rows of moves go beyond it as well, and further (theory, section 16): where A < 0, relu(z) <= value + gains . m holds
for all flows m of the ball, and may bound any share of A a; the hull has the rest. What is left at the image is then a
linear function of the flow, not of the image alone, whose least value knows that all rows share one budget.

What is computed may be off by rounding, and is lowered by as much. Any rho is sound, the rounded one too: only what is
computed from it matters; rows put in four times the coefficients that they bound, times P_k. With P_k the magnitudes of
:mod:`flowverify.network.rounding`, which are at least |z_k|, |l_k| and |u_k| (bounds are cut off there), b_k and W_k
weighted by rho_k, or by the specification, put in terms of at most |rho_k| . P_k in sum, with their own rounding; A is
a sum of such rho_k W_k, and what the hull's minimum or the ball makes of it is no more than that again; U and D put in
(U + D) . P_k, limits theta limit. gamma_n times the sum of all these is the lowering; a few units more for the minimum
over the hull are among the n.

**Joint limits** of a layer's neurons say that a ball of small budget cannot drive all of them to their extremes at
once. The relaxation of an unstable neuron with bounds l < 0 < u overrates its output by up to gap * (1 - max(z / u, z /
l)), gap = -l u / (u - l), whatever the others do; by nothing only at its extremes. For weights w >= 0 on m neurons,

    sum over i of w_i max(z_i / u_i, z_i / l_i) <= limit = max over sign patterns s of max over the ball of
                                                           sum over i of w_i z_i / (u_i if s_i > 0 else l_i)

holds on the ball: 2 ** m linear functions, whose maxima over the ball are exact in the first layer and bounded above
it. With w_i the gap times the coefficient of a bound, the cost of relaxing these neurons falls from sum w_i to the
limit, about half of it for eight neurons of a network on MNIST. A split leaves half of the patterns.

Relaxations of several neurons at once: k-ReLU (Singh et al. 2019), PRIMA (Mueller et al. 2022); these limits need no
hull, one multiplier each, and use what is special about a Wasserstein ball, that its budget is shared (theory,
section 17).

On the CPU, compiled kernels take a ReLU layer row by row: the relaxation's value, its gradient, and a step of Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.certifiers.complete.problem import Problem, SingleBall

OF_ROWS = 4  # times a neuron's magnitude: a row's value, its gains, and both with their coefficient


@dataclass
class JointLimits:
    """G limits for each of N nodes on one layer: sum over members i of max(up_i z_i, -down_i z_i) <= limit.

    Attributes:
        members: neurons, (N, G, m).
        up, down: nonnegative, (N, G, m).
        largest: of the sum where members have the signs of a pattern, (N, G, 2 ** m): bit j of the pattern's number
            says that member j is positive; -inf for patterns that splits have ruled out.
    """

    members: Tensor
    up: Tensor
    down: Tensor
    largest: Tensor

    @classmethod
    def none(cls, count: int, device: torch.device) -> JointLimits:
        """No limits."""
        nothing = torch.zeros(count, 0, 0, dtype=torch.float64, device=device)
        return cls(nothing.long(), nothing, nothing, nothing.new_zeros(count, 0, 1))

    @classmethod
    def join(cls, parts: Sequence[JointLimits]) -> JointLimits:
        """One after the other; all need the same G and m."""
        return cls(*(torch.cat(same) for same in zip(*(part._all for part in parts), strict=True)))

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.members, self.up, self.down, self.largest

    def __getitem__(self, chosen: Tensor | slice) -> JointLimits:
        return JointLimits(*(value[chosen] for value in self._all))

    def to(self, kind: torch.dtype) -> JointLimits:
        """In this precision."""
        return JointLimits(self.members, self.up.to(kind), self.down.to(kind), self.largest.to(kind))

    def closed(self) -> JointLimits:
        """The same limits with one pattern only, the largest: enough where nothing more is split."""
        return JointLimits(self.members, self.up, self.down, self.limit[..., None])

    @property
    def groups(self) -> int:
        return self.members.shape[1]

    @property
    def limit(self) -> Tensor:
        """(N, G); -inf where no pattern is left, which is where no image is."""
        return self.largest.amax(-1)

    def slopes(self, theta: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """sum over groups of theta (N, G) times up, and times down, for each of ``width`` neurons: (N, width) each."""
        blank, members = theta.new_zeros(len(theta), width), self.members.flatten(1)
        weight = theta[..., None]
        return (
            blank.scatter_add(1, members, (weight * self.up).flatten(1)),
            blank.scatter_add(1, members, (weight * self.down).flatten(1)),
        )

    def restrict(self, node: Tensor, neuron: Tensor, positive: bool) -> None:
        """Rules out, in place, the patterns where ``neuron`` (K,) of ``node`` (K,) has the other sign."""
        if self.groups and len(node):
            member, group, left = self._split(node, neuron, positive)
            self.largest[node[member], group[member]] = left[member]

    def limit_after(self, node: Tensor, neuron: Tensor, positive: bool) -> Tensor:
        """What ``limit`` would be, (K, G), with ``neuron`` (K,) of ``node`` (K,) split to one side."""
        result = self.limit[node]
        if self.groups and len(node):
            member, group, left = self._split(node, neuron, positive)
            result[member.nonzero().flatten(), group[member]] = left[member].amax(-1)
        return result

    def _split(self, node: Tensor, neuron: Tensor, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a neuron is a member of a group, of which, and what is left of its patterns, (K,) and (K, 2 ** m)."""
        size = self.members.shape[-1]
        place = (self.members[node] == neuron[:, None, None]).flatten(1).to(torch.uint8)
        member, first = place.max(1)
        group, own = first // size, first % size
        bit = (torch.arange(2**size, device=neuron.device) >> own[:, None]) & 1
        return member > 0, group, self.largest[node, group].masked_fill(bit == (0 if positive else 1), -torch.inf)


@dataclass
class Multipliers:
    """The dual variables of N bounds.

    Attributes:
        alpha, gamma: of the neurons' slopes and splits, (N, n_k) a layer.
        theta: of the joint limits, (N, G_k) a layer.
        share: of negative coefficients, what rows bound in place of the hull, in [0, 1], (N, n_k) a layer; or (N, 0).
        guess: of the ball's multiplier, (N,).
    """

    alpha: list[Tensor]
    gamma: list[Tensor]
    theta: list[Tensor]
    share: list[Tensor]
    guess: Tensor

    @property
    def variables(self) -> list[Tensor]:
        """All but the guess."""
        return [*self.alpha, *self.gamma, *self.theta, *self.share]

    @classmethod
    def of(cls, variables: Sequence[Tensor], guess: Tensor) -> Multipliers:
        """The inverse of :attr:`variables`."""
        layers = len(variables) // 4
        alpha, gamma, theta, share = (list(variables[kind * layers : (kind + 1) * layers]) for kind in range(4))
        return cls(alpha, gamma, theta, share, guess)

    def to(self, kind: torch.dtype) -> Multipliers:
        """In this precision, but for the guess."""
        return Multipliers.of([v.to(kind) for v in self.variables], self.guess)

    def __getitem__(self, chosen: Tensor | slice) -> Multipliers:
        return Multipliers.of([v[chosen] for v in self.variables], self.guess[chosen])


@dataclass(frozen=True)
class Bound:
    """Lower bounds (N,), the ball's multipliers (N,), minimisers (N, pixels) where asked for, and A by layer."""

    value: Tensor
    multiplier: Tensor
    point: Tensor | None
    coefficients: list[Tensor]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """N problems in which each ReLU below the stage is replaced by the convex hull of its values.

    Attributes:
        problem: has one specification for each.
        lower, upper: of the inputs of the ReLU layers below the stage, (N, n_k) each.
        signs: int8, +1 where split active, -1 inactive.
        joint: limits of each of these layers.
    """

    problem: Problem
    lower: list[Tensor]
    upper: list[Tensor]
    signs: list[Tensor]
    joint: list[JointLimits]

    @classmethod
    def of(
        cls,
        problem: Problem,
        lower: Sequence[Tensor],  # (N, n_k), or (n_k,) for all
        upper: Sequence[Tensor],
        signs: Sequence[Tensor] | None = None,
        joint: Sequence[JointLimits] = (),
    ) -> Relaxation:
        """Of the layers, those below the stage; nothing is split, and there are no joint limits, unless given."""
        count, stage = len(problem.specification), problem.stage
        lower, upper = ([v.expand(count, -1) for v in group[:stage]] for group in (lower, upper))
        signs = [torch.zeros_like(v, dtype=torch.int8) for v in lower] if signs is None else list(signs[:stage])
        limits = list(joint[:stage]) or [JointLimits.none(count, problem.specification.device)] * stage
        return cls(problem, lower, upper, signs, limits)

    def __len__(self) -> int:
        return len(self.problem.specification)

    def __getitem__(self, chosen: Tensor) -> Relaxation:
        lower, upper, signs = ([v[chosen] for v in group] for group in (self.lower, self.upper, self.signs))
        return Relaxation(self.problem.rows(chosen), lower, upper, signs, [limits[chosen] for limits in self.joint])

    def reduced(self, kind: torch.dtype = torch.float32) -> Relaxation:
        """The same of the reduced problem, in this precision."""
        lower, upper = ([v.to(kind) for v in group] for group in (self.lower, self.upper))
        limits = [own.closed().to(kind) for own in self.joint]
        return Relaxation(self.problem.reduced(kind), lower, upper, self.signs, limits)

    @property
    def compiled(self) -> bool:
        """Whether kernels on the CPU do the work."""
        return self.problem.settings.compiled and self.problem.specification.device.type == "cpu"


def initial_multipliers(
    lower: Sequence[Tensor], upper: Sequence[Tensor], count: int, share: float | None = None
) -> Multipliers:
    """CROWN's choice of slopes, nothing for splits, no joint limits; bounds (n_k,) or (N, n_k).

    Args:
        share: of rows; None where there are none.
    """
    alpha = [
        (high > -low).to(low.dtype).expand(count, low.shape[-1]).clone() for low, high in zip(lower, upper, strict=True)
    ]
    guess = torch.zeros(count, dtype=torch.float64, device=alpha[0].device if alpha else None)
    nothing = [a.new_zeros(count, 0) for a in alpha]
    shares = nothing if share is None else [torch.full_like(a, share) for a in alpha]
    return Multipliers(alpha, [torch.zeros_like(a) for a in alpha], nothing, shares, guess)


def relax(
    coefficient: Tensor,
    lower: Tensor,
    upper: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    up: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """rho (N, n) and the constants (N,) of one ReLU layer for coefficients A (N, n) on its outputs, with U and D."""
    active, inactive = lower >= 0, upper <= 0
    unstable = ~(active | inactive)
    least, most = torch.zeros_like(coefficient) - down, coefficient + up
    chord = (upper * most - lower * least) / (upper - lower).clamp(min=1e-300)
    free = torch.where(most < least, chord, least + alpha * (most - least))
    rho = torch.where(active, most, torch.where(unstable, free, least)) + gamma
    below = torch.where(active, most - rho, least - rho) * lower
    above = torch.where(inactive & ~active, least - rho, most - rho) * upper
    # Where both ends agree, at gamma = 0 or between the lines, the gradient is that of the side to which to go.
    constant = torch.where((below < above) | ((below == above) & active), below, above)
    constant = torch.where(unstable & (constant >= 0), 0.0, constant)
    # The comparisons pass over what is not a number, and that proves nothing.
    return rho, torch.where(torch.isnan(lower + upper), torch.nan, constant).sum(-1)


def left_to_rows(
    relaxation: Relaxation, coefficients: Tensor, multipliers: Multipliers, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The coefficients (N, n) that are left to the hull, and those that rows bound, (N, K) and nowhere positive."""
    above, share = relaxation.problem.above, multipliers.share[layer]
    if above is None or not share.shape[1]:
        return coefficients, None
    index = above.index[layer]
    own = coefficients[:, index]
    open_ = (relaxation.lower[layer][:, index] < 0) & (relaxation.upper[layer][:, index] > 0)
    part = torch.where(open_, own * share[:, index], 0.0).clamp(max=0)
    return coefficients.index_add(1, index, -part), part


@dataclass(frozen=True)
class Linear:
    """A linear lower bound: constant (N,) + on_image (N, pixels) . nu + gains (N, ways, C, H, W) . m.

    Attributes:
        coefficients: A_k (N, n_k) of each layer.
        gains: of the flows m that lead to nu; None without rows.
        size: the absolute values of all terms in two parts, first + reach * second, (N, 2); None without rounding.
    """

    constant: Tensor
    on_image: Tensor
    coefficients: list[Tensor]
    gains: Tensor | None
    size: Tensor | None


def gains_of(relaxation: Relaxation, parts: Sequence[Tensor | None]) -> Tensor | None:
    """What rows add to the flows' gains, given the coefficients (N, K_k) that they bound in each layer."""
    taken = [part for part in parts if part is not None]
    if not taken:
        return None
    above = relaxation.problem.above
    assert above is not None
    rows = above.below(len(parts)).gains
    return (torch.cat(taken, 1) @ rows.flatten(1)).reshape(-1, *rows.shape[1:])


def linear_bound(relaxation: Relaxation, multipliers: Multipliers) -> Linear:
    """A linear function of image and flow below specification . z_stage, wherever the neurons' bounds hold."""
    problem = relaxation.problem
    maps, stage, specification = problem.maps, problem.stage, problem.specification
    constant = specification @ maps.stages[stage].bias
    carried = {source: specification @ weight for source, weight in maps.stages[stage].weights.items()}
    coefficients: list[Tensor] = [specification] * stage
    parts: list[Tensor | None] = [None] * stage
    known = None if maps.rounding is None else maps.rounding.magnitudes
    size = None if known is None else specification.detach().abs() @ known[stage]
    for index in range(stage - 1, -1, -1):
        own = carried.pop(index + 1, None)
        if own is None:
            own = torch.zeros_like(multipliers.alpha[index])
        coefficients[index] = own
        hull, part = left_to_rows(relaxation, own, multipliers, index)
        parts[index] = part
        rho, term, steepness, limited = _relax_layer(relaxation, hull, multipliers, index)
        constant = constant + term + rho @ maps.stages[index].bias
        if size is not None and known is not None:
            size += (rho.detach().abs() + steepness.detach()) @ known[index]
            size[:, 0] += limited.detach()
        if part is not None and problem.above is not None:
            constant = constant + part @ problem.above.values[index]
            if size is not None and known is not None:
                size += OF_ROWS * part.detach().abs() @ known[index][problem.above.index[index]]
        for source, weight in maps.stages[index].weights.items():
            more = rho @ weight
            carried[source] = carried[source] + more if source in carried else more
    on_image = carried.get(0)
    if on_image is None:
        on_image = specification.new_zeros(len(specification), maps.pixels)
    return Linear(constant, on_image, coefficients, gains_of(relaxation, parts), size)


def _relax_layer(
    relaxation: Relaxation, coefficients: Tensor, multipliers: Multipliers, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rho (N, n), constants (N,), U + D (N, n) and sizes of joint limits (N,); compiled where no gradient is wanted."""
    lower, upper, limits = relaxation.lower[layer], relaxation.upper[layer], relaxation.joint[layer]
    alpha, gamma, theta = (group[layer] for group in (multipliers.alpha, multipliers.gamma, multipliers.theta))
    theta = theta[:, : limits.groups]
    # A limit of -inf, which holds nowhere, makes an infinite bound, whatever is rounded.
    used = (theta > 0) & torch.isfinite(limits.limit)
    limited = torch.where(used, theta * limits.limit.abs(), 0.0).sum(1)
    if not relaxation.compiled or any(value.requires_grad for value in (coefficients, alpha, gamma, theta)):
        slopes = limits.slopes(theta, coefficients.shape[1])
        rho, term = relax(coefficients, lower, upper, alpha, gamma, *slopes)
        return rho, term - torch.where(theta > 0, theta * limits.limit, 0.0).sum(1), slopes[0] + slopes[1], limited
    wide = [v.expand_as(coefficients).contiguous().numpy() for v in (lower, upper, alpha, gamma)]
    sums = limits.members, limits.up, limits.down, limits.limit, theta
    rho, steeper, flatter = (torch.empty_like(coefficients) for _ in range(3))
    term = coefficients.new_zeros(len(coefficients), dtype=torch.float64)
    relax_rows(
        coefficients.contiguous().numpy(), *wide, *(v.contiguous().numpy() for v in sums), rho.numpy(),
        steeper.numpy(), flatter.numpy(), term.numpy(),
    )  # fmt: skip
    return rho, term, steeper + flatter, limited


def lower_bound(
    relaxation: Relaxation, multipliers: Multipliers, *, tolerance: float = 1e-9, point: bool = False
) -> Bound:
    """Lower bounds of specification . z_stage over the ball, rounding included; differentiable in ``multipliers``.

    Args:
        tolerance: of the minimum over the ball; the bound is sound at any.
    """
    maps, ball = relaxation.problem.maps, relaxation.problem.ball
    linear = linear_bound(relaxation, multipliers)
    constant = linear.constant
    if linear.size is not None and maps.rounding is not None:
        constant = constant - maps.rounding.gamma * (linear.size[:, 0] + ball.reach * linear.size[:, 1])
    if linear.on_image.requires_grad and torch.is_grad_enabled():
        least, multiplier, nearest = _Concretise.apply(  # type: ignore[no-untyped-call]
            linear.on_image, linear.gains, ball, multipliers.guess, tolerance
        )
        return Bound(constant + least, multiplier, nearest, linear.coefficients)
    found = ball.minimum(linear.on_image, multipliers.guess, tolerance, point, linear.gains)
    return Bound(constant + found.value, found.multiplier, found.point, linear.coefficients)


class _Concretise(torch.autograd.Function):
    """The minimum over the ball; by Danskin's theorem its gradient in c is the minimiser, in gains its flow."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, gains: Tensor | None, ball: SingleBall, guess: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = ball.minimum(coefficients, guess, tolerance, True, gains)
        assert found.point is not None
        ctx.save_for_backward(found.point, found.flow)
        ctx.mark_non_differentiable(found.multiplier, found.point)
        return found.value, found.multiplier, found.point

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        point, flow = ctx.saved_tensors
        of_gains = None if flow is None else gradient.reshape(-1, *[1] * (flow.ndim - 1)) * flow
        return gradient[:, None] * point, of_gains, None, None, None


Array = NDArray[Any]

HUGE = 1e30  # in place of the gradient of a limit that no pattern keeps to


@numba.njit(nogil=True, cache=True)
def _steepen(members: Array, up: Array, down: Array, theta: Array, steeper: Array, flatter: Array) -> None:
    """U and D of one node, from its joint limits."""
    steeper[:] = 0
    flatter[:] = 0
    for group in range(theta.size):
        for member in range(members.shape[1]):
            neuron = members[group, member]
            steeper[neuron] += theta[group] * up[group, member]
            flatter[neuron] += theta[group] * down[group, member]


@numba.njit(nogil=True, cache=True)
def relax_rows(
    coefficients: Array, lower: Array, upper: Array, alpha: Array, gamma: Array,
    members: Array, up: Array, down: Array, limit: Array, theta: Array,
    rho: Array, steeper: Array, flatter: Array, constant: Array,
) -> None:  # fmt: skip
    """Writes rho, U and D (N, n), and adds to the constants (N,); joint limits are (N, G, m) and (N, G)."""
    zero = coefficients.dtype.type(0)
    for row in range(coefficients.shape[0]):
        _steepen(members[row], up[row], down[row], theta[row], steeper[row], flatter[row])
        total = 0.0
        for group in range(theta.shape[1]):
            if theta[row, group] > 0:
                total -= theta[row, group] * limit[row, group]
        for neuron in range(coefficients.shape[1]):
            low, high = lower[row, neuron], upper[row, neuron]
            least = -flatter[row, neuron]
            most = coefficients[row, neuron] + steeper[row, neuron]
            active, inactive = low >= 0, high <= 0
            if active:
                free = most
            elif inactive:
                free = least
            elif most < least:
                free = (high * most - low * least) / (high - low)
            else:
                free = least + alpha[row, neuron] * (most - least)
            slope = free + gamma[row, neuron]
            rho[row, neuron] = slope
            below = ((most if active else least) - slope) * low
            above = ((least if inactive and not active else most) - slope) * high
            value = min(below, above)
            if not active and not inactive:
                value = min(value, zero)
            if np.isnan(low + high):  # min would pass over it, and what is not a number proves nothing
                total = np.nan
            total += value
        constant[row] += total


@numba.njit(nogil=True, cache=True)
def relax_gradients(
    coefficients: Array, lower: Array, upper: Array, alpha: Array,
    members: Array, up: Array, down: Array, limit: Array, theta: Array,
    rho: Array, steeper: Array, flatter: Array, read: Array,
    output: Array, for_alpha: Array, for_gamma: Array, for_theta: Array,
) -> None:  # fmt: skip
    """The way back: from ``read``, the gradient in rho but for the constants, to those in A and the multipliers.

    ``read`` is what the layer reads at the minimiser, in the relaxation; the gradient in A is what it puts out.
    """
    zero = coefficients.dtype.type(0)
    one = coefficients.dtype.type(1)
    for row in range(coefficients.shape[0]):
        for group in range(theta.shape[1]):
            for_theta[row, group] = max(-limit[row, group], -HUGE) if limit[row, group] > -HUGE else HUGE
        for neuron in range(coefficients.shape[1]):
            low, high, slope = lower[row, neuron], upper[row, neuron], rho[row, neuron]
            least = -flatter[row, neuron]
            most = coefficients[row, neuron] + steeper[row, neuron]
            active, inactive = low >= 0, high <= 0
            below = ((most if active else least) - slope) * low
            above = ((least if inactive and not active else most) - slope) * high
            by_slope, by_least, by_most = read[row, neuron], zero, zero
            if active or inactive or min(below, above) < 0:
                # At gamma = 0 both ends agree; the side to which gamma can go from there is the one that counts.
                if below < above or (below == above and active):
                    by_slope -= low
                    if active:
                        by_most += low
                    else:
                        by_least += low
                else:
                    by_slope -= high
                    if inactive and not active:
                        by_least += high
                    else:
                        by_most += high
            for_gamma[row, neuron] = by_slope
            for_alpha[row, neuron] = zero
            if active:
                by_most += by_slope
            elif inactive:
                by_least += by_slope
            elif most < least:
                share = high / (high - low)
                by_most += share * by_slope
                by_least += (one - share) * by_slope
            else:
                for_alpha[row, neuron] = by_slope * (most - least)
                by_most += alpha[row, neuron] * by_slope
                by_least += (one - alpha[row, neuron]) * by_slope
            output[row, neuron] = by_most
            steeper[row, neuron] = by_most
            flatter[row, neuron] = -by_least
        for group in range(theta.shape[1]):
            for member in range(members.shape[2]):
                neuron = members[row, group, member]
                for_theta[row, group] += up[row, group, member] * steeper[row, neuron]
                for_theta[row, group] += down[row, group, member] * flatter[row, neuron]


@numba.njit(nogil=True, cache=True)
def adam_step(
    value: Array, gradient: Array, mean: Array, square: Array, first: float, second: float, rate: float,
    first_bias: float, second_bias: float, lowest: float, highest: float,
) -> None:  # fmt: skip
    """One step uphill, in place, within [lowest, highest]."""
    kind = value.dtype.type
    keep, add, keep_square, add_square = kind(first), kind(1 - first), kind(second), kind(1 - second)
    pace, unbias, small = kind(rate / first_bias), kind(1 / second_bias), kind(1e-8)
    low, high = kind(lowest), kind(highest)
    for row in range(value.shape[0]):
        for place in range(value.shape[1]):
            slope = gradient[row, place]
            average = keep * mean[row, place] + add * slope
            spread = keep_square * square[row, place] + add_square * slope * slope
            mean[row, place], square[row, place] = average, spread
            moved = value[row, place] + pace * average / ((spread * unbias) ** kind(0.5) + small)
            value[row, place] = min(max(moved, low), high)


@numba.njit(nogil=True, cache=True)
def adam_step_on_sides(
    value: Array, gradient: Array, mean: Array, square: Array, sign: Array, first: float, second: float, rate: float,
    first_bias: float, second_bias: float,
) -> None:  # fmt: skip
    """As :func:`adam_step` for gamma: -beta where z >= 0 and beta where z <= 0, beta >= 0; 0 where nothing is split."""
    kind = value.dtype.type
    keep, add, keep_square, add_square = kind(first), kind(1 - first), kind(second), kind(1 - second)
    pace, unbias, small, zero = kind(rate / first_bias), kind(1 / second_bias), kind(1e-8), kind(0)
    for row in range(value.shape[0]):
        for place in range(value.shape[1]):
            side = sign[row, place]
            if side == 0:
                value[row, place] = zero
                continue
            slope = gradient[row, place]
            average = keep * mean[row, place] + add * slope
            spread = keep_square * square[row, place] + add_square * slope * slope
            mean[row, place], square[row, place] = average, spread
            moved = value[row, place] + pace * average / ((spread * unbias) ** kind(0.5) + small)
            value[row, place] = min(moved, zero) if side > 0 else max(moved, zero)
