"""Attacks and certification as other libraries' own; these are optional.

As an ``art.attacks.evasion.EvasionAttack`` of adversarial-robustness-toolbox:

    attack = art_attack(classifier, "minimal", ground="l2")  # a PyTorchClassifier
    adversarial = attack.generate(x, y)

As a foolbox ``MinimizationAttack``:

    attack = foolbox_attack(MinimalRadius(network), ground="l2")
    raw, clipped, success = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilons=[0.1, 0.3])

As a ``VerificationModule`` of VERONA, package ada-verona:

    verifier = verona_module("complete", timeout=60)
    estimator = BinarySearchEpsilonValueEstimator(epsilon_value_list=[0.01, 0.02, 0.05], verifier=verifier)

Epsilons are radii, W1 of normalised images in pixels. foolbox judges success itself, on its own model.
"""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.attack.base import BaseAttack, make_attack
from flowverify.ball import Threat, WassersteinBall
from flowverify.errors import DependencyError, FlowverifyError, InvalidInputError
from flowverify.registry import METHODS
from flowverify.results import Verdict
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


# VERONA has no word for "unknown": like what took too long, it is neither.
VERONA_WORDS = {
    Verdict.CERTIFIED: "UNSAT",
    Verdict.FALSIFIED: "SAT",
    Verdict.MISCLASSIFIED: "SAT",
    Verdict.UNKNOWN: "TIMEOUT",
    Verdict.TIMEOUT: "TIMEOUT",
    Verdict.ERROR: "ERR",
}


def verona_module(
    method: str = "complete",
    ground: str = "l1",
    cap: float | None = None,
    input_shape: tuple[int, int, int] | None = None,
    **options: Any,
) -> Any:
    """Certification as a ``VerificationModule``, whose epsilon is the radius of the Wasserstein ball.

    UNSAT is certified, SAT falsified or misclassified, TIMEOUT neither; ERR comes with the reason as ``err``. The
    property generator says no more than which class counts as wrong: any other, or its ``target_class``.

    Args:
        method, options: as for :func:`flowverify.api.make_certifier`.
        ground, cap: the threat model.
        input_shape: (C, H, W) of data points that come in another shape; (H, W) is one channel.

    Raises:
        DependencyError: VERONA is not installed.
        UnknownNameError: an unknown method or ground cost.
    """
    try:
        from ada_verona.database.verification_result import CompleteVerificationData
        from ada_verona.verification_module.verification_module import VerificationModule
    except ImportError as error:
        raise DependencyError(
            "this adapter needs VERONA: pip install git+https://github.com/ADA-research/VERONA"
        ) from error
    from flowverify.api import make_certifier

    METHODS.check(method)
    threat = Threat(ground, cap)

    class Adapter(VerificationModule):  # type: ignore[misc]
        name = f"flowverify ({method}, {threat.name})"

        def __init__(self) -> None:
            self._key: Any = None
            self._certifier: Any = None

        def certifier(self, network: Any, shape: Any, target: int | None) -> Any:
            """The last one is kept: epsilons are asked about one after the other."""
            key = (network, shape, target)
            if self._key != key:
                model: Any = getattr(network, "path", None)
                if model is None or Path(model).suffix != ".onnx":
                    wrapper = network.load_pytorch_model()
                    model = getattr(wrapper, "torch_model", wrapper)
                self._certifier = make_certifier(model, method, input_shape=shape, target=target, **options)
                self._key = key
            return self._certifier

        def verify(self, verification_context: Any, epsilon: float) -> Any:
            start, point = time.perf_counter(), verification_context.data_point
            target = getattr(verification_context.property_generator, "target_class", None)
            data, label = point.data.detach().cpu(), torch.tensor([int(point.label)])
            shape = input_shape or ((1, *data.shape) if data.ndim == 2 else tuple(data.shape[-3:]))
            try:
                if data.numel() != prod(shape):
                    raise InvalidInputError(f"data point of shape {tuple(data.shape)}: expected one image {shape}")
                image, ball = data.reshape(1, *shape), WassersteinBall(float(epsilon), threat.ground, threat.cap)
                certifier = self.certifier(verification_context.network, shape, target)
                (found,) = certifier.certify(image, label, ball)
            except FlowverifyError as error:
                return CompleteVerificationData(result="ERR", took=time.perf_counter() - start, err=str(error))
            shown = image[0] if found.verdict is Verdict.MISCLASSIFIED else found.witness
            logits = None
            if VERONA_WORDS[found.verdict] == "SAT" and shown is not None:
                with torch.no_grad():
                    logits = certifier.precise(shown[None].double().to(certifier.device))[0].cpu()
            return CompleteVerificationData(
                result=VERONA_WORDS[found.verdict],
                took=time.perf_counter() - start,
                counter_example=None if logits is None else _assignment(shown, logits),
                obtained_labels=None if logits is None else logits.argmax().reshape(1).numpy(),
                err=found.note if found.verdict is Verdict.ERROR else "",
                stdout=found.note,
            )

    return Adapter()


def _assignment(image: Tensor, logits: Tensor) -> str:
    """A counterexample as VNN-COMP has it: a line for each input and output."""
    inputs = [f"(X_{k} {value!r})" for k, value in enumerate(image.flatten().tolist())]
    return "\n".join(["sat", *inputs, *(f"(Y_{k} {value!r})" for k, value in enumerate(logits.tolist()))])
