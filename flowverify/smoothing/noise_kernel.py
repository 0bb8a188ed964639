"""Noisy images on the CPU, compiled: random bits, their distribution, and Delta, in one pass over each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from flowverify.smoothing.sampling import FIRST, GAMMA, SECOND

Floats = NDArray[np.float32]

_GAMMA, _FIRST, _SECOND = np.uint64(GAMMA), np.uint64(FIRST), np.uint64(SECOND)
_STEP = np.float32(2.0**-31)
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) in float32
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Minimax polynomial of (ln(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes, logf).
_C = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def draw_bits(key: Any, first: Any, bits: Any) -> None:
    """Numbers ``first`` (even) and following of ``counter.halves``, as uint32; ``bits`` has an even length."""
    base = np.uint64(key) + (np.uint64(first) >> np.uint64(1)) * _GAMMA
    pairs = bits.view(np.uint64)
    for k in range(pairs.size):
        value = base + np.uint64(k + 1) * _GAMMA
        value = (value ^ (value >> np.uint64(30))) * _FIRST
        value = (value ^ (value >> np.uint64(27))) * _SECOND
        pairs[k] = value ^ (value >> np.uint64(31))


@njit(cache=True, nogil=True, error_model="numpy")
def to_laplace(bits: Any, scale: Any, noise: Any) -> None:
    """Sign from the highest bit, magnitude -scale * ln((k + 1) / 2^31) from the other 31."""
    whole = noise.view(np.int32)
    for e in range(noise.size):
        noise[e] = np.float32(np.int32(bits[e] & np.uint32(0x7FFFFFFF))) * _STEP + _STEP
    for e in range(noise.size):
        shifted = whole[e] - np.int32(_SQRT_HALF)
        exponent = np.float32(shifted >> np.int32(23))
        whole[e] = (shifted & np.int32(0x7FFFFF)) + np.int32(_SQRT_HALF)
        f = noise[e] - np.float32(1)
        p = _C[0]
        p = p * f + _C[1]
        p = p * f + _C[2]
        p = p * f + _C[3]
        p = p * f + _C[4]
        p = p * f + _C[5]
        p = p * f + _C[6]
        p = p * f + _C[7]
        p = p * f + _C[8]
        z = f * f
        logarithm = f + (f * z * p + exponent * _LN2_LOW - np.float32(0.5) * z) + exponent * _LN2_HIGH
        magnitude = -scale * logarithm
        noise[e] = magnitude if np.int32(bits[e]) >= 0 else -magnitude


@njit(cache=True, nogil=True, error_model="numpy")
def to_uniform(bits: Any, scale: Any, noise: Any) -> None:
    """scale * k / 2^31 for the signed 32-bit integer k."""
    for e in range(noise.size):
        noise[e] = np.float32(np.int32(bits[e])) * (_STEP * scale)


@njit(cache=True, nogil=True, error_model="numpy")
def apply_flows(image: Any, noise: Any, width: Any, result: Any) -> None:
    """Delta on one channel, all flat: ``noise`` holds the plane of rightward flows, then that of downward flows."""
    size = image.size
    right, down = noise[:size], noise[size:]
    right[width - 1 :: width] = 0  # no flow leaves the grid
    down[size - width :] = 0
    for p in range(size):
        result[p] = image[p] - right[p] - down[p]
    for p in range(size - 1):
        result[p + 1] += right[p]
    for p in range(size - width):
        result[p + width] += down[p]


@njit(cache=True, nogil=True, error_model="numpy")
def noisy_samples(
    image: Any,  # (C, H, W)
    key: Any,
    first: Any,  # number of the first sample
    scale: Any,  # of the noise, times the image's mass
    laplace: Any,
    flow: Any,
    result: Any,  # (samples, C, H, W)
) -> None:
    """Samples ``first`` and following of image + noise; sample j uses the numbers from j * stride of its key."""
    channels, width, size = image.shape[0], image.shape[2], image.shape[1] * image.shape[2]
    length = (2 if flow else 1) * channels * size
    stride = length + length % 2
    bits, noise = np.empty(stride, np.uint32), np.empty(stride, np.float32)
    flat, rows = image.reshape(channels, size), result.reshape(result.shape[0], channels, size)
    for sample in range(result.shape[0]):
        draw_bits(key, (first + sample) * stride, bits)
        if laplace:
            to_laplace(bits, scale, noise)
        else:
            to_uniform(bits, scale, noise)
        for c in range(channels):
            if flow:
                apply_flows(flat[c], noise[2 * c * size : 2 * (c + 1) * size], width, rows[sample, c])
            else:
                for p in range(size):
                    rows[sample, c, p] = flat[c, p] + noise[c * size + p]
