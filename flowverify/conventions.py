"""How images, labels and logits have to come: the rules that everything which takes them from outside shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError

CHANNELS = (1, 2, 3, 4)  # grey, with or without transparency, and colour, with or without it
LAST = (1, 3, 4)  # of these, what images with channels last are met with


def has_channels_last(sizes: Sequence[int]) -> bool:
    """Whether images (N, A, B, C) can only have their channels last: C is 1, 3 or 4, and A more than any image has."""
    return sizes[0] > max(CHANNELS) and sizes[-1] in LAST


def check_channels_first(sizes: Sequence[int], what: str) -> None:
    """Refuses images (N, A, B, C) that look as if their channels came last.

    Read as (N, C, H, W), they would be images of A channels, and mass, which moves within a channel only, would go
    from colour to colour. The rule is :func:`has_channels_last`.

    Args:
        sizes: (A, B, C); a size that is not known is 0.
        what: what has this shape, for the message.

    Raises:
        InvalidInputError: they look so.
    """
    if has_channels_last(sizes):
        raise InvalidInputError(
            f"{what}: looks like (N, H, W, C), channels last; expected channels first, (N, C, H, W), with the "
            "transpose left to whoever makes the images"
        )


def as_tensor(images: Any, what: str = "images") -> Tensor:
    """Images as a tensor: a tensor as it is, a numpy array as one of its type.

    Raises:
        InvalidInputError: neither, or an array of a type that torch does not know.
    """
    if isinstance(images, Tensor):
        return images
    if not isinstance(images, np.ndarray):
        raise InvalidInputError(f"{what}: given {type(images).__name__}, expected a torch.Tensor or a numpy array")
    try:
        # torch takes neither other byte orders nor negative strides, and warns about arrays that are read-only.
        native = images.astype(images.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except TypeError:
        raise InvalidInputError(f"{what} of dtype {images.dtype}: expected a floating-point dtype of torch") from None


def check_labels(labels: Any, count: int, classes: int | None = None, device: torch.device | None = None) -> Tensor:
    """Labels as int64 (count,).

    Args:
        labels: integers in any form that torch takes; booleans are none.
        classes: of the model, where it is known.

    Raises:
        InvalidInputError: another type, another number of them, or one that is no class of the model.
    """
    try:
        truth = isinstance(labels, list | tuple) and any(isinstance(label, bool | np.bool_) for label in labels)
        given = torch.as_tensor(np.asarray(labels) if truth or isinstance(labels, np.generic) else labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"labels: {error}; expected {count} integers") from None
    kind = torch.bool if truth else given.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or len(given) != count:
        raise InvalidInputError(f"labels of type {kind} and length {len(given)}: expected {count} integers")
    given = given.to(device, torch.int64)
    wrong = (given < 0) if classes is None else (given < 0) | (given >= classes)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        expected = ">= 0" if classes is None else f"a class of the model, 0 to {classes - 1}"
        raise InvalidInputError(f"label {int(given[at])} (image {at}): expected {expected}")
    return given


def check_logits(output: object, count: int) -> Tensor:
    """What a model returned for ``count`` images, if it is logits: two classes at least, or no image has another.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != count or output.shape[1] < 2:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidInputError(f"model output {given}: expected logits of shape ({count}, classes >= 2)")
    return output
