"""Lower bounds on the margins f_y - f_t over Wasserstein balls: the engine behind every incomplete certificate."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowverify.bounds.crown.bounded import BoundedNetwork, handed_over
from flowverify.bounds.crown.domain import Domain, DomainName, make_domain, sample_images
from flowverify.bounds.first_layer import AffineValue
from flowverify.bounds.intervals import Interval, intersect, propagate
from flowverify.bounds.recipes import BOUNDS, check_bound, check_method
from flowverify.bounds.warm_start import WarmStart
from flowverify.errors import BoundError, FlowverifyError, UnsupportedOperationError
from flowverify.network import INPUT, Network
from flowverify.network.lowering import Lowered, lower

CHUNK_ENTRIES = 1 << 25  # images x specifications x widest layer in one backward pass


class MarginBounds:
    """Bounds the margins of one network by one method, batched over images.

    Values that are affine in the image are bounded exactly; activations above them get intervals, in
    topological order, from interval propagation, from CROWN through auto_LiRPA, or the tighter of the two,
    as the recipe of the bound says. CROWN bounds a neuron only if interval propagation has not already
    shown its ReLU to be linear for all images of the batch; the relaxation of such a ReLU is exact.

    auto_LiRPA gets the network rewritten in the operations that it bounds right
    (:func:`flowverify.bounds.crown.bounded.handed_over`). A bound that can do without it does so, with a note, where it
    cannot take the network or fails.

    Args:
        network: in canonical form; it is copied.
        method: "vanilla" or "fine-tuned".
        bound: a name in :data:`flowverify.certifiers.methods.BOUNDS`.
        domain: where CROWN runs; see :func:`flowverify.bounds.crown.domain.make_domain`.
        dtype: precision of the bounds.
        tolerance: duality gap of the support function; see :func:`flowverify.transport.support.support`.
        ground: the ground cost of the balls; see :mod:`flowverify.transport.ground`.
        cap: largest value of a pixel in the balls; fine-tuned bounds make use of it.

    Raises:
        UnknownNameError: an unknown method or bound.
        FoldError: ``domain="flow"`` for a network that cannot be folded.
        InvalidInputError: ``domain="flow"`` with another ground cost than l1.
        UnsupportedOperationError, BoundError: auto_LiRPA does not know an operation, and the bound rests on it alone.
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
        self._preactivations = list(dict.fromkeys(node.inputs[0] for node in self.network.activations))
        self._two_piece = {
            name: all(isinstance(node.operation, nn.ReLU | nn.LeakyReLU) for node in self.network.consumers(name))
            for name in self._preactivations
        }
        pools = any(isinstance(node.operation, nn.MaxPool2d) for node in self.network.nodes)
        self._optimise_slopes = self.recipe.final_alpha and bool(self._preactivations) and not pools
        if self.recipe.final_alpha and pools:
            self.notes.append("auto_LiRPA cannot optimise slopes through MaxPool2d: the bound is that of crown")
        self._lowered, self._bounded = Lowered(self.network, ()), None
        self._domain, self._bounded = self._host(domain, ground, cap)
        self._width = max([self._domain.width, *(math.prod(node.shape) for node in self.network.nodes)])

    def _host(self, domain: DomainName, ground: str, cap: float | None) -> tuple[Domain, BoundedNetwork | None]:
        """The domain, and the network in it as auto_LiRPA takes it, if the recipe asks for that."""
        if self.recipe.intermediate_crown or self.recipe.final_crown:
            try:
                self._lowered = lower(self.network, handed_over)
                graph = self._lowered.graph.to(sample_images(self.network))
                found = make_domain(graph, domain, self.feasible, ground, cap)
                return found, self._hosted(found)
            except (UnsupportedOperationError, BoundError) as error:
                self._without_host(error)
        return make_domain(self.network, domain, self.feasible, ground, cap), None

    def _hosted(self, domain: Domain) -> BoundedNetwork:
        sample = sample_images(self.network)
        values = self.network.values(sample)
        read = [one.of(values[one.source]) for one in self._lowered.preactivations]
        return BoundedNetwork(domain.module, domain.inputs(sample, None), read)

    def _without_host(self, error: FlowverifyError) -> None:
        """Goes on with intervals alone, where the bound has them for its margins.

        Raises:
            FlowverifyError: the error, where it has not.
        """
        if not self.recipe.final_interval:
            raise type(error)(f"{error}; the bounds ibp and best take this network") from error
        self.recipe, self._optimise_slopes, self._bounded = BOUNDS["ibp"], False, None
        self.notes.append(f"bounded by intervals alone: {error}")

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
            try:
                found = self._bound(images[part], specification[part], budget[part], own, warm_start)
            except BoundError as error:
                self._without_host(error)
                found = self._bound(images[part], specification[part], budget[part], own, warm_start)
            parts.append(found)
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
            known = self._known(intervals)
            margins.append(self._crown(None, specification, known, inputs, perturbation, warm_start)[0])
            if self._optimise_slopes:
                margins += self._optimised(specification, known, inputs, perturbation)
        # What is not a number bounds nothing, and takes nothing from the other bounds.
        return torch.stack(margins).nan_to_num(nan=-torch.inf).amax(0)

    def _optimised(
        self, specification: Tensor, known: Sequence[Interval | None], inputs: Sequence[Tensor], perturbation: object
    ) -> list[Tensor]:
        """The margins by optimised slopes; none, with a note, where auto_LiRPA cannot optimise them."""
        assert self._bounded is not None
        try:
            found = self._bounded.alpha_crown(
                inputs,
                perturbation,
                specification,
                known,
                iterations=self.alpha_iterations,
                learning_rate=self.alpha_learning_rate,
            )
        except BoundError as error:
            self._optimise_slopes = False
            self.notes.append(f"slopes are not optimised: {error}")
            self._bounded = self._hosted(self._domain)  # a failed call leaves the old one unusable
            return []
        return [found]

    def _known(self, intervals: dict[str, Interval]) -> list[Interval | None]:
        """The intervals of what the activations of the rewritten network read, as far as there are any."""
        return [
            (one.of(intervals[one.source][0]), one.of(intervals[one.source][1])) if one.source in intervals else None
            for one in self._lowered.preactivations
        ]

    def preactivation_bounds(self, images: Tensor, budget: Tensor) -> list[Interval]:
        """Lower and upper bounds (B, *shape) of what each activation reads, in the order of the activations.

        Args:
            images: (B, C, H, W); budget: radius times mass of each, (B,).
        """
        images = images.to(self.dtype)
        inputs = self._domain.inputs(images, None)
        perturbation = self._domain.perturbation(images, None, budget, self.tolerance, None)
        intervals = self._intervals(images, budget, inputs, perturbation, None)
        return [intervals[node.inputs[0]] for node in self.network.activations]

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
        index, places = self._places(name, chosen)
        chosen = chosen[places >= 0]
        if not chosen.numel():
            return lower, upper
        width = self._lowered.preactivations[index].of(lower[:1]).numel()
        units = torch.zeros(chosen.numel(), width, dtype=lower.dtype, device=lower.device)
        units[torch.arange(chosen.numel()), places[places >= 0]] = 1
        specification = units.expand(lower.shape[0], *units.shape)
        crown = self._crown(index, specification, self._known(intervals), inputs, perturbation, warm_start)
        crown = _numbers(crown[0], -torch.inf), _numbers(crown[1], torch.inf)
        if self.recipe.intermediate_interval:
            crown = intersect(crown, (flat_lower[:, chosen], flat_upper[:, chosen]))
        # What is settled for one image stays as it is, so that no image's bounds depend on the rest of its batch.
        own = open_entries[:, chosen]
        flat_lower[:, chosen] = torch.where(own, crown[0], flat_lower[:, chosen])
        flat_upper[:, chosen] = torch.where(own, crown[1], flat_upper[:, chosen])
        return flat_lower.reshape(lower.shape), flat_upper.reshape(upper.shape)

    def _places(self, name: str, chosen: Tensor) -> tuple[int, Tensor]:
        """Where entries of a value stand in what an activation of the rewritten network reads: which one, and at which
        positions (-1: nowhere, such as pixels that no window of a pool reaches).
        """
        reading = [k for k, one in enumerate(self._lowered.preactivations) if one.source == name]
        whole = [k for k in reading if self._lowered.preactivations[k].windows is None]
        if whole or not reading:
            return (whole or [0])[0], chosen if whole else torch.full_like(chosen, -1)
        windows = self._lowered.preactivations[reading[0]].windows
        assert windows is not None
        pixels = math.prod(self._shape(name)[-2:])
        first = torch.full((pixels,), -1, dtype=chosen.dtype)
        flat = windows.flatten().flip(0)
        first[flat] = torch.arange(flat.numel(), dtype=chosen.dtype).flip(0)
        first = first.to(chosen.device)
        within = first[chosen % pixels]
        return reading[0], torch.where(within < 0, -1, chosen // pixels * flat.numel() + within)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.network.input_shape if name == INPUT else self.network.node(name).shape

    def _crown(
        self,
        node: int | None,
        specification: Tensor,
        known: Sequence[Interval | None],
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


def _numbers(values: Tensor, otherwise: float) -> Tensor:
    return values.masked_fill(torch.isnan(values), otherwise)


def margin_specification(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows e_y - e_t for every t != y in ascending order: (B,) -> (B, classes - 1, classes)."""
    identity = torch.eye(classes, dtype=dtype, device=labels.device)
    differences = identity[labels][:, None] - identity
    others = torch.arange(classes, device=labels.device) != labels[:, None]
    return differences[others].reshape(labels.shape[0], classes - 1, classes)
