"""The attacks as other libraries' own; these are optional extras.

As an ``art.attacks.evasion.EvasionAttack`` of adversarial-robustness-toolbox:

    attack = art_attack(classifier, "minimal", ground="l2")  # a PyTorchClassifier
    adversarial = attack.generate(x, y)

As a foolbox ``MinimizationAttack``:

    attack = foolbox_attack(MinimalRadius(network), ground="l2")
    raw, clipped, success = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilons=[0.1, 0.3])

Epsilons are radii, W1 of normalised images in pixels. foolbox judges success itself, on its own model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.attack.base import BaseAttack, make_attack
from flowverify.ball import Threat, WassersteinBall
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.transport.distance import FLOAT32_MASS_TOLERANCE


def art_attack(
    classifier: Any,
    attack: str = "minimal",
    ground: str = "l1",
    cap: float | None = None,
    radius: float | None = None,
    **options: Any,
) -> Any:
    """The attack of this name as an ``EvasionAttack`` on a ``PyTorchClassifier`` without preprocessing.

    Args:
        classifier: ART's estimator; its torch module is attacked, without ART in between.
        attack, options: as for :func:`flowverify.attack.base.make_attack`.
        ground, cap: the threat model.
        radius: look within this radius; by default, for the nearest adversarial image.

    Raises:
        DependencyError: ART is not installed.
        InvalidInputError: not such a classifier; or, when images are generated, one whose outputs are not its module's.
        UnknownNameError: an unknown attack or ground cost.
    """
    try:
        from art.attacks.attack import EvasionAttack
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise DependencyError("this adapter needs ART: pip install adversarial-robustness-toolbox") from error
    threat = Threat(ground, cap)
    if not isinstance(classifier, PyTorchClassifier):
        raise InvalidInputError(f"classifier of type {type(classifier).__name__}: expected art's PyTorchClassifier")
    search = make_attack(attack, classifier.model, **options)

    class Adapter(EvasionAttack):  # type: ignore[misc]
        _estimator_requirements = (PyTorchClassifier,)
        attack_params: list[str] = []  # noqa: RUF012 # what ART's base class prints and sets

        def generate(self, x: NDArray[Any], y: NDArray[Any] | None = None, **_: Any) -> NDArray[Any]:
            """Adversarial images like ``x``; the clean image where none was found. Labels are integers or one-hot."""
            images, outputs = torch.from_numpy(np.asarray(x)), self.estimator.predict(x)
            own = search.model.logits(images.to(search.model.device)).cpu().numpy()
            if not np.allclose(own, outputs, rtol=1e-3, atol=1e-3):
                raise InvalidInputError(
                    "classifier: its outputs are not those of its torch module; expected no pre- or postprocessing "
                    "(put it into the module, so that radii are those of the images as they are)"
                )
            labels = np.asarray(outputs if y is None else y)
            numbers = torch.from_numpy(labels.argmax(1) if labels.ndim == 2 else labels)
            if radius is None:
                found = search.minimise(images, numbers, threat.ground, threat.cap)
            else:
                found = search.run(images, numbers, WassersteinBall(radius, threat.ground, threat.cap))
            result: NDArray[Any] = found.images.cpu().numpy().astype(x.dtype)
            return result

    return Adapter(estimator=classifier)


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
