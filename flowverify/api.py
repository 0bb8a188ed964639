"""What ``import flowverify as fv`` offers: certification and attacks in one call, by the name of a method.

A method, an engine or an attack is a name of :mod:`flowverify.registry`, or ``MODULE:CLASS`` of somebody else's. Its
options are keyword arguments of every function here, or a dataclass of them as ``options``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.attack.base import AttackResult, BaseAttack, make_attack
from flowverify.ball import Threat, WassersteinBall, check_images
from flowverify.certifiers.base import BaseCertifier
from flowverify.errors import InvalidInputError
from flowverify.network import load_network
from flowverify.registry import COMPLETE, ENGINES, INCOMPLETE, METHODS, OWN_ENGINE
from flowverify.results import Certificate
from flowverify.smoothing import Noise, SmoothedCertificate, SmoothedClassifier, SplitClassifier, Splitting
from flowverify.targeted import TargetedAttack, TargetedCertifier

ADVERSARY = "minimal"  # what complete methods start from, unless told otherwise


def certify(
    model: str | Path | nn.Module,
    image: Tensor,
    label: int | Tensor,
    ball: WassersteinBall,
    method: str = "fine-tuned",
    bound: str = "best",
    **options: Any,
) -> Certificate:
    """Certifies one image (C, H, W) against a Wasserstein ball; see :func:`certify_batch`.

    Raises:
        InvalidInputError: more than one image, or as :func:`certify_batch`.
    """
    batch = check_images(image)
    if batch.shape[0] != 1:
        raise InvalidInputError(f"image of shape {tuple(image.shape)}: expected one image; use certify_batch for more")
    return certify_batch(model, batch, torch.as_tensor(label).reshape(-1), ball, method, bound, **options)[0]


def certify_batch(
    model: str | Path | nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: WassersteinBall,
    method: str = "fine-tuned",
    bound: str = "best",
    **options: Any,
) -> list[Certificate]:
    """Certifies a batch of images (B, C, H, W).

    The claim of ``certified``: every image of the ball (nonnegative, of equal mass, within the radius for its ground
    cost, below its cap) is classified as the label.

    Args:
        method, bound, options: see :func:`make_certifier`; such as ``method="complete", timeout=10``.

    Raises:
        UnknownNameError: an unknown method or bound.
        InvalidInputError: images or labels that the model does not take, an image above the cap, or an option that
            the method has not.
    """
    return make_certifier(model, method, bound, input_shape=_shape(images), **options).certify(images, labels, ball)


def certified_radius(
    model: str | Path | nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = "fine-tuned",
    bound: str = "best",
    ground: str = "l1",
    *,
    cap: float | None = None,
    **options: Any,
) -> Tensor:
    """Largest certified radii (B,), in pixels on normalised images, float64; 0 where misclassified.

    ``search`` of :func:`make_certifier` returns whole certificates, with what is known from above.

    Raises:
        UnknownNameError: an unknown method, bound or ground cost.
        InvalidInputError: as :func:`certify_batch`.
    """
    certifier = make_certifier(model, method, bound, input_shape=_shape(images), **options)
    found = certifier.search(images, labels, Threat(ground, cap))
    return torch.tensor([certificate.radius for certificate in found], dtype=torch.float64)


def find_adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: WassersteinBall | None = None,
    method: str = ADVERSARY,
    ground: str = "l1",
    *,
    cap: float | None = None,
    target: int | None = None,
    **options: Any,
) -> AttackResult:
    """Looks for an adversarial image of each image (B, C, H, W): in the ball, or without one for the nearest.

    Every distance in the result is exact, of an image that was checked: an upper bound of what can be certified.

    Args:
        ground, cap: of the distance that is minimised, where no ball is given.
        target: the class that has to overtake the label (:mod:`flowverify.targeted`); any other class without it.

    Raises:
        UnknownNameError: an unknown attack or ground cost.
        InvalidInputError: images or labels that the model does not take, an option that the attack has not, or a
            target that is the label of an image.
    """
    search = attack_on(model, method, target, **options)
    if ball is None:
        return search.minimise(images, labels, ground, cap)
    return search.run(images, labels, ball)


def attack_on(model: nn.Module, method: str, target: int | None = None, **options: Any) -> BaseAttack | TargetedAttack:
    """The attack of a name on a model; with a target, on the class that has to overtake the label.

    Raises:
        UnknownNameError: no attack has this name.
        InvalidInputError: a model or an option that the attack does not take.
    """

    def make(model: nn.Module) -> BaseAttack:
        return make_attack(method, model, **options)

    return make(model) if target is None else TargetedAttack(model, target, make)


def smooth(
    model: str | Path | nn.Module,
    images: Tensor,
    labels: Tensor,
    noise: Noise | Splitting | float,
    ground: str = "l1",
    *,
    seed: int = 0,
    **options: Any,
) -> list[SmoothedCertificate]:
    """Certified radii of the smoothed classifier, each right with probability 1 - alpha (with splitting, certain).

    Args:
        noise: what is added; a number is the standard deviation of Laplace noise on flows (Wasserstein smoothing).
        options: of :meth:`flowverify.smoothing.SmoothedClassifier.certify`: n0, n, alpha, certificate.
            Splitting has none.

    Raises:
        UnknownNameError: an unknown certificate or ground cost.
        InvalidInputError: images or labels that the model does not take, or an option out of its range.
    """
    network = load_network(model, _shape(images))
    if isinstance(noise, Splitting):
        if options:
            raise InvalidInputError(f"options {', '.join(options)}: given with splitting, which has none")
        return SplitClassifier(network, noise).certify(images, labels, ground=ground)
    chosen = noise if isinstance(noise, Noise) else Noise(noise)
    return SmoothedClassifier(network, chosen, seed=seed).certify(images, labels, ground=ground, **options)


def make_certifier(
    model: str | Path | nn.Module,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    engine: str = OWN_ENGINE,
    input_shape: tuple[int, int, int] | None = None,
    references: int = 0,
    pool: Tensor | None = None,
    progress: Callable[[Any], None] | None = None,
    target: int | None = None,
    options: Any = None,
    **given: Any,
) -> BaseCertifier:
    """The certifier of a method: ``certify`` decides radii, ``search`` finds the largest.

    Args:
        method: a name of :data:`flowverify.registry.METHODS`, or MODULE:CLASS.
        bound: of vanilla and fine-tuned certification; other methods have no use for it.
        engine: what carries the method out: flowverify, marabou, or MODULE:CLASS.
        references: with a number > 0, the maximum over so many references, which ``pool`` may provide.
        progress: told what is known, now and then, by methods that take long.
        target: the one class that counts as wrong (:mod:`flowverify.targeted`); every other class without it.
        options: the method's options, as their dataclass or a mapping.
        given: options one by one; they replace those of ``options``. ``adversary`` of complete methods may be the name
            of an attack, and is "minimal" unless it is given.

    Raises:
        UnknownNameError: an unknown method, bound or engine; and as the certifiers.
        InvalidInputError: an option that the method has not; references for a method that is exact: there is nothing
            to gain over the truth (framework paper, Table 1).
    """
    registry, name = (METHODS, method) if engine == OWN_ENGINE else (ENGINES, engine)
    wanted = {field.name for field in dataclasses.fields(registry.options_type(name))}
    if options is not None and not isinstance(options, Mapping):
        if not isinstance(options, registry.options_type(name)):
            expected = registry.options_type(name).__name__
            raise InvalidInputError(f"options of {registry.kind} {name}: given {options!r}, expected {expected}")
        options = {key: getattr(options, key) for key in wanted}
    defaults = {"bound": bound, "adversary": ADVERSARY, "progress": progress}
    values = {key: value for key, value in defaults.items() if key in wanted and value is not None}
    chosen = registry.options(name, {**values, **(options or {}), **given})
    network = load_network(model, input_shape)
    if target is not None:

        def make(network: nn.Module) -> BaseCertifier:
            return make_certifier(
                network, method, bound, engine=engine, references=references, pool=pool, options=chosen
            )

        return TargetedCertifier(network, target, make)
    if isinstance(adversary := getattr(chosen, "adversary", None), str):
        chosen = dataclasses.replace(chosen, adversary=make_attack(adversary, network))
    if references:
        return _over_references(network, name, references, pool, chosen)
    made: BaseCertifier = registry.make(name, chosen, network, method)
    return made


def _over_references(network: nn.Module, method: str, count: int, pool: Tensor | None, options: Any) -> BaseCertifier:
    """The maximum over references of a method that can gain by them."""
    from flowverify.certifiers.references import IMPOSSIBLE, ReferenceCertifier, ReferenceCompleteCertifier

    if method in METHODS.family(INCOMPLETE):
        return ReferenceCertifier(network, method, options.bound, count=count, pool=pool, options=options)
    if method == "vanilla-complete":
        return ReferenceCompleteCertifier(network, method, count=count, pool=pool, options=options)
    why = IMPOSSIBLE if method in METHODS.family(COMPLETE) else "it is exact, so no reference can gain (Table 1)"
    raise InvalidInputError(
        f"references with method {method}: {why}; expected {', '.join(METHODS.family(INCOMPLETE))} or vanilla-complete"
    )


def _shape(images: Tensor) -> tuple[int, int, int]:
    """(C, H, W), for models that do not say what they take."""
    return tuple(int(size) for size in images.shape[-3:])  # type: ignore[return-value]
