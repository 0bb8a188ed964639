"""The attacks as a foolbox ``MinimizationAttack``; needs foolbox, which is an optional extra.

    attack = foolbox_attack(MinimalRadius(network), ground="l2")
    raw, clipped, success = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilons=[0.1, 0.3])

Epsilons are radii, W1 of normalised images in pixels. foolbox judges success itself, on its own model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowverify.attack.base import BaseAttack
from flowverify.ball import Threat
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.transport.distance import FLOAT32_MASS_TOLERANCE


def foolbox_attack(attack: BaseAttack, ground: str = "l1", cap: float | None = 1.0) -> Any:
    """``attack`` as foolbox's ``MinimizationAttack``, for PyTorch models and the criterion Misclassification.

    The network under attack is that of ``attack``: give foolbox's model the same. With the default cap images stay
    within foolbox's usual bounds (0, 1).

    Raises:
        DependencyError: foolbox is not installed.
        UnknownNameError: an unknown ground cost.
    """
    try:
        import eagerpy
        from foolbox.attacks.base import MinimizationAttack
        from foolbox.criteria import Misclassification
        from foolbox.distances import Distance
    except ImportError as error:
        raise DependencyError("this adapter needs foolbox: pip install foolbox") from error
    threat = Threat(ground, cap)

    def raw(tensor: Any) -> Tensor:
        value = eagerpy.astensor(tensor).raw
        if not isinstance(value, Tensor):
            raise InvalidInputError(f"foolbox tensors of type {type(value).__name__}: expected torch.Tensor")
        return value

    class Wasserstein(Distance):  # type: ignore[misc]
        """Exact W1 of normalised images."""

        def __call__(self, reference: Any, perturbed: Any) -> Any:
            clean = raw(reference)
            distances = threat.distance(clean, raw(perturbed), FLOAT32_MASS_TOLERANCE).to(clean)
            return eagerpy.astensor(distances) if isinstance(reference, eagerpy.Tensor) else distances

        def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
            clean, far = raw(references).double(), raw(perturbed)
            ball = threat.ball(clean, threat.budget(epsilon, clean))
            clipped = ball.pull_back(threat.repair(clean, far)).to(far)
            return eagerpy.astensor(clipped) if isinstance(references, eagerpy.Tensor) else clipped

    class Adapter(MinimizationAttack):  # type: ignore[misc]
        distance = Wasserstein()

        def run(
            self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **options: Any
        ) -> Any:
            if not isinstance(criterion, Misclassification):
                raise InvalidInputError(f"criterion {criterion!r}: expected foolbox.criteria.Misclassification")
            images = raw(inputs)
            found = attack.minimise(images, raw(criterion.labels), ground, cap)
            result = eagerpy.astensor(found.images.to(images))
            return result if isinstance(inputs, eagerpy.Tensor) else result.raw

    return Adapter()
