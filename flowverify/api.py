"""What ``import flowverify as fv`` offers: certification and attacks in one call, by the name of a method.

A method, an engine or an attack is a name of :mod:`flowverify.registry`, or ``MODULE:CLASS`` of somebody else's. Its
options are keyword arguments of every function here, or a dataclass of them as ``options``.

Images are tensors or numpy arrays (C, H, W) or (B, C, H, W), with labels in any form of integers; or, in place of
both, a :class:`~flowverify.data.Dataset`, or a loader or data set of torch or Hugging Face, which has its own labels.
"""

# Annotations are the types themselves here, not their text: ``help`` shows them.

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.attack.base import AttackResult, BaseAttack, make_attack
from flowverify.ball import Threat, WassersteinBall, check_images
from flowverify.certifiers.base import BaseCertifier
from flowverify.conventions import check_labels
from flowverify.data import Dataset, as_dataset
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.network import load_network
from flowverify.quiet import without_warnings
from flowverify.registry import COMPLETE, ENGINES, INCOMPLETE, METHODS, OWN_ENGINE
from flowverify.results import Certificate, Interrupted
from flowverify.smoothing import Noise, SmoothedCertificate, SmoothedClassifier, SplitClassifier, Splitting
from flowverify.targeted import TargetedAttack, TargetedCertifier

if TYPE_CHECKING:
    import pandas

ADVERSARY = "minimal"  # what complete methods start from, unless told otherwise
PART = 50  # images that are done before progress is told, where a method has no batches of its own

Model = str | Path | nn.Module
Images = Tensor | np.ndarray | Dataset | Iterable[Any]
Labels = Tensor | np.ndarray | Sequence[int] | int | None
Progress = bool | Callable[[int, int], None]


def certify(
    model: Model,
    image: Tensor | np.ndarray,
    label: int | Tensor | np.ndarray,
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
    return certify_batch(model, batch, check_labels(label, 1), ball, method, bound, **options)[0]


def certify_batch(
    model: Model,
    images: Images,
    labels: Labels = None,
    ball: WassersteinBall | None = None,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    progress: Progress = False,
    **options: Any,
) -> list[Certificate]:
    """Certifies images (B, C, H, W).

    The claim of ``certified``: every image of the ball (nonnegative, of equal mass, within the radius for its ground
    cost, below its cap) is classified as the label.

    Args:
        images, labels: as :mod:`flowverify.api` says; a data set or a loader without labels beside it.
        ball: of the radius that is asked about.
        method, bound, options: see :func:`make_certifier`; such as ``method="complete", timeout=10``.
        progress: True shows a bar, a function is told how many images are done, and of how many.

    Raises:
        UnknownNameError: an unknown method or bound.
        InvalidInputError: images or labels that the model does not take, an image above the cap, or an option that
            the method has not.
        DataError: a data set or a loader that gives something else than images and labels.
    """
    if not isinstance(ball, WassersteinBall):
        raise InvalidInputError(f"ball: given {ball!r}, expected a WassersteinBall, such as ball=WassersteinBall(0.05)")
    chosen, truth = with_labels(images, labels)
    certifier = make_certifier(model, method, bound, input_shape=_shape(chosen), **options)
    return _in_parts(
        certifier, chosen, truth, ball.threat, progress, lambda some, of: certifier.certify(some, of, ball)
    )


def certified_radius(
    model: Model,
    images: Images,
    labels: Labels = None,
    method: str = "fine-tuned",
    bound: str = "best",
    ground: str = "l1",
    *,
    cap: float | None = None,
    progress: Progress = False,
    **options: Any,
) -> Tensor:
    """Largest certified radii (B,), in pixels on normalised images, float64; 0 where misclassified.

    ``search`` of :func:`make_certifier` returns whole certificates, with what is known from above.

    Args:
        images, labels, progress, options: as for :func:`certify_batch`.
        method, bound: see :func:`make_certifier`.
        ground, cap: of the ball; see :class:`~flowverify.ball.WassersteinBall`.

    Raises:
        UnknownNameError: an unknown method, bound or ground cost.
        InvalidInputError, DataError: as :func:`certify_batch`.
    """
    chosen, truth = with_labels(images, labels)
    certifier, threat = make_certifier(model, method, bound, input_shape=_shape(chosen), **options), Threat(ground, cap)
    found = _in_parts(certifier, chosen, truth, threat, progress, lambda some, of: certifier.search(some, of, threat))
    return torch.tensor([certificate.radius for certificate in found], dtype=torch.float64)


def with_labels(images: Images, labels: Labels = None) -> tuple[Tensor, Any]:
    """Images (B, C, H, W) and their labels, out of whatever form they come in.

    Args:
        labels: None for images that come with their own; they are checked by what knows the classes.

    Raises:
        InvalidInputError: images in another form, or without labels.
        DataError: a data set or a loader that gives something else than images and labels.
    """
    if labels is not None:
        return check_images(images), labels
    if isinstance(images, Tensor | np.ndarray):
        raise InvalidInputError(
            f"labels: given none with images of type {type(images).__name__}, expected one for each image (or a data "
            "set or a loader, which has its own)"
        )
    data = images if isinstance(images, Dataset) else as_dataset(images)
    return check_images(data.images), data.labels


def to_frame(certificates: Iterable[Certificate | Mapping[str, Any]] | AttackResult) -> "pandas.DataFrame":
    """Certificates, or what an attack found, as a frame of pandas: a row an image, in their order.

    Args:
        certificates: or records of them, as ``to_json`` and ``flowverify verify --json`` give them.

    Raises:
        DependencyError: pandas is not installed. ``[one.to_json() for one in certificates]`` does without.
        InvalidInputError: something else.
    """
    records = to_records(certificates)
    try:
        import pandas
    except ImportError as error:
        raise DependencyError(
            "frames need pandas: pip install 'flowverify[pandas]'; fv.to_records gives a list of dicts without"
        ) from error
    return pandas.DataFrame.from_records(records, columns=list(dict.fromkeys(key for one in records for key in one)))


def to_records(certificates: Iterable[Certificate | Mapping[str, Any]] | AttackResult) -> list[dict[str, Any]]:
    """As :func:`to_frame`, as a list of dicts with plain values.

    Raises:
        InvalidInputError: something else than certificates, records or the result of an attack.
    """
    if isinstance(certificates, AttackResult):
        return [certificates.to_json(number) for number in range(len(certificates))]
    if isinstance(certificates, Certificate | Mapping | str) or not isinstance(certificates, Iterable):
        raise InvalidInputError(f"certificates: given {type(certificates).__name__}, expected a list of certificates")
    records = []
    for number, one in enumerate(certificates):
        if not isinstance(one, Certificate | Mapping):
            raise InvalidInputError(f"certificate {number}: given {type(one).__name__}, expected a Certificate")
        records.append(one.to_json() if isinstance(one, Certificate) else dict(one))
    return records


def _in_parts(
    certifier: BaseCertifier,
    images: Tensor,
    labels: Any,
    threat: Threat,
    progress: Progress,
    ask: Callable[[Tensor, Tensor], list[Certificate]],
) -> list[Certificate]:
    """All certificates; part by part where somebody wants to know how far it is.

    Raises:
        Interrupted: at Ctrl-C, with what is known until then.
    """
    if progress is False:
        return ask(images, labels)
    images, labels = certifier.check(images, labels, threat)
    own = getattr(getattr(certifier, "options", None), "batch_size", PART)
    size, found = own if certifier.batched else 1, list[Certificate]()
    with _told(progress, len(images)) as tell:
        for first in range(0, len(images), size):
            try:
                found += ask(images[first : first + size], labels[first : first + size])
                tell(len(found))
            except Interrupted as stopped:
                raise Interrupted([*found, *stopped.certificates]) from None
            except KeyboardInterrupt:
                raise Interrupted(found) from None
    return found


@contextmanager
def _told(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """What to call with the number of images that are done."""
    if callable(progress):
        yield lambda done: progress(done, total)
        return
    with without_warnings():  # notebooks without widgets get a bar of letters, and are told so each time
        from tqdm.auto import tqdm

        bar = tqdm(total=total, unit="image")
    with bar:
        yield lambda done: bar.update(done - bar.n)


def find_adversarial(
    model: nn.Module,
    images: Images,
    labels: Labels = None,
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
        images, labels: as for :func:`certify_batch`.
        ground, cap: of the distance that is minimised, where no ball is given.
        target: the class that has to overtake the label (:mod:`flowverify.targeted`); any other class without it.

    Raises:
        UnknownNameError: an unknown attack or ground cost.
        InvalidInputError: images or labels that the model does not take, an option that the attack has not, or a
            target that is the label of an image.
    """
    chosen, truth = with_labels(images, labels)
    search = attack_on(model, method, target, **options)
    if ball is None:
        return search.minimise(chosen, truth, ground, cap)
    return search.run(chosen, truth, ball)


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
    model: Model,
    images: Images,
    labels: Labels,
    noise: Noise | Splitting | float,
    ground: str = "l1",
    *,
    seed: int = 0,
    **options: Any,
) -> list[SmoothedCertificate]:
    """Certified radii of the smoothed classifier, each right with probability 1 - alpha (with splitting, certain).

    Args:
        images, labels: as for :func:`certify_batch`; None for the labels of a data set or a loader.
        noise: what is added; a number is the standard deviation of Laplace noise on flows (Wasserstein smoothing).
        options: of :meth:`flowverify.smoothing.SmoothedClassifier.certify`: n0, n, alpha, certificate.
            Splitting has none.

    Raises:
        UnknownNameError: an unknown certificate or ground cost.
        InvalidInputError: images or labels that the model does not take, or an option out of its range.
    """
    chosen, truth = with_labels(images, labels)
    network = load_network(model, _shape(chosen))
    if isinstance(noise, Splitting):
        if options:
            raise InvalidInputError(f"options {', '.join(options)}: given with splitting, which has none")
        return SplitClassifier(network, noise).certify(chosen, truth, ground=ground)
    added = noise if isinstance(noise, Noise) else Noise(noise)
    return SmoothedClassifier(network, added, seed=seed).certify(chosen, truth, ground=ground, **options)


def make_certifier(
    model: Model,
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
        engine: what carries the method out: flowverify, marabou, alpha-beta-crown, or MODULE:CLASS.
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
