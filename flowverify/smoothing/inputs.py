"""The check of images and labels, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.ball import check_images
from flowverify.conventions import check_labels
from flowverify.smoothing.voting import Voter


def check_inputs(images: Tensor, labels: Tensor, voter: Voter) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), and labels int64 (B,) on the CPU.

    Raises:
        InvalidInputError: images that are not valid (:func:`flowverify.ball.check_images`) or that the model does
            not take, labels that are not its classes, or another number of them.
    """
    images = check_images(images).detach()
    targets = check_labels(labels, len(images), voter.plan(images.shape[1:])[1], torch.device("cpu"))
    return images, targets
