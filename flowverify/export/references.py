"""References of the flow domain by the names that the command line takes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.distance import FLOAT32_MASS_TOLERANCE, channel_masses, check_measures
from flowverify.transport.reference import make_reference

NAMES = ("image", "uniform", "point:ROW,COLUMN", "FILE.npy")


def reference_pattern(name: str, grid: Grid) -> Tensor | None:
    """The pattern of mass 1 in every channel, float64 (C, H, W), that a name stands for; None for "image" and files.

    Raises:
        UnknownNameError: none of ``NAMES``.
        InvalidInputError: a pixel that is not on the grid.
    """
    ones = torch.ones(1, grid.channels, dtype=torch.float64)
    if name == "uniform":
        return make_reference("flat", grid, ones)[0]
    if match := re.fullmatch(r"point:([0-9]+),([0-9]+)", name):
        return make_reference("point", grid, ones, pixel=(int(match[1]), int(match[2])))[0]
    if name == "image" or name.endswith(".npy"):
        return None
    raise UnknownNameError("reference", name, NAMES)


def file_reference(path: str | Path, images: Tensor) -> Tensor:
    """The reference of a .npy file, (C, H, W) or (H, W), for images (B, C, H, W); float64 (C, H, W).

    Raises:
        InvalidInputError: the file cannot be read, or the reference has another shape, a value that is negative or
            not finite, or in some channel another mass than one of the images.
    """
    grid = Grid.of(images)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"reference {path}: cannot be read as a .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InvalidInputError(f"reference {path}: expected one array of numbers")
    reference = torch.from_numpy(array.astype(np.float64))
    if reference.ndim == 2:
        reference = reference[None]
    if tuple(reference.shape) != grid.image_shape:
        raise InvalidInputError(
            f"reference {path} of shape {tuple(array.shape)}: expected {grid.image_shape}, that of the images"
        )
    check_measures(reference, f"reference {path}")
    given, masses = channel_masses(reference[None]), channel_masses(images)
    wrong = ((given - masses).abs() > FLOAT32_MASS_TOLERANCE * masses.sum(1, keepdim=True)).any(1).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise InvalidInputError(
            f"reference {path} of mass {given[0].tolist()}: expected {masses[at].tolist()}, the mass of image {at} "
            f"of the {len(images)} given (the references uniform and point take the mass of each image)"
        )
    return reference
