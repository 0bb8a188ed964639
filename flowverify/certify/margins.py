"""Lower bounds on the margins f_y - f_t over Wasserstein balls: the engine behind every incomplete certificate."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowverify.certify.domain import DomainName, make_domain, sample_images
from flowverify.certify.first_layer import AffineValue
from flowverify.certify.intervals import Interval, intersect, propagate
from flowverify.certify.methods import check_bound, check_method
from flowverify.errors import UnsupportedOperationError
from flowverify.lirpa.bounded import BoundedNetwork
from flowverify.lirpa.warm_start import WarmStart
from flowverify.network import Network

CHUNK_ENTRIES = 1 << 25  # images x specifications x widest layer in one backward pass


class MarginBounds:
    """Bounds the margins of one network by one method, batched over images.

    Values that are affine in the image are bounded exactly; activations above them get intervals, in
    topological order, from interval propagation, from CROWN through auto_LiRPA, or the tighter of the two,
    as the recipe of the bound says. CROWN bounds a neuron only if interval propagation has not already
    shown its ReLU to be linear for all images of the batch; the relaxation of such a ReLU is exact.

    Args:
        network: in canonical form; it is copied.
        method: "vanilla" or "fine-tuned".
        bound: a name in :data:`flowverify.certify.methods.BOUNDS`.
        domain: where CROWN runs; see :func:`flowverify.certify.domain.make_domain`.
        dtype: precision of the bounds.
        tolerance: duality gap of the support function; see :func:`flowverify.transport.support.support`.
        ground: the ground cost of the balls; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel in the balls; fine-tuned bounds make use of it.

    Raises:
        UnknownNameError: an unknown method or bound.
        FoldError: ``domain="flow"`` for a network that cannot be folded.
        InvalidInputError: ``domain="flow"`` with another ground cost than l1.
        UnsupportedOperationError: auto_LiRPA does not know an operation.
    """

    def __init__(
        self,
        network: Network,
        method: str = "fine-tuned",
        bound: str = "best",
        *,
        domain: DomainName = "auto",
        dtype: torch.dtype = torch.float32,
        tolerance: float | None = None,
        alpha_iterations: int = 20,
        alpha_learning_rate: float = 0.5,
        ground: str = "l1",
        cap: float | None = None,
    ) -> None:
        self.recipe = check_bound(bound)
        self.feasible = check_method(method) == "fine-tuned"
        self.network = copy.deepcopy(network).to(dtype)
        self.dtype = dtype
        self.tolerance = tolerance
        self.alpha_iterations, self.alpha_learning_rate = alpha_iterations, alpha_learning_rate
        self.chunk_entries = CHUNK_ENTRIES
        self.notes: list[str] = []
        affine = self.network.affine_of_input()
        self._nodes = [node for node in self.network.nodes if node.name not in affine]
        frontier = {name for node in self._nodes for name in node.inputs if name in affine}
        if self.network.is_affine:
            frontier.add(self.network.output)
        self._affine = {name: AffineValue(self.network, name, dtype, ground, cap) for name in sorted(frontier)}
        self._preactivations = [node.inputs[0] for node in self.network.activations]
        self._two_piece = {
            name: all(isinstance(node.operation, nn.ReLU | nn.LeakyReLU) for node in self.network.consumers(name))
            for name in self._preactivations
        }
        pools = any(isinstance(node.operation, nn.MaxPool2d) for node in self.network.nodes)
        self._optimise_slopes = self.recipe.final_alpha and bool(self._preactivations) and not pools
        if self.recipe.final_alpha and pools:
            self.notes.append("auto_LiRPA cannot optimise slopes through MaxPool2d: the bound is that of crown")
        self._domain = make_domain(self.network, domain, self.feasible, ground, cap)
        self._bounded: BoundedNetwork | None = None
        if self.recipe.intermediate_crown or self.recipe.final_crown:
            _refuse_overlapping_pools(self.network)
            sample = sample_images(self.network)
            values = self.network.values(sample)
            self._bounded = BoundedNetwork(
                self._domain.module,
                self._domain.inputs(sample, None),
                [values[name] for name in self._preactivations],
            )
        self._width = max([self._domain.width, *(math.prod(node.shape) for node in self.network.nodes)])

    def lower_bounds(
        self,
        images: Tensor,
        labels: Tensor,
        budget: Tensor,
        *,
        references: Tensor | None = None,
        warm_start: WarmStart | None = None,
    ) -> Tensor:
        """Lower bounds of f_y - f_t over the ball around each image, for the classes t other than y.

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; converted to the engine's precision.
            labels: y, (B,).
            budget: what the plans from each image may cost, (B,): radius times mass for a distance.
            references: R of equal masses, (B, C, H, W), for the flow domain; the image itself by default.
            warm_start: multipliers of an earlier call on the same images; its ``images`` say which.

        Returns:
            (B, classes - 1), in ascending order of t.
        """
        images = images.to(self.dtype)
        if not len(images):
            return images.new_zeros(0, self.network.num_classes - 1)
        specification = margin_specification(labels, self.network.num_classes, self.dtype).to(images.device)
        rows = torch.arange(images.shape[0]) if warm_start is None else warm_start.images
        size = max(1, self.chunk_entries // (self._width * 128))
        parts = []
        for start in range(0, images.shape[0], size):
            part = slice(start, start + size)
            if warm_start is not None:
                warm_start.at(None, rows[part])
            own = None if references is None else references[part].to(images.device)
            parts.append(self._bound(images[part], specification[part], budget[part], own, warm_start))
        if warm_start is not None:
            warm_start.at(None, rows)
        return torch.cat(parts)

    def _bound(
        self,
        images: Tensor,
        specification: Tensor,
        budget: Tensor,
        references: Tensor | None,
        warm_start: WarmStart | None,
    ) -> Tensor:
        inputs = self._domain.inputs(images, references)
        perturbation = self._domain.perturbation(images, references, budget, self.tolerance, warm_start)
        intervals = self._intervals(images, budget, inputs, perturbation, warm_start)
        margins = []
        if self.recipe.final_interval:
            margins.append(self._interval_margins(images, budget, specification, intervals))
        if self.recipe.final_crown:
            known = [intervals[name] for name in self._preactivations]
            margins.append(self._crown(None, specification, known, inputs, perturbation, warm_start)[0])
            if self._optimise_slopes:
                assert self._bounded is not None
                margins.append(
                    self._bounded.alpha_crown(
                        inputs,
                        perturbation,
                        specification,
                        known,
                        iterations=self.alpha_iterations,
                        learning_rate=self.alpha_learning_rate,
                    )
                )
        return torch.stack(margins).amax(0)

    def preactivation_bounds(self, images: Tensor, budget: Tensor) -> list[Interval]:
        """Lower and upper bounds (B, *shape) of what each activation reads, in topological order.

        Args:
            images: (B, C, H, W); budget: radius times mass of each, (B,).
        """
        images = images.to(self.dtype)
        inputs = self._domain.inputs(images, None)
        perturbation = self._domain.perturbation(images, None, budget, self.tolerance, None)
        intervals = self._intervals(images, budget, inputs, perturbation, None)
        return [intervals[name] for name in self._preactivations]

    def _intervals(
        self,
        images: Tensor,
        budget: Tensor,
        inputs: Sequence[Tensor],
        perturbation: object,
        warm_start: WarmStart | None,
    ) -> dict[str, Interval]:
        """Bounds of the values that activations read, and of the rest where interval propagation has them."""
        intervals: dict[str, Interval] = {
            name: value.bounds(images, budget, self.feasible, self.tolerance, warm_start)
            for name, value in self._affine.items()
            if name != self.network.output
        }
        for node in self._nodes:
            last = node.name == self.network.output
            if not (last and not self.recipe.final_interval):
                intervals[node.name] = propagate(node.operation, [intervals[name] for name in node.inputs])
            if self.recipe.intermediate_crown and node.name in self._two_piece:
                intervals[node.name] = self._tighten(node.name, intervals, inputs, perturbation, warm_start)
        return intervals

    def _tighten(
        self,
        name: str,
        intervals: dict[str, Interval],
        inputs: Sequence[Tensor],
        perturbation: object,
        warm_start: WarmStart | None,
    ) -> Interval:
        """CROWN bounds for the entries of an activation's input that are not settled."""
        lower, upper = intervals[name]
        flat_lower, flat_upper = lower.flatten(1).clone(), upper.flatten(1).clone()
        open_entries = torch.ones_like(flat_lower, dtype=torch.bool)
        if self._two_piece[name]:
            open_entries = (flat_lower < 0) & (flat_upper > 0)
        chosen = open_entries.any(0).nonzero().flatten()
        if not chosen.numel():
            return lower, upper
        index = self._preactivations.index(name)
        known = [intervals[other] for other in self._preactivations[:index]]
        identity = torch.zeros(chosen.numel(), flat_lower.shape[1], dtype=lower.dtype, device=lower.device)
        identity[torch.arange(chosen.numel()), chosen] = 1
        specification = identity.expand(lower.shape[0], *identity.shape)
        crown = self._crown(index, specification, known, inputs, perturbation, warm_start)
        if self.recipe.intermediate_interval:
            crown = intersect(crown, (flat_lower[:, chosen], flat_upper[:, chosen]))
        # What is settled for one image stays as it is, so that no image's bounds depend on the rest of its batch.
        own = open_entries[:, chosen]
        flat_lower[:, chosen] = torch.where(own, crown[0], flat_lower[:, chosen])
        flat_upper[:, chosen] = torch.where(own, crown[1], flat_upper[:, chosen])
        return flat_lower.reshape(lower.shape), flat_upper.reshape(upper.shape)

    def _crown(
        self,
        node: int | None,
        specification: Tensor,
        known: Sequence[Interval],
        inputs: Sequence[Tensor],
        perturbation: object,
        warm_start: WarmStart | None,
    ) -> Interval:
        """CROWN in chunks of specifications, smaller ones where memory runs out."""
        assert self._bounded is not None
        lowers: list[Tensor] = []
        uppers: list[Tensor] = []
        total, start = specification.shape[1], 0
        while start < total:
            size = max(1, self.chunk_entries // (self._width * specification.shape[0]))
            if warm_start is not None:
                warm_start.at(("crown", node, start))
            try:
                lower, upper = self._bounded.crown(
                    inputs,
                    perturbation,
                    specification[:, start : start + size],
                    known,
                    node=node,
                    upper=node is not None,
                )
            except MemoryError:
                if size == 1:
                    raise
                self.chunk_entries //= 4
                self.notes.append(f"out of memory: continued with chunks of {self.chunk_entries} entries")
                continue
            assert lower is not None
            lowers.append(lower)
            uppers.append(lower if upper is None else upper)
            start += size
        return torch.cat(lowers, 1), torch.cat(uppers, 1)

    def _interval_margins(
        self, images: Tensor, budget: Tensor, specification: Tensor, intervals: dict[str, Interval]
    ) -> Tensor:
        output = self.network.output
        if output in self._affine:
            value = self._affine[output]
            return value.margins(specification, images, budget, self.feasible, self.tolerance)
        last = self.network.nodes[-1]
        if isinstance(last.operation, nn.Linear):
            # The specification merges with the last layer, so that shared terms cancel.
            (lower, upper), layer = intervals[last.inputs[0]], last.operation
            weights = specification @ layer.weight
            constant = 0 * weights[..., 0] if layer.bias is None else specification @ layer.bias
        else:
            lower, upper = intervals[output]
            weights, constant = specification, torch.zeros_like(specification[..., 0])
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        return (weights @ centre[..., None] - weights.abs() @ radius[..., None]).squeeze(-1) + constant


def _refuse_overlapping_pools(network: Network) -> None:
    for node in network.nodes:
        operation = node.operation
        if isinstance(operation, nn.MaxPool2d) and operation.stride != operation.kernel_size:
            raise UnsupportedOperationError(
                f"layer {node.name!r}: auto_LiRPA bounds MaxPool2d only with stride equal to kernel size, given stride "
                f"{operation.stride} and kernel size {operation.kernel_size}; the bound ibp takes any"
            )


def margin_specification(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows e_y - e_t for every t != y in ascending order: (B,) -> (B, classes - 1, classes)."""
    identity = torch.eye(classes, dtype=dtype, device=labels.device)
    differences = identity[labels][:, None] - identity
    others = torch.arange(classes, device=labels.device) != labels[:, None]
    return differences[others].reshape(labels.shape[0], classes - 1, classes)
