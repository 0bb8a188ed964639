"""Bounds of a network's values over Wasserstein balls through which its weights can be trained.

Values that are affine in the image are bounded by duality (theory, section 5) with one multiplier lambda for every row
and side, and by Lip(c) * eps where that is less: both are sound for every image, so what is trained is sound, but not
the tightest that the rows allow. Intervals above are those of certification (:mod:`flowverify.bounds.intervals`, Gowal
et al. 2018). The multipliers follow the weights: where moving the batch's mean image to the origins of its dilation
costs more than the batch's mean budget, lambda is too small.

In training one lambda a row serves all images, so the bounds of a batch are one matrix product.
The value at pixel i is c_j - lambda * d(i, j) for some j, its origin, so its derivative in c_j is 1.

Where each image has functions of its own, the least bound over a fixed set of shares of Lip(c) is taken, which is
enough for training. The gradient in c is where that lambda moves the mass of the image (Danskin's theorem).

On the CPU, compiled kernels dilate rows, sixteen at once, and remember where values came from. The scans are those of
:mod:`flowverify.transport.dilation`, with the rows side by side in the lanes of vector registers: buffers are laid out
(pixel, lane). Unsigned offsets keep the inner loops free of the handling of negative ones, which would keep them from
being vectorised.

Above the first layer, rows of moves do better. Intervals let every neuron spend the whole budget, so that they cannot
train convolutional networks, where thousands of neurons each have the worst that can be done to them. Rows of moves
(theory, section 21) share one budget. The flow that a row's maximum takes is its gradient (Danskin's theorem), and the
rows of a layer are products of those below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval, propagate
from flowverify.bounds.lifted.engine import LiftedBounds, _Batch
from flowverify.bounds.lifted.rows import Coefficients
from flowverify.bounds.relaxations import pull_back, relaxable
from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import INPUT, Network, Node, is_affine, operation_name
from flowverify.network.affine import columns
from flowverify.transport.dilation import dilate, lipschitz_constant
from flowverify.transport.support import support_value

Array = NDArray[Any]

LANES = 16


@numba.njit(nogil=True, cache=True)
def _relax(value: Array, origin: Array, price: Array, target: int, source: int) -> None:
    """Lets the pixel ``target`` of all lanes take the value of its neighbour ``source``, one step away."""
    to, of = np.uint64(target * LANES), np.uint64(source * LANES)
    for k in range(LANES):
        lane = np.uint64(k)
        here = value[to + lane]
        there = value[of + lane] - price[lane]
        origin_here = origin[to + lane]
        origin_there = origin[of + lane]
        better = there > here
        value[to + lane] = there if better else here
        origin[to + lane] = origin_there if better else origin_here


@numba.njit(nogil=True, cache=True)
def _scan(value: Array, origin: Array, price: Array, height: int, width: int) -> None:
    """Running maxima along the rows of the grid, then along its columns, forth and back."""
    plane = height * width
    for line in range(height):
        start = line * width
        for pixel in range(start + 1, start + width):
            _relax(value, origin, price, pixel, pixel - 1)
        for pixel in range(start + width - 2, start - 1, -1):
            _relax(value, origin, price, pixel, pixel + 1)
    for pixel in range(width, plane):
        _relax(value, origin, price, pixel, pixel - width)
    for pixel in range(plane - width - 1, -1, -1):
        _relax(value, origin, price, pixel, pixel + width)


@numba.njit(nogil=True, cache=True)
def _load(rows: Array, first: int, used: int, sign: float, value: Array) -> None:
    """(row, pixel) -> (pixel, lane), times the sign; idle lanes repeat the first row."""
    pixels = rows.shape[1]
    for lane in range(LANES):
        row = first + lane if lane < used else first
        for pixel in range(pixels):
            value[np.uint64(pixel * LANES + lane)] = sign * rows[row, pixel]


@numba.njit(nogil=True, cache=True)
def _reset(origin: Array, pixels: int) -> None:
    for pixel in range(pixels):
        start = np.uint64(pixel * LANES)
        for lane in range(LANES):
            origin[start + np.uint64(lane)] = pixel


@numba.njit(nogil=True, cache=True)
def _scan_channels(value: Array, origin: Array, price: Array, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    size = height * width * LANES
    for channel in range(channels):
        part = slice(channel * size, (channel + 1) * size)
        _scan(value[part], origin[part], price, height, width)


@numba.njit(nogil=True, cache=True)
def _compiled_rows(
    rows: Array,  # (R, pixels)
    multipliers: Array,  # (R,)
    sign: float,
    shape: tuple[int, int, int],
    dilated: Array,  # (R, pixels)
    origins: Array,  # (R, pixels) int32
) -> None:
    """Writes D_lambda(sign * row) for every row, and for every pixel the pixel that its value comes from."""
    pixels = rows.shape[1]
    value = np.empty(pixels * LANES, rows.dtype)
    origin = np.empty(pixels * LANES, np.int32)
    price = np.empty(LANES, rows.dtype)
    for first in range(0, rows.shape[0], LANES):
        used = min(LANES, rows.shape[0] - first)
        for lane in range(LANES):
            price[lane] = multipliers[first + lane if lane < used else first]
        _load(rows, first, used, sign, value)
        _reset(origin, pixels)
        _scan_channels(value, origin, price, shape)
        for lane in range(used):
            for pixel in range(pixels):
                at = np.uint64(pixel * LANES + lane)
                dilated[first + lane, pixel] = value[at]
                origins[first + lane, pixel] = origin[at]


@numba.njit(nogil=True, cache=True)
def follow_origins(
    rows: Array, origins: Array, multipliers: Array, sign: float, shape: tuple[int, int, int], dilated: Array
) -> None:
    """Writes what the origins of an earlier dilation give for these rows: at most their dilation."""
    place = _places(rows.shape[1], shape)
    for row in range(rows.shape[0]):
        price = multipliers[row]
        for pixel in range(rows.shape[1]):
            goal = origins[row, pixel]
            distance = abs(place[goal, 0] - place[pixel, 0]) + abs(place[goal, 1] - place[pixel, 1])
            dilated[row, pixel] = sign * rows[row, goal] - price * distance


@numba.njit(nogil=True, cache=True)
def _places(pixels: int, shape: tuple[int, int, int]) -> Array:
    """Row and column of every pixel."""
    _, height, width = shape
    place = np.empty((pixels, 2), np.int32)
    for pixel in range(pixels):
        inside = pixel % (height * width)
        place[pixel, 0], place[pixel, 1] = inside // width, inside % width
    return place


@numba.njit(nogil=True, cache=True)
def gather_gradient(gradient: Array, origins: Array, sign: float, result: Array) -> None:
    """Adds the gradient of every dilated pixel to the pixel that its value came from."""
    for row in range(gradient.shape[0]):
        for pixel in range(gradient.shape[1]):
            result[row, origins[row, pixel]] += sign * gradient[row, pixel]


@numba.njit(nogil=True, cache=True)
def _compiled_costs(origins: Array, mass: Array, shape: tuple[int, int, int], costs: Array) -> None:
    """The cost, for each row, of moving the mass of one image to the origins."""
    place = _places(mass.size, shape)
    for row in range(origins.shape[0]):
        total = 0.0
        for pixel in range(mass.size):
            goal = origins[row, pixel]
            distance = abs(place[goal, 0] - place[pixel, 0]) + abs(place[goal, 1] - place[pixel, 1])
            total += mass[pixel] * distance
        costs[row] = total


@numba.njit(nogil=True, cache=True)
def maximise_rows(
    rows: Array,  # (R, pixels)
    images: Array,  # (B, pixels)
    budgets: Array,  # (B,)
    lipschitz: Array,  # (R,)
    shares: Array,  # (S,)
    shape: tuple[int, int, int],
    excess: Array,  # (R,)
    maximiser: Array,  # (R, pixels)
) -> None:
    """The least of the bounds with lambda = share * Lip(row), and where it moves the mass of the row's image.

    Row r belongs to image r // (R // B). ``excess`` is the bound less row . image; share 1 moves nothing.
    """
    pixels = rows.shape[1]
    each = rows.shape[0] // images.shape[0]
    base = np.empty(pixels * LANES, rows.dtype)
    value = np.empty(pixels * LANES, rows.dtype)
    origin = np.empty(pixels * LANES, np.int32)
    mass = np.empty(pixels * LANES, rows.dtype)
    goal = np.empty(pixels * LANES, np.int32)
    price = np.empty(LANES, rows.dtype)
    total = np.empty(LANES, rows.dtype)
    better = np.empty(LANES, np.bool_)
    for first in range(0, rows.shape[0], LANES):
        used = min(LANES, rows.shape[0] - first)
        _load(rows, first, used, 1, base)
        for lane in range(LANES):
            row = first + lane if lane < used else first
            for pixel in range(pixels):
                mass[np.uint64(pixel * LANES + lane)] = images[row // each, pixel]
        for lane in range(used):
            excess[first + lane] = lipschitz[first + lane] * budgets[(first + lane) // each]
        _reset(goal, pixels)
        for share in shares:
            for lane in range(LANES):
                row = first + lane if lane < used else first
                price[lane] = share * lipschitz[row]
                total[lane] = price[lane] * budgets[row // each]
            value[:] = base
            _reset(origin, pixels)
            _scan_channels(value, origin, price, shape)
            for pixel in range(pixels):
                start = np.uint64(pixel * LANES)
                for k in range(LANES):
                    at = start + np.uint64(k)
                    total[k] += mass[at] * (value[at] - base[at])
            for lane in range(LANES):
                better[lane] = lane < used and total[lane] < excess[first + lane]
                if better[lane]:
                    excess[first + lane] = total[lane]
            for pixel in range(pixels):
                start = np.uint64(pixel * LANES)
                for k in range(LANES):
                    at = start + np.uint64(k)
                    goal[at] = origin[at] if better[k] else goal[at]
        for lane in range(used):
            for pixel in range(pixels):
                maximiser[first + lane, pixel] = 0
            for pixel in range(pixels):
                at = np.uint64(pixel * LANES + lane)
                if mass[at] != 0:
                    maximiser[first + lane, goal[at]] += mass[at]


class DilatedRows(NamedTuple):
    """``rows``: D_lambda(sign * row), (R, pixels); ``origins``: where each pixel has its value from, (R, pixels)."""

    rows: Tensor
    origins: Tensor


def dilate_rows(
    rows: Tensor,  # (R, C, H, W)
    multipliers: Tensor,  # (R,)
    sign: int,
    origins: Tensor | None = None,  # (R, pixels)
) -> DilatedRows:
    """Dilates ``sign * rows``, each by its own multiplier lambda >= 0; differentiable in the rows.

    With the ``origins`` of an earlier call, values are taken from there: no more than the dilation, and nearly
    it while the rows have hardly changed. On the CPU in float32 or float64 a compiled kernel does it, elsewhere
    torch.
    """
    value, found = _DilatedRows.apply(rows, multipliers, sign, origins)  # type: ignore[no-untyped-call]
    return DilatedRows(value, found)


def transport_costs(origins: Tensor, image: Tensor) -> Tensor:
    """What moving the mass of one image (C, H, W) to the origins of each row costs, float64 (R,)."""
    if origins.device.type == "cpu":
        costs = torch.empty(len(origins), dtype=torch.float64)
        mass = image.detach().double().contiguous().flatten().numpy()
        _compiled_costs(origins.numpy(), mass, _shape(image), costs.numpy())
        return costs
    return _distances(origins, image) @ image.detach().double().flatten()


class _DilatedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, multipliers = rows.detach(), multipliers.detach().to(rows.dtype)
        ctx.sign, ctx.shape = sign, rows.shape
        ctx.compiled = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
        value, origins = (_compiled if ctx.compiled else _by_torch)(rows, multipliers, sign, origins)
        ctx.save_for_backward(origins)
        ctx.mark_non_differentiable(origins)
        return value, origins

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (origins,) = ctx.saved_tensors
        result = torch.zeros_like(gradient)
        if ctx.compiled:
            array = gradient.contiguous().numpy()
            gather_gradient(array, origins.numpy(), array.dtype.type(ctx.sign), result.numpy())
        else:
            result.scatter_add_(1, origins, ctx.sign * gradient)
        return result.reshape(ctx.shape), None, None, None


def _compiled(rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None) -> tuple[Tensor, Tensor]:

    flat = rows.flatten(1).contiguous()
    array, prices, shape = flat.numpy(), multipliers.contiguous().numpy(), _shape(rows[0])
    value, factor = torch.empty_like(flat), array.dtype.type(sign)
    if origins is None:
        origins = torch.empty(flat.shape, dtype=torch.int32)
        _compiled_rows(array, prices, factor, shape, value.numpy(), origins.numpy())
    else:
        follow_origins(array, origins.numpy(), prices, factor, shape, value.numpy())
    return value, origins


def _by_torch(rows: Tensor, multipliers: Tensor, sign: int, origins: Tensor | None) -> tuple[Tensor, Tensor]:
    if origins is None:
        found = dilate(sign * rows, multipliers)
        plane = rows.shape[2] * rows.shape[3]
        channel = torch.arange(rows.shape[1], device=rows.device)[:, None, None] * plane
        return found.value.flatten(1), (found.origin + channel).flatten(1)
    distance = _distances(origins, rows[0]).to(rows.dtype)
    return sign * rows.flatten(1).gather(1, origins) - multipliers[:, None] * distance, origins


def _distances(origins: Tensor, image: Tensor) -> Tensor:
    """The l1 distance of each pixel to its origin, float64 (R, pixels)."""
    _, height, width = _shape(image)
    pixel = torch.arange(origins.shape[1], device=origins.device) % (height * width)
    goal = origins.long() % (height * width)
    return ((goal // width - pixel // width).abs() + (goal % width - pixel % width).abs()).double()


def _shape(image: Tensor) -> tuple[int, int, int]:
    return int(image.shape[0]), int(image.shape[1]), int(image.shape[2])


SHARES = (0.55, 0.35, 0.22, 0.14)  # and 1, which costs no dilation


def ball_bounds(
    coefficients: Tensor,  # (B, S, C, H, W)
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
) -> Tensor:
    """Upper bounds of c . nu over the images nu within the budget of mu, (B, S); differentiable in c.

    On the CPU in float32 or float64 by a compiled kernel with few lambdas; elsewhere the exact maximum.
    """
    compiled = images.device.type == "cpu" and coefficients.dtype in (torch.float32, torch.float64)
    if not compiled:
        return support_value(coefficients, images.to(coefficients.dtype), budget)
    value: Tensor = _BallBounds.apply(coefficients, images, budget)  # type: ignore[no-untyped-call]
    return value


class _BallBounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, images: Tensor, budget: Tensor) -> Tensor:

        dtype, (batch, count) = coefficients.dtype, coefficients.shape[:2]
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        rows = coefficients.detach().reshape(batch * count, -1).contiguous()
        mass = images.detach().to(dtype).flatten(1).contiguous()
        excess, maximiser = torch.empty(len(rows), dtype=dtype), torch.empty_like(rows)
        lipschitz = lipschitz_constant(rows.reshape(-1, *shape))
        maximise_rows(
            rows.numpy(),
            mass.numpy(),
            budget.detach().to(dtype).contiguous().numpy(),
            lipschitz.numpy(),
            torch.tensor(SHARES, dtype=dtype).numpy(),
            shape,
            excess.numpy(),
            maximiser.numpy(),
        )
        ctx.save_for_backward(maximiser)
        ctx.shape = coefficients.shape
        centre = (rows.reshape(batch, count, -1) @ mass[:, :, None]).squeeze(2)
        return centre + excess.reshape(batch, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (maximiser,) = ctx.saved_tensors
        return (gradient.reshape(-1, 1) * maximiser).reshape(ctx.shape), None, None


FIRST_SHARE = 0.3  # of the Lipschitz constant: where the multipliers start
ADAPTATION = 0.1  # the largest change of a multiplier's logarithm in one step


class TrainableBounds:
    """Differentiable interval bounds of one network, whose weights may change between calls.

    Args:
        network: in canonical form, with an activation.
        targets: how many classes are bounded by CROWN over these intervals
            (:func:`flowverify.bounds.relaxations.pull_back`; CROWN-IBP, Zhang et al. 2020, arXiv:1906.06316): those
            with the largest clean scores beside the label's. With 0, all are bounded by intervals.

    Attributes:
        multipliers: for each value where the affine part ends, lambda of (upper, lower) for each entry, (2, R).

    Raises:
        InvalidInputError: a network that is affine as a whole: its margins need no interval bounds.
        UnsupportedOperationError: ``targets`` > 0, and an activation without a linear relaxation.
    """

    def __init__(self, network: Network, targets: int = 0, refresh: int = 1) -> None:
        affine = network.affine_of_input()
        if network.output in affine:
            raise InvalidInputError("network that is affine in its input: expected one with an activation")
        self.network, self.targets = network, min(targets, network.num_classes - 1)
        self.refresh = refresh
        self.multipliers: dict[str, Tensor] = {}
        self._origins: dict[str, tuple[Tensor, Tensor]] = {}
        self._age: dict[str, int] = {}
        self._prefix = [node for node in network.nodes if node.name in affine]
        self._rest = [node for node in network.nodes if node.name not in affine]
        if self.targets:
            _check_relaxable(self._rest)
        self._frontier = sorted({name for node in self._rest for name in node.inputs if name in affine})

    def bound(
        self,
        images: Tensor,  # (B, C, H, W)
        labels: Tensor,  # (B,)
        budget: Tensor,  # radius times mass, (B,)
    ) -> tuple[Tensor, Tensor]:
        """Clean logits, and upper bounds of f_t - f_y over the ball around each image, both (B, classes).

        The bound of t = y is 0. With ``targets``, the classes that get no bound of CROWN's are at minus infinity.
        """
        values: dict[str, Tensor] = {}
        intervals: dict[str, Interval] = {}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self._frontier:
            rows[name] = self.rows(name)
            values[name], intervals[name] = self._affine(name, rows[name], images, budget)
        output, last = self.network.output, self._rest[-1]
        for node in self._rest:
            values[node.name] = node.operation(*(values[name] for name in node.inputs))
            if node.name != output:
                intervals[node.name] = propagate(node.operation, [intervals[name] for name in node.inputs])
        if self.targets:
            hardest = values[output].detach().scatter(1, labels[:, None], -torch.inf).topk(self.targets, 1).indices
            bounds = self._crown(rows, images, labels, hardest, budget, intervals)
            worst = torch.full_like(values[output], -torch.inf).scatter(1, hardest, bounds)
        elif isinstance(last.operation, nn.Linear):
            worst = _linear_differences(*intervals[last.inputs[0]], last.operation, labels)
        else:
            lower, upper = propagate(last.operation, [intervals[name] for name in last.inputs])
            worst = upper - lower.gather(1, labels[:, None])
        return values[output], worst.scatter(1, labels[:, None], 0.0)

    def _crown(
        self,
        rows: dict[str, tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor,
        classes: Tensor,  # (B, S)
        budget: Tensor,
        intervals: dict[str, Interval],
    ) -> Tensor:
        """Upper bounds of f_t - f_y for the given classes t, (B, S)."""
        identity = torch.eye(self.network.num_classes, dtype=images.dtype, device=images.device)
        specification = identity[classes] - identity[labels][:, None]
        network = self.network
        below, constant = pull_back(network, network.output, specification, intervals, self._frontier)
        pixels: Tensor | float = 0.0
        for name, coefficients in below.items():
            weight, bias = rows[name]
            flat = coefficients.flatten(2)
            pixels, constant = pixels + flat @ weight, constant + flat @ bias
        assert isinstance(pixels, Tensor)
        return ball_bounds(pixels.reshape(*classes.shape, *self.network.input_shape), images, budget) + constant

    def _affine(
        self, name: str, affine: tuple[Tensor, Tensor], images: Tensor, budget: Tensor
    ) -> tuple[Tensor, Interval]:
        """The value of the clean images, and its bounds; of shape (B, *shape)."""
        rows, bias = affine
        grids = rows.reshape(-1, *self.network.input_shape)
        lipschitz = lipschitz_constant(grids)
        multipliers = self._multipliers(name, lipschitz.detach())
        above, below = self._dilated(name, grids, multipliers)
        budget = budget[:, None].to(rows.dtype)
        products = images.flatten(1) @ torch.cat([rows, above.rows, below.rows]).T
        centre, up, down = torch.tensor_split(products, 3, dim=1)
        rise, fall = up - centre, down + centre
        centre, reach = centre + bias, budget * lipschitz
        upper = centre + torch.minimum(rise + budget * multipliers[0], reach)
        lower = centre - torch.minimum(fall + budget * multipliers[1], reach)
        if self._age[name] == 1:
            costs = torch.stack([transport_costs(side.origins, images.mean(0)) for side in (above, below)])
            self._adapt(name, costs.to(rows.dtype), budget.mean(), lipschitz.detach())
        shape = self.network.shape(name)
        return centre.reshape(-1, *shape), (lower.reshape(-1, *shape), upper.reshape(-1, *shape))

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows (R, pixels) and bias (R,) of a value that is affine in the image, differentiable in the weights."""
        node = self.network.node(name) if name != INPUT else None
        flattened = all(isinstance(other.operation, nn.Flatten) for other in self._prefix if other is not node)
        if node is not None and isinstance(node.operation, nn.Linear) and flattened and len(node.shape) == 1:
            weight, bias = node.operation.weight, node.operation.bias
            return weight, weight.new_zeros(len(weight)) if bias is None else bias
        like, shape = next(self.network.parameters()), self.network.input_shape

        def value(images: Tensor) -> Tensor:
            values = {INPUT: images}
            for other in self._prefix:
                values[other.name] = other.operation(*(values[read] for read in other.inputs))
            return values[name].flatten(1)

        constant = value(like.new_zeros(1, *shape))
        return torch.cat(list(columns(lambda units: value(units) - constant, shape, like=like))).T, constant[0]

    def _dilated(self, name: str, grids: Tensor, multipliers: Tensor) -> tuple[DilatedRows, DilatedRows]:
        """The rows dilated from above and from below, by old origins unless it is time for new ones."""
        age = self._age.get(name, 0) % self.refresh
        old = (None, None) if age == 0 else self._origins[name]
        above = dilate_rows(grids, multipliers[0], +1, old[0])
        below = dilate_rows(grids, multipliers[1], -1, old[1])
        self._origins[name], self._age[name] = (above.origins, below.origins), age + 1
        return above, below

    def forget(self) -> None:
        """Dilates anew at the next call."""
        self._age.clear()

    def _multipliers(self, name: str, lipschitz: Tensor) -> Tensor:
        if name not in self.multipliers:
            self.multipliers[name] = FIRST_SHARE * torch.stack([lipschitz, lipschitz])
        self.multipliers[name] = self.multipliers[name].to(lipschitz)
        return self.multipliers[name]

    def _adapt(self, name: str, cost: Tensor, budget: Tensor, lipschitz: Tensor) -> None:
        """Moves every multiplier towards the one whose transport cost is the budget."""
        budget = budget.to(cost.dtype)
        change = ADAPTATION * ((cost - budget) / (cost + budget).clamp(min=torch.finfo(cost.dtype).tiny))
        # Above Lip(c) the dilation is c itself, and below a small share of it the cone is flat.
        self.multipliers[name] = torch.minimum((self.multipliers[name] * change.exp()), lipschitz).maximum(
            1e-4 * lipschitz
        )


def _check_relaxable(nodes: Sequence[Node]) -> None:
    for node in nodes:
        if not is_affine(node.operation) and not relaxable(node.operation):
            raise UnsupportedOperationError(
                f"layer {node.name!r}: bound crown-ibp trains networks of affine operations, ReLU, LeakyReLU, Sigmoid "
                f"and Tanh, given {operation_name(node.operation)} (the bound ibp takes any)"
            )


def _linear_differences(lower: Tensor, upper: Tensor, layer: nn.Linear, labels: Tensor) -> Tensor:
    """Upper bounds of (w_t - w_y) . v + b_t - b_y for lower <= v <= upper, (B, classes)."""
    weight = layer.weight
    classes = len(weight)
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    middle = layer(centre)
    spreads = (weight[None] - weight[:, None]).abs().reshape(classes * classes, -1)  # row y * classes + t
    spread = (radius @ spreads.T).reshape(-1, classes, classes)[torch.arange(len(labels), device=labels.device), labels]
    difference: Tensor = middle - middle.gather(1, labels[:, None]) + spread
    return difference


TOLERANCE = 1e-2  # relative gap at which the search for a row's maximum stops; it is a bound wherever it stops


class LiftedTrainableBounds(TrainableBounds):
    """As :class:`TrainableBounds`, by rows of moves above the first layer.

    Where it pays to move mass around cycles of more than two moves, the gradient is that of the steepest pair of moves.

    Args:
        targets: how many classes are bounded: those with the largest clean scores beside the label's.

    Raises:
        InvalidInputError: a network that is affine as a whole.
        UnsupportedOperationError: an operation that lifted bounds have no rule for, named.
    """

    def __init__(self, network: Network, targets: int = 1, refresh: int = 1) -> None:
        super().__init__(network, 0, refresh)
        self.targets = min(targets, network.num_classes - 1)
        dtype = next(network.parameters()).dtype
        self._lifted = LiftedBounds(network, dtype=dtype, tolerance=TOLERANCE, trained=True)

    def bound(self, images: Tensor, labels: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Clean logits, and upper bounds of f_t - f_y over the ball around each image, both (B, classes).

        The bound of t = y is 0; classes that get none are at minus infinity.
        """
        known: dict[str, Interval] = {
            name: self._affine(name, self.rows(name), images, budget)[1] for name in self._frontier
        }
        ball = _Batch(self._lifted, images, budget, known)
        for node in self.network.nodes:
            if not is_affine(node.operation) and node.name not in ball.relaxations:
                read = node.inputs[0]
                ball.relax_readers(read, ball.bound(read, tighten=read not in self._frontier))
            ball.enter(node)
        logits = ball.values[self.network.output]
        classes = logits.detach().scatter(1, labels[:, None], -torch.inf).topk(self.targets, 1).indices
        identity = torch.eye(self.network.num_classes, dtype=logits.dtype, device=logits.device)
        rises = identity[classes] - identity[labels][:, None]
        rows, constant = ball.rows(self.network.output, Coefficients(rises[:, None], None))
        every = torch.full(rises.shape[:2], -torch.inf, dtype=torch.float64, device=logits.device)
        excess, _ = ball.maximum(rows, every, None, TOLERANCE)
        bounds = (rises @ logits[..., None]).squeeze(-1) + constant + excess
        worst = torch.full_like(logits, -torch.inf).scatter(1, classes, bounds)
        return logits, worst.scatter(1, labels[:, None], 0.0)
