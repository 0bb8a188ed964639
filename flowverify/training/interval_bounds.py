"""Bounds of a network's values over Wasserstein balls through which its weights can be trained.

Values that are affine in the image are bounded by duality (theory, section 5) with one multiplier lambda for every row
and side, and by Lip(c) * eps where that is less: both are sound for every image, so what is trained is sound, but
not the tightest that the rows allow. Intervals above are those of certification
(:mod:`flowverify.bounds.intervals`, Gowal et al. 2018). The multipliers follow the weights: where moving the
batch's mean image to the origins of its dilation costs more than the batch's mean budget, lambda is too small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowverify.bounds.backward import pull_back
from flowverify.bounds.intervals import Interval, propagate
from flowverify.bounds.relaxations import relaxable
from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import INPUT, Network, Node, is_affine, operation_name
from flowverify.network.affine import columns
from flowverify.training.dilated_rows import DilatedRows, dilate_rows, transport_costs
from flowverify.training.worst_image import ball_bounds
from flowverify.transport.dilation import lipschitz_constant

FIRST_SHARE = 0.3  # of the Lipschitz constant: where the multipliers start
ADAPTATION = 0.1  # the largest change of a multiplier's logarithm in one step


class TrainableBounds:
    """Differentiable interval bounds of one network, whose weights may change between calls.

    Args:
        network: in canonical form, with an activation.
        targets: how many classes are bounded by CROWN over these intervals (:mod:`flowverify.bounds.backward`;
            CROWN-IBP, Zhang et al. 2020, arXiv:1906.06316): those with the largest clean scores beside the label's.
            With 0, all are bounded by intervals.

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
