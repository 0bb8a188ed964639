"""The classifier smoothed by splitting: its exact class probabilities, and radii that are certain."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.smoothing.classifier import verdict_of
from flowverify.smoothing.results import SmoothedCertificate
from flowverify.smoothing.splitting import Splitting
from flowverify.smoothing.voting import MEMORY, Voter


class SplitClassifier:
    """g(x) = the class that the base classifier gives to the largest share of shifts and offsets of a splitting.

    Args:
        network: the base classifier, trained on what the splitting shows; it is copied.
        memory: see :class:`~flowverify.smoothing.voting.Voter`.

    Raises:
        InvalidInputError: see :class:`~flowverify.smoothing.voting.Voter`.
    """

    def __init__(self, network: nn.Module, splitting: Splitting, *, memory: int = MEMORY) -> None:
        self.voter = Voter(network, memory)
        self.splitting = splitting

    def probabilities(
        self, images: Tensor, on_samples: Callable[[int], None] | None = None
    ) -> tuple[Tensor, list[int]]:
        """The exact class probabilities, float64 (B, classes), and how many evaluations each image took.

        Args:
            images: valid images (B, C, H, W).
            on_samples: called with the number of evaluations done since the last call.
        """
        rows, classes = self.voter.plan(images.shape[1:])
        total = torch.zeros(len(images), classes, dtype=torch.float64)
        evaluations = [0] * len(images)
        for index, image in enumerate(images.cpu()):
            for shift in self.splitting.shifts:
                seen, lengths = self._pieces(image, shift)
                for start in range(0, len(seen), rows):
                    part = slice(start, start + rows)
                    winners = self.voter.votes(seen[part], f"image {index}").cpu()
                    some = winners >= 0
                    total[index].index_add_(0, winners[some], lengths[part][some])
                evaluations[index] += len(seen)
                if on_samples is not None:
                    on_samples(len(seen))
        return (total / len(self.splitting.shifts)).clamp(max=1), evaluations

    def certify(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        ground: str = "l1",
        on_samples: Callable[[int], None] | None = None,
    ) -> list[SmoothedCertificate]:
        """The certified radius of each image: within it the smoothed classifier gives no other class.

        Args:
            images: (B, C, H, W), nonnegative, of positive mass; not normalised.
            labels: (B,).
            ground: any ground cost (:mod:`flowverify.transport.ground`).

        Returns:
            Certificates with ``alpha`` 0 and the exact ``probability`` of the class.

        Raises:
            UnknownNameError: an unknown ground cost.
            InvalidInputError: bad images or labels, or a model that returns NaN.
        """
        images, targets = self.voter.check(images, labels)
        self.splitting.expansion(ground, (1, 1))
        begin = time.perf_counter()
        probabilities, evaluations = self.probabilities(images, on_samples)
        top, classes = probabilities.topk(2, dim=1)
        margin = (top[:, 0] - top[:, 1]).numpy()
        radii = self.splitting.radius(margin, ground, (images.shape[-2], images.shape[-1]))
        share = (time.perf_counter() - begin) / max(len(targets), 1)
        results = []
        for row, label in enumerate(targets.tolist()):
            prediction = int(classes[row, 0]) if top[row, 0] > 0 else None
            results.append(
                SmoothedCertificate(
                    verdict=verdict_of(prediction, label, float(radii[row])),
                    label=label,
                    prediction=prediction,
                    method=self.splitting.method,
                    bound="exact",
                    ground=ground,
                    radius=float(radii[row]) if prediction == label else 0.0,
                    probability=float(top[row, 0]),
                    successes=None,
                    samples=evaluations[row],
                    base_accuracy=float(probabilities[row, label]),
                    alpha=0.0,
                    seconds=share,
                )
            )
        return results

    def _pieces(self, image: Tensor, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the base classifier sees (N, C, H, W) at one shift, and the share of each piece (N,)."""
        splitting, size = self.splitting, (image.shape[-2], image.shape[-1])
        masses = splitting.masses(image[None], shift)
        offsets = splitting.offsets(tuple(masses.shape[1:]), shift)
        middles, lengths = splitting.pieces(masses, offsets)
        t = torch.from_numpy(middles)[:, None, None, None]
        shown = splitting.images(splitting.parts(masses, offsets, t), offsets, t, shift, size)
        seen = (shown * image.double().sum()).to(self.voter.device, self.voter.dtype)
        return seen, torch.from_numpy(np.ascontiguousarray(lengths))
