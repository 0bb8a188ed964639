"""The attacks as an ``art.attacks.evasion.EvasionAttack``; needs adversarial-robustness-toolbox, an optional extra.

attack = art_attack(classifier, "minimal", ground="l2")  # a PyTorchClassifier
adversarial = attack.generate(x, y)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowverify.attack.make import make_attack
from flowverify.ball import Threat, WassersteinBall
from flowverify.errors import DependencyError, InvalidInputError


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
        attack, options: as for :func:`flowverify.attack.make.make_attack`.
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
