"""Splitting noise on masses of blocks: deterministic certificates for W1.

Levine & Feizi 2021, "Improved, Deterministic Smoothing for L1 Certified Robustness", split each coordinate of the
input at s + step * Z with s uniform on [0, step) and show the base classifier only in which part a coordinate lies. Two
inputs look different with probability at most |u - u'|_1 / step, however the offsets of the coordinates depend on each
other. Here the coordinates are not the flows (splitting is not additive, and flows are not unique) but what flows
change: the masses of blocks of k x k pixels,

    u(x) = masses of the blocks of x / s, the grid of blocks shifted by (a, b), 0 <= a, b < k, all k^2 shifts alike.

A unit of mass that moves by (i, j) changes block in a share 1 - (1 - |i| / k)^+ (1 - |j| / k)^+ of the shifts, and then
two masses, by one each. So with d the ground cost and W1 in it,

    mean over shifts |u(x) - u(y)|_1 <= K * W1(x, y),     K = max over (i, j) of 2 * share(i, j) / d(i, j),

which is 2 / k for the l1 ground cost (a flow through an edge changes two blocks in one of k shifts). The class
probabilities p of the smoothed classifier therefore change by at most K * W1 / step, and none overtakes within

    radius = (p_first - p_second) * step / (2 K).

The offsets are s_j = v_j + t with v fixed and one t, uniform on [0, step), so p is an integral over t of a function
that only changes where a coordinate crosses its offset: it is computed exactly, with one evaluation of the base
classifier for each piece. No sampling, no confidence: the certificate is certain
(theory, section 12).

The classifier smoothed by splitting: its exact class probabilities, and radii that are certain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.errors import InvalidInputError
from flowverify.smoothing.classifier import SmoothedCertificate, verdict_of
from flowverify.smoothing.sampling import MEMORY, Voter, derive_key, halves
from flowverify.transport.ground import parse_ground

ROUNDING = 1e-12  # of margins: the lengths of some thousand pieces, each exact to 1e-16, are added up
BINS = 16  # of t: the base classifier is told the offsets to a 16th of the step


@dataclass(frozen=True)
class Splitting:
    """Splits of block masses.

    Args:
        step: length of the parts, in units of the image's mass.
        block: k, in pixels; 1 splits the pixels themselves.
        scattered: whether the blocks have different offsets v (fixed, pseudo-random), or the same one.

    Raises:
        InvalidInputError: a step that is not a finite number > 0, a block that is not an integer >= 1.
    """

    step: float
    block: int = 4
    scattered: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int | float) or not isfinite(self.step):
            raise InvalidInputError(f"splitting step: given {self.step!r}, expected a finite number > 0")
        if self.step <= 0:
            raise InvalidInputError(f"splitting step: given {self.step!r}, expected a number > 0")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise InvalidInputError(f"splitting block: given {self.block!r}, expected an integer >= 1")

    @property
    def method(self) -> str:
        """The name of this smoothing."""
        return "splitting-smoothing"

    @property
    def shifts(self) -> list[tuple[int, int]]:
        """All shifts of the grid of blocks."""
        return [(a, b) for a in range(self.block) for b in range(self.block)]

    def masses(self, images: Tensor, shift: tuple[int, int]) -> Tensor:
        """Shares of the mass in the blocks, (B, C, H, W) -> float64 (B, C, rows, columns).

        Block (i, j) covers the pixels from (i * k - a, j * k - b) for shift (a, b), where the image has some.
        """
        images = images.double()
        total = images.sum(dim=(1, 2, 3), keepdim=True)
        padding = self._padding(images.shape[-2], images.shape[-1], shift)
        padded = torch.nn.functional.pad(images / total, padding)
        k = self.block
        rows, columns = padded.shape[-2] // k, padded.shape[-1] // k
        return padded.reshape(*padded.shape[:2], rows, k, columns, k).sum(dim=(3, 5))

    def offsets(self, shape: tuple[int, ...], shift: tuple[int, int]) -> Tensor:
        """v of each block of one image, float64 in [0, step), of ``shape`` (C, rows, columns)."""
        if not self.scattered:
            return torch.zeros(shape, dtype=torch.float64)
        drawn = halves(derive_key(self.block, *shift), 0, int(np.prod(shape)))
        return ((drawn.double() + 2**31) / 2**32 * self.step).reshape(shape)

    def parts(self, masses: Tensor, offsets: Tensor, t: Tensor) -> Tensor:
        """Numbers of the parts in which the masses lie: floor((u - v - t) / step)."""
        return torch.floor((masses - offsets - t) / self.step)

    def images(
        self, parts: Tensor, offsets: Tensor, t: Tensor, shift: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """What the base classifier sees of an image of mass 1, (N, C, rows, columns) -> (N, C, H, W), float64.

        The middle of each block's part (of what of it is >= 0), spread evenly over the block's pixels, with the
        offset known to 1 / BINS of the step: a function of the parts, the bin of ``t`` (N, 1, 1, 1) and the shift.
        """
        told = (torch.floor(t / self.step * BINS) + 0.5) / BINS * self.step
        low = offsets + told + parts * self.step
        middle = (low.clamp(min=0) + (low + self.step).clamp(min=0)) / 2
        k = self.block
        fine = (middle / k**2).repeat_interleave(k, dim=-2).repeat_interleave(k, dim=-1)
        a, b = shift
        return fine[..., a : a + size[0], b : b + size[1]]

    def show(self, images: Tensor, t: Tensor, shift: tuple[int, int]) -> Tensor:
        """What the base classifier sees of images (B, C, H, W) of any mass at t (B, 1, 1, 1), float64."""
        masses = self.masses(images, shift)
        offsets = self.offsets(tuple(masses.shape[1:]), shift).to(images.device)
        total = images.double().sum(dim=(1, 2, 3), keepdim=True)
        size = (images.shape[-2], images.shape[-1])
        return self.images(self.parts(masses, offsets, t), offsets, t, shift, size) * total

    def pieces(self, masses: Tensor, offsets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Middles and lengths (as shares of the step) of the pieces of t on which the classifier sees one image."""
        crossings = torch.remainder(masses - offsets, self.step).flatten().numpy()
        bins = np.arange(BINS + 1) / BINS * self.step
        edges = np.unique(np.concatenate([np.clip(crossings, 0, self.step), bins]))
        lengths = np.diff(edges)
        return (edges[:-1] + edges[1:]) / 2, lengths / self.step

    def expansion(self, ground: str, size: tuple[int, int]) -> float:
        """K: the largest mean change of the block masses, in L1, for each unit of W_p^p of the ground cost."""
        cost = parse_ground(ground)
        rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
        stays = np.maximum(1 - rows / self.block, 0) * np.maximum(1 - columns / self.block, 0)
        distance = cost.of_offset(rows.astype(np.float64), columns.astype(np.float64))
        distance.flat[0] = np.inf
        return float(np.max(2 * (1 - stays) / distance, initial=0.0))

    def radius(self, margin: NDArray[np.float64], ground: str, size: tuple[int, int]) -> NDArray[np.float64]:
        """The certified radius for margins p_first - p_second of images of (H, W) pixels."""
        expansion = self.expansion(ground, size)
        if expansion == 0:  # a single pixel: nothing can move
            return np.full_like(margin, np.inf)
        reach = np.clip(margin - ROUNDING, 0.0, 1.0) * self.step / (2 * expansion)
        return np.asarray(reach ** (1 / parse_ground(ground).power))

    def _padding(self, height: int, width: int, shift: tuple[int, int]) -> tuple[int, int, int, int]:
        (a, b), k = shift, self.block
        return (b, -(width + b) % k, a, -(height + a) % k)


class SplitClassifier:
    """g(x) = the class that the base classifier gives to the largest share of shifts and offsets of a splitting.

    Args:
        network: the base classifier, trained on what the splitting shows; it is copied.
        memory: see :class:`~flowverify.smoothing.sampling.Voter`.

    Raises:
        InvalidInputError: see :class:`~flowverify.smoothing.sampling.Voter`.
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
        images, targets = self.voter.check(images, labels, Threat(ground))
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
