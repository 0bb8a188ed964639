"""Reference distributions R of the flow domain (framework paper, section 2.2 and its experiments)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.distance import channel_masses, check_measures

REFERENCES: tuple[str, ...] = ("uniform-random", "point", "flat", "image")


def make_reference(
    kind: str,
    grid: Grid,
    mass: Tensor,  # (B,) or (B, C)
    *,
    seed: int = 0,
    images: Tensor | None = None,
    pixel: tuple[int, int] | None = None,
) -> Tensor:
    """References of the given masses, float64 (B, C, H, W).

    One pattern, which depends on ``kind``, ``grid`` and ``seed`` only, is scaled to the mass of each image of
    the batch, so a result does not depend on how images are batched.

    Args:
        kind: "uniform-random" (pixels uniform in [0, 1]), "point" (one pixel a channel), "flat" (constant),
            or "image" (``images``, the pattern of each entry of the batch).
        mass: mass of each channel, (B, C); or of each image, (B,), shared equally between the channels.
        seed: of "uniform-random", and of "point" without a pixel.
        images: only for "image": (B, C, H, W), or one for all: (1, C, H, W) or (C, H, W).
        pixel: only for "point": (row, column); drawn at random, for each channel, if it is None.

    Raises:
        UnknownNameError: the kind is unknown.
        InvalidInputError: a mass is negative, not finite or, over an image, 0; a shape does not fit; the
            pixel is not on the grid; "image" without images, or a channel without mass that is to get some.
    """
    masses = _check_mass(mass, grid)
    if kind == "uniform-random":
        pattern = torch.rand(1, *grid.image_shape, generator=_generator(seed), dtype=torch.float64)
    elif kind == "point":
        pattern = _point(grid, seed, pixel)
    elif kind == "flat":
        pattern = torch.ones(1, *grid.image_shape, dtype=torch.float64)
    elif kind == "image":
        pattern = _image(grid, images, masses)
    else:
        raise UnknownNameError("reference", kind, REFERENCES)
    total = channel_masses(pattern)
    scale = torch.where(total > 0, masses / total, 0.0)
    return pattern * scale[..., None, None]


def _check_mass(mass: Tensor, grid: Grid) -> Tensor:
    shape = tuple(mass.shape) if isinstance(mass, Tensor) else type(mass).__name__
    if not isinstance(mass, Tensor) or mass.ndim not in (1, 2):
        raise InvalidInputError(f"mass of shape {shape}: expected a tensor (B,) or (B, {grid.channels})")
    masses = mass.detach().cpu().to(torch.float64)
    if masses.ndim == 1:
        masses = (masses / grid.channels)[:, None].expand(-1, grid.channels)
    if masses.shape[1] != grid.channels:
        raise InvalidInputError(f"mass of shape {shape}: expected (B,) or (B, {grid.channels})")
    wrong = ~((torch.isfinite(masses) & (masses >= 0)).all(-1) & (masses.sum(-1) > 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise InvalidInputError(
            f"mass of image {first}: given {mass[first].tolist()}, expected finite values >= 0 and a positive sum"
        )
    return masses


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _point(grid: Grid, seed: int, pixel: tuple[int, int] | None) -> Tensor:
    if pixel is None:
        area = grid.height * grid.width
        index = torch.randint(area, (grid.channels,), generator=_generator(seed))
    else:
        row, column = pixel
        if not (0 <= row < grid.height and 0 <= column < grid.width):
            raise InvalidInputError(
                f"pixel {pixel}: expected a row in 0..{grid.height - 1} and a column in 0..{grid.width - 1}"
            )
        index = torch.full((grid.channels,), row * grid.width + column)
    pattern = torch.zeros(grid.channels, grid.height * grid.width, dtype=torch.float64)
    pattern[torch.arange(grid.channels), index] = 1.0
    return pattern.reshape(1, *grid.image_shape)


def _image(grid: Grid, images: Tensor | None, masses: Tensor) -> Tensor:
    if images is None:
        raise InvalidInputError("reference 'image': given images=None, expected a tensor of images")
    pattern = grid.check_image(check_measures(images)).detach().cpu().to(torch.float64)
    if pattern.shape[0] not in (1, masses.shape[0]):
        raise InvalidInputError(f"images: given {pattern.shape[0]}, expected 1 or {masses.shape[0]}, as in mass")
    if ((channel_masses(pattern) == 0) & (masses > 0)).any():
        raise InvalidInputError("images: a channel has mass 0.0, expected a positive one where mass is positive")
    return pattern
