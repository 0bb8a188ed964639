"""Certified training: the worst case over a Wasserstein ball, from bounds that need no attack.

The loss of an image is the cross-entropy of upper bounds of f_t - f_y over its ball (Wong and Kolter 2018,
Gowal et al. 2018, arXiv:1810.12715, for other balls), mixed with the clean cross-entropy. A radius that is the
same for all images is out of reach for many of them: they then push the weights without an effect on what is
certified, and the clean accuracy pays. So each training image may keep a radius of its own, which follows what
is certified for it, as in adversarial training with an adaptive radius (Ding et al. 2020, arXiv:1812.02637).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.training.interval_bounds import TrainableBounds
from flowverify.training.losses import LOSSES, BatchContext, BatchOutcome

BOUNDS = ("ibp", "crown-ibp")
STEP = 0.02  # of a growing radius, in pixels, beside its growth factor, at the start; falls linearly to 0
GROWTH, DECAY, DROP = 1.08, 0.93, 0.6


class Certified:
    """``clean_weight`` * clean cross-entropy + (1 - ``clean_weight``) * worst-case cross-entropy.

    The radius grows linearly from 0 to ``radius`` over the first ``warm_up`` of all steps. With ``own_radii``
    that is the upper limit only: an image's own radius starts at 0, grows by a factor of 1.08 and by 0.02 pixels
    (falling to 0 with the progress) each time that it is certified, and shrinks by 0.93 where it is not, by 0.6
    where it is misclassified. Late in the training about half of the images are certified at their radius.

    Args:
        radius: of the ball (l1 ground), in pixels on normalised images.
        warm_up: share of the training, in [0, 1].
        clean_weight: in [0, 1].
        bound: ``ibp``, intervals above the first layer; or ``crown-ibp``, CROWN over these intervals for the
            ``targets`` classes with the largest clean scores beside the label's, and nothing for the others.
        targets: of crown-ibp.
        share: of the images of each batch, in (0, 1], that get a worst case; the others only count for the clean
            cross-entropy. The batches are shuffled, so that it is another choice in each epoch. With a half, an
            epoch takes little more than half the time.
        refresh: after how many steps the rows of the first layer are dilated anew; see
            :class:`flowverify.training.TrainableBounds`.

    Metrics: ``certified``, the share of images whose worst case over the bounded classes is right at the radius
    that they were trained at, and ``radius``, the mean of these radii.

    Raises:
        InvalidInputError: a value out of range.
    """

    def __init__(
        self,
        radius: float = 0.4,
        warm_up: float = 0.5,
        clean_weight: float = 0.5,
        own_radii: bool = True,
        bound: str = "ibp",
        targets: int = 2,
        share: float = 1.0,
        refresh: int = 1,
    ) -> None:
        for name, value, most in (
            ("radius", radius, float("inf")), ("warm_up", warm_up, 1), ("clean_weight", clean_weight, 1),
            ("share", share, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidInputError(f"loss certified: given {name} {value!r}, expected a number")
            if not 0 <= value <= most:
                limit = "a number >= 0" if most > 1 else "a number between 0 and 1"
                raise InvalidInputError(f"loss certified: given {name} {value!r}, expected {limit}")
        if not isinstance(own_radii, bool):
            raise InvalidInputError(f"loss certified: given own_radii {own_radii!r}, expected true or false")
        self.radius, self.warm_up, self.clean_weight = float(radius), float(warm_up), float(clean_weight)
        if bound not in BOUNDS:
            raise UnknownNameError("bound of certified training", bound, BOUNDS)
        for name, number in (("targets", targets), ("refresh", refresh)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InvalidInputError(f"loss certified: given {name} {number!r}, expected an integer >= 1")
        if share == 0:
            raise InvalidInputError(
                "loss certified: given share 0, expected a number > 0 (clean_weight 1 trains plainly)"
            )
        self._refresh, self._epoch = refresh, -1
        self.own_radii, self.share = own_radii, float(share)
        self._targets = targets if bound == "crown-ibp" else 0
        self._radii = torch.zeros(0)
        self._multipliers: dict[str, Tensor] = {}
        self._bounds: TrainableBounds | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, context: BatchContext) -> BatchOutcome:
        bounds = self._bounds_of(model)
        if context.epoch != self._epoch:  # an epoch depends on nothing that a checkpoint does not hold
            bounds.forget()
            self._epoch = context.epoch
        limit = self.radius * min(1.0, context.progress / self.warm_up) if self.warm_up else self.radius
        count = math.ceil(self.share * len(images))
        chosen, own_labels = images[:count], labels[:count]
        radii = torch.full_like(chosen[:, 0, 0, 0], limit)
        if self.own_radii:
            radii = self._radii_of(context)[:count].to(chosen).clamp(max=limit)
        logits, worst = bounds.bound(chosen, own_labels, Threat().budget(radii, chosen))
        certified = worst.detach().scatter(1, own_labels[:, None], -torch.inf).amax(1) < 0
        if self.own_radii:
            self._adapt(context, radii, certified, logits.argmax(1) == own_labels)
        if count < len(images):
            logits = torch.cat([logits, model(images[count:])])
        clean = nn.functional.cross_entropy(logits, labels)
        robust = nn.functional.cross_entropy(worst, own_labels)
        loss = self.clean_weight * clean + (1 - self.clean_weight) * robust
        metrics = {"certified": float(certified.float().mean()), "radius": float(radii.mean())}
        return BatchOutcome(loss, logits, metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """Radii of the images and multipliers of the rows: what a resumed training needs."""
        multipliers = self._multipliers if self._bounds is None else self._bounds.multipliers
        return {"radii": self._radii, **{f"multipliers.{name}": value for name, value in multipliers.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._radii = state["radii"]
        prefix = "multipliers."
        self._multipliers = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        self._bounds = None

    def _bounds_of(self, model: nn.Module) -> TrainableBounds:
        if not isinstance(model, Network):
            raise InvalidInputError(
                f"loss certified: given a module {type(model).__name__}, expected a flowverify.network.Network "
                "(load_network converts)"
            )
        if self._bounds is None or self._bounds.network is not model:
            self._bounds = TrainableBounds(model, self._targets, self._refresh)
            self._bounds.multipliers = dict(self._multipliers)
        return self._bounds

    def _radii_of(self, context: BatchContext) -> Tensor:
        positions = self._positions(context)
        missing = context.training_size - len(self._radii)
        if missing > 0:
            self._radii = torch.cat([self._radii, torch.zeros(missing)])
        return self._radii[positions]

    def _adapt(self, context: BatchContext, radii: Tensor, certified: Tensor, correct: Tensor) -> None:
        shrunk = torch.where(correct, DECAY, DROP) * radii
        grown = (GROWTH * radii + STEP * (1 - context.progress)).clamp(max=self.radius)
        self._radii[self._positions(context)[: len(radii)]] = torch.where(certified, grown, shrunk).cpu()

    def _positions(self, context: BatchContext) -> Tensor:
        if context.positions is None:
            raise InvalidInputError("loss certified with own_radii: expected a context with positions of the images")
        return context.positions


LOSSES["certified"] = Certified
