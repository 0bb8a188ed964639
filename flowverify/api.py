"""Certification in one call, by the name of a method."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flowverify.ball import WassersteinBall, check_images
from flowverify.bounds.engine import DomainName
from flowverify.certifiers.make import make_certifier
from flowverify.certifiers.radius import RELATIVE_TOLERANCE, search_radius
from flowverify.certifiers.verify import Certifier
from flowverify.errors import InvalidInputError
from flowverify.results import Certificate


def certify(
    model: str | Path | nn.Module,
    image: Tensor,
    label: int | Tensor,
    ball: WassersteinBall,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    domain: DomainName = "auto",
) -> Certificate:
    """Certifies one image (C, H, W) against a Wasserstein ball; see :func:`certify_batch`.

    Raises:
        InvalidInputError: more than one image, or as :func:`certify_batch`.
    """
    batch = check_images(image)
    if batch.shape[0] != 1:
        raise InvalidInputError(f"image of shape {tuple(image.shape)}: expected one image; use certify_batch for more")
    return certify_batch(model, batch, torch.as_tensor(label).reshape(-1), ball, method, bound, domain=domain)[0]


def certify_batch(
    model: str | Path | nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: WassersteinBall,
    method: str = "fine-tuned",
    bound: str = "best",
    *,
    domain: DomainName = "auto",
) -> list[Certificate]:
    """Certifies a batch of images (B, C, H, W).

    The claim of ``certified``: every image of the ball (nonnegative, of equal mass, within the radius for its ground
    cost, below its cap) is classified as the label.

    Args:
        method: ``vanilla``, ``fine-tuned``, ``linear``, ``linear-lp``, ``complete``, ``vanilla-complete`` or ``milp``.
        bound: of vanilla and fine-tuned certification; exact methods have no use for it.

    Raises:
        UnknownNameError: an unknown method or bound.
        InvalidInputError: images or labels that the model does not take, or an image above the cap.
    """
    shape = tuple(int(size) for size in images.shape[-3:])
    certifier = make_certifier(model, method, bound, input_shape=shape, domain=domain)  # type: ignore[arg-type]
    return certifier.certify(images, labels, ball)


def certified_radius(
    model: str | Path | nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = "fine-tuned",
    bound: str = "best",
    ground: str = "l1",
    *,
    tolerance: float = RELATIVE_TOLERANCE,
    domain: DomainName = "auto",
    cap: float | None = None,
) -> Tensor:
    """Largest certified radii (B,), in pixels on normalised images, float64; 0 where misclassified.

    ``search`` of the method's certifier returns whole certificates, with what is known from above.

    Args:
        tolerance: relative, of the search by vanilla and fine-tuned certification.

    Raises:
        UnknownNameError: an unknown method, bound or ground cost.
        InvalidInputError: as :func:`certify_batch`.
    """
    shape = tuple(int(size) for size in images.shape[-3:])
    certifier = make_certifier(model, method, bound, input_shape=shape, domain=domain)  # type: ignore[arg-type]
    if isinstance(certifier, Certifier):
        found = search_radius(certifier, images, labels, ground, tolerance=tolerance, cap=cap)
    else:
        found = certifier.search(images, labels, ground, cap)
    return torch.tensor([certificate.radius for certificate in found], dtype=torch.float64)
