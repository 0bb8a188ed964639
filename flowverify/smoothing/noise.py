"""Smoothing noise, on flows (Wasserstein smoothing) or on pixels, Laplace or uniform, and the radii that it certifies.

Source: Levine & Feizi 2020, Definition 3.2, Sections 5 and 6.1, Corollary 2 (Laplace noise); Yang et al.
2020, "Randomized Smoothing of All Shapes and Sizes" (uniform noise).

Certified radii come from a lower bound of the probability of the top class. For noise with independent coordinates,
p(x) the probability that the base classifier answers the class at x + noise, and p = p(x) > 1/2 (proofs: theory,
section 11):

Laplace noise of scale b. The density's derivative in one coordinate is that density times sign(t) / b, so a move
along one coordinate changes p(x) at the rate E[f sign(t)] / b, and |E[f sign(t)]| <= 1 - p for any f in [0, 1] with
E f = p >= 1/2: half of the mass has either sign, and f misses 1 - p of it. Along any path of L1 length r the share
1 - p thus grows by a factor exp(r / b) at most, and it stays below 1/2 for

    r < b * ln(1 / (2 (1 - p)))                      ``tight``

in any number of dimensions. The half-space {t_1 <= r} attains it. It is the bound of Teng et al. 2020 and of Yang et
al. 2020 (Table 1). Levine & Feizi 2020 use Lecuyer et al. 2019, which compares two classes each of which may
change by exp(r / b),

    r = b / 2 * ln(p / (1 - p))                      ``paper``, their equation (18).

Uniform noise on [-h, h]. Two boxes whose centres differ by r_i in coordinate i share the part prod (1 - |r_i| / 2h)
>= 1 - sum |r_i| / 2h of their volume, so p falls by at most |r|_1 / 2h, and one coordinate attains it:

    r = 2h * (p - 1/2)                               ``tight`` (Yang et al. 2020).

What L1 means for W1: on flows, W1 with l1 ground is the least L1 length of a flow (Lemma 1 of Levine & Feizi), so the
radius is r for l1 ground and r / sqrt(2) for l2 (their equation 20). On pixels, |x - y|_1 <= 2 W1 for either ground
(Corollary 1), so it is r / 2 for both (their equation 21).

Confidence bounds of that probability from counts of samples: Cohen et al. 2019, "Certified Adversarial Robustness via
Randomized Smoothing", Section 3.2, which Levine & Feizi 2020, Section 5, follow; Clopper and Pearson 1934; for the test
of the top two, Hung and Fithian 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.ground import parse_ground

DOMAINS = ("flow", "pixels")
DISTRIBUTIONS = ("laplace", "uniform")
METHODS = {
    ("flow", "laplace"): "wasserstein-smoothing",
    ("pixels", "laplace"): "laplace-smoothing",
    ("flow", "uniform"): "uniform-smoothing",
    ("pixels", "uniform"): "uniform-pixel-smoothing",
}


@dataclass(frozen=True)
class Noise:
    """Independent noise of mean 0 and standard deviation ``sigma``, in units of the image's mass.

    In the ``flow`` domain every edge between neighbouring pixels carries a noisy flow, and the image gets
    A delta: its mass stays as it is (Delta of Definition 3.1; the channels are independent, Corollary 2).
    In the ``pixels`` domain every pixel gets its own noise. An image x of mass s becomes x + s * noise: what
    noise on the normalised image x / s is once it is scaled back. Noisy pixels may be negative, as in
    the paper.

    Raises:
        UnknownNameError: an unknown domain or distribution.
        InvalidInputError: ``sigma`` is not a finite number > 0.
    """

    sigma: float
    domain: str = "flow"
    distribution: str = "laplace"

    def __post_init__(self) -> None:
        for kind, given, valid in (
            ("noise domain", self.domain, DOMAINS),
            ("noise distribution", self.distribution, DISTRIBUTIONS),
        ):
            if given not in valid:
                raise UnknownNameError(kind, given, valid)
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float):
            raise InvalidInputError(f"noise sigma: given {self.sigma!r}, expected a number > 0")
        if not (isfinite(self.sigma) and self.sigma > 0):
            raise InvalidInputError(f"noise sigma: given {self.sigma!r}, expected a finite number > 0")

    @property
    def scale(self) -> float:
        """Laplace: b = sigma / sqrt(2) of the density exp(-|t|/b) / 2b. Uniform: the half-width sqrt(3) * sigma."""
        return self.sigma / sqrt(2) if self.distribution == "laplace" else self.sigma * sqrt(3)

    @property
    def method(self) -> str:
        """The name of smoothing with this noise; the paper's are wasserstein-smoothing and laplace-smoothing."""
        return METHODS[self.domain, self.distribution]

    def draw(
        self, grid: Grid, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``count`` independent noises for an image of mass 1, (count, C, H, W), on the generator's device."""
        size = grid.edges if self.domain == "flow" else grid.pixels
        device = generator.device if generator is not None else torch.device("cpu")
        # In [-1, 1): uniform_ draws multiples of 2^-24 (2^-53), so the magnitude below is never 0.
        values = torch.empty(count, size, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
        if self.distribution == "laplace":
            values = torch.copysign(torch.log1p(-values.abs().clamp_(max=1 - torch.finfo(dtype).eps)), values).neg_()
        values *= self.scale
        return grid.divergence(values) if self.domain == "flow" else values.reshape(count, *grid.image_shape)


CERTIFICATES = ("tight", "paper")


def check_certificate(name: object, noise: Noise) -> str:
    """Returns the name of a certificate.

    Raises:
        UnknownNameError: neither ``tight`` nor ``paper``.
        InvalidInputError: ``paper`` for another noise than Laplace's, which the paper does not have.
    """
    if not isinstance(name, str) or name not in CERTIFICATES:
        raise UnknownNameError("certificate", name, CERTIFICATES)
    if name == "paper" and noise.distribution != "laplace":
        raise InvalidInputError(f"certificate 'paper': given {noise.distribution} noise, expected laplace noise")
    return name


def l1_radius(noise: Noise, failure: ArrayLike, certificate: str = "tight") -> NDArray[np.float64]:
    """The certified L1 radius in the noise's own coordinates, for an image of mass 1.

    Args:
        failure: upper bounds of 1 - p, in (0, 1].

    Returns:
        Radii of the same shape; 0 where the bound is 1/2 or more.
    """
    check_certificate(certificate, noise)
    miss = np.asarray(failure, dtype=np.float64)
    if not np.all((miss > 0) & (miss <= 1)):
        raise InvalidInputError(
            f"1 - p: given {np.min(miss):g} to {np.max(miss):g}, expected bounds above 0 and at most 1"
        )
    if noise.distribution == "uniform":
        radius = 2 * noise.scale * (0.5 - miss)
    elif certificate == "tight":
        radius = -noise.scale * np.log(2 * miss)
    else:
        radius = noise.scale / 2 * (np.log1p(-np.minimum(miss, 0.5)) - np.log(miss))
    return np.asarray(np.where(miss < 0.5, radius, 0.0))


def wasserstein_radius(
    noise: Noise, failure: ArrayLike, certificate: str = "tight", ground: str = "l1"
) -> NDArray[np.float64]:
    """The certified W1 radius in pixels, on normalised images.

    No image within it is given another class by the smoothed classifier, if 1 - p is at most ``failure``.

    Args:
        ground: any ground cost (:mod:`flowverify.transport.ground`); for powers the radius is that of W_p.

    Raises:
        UnknownNameError: an unknown certificate or ground cost.
        InvalidInputError: a certificate that the noise does not have, or bounds outside (0, 1].
    """
    cost = parse_ground(ground)
    radius = l1_radius(noise, failure, certificate)
    if noise.domain == "flow":
        return np.asarray(np.vectorize(cost.from_l1, otypes=[np.float64])(radius))
    # Every move is at least one pixel long: |x - y|_1 <= 2 * (mass moved) <= 2 W1 <= 2 W_p, and <= 2 W_p^p.
    return np.asarray(np.maximum(radius / 2, (radius / 2) ** (1 / cost.power)))


Floats = NDArray[np.float64]


def check_alpha(alpha: object) -> float:
    """Returns a probability of error, or raises InvalidInputError unless it is a number in (0, 1)."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise InvalidInputError(f"alpha: given {alpha!r}, expected a number between 0 and 1, both excluded")
    return float(alpha)


def check_samples(name: str, count: object) -> int:
    """Returns a number of samples, or raises InvalidInputError unless it is an integer >= 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInputError(f"{name}: given {count!r} samples, expected an integer >= 1")
    return count


def upper_bound_of_failure(successes: ArrayLike, samples: int, alpha: float) -> Floats:
    """The Clopper-Pearson upper bound of 1 - p, from ``successes`` in ``samples`` independent trials.

    With probability at least 1 - alpha over the samples it is >= 1 - p. Given for 1 - p, which is near 0 where
    it matters, so that no digits are lost. All successes give 1 - alpha^(1/n) > 0, none give 1.

    Raises:
        InvalidInputError: alpha outside (0, 1), fewer than one sample, counts outside 0 to ``samples``.
    """
    check_alpha(alpha)
    check_samples("n", samples)
    right = np.asarray(successes, dtype=np.float64)
    if right.size and not (right.min() >= 0 and right.max() <= samples):
        raise InvalidInputError(f"successes: given {right.min():g} to {right.max():g}, expected 0 to {samples}")
    import scipy.stats  # takes longer to load than a few images to certify

    bound = scipy.stats.beta.isf(alpha, samples - right + 1, np.maximum(right, 1))
    return np.where(right > 0, bound, 1.0)


def lower_confidence_bound(successes: ArrayLike, samples: int, alpha: float) -> Floats:
    """The one-sided Clopper-Pearson lower bound of p; see :func:`upper_bound_of_failure`."""
    return np.asarray(1.0 - upper_bound_of_failure(successes, samples, alpha))


def top_two_p_values(first: ArrayLike, second: ArrayLike) -> Floats:
    """p-values of the two-sided binomial test that the two most frequent classes are equally likely.

    2 * P(Binomial(first + second, 1/2) >= first), at most 1, for counts ``first`` >= ``second``.
    """
    higher, lower = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    import scipy.stats

    return np.asarray(np.minimum(1.0, 2.0 * scipy.stats.binom.sf(higher - 1, higher + lower, 0.5)))
