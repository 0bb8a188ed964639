"""What the input and the output of somebody else's network mean: where pixels lie, and how a class is answered.

Images are (C, H, W) here. A network may take them with channels last, as rows of pixels, without a channel or without a
batch dimension; every shape whose entries are those of one image is read, and the order of its entries is inferred
where it is beyond doubt, and asked for where it is not.

A network may end in what leaves the order of its answers as it is (a softmax, or a sigmoid of each), or answer with one
number whose sign decides. A claim about classes is about that order: such an end is dropped, and a single logit z is
read as the two logits 0 and z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowverify.conventions import CHANNELS, LAST
from flowverify.errors import InvalidInputError, UnknownNameError, UnsupportedOperationError
from flowverify.network.builder import Builder, Value

LAYOUTS = ("nchw", "nhwc")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Reading:
    """What a file or a module does not say about itself.

    Args:
        layout: nchw (channels first) or nhwc (channels last), of what the network takes; None infers it.
        mean, std: of normalised inputs (x - mean) / std, one number or one a channel; images stay unnormalised, and
            with them radii: the normalisation becomes a part of the network.
        output: the name of the output that holds the classes, where there are several; of a module that returns
            several values, its position.
        weights: a file with the weights of what a factory makes.

    Raises:
        UnknownNameError: another layout.
        InvalidInputError: a mean that is not finite, or a std that is not a finite number > 0.
    """

    layout: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    output: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise UnknownNameError("layout", self.layout, LAYOUTS)
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise InvalidInputError(f"mean {self.mean}: expected finite numbers")
        if self.std is not None and not all(math.isfinite(one) and one > 0 for one in self.std):
            raise InvalidInputError(f"std {self.std}: expected finite numbers > 0")

    @property
    def normalises(self) -> bool:
        return self.mean is not None or self.std is not None

    def normalise(self, builder: Builder, value: Value) -> Value:
        """(value - mean) / std, for images (C, H, W) as they are given.

        Raises:
            InvalidInputError: neither one number nor one for each channel.
        """
        if not self.normalises:
            return value
        mean, std = self._constants(value.shape[0])
        return builder.scale_shift(value, 1 / std, -mean / std, "normalised")

    def normalised(self, images: Tensor) -> Tensor:
        """The same of a batch (B, C, H, W), in float64."""
        if not self.normalises:
            return images
        mean, std = self._constants(images.shape[1])
        return (images.double() - mean) / std

    def _constants(self, channels: int) -> tuple[Tensor, Tensor]:
        mean, std = (
            _for_channels(given, default, channels, what)
            for given, default, what in ((self.mean, 0.0, "mean"), (self.std, 1.0, "std"))
        )
        return mean, std


def _for_channels(given: tuple[float, ...] | None, default: float, channels: int, what: str) -> Tensor:
    values = (default,) if given is None else given
    if len(values) not in (1, channels):
        raise InvalidInputError(f"{what} {values}: expected one number, or one for each of {channels} channels")
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


@dataclass(frozen=True)
class InputForm:
    """How the entries of one image lie in what a network takes.

    Attributes:
        sample: the shape that the network takes, without the batch.
        shape: (C, H, W).
        layout: nchw or nhwc: the order of the entries.
        batched: whether there is a batch dimension before the sample.
    """

    sample: tuple[int, ...]
    shape: Shape
    layout: str
    batched: bool = True

    @property
    def note(self) -> str:
        """What was taken, in words."""
        channels, height, width = self.shape
        sizes = ", ".join((*(["N"] if self.batched else []), *map(str, self.sample)))
        order = "" if channels == 1 else ", channels last" if self.layout == "nhwc" else ", channels first"
        return f"input ({sizes}): {channels} x {height} x {width} images{order}"

    def enter(self, builder: Builder, value: Value) -> Value:
        """From images (C, H, W) to what the network takes."""
        if self.layout == "nhwc" and self.shape[0] > 1:
            value = builder.permute(value, (1, 2, 0), "channels_last")
        return value if value.shape == self.sample else builder.reshape(value, self.sample, "pixels")

    def arrange(self, images: Tensor) -> Tensor:
        """As :meth:`enter`, for a batch (B, C, H, W), with the batch first."""
        ordered = images.permute(0, 2, 3, 1) if self.layout == "nhwc" else images
        return ordered.reshape(len(images), *self.sample)


def module_form(shape: Shape, layout: str | None) -> InputForm:
    """How a module takes images: as a batch of (C, H, W), or of (H, W, C)."""
    order = layout or "nchw"
    return InputForm(shape if order == "nchw" else (*shape[1:], shape[0]), shape, order)


def input_form(
    sizes: Sequence[int], given: Sequence[int] | None, layout: str | None, told: str | None, what: str
) -> InputForm:
    """The one way to read an input of these sizes, 0 where a size is free.

    Args:
        given: (C, H, W), if somebody has said it.
        layout: the order that the user asks for.
        told: the order that the network's own first operations show.
        what: the input, for messages.

    Raises:
        InvalidInputError: ``given`` is missing or does not fit, or several readings do; the choice is named.
        UnsupportedOperationError: no image has such a shape.
    """
    if len(sizes) == 4 and _is_row(sizes, given):
        return _flat(tuple(sizes[1:]), given, layout, True, what)  # what is told is about its one channel
    if layout is not None and told is not None and layout != told and len(sizes) == 4:
        raise InvalidInputError(f"layout {layout}: expected {told}, as {what} is used as such")
    wanted = layout or told
    batched = len(sizes) == 4 or (len(sizes) in (2, 3) and sizes[0] in (0, 1))
    sample = tuple(sizes[1:] if batched else sizes)
    if not 1 <= len(sample) <= 3 or (len(sizes) == 4 and sizes[0] not in (0, 1)):
        raise UnsupportedOperationError(
            f"{what}: expected one image an entry: (N, C, H, W), (N, H, W, C), (N, H, W) or (N, pixels), N free or 1"
        )
    if len(sample) == 1 or (len(sample) == 2 and 1 in sample):
        return _flat(sample, given, wanted, batched, what)
    if len(sample) == 2:
        ((_, shape),) = _fitting([("nchw", (1, *sample))], given, what)
        return InputForm(shape[1:], shape, "nchw", batched)
    first, middle, last = sample
    readings = [("nchw", (first, middle, last)), ("nhwc", (last, first, middle))]
    fitting = _fitting([one for one in readings if wanted in (None, one[0])], given, what)
    if len(fitting) > 1 and given is None:
        if first in CHANNELS:
            fitting = fitting[:1]
        elif last in LAST:
            fitting = fitting[1:]
    if len(fitting) > 1 and fitting[0][1][0] == 1:
        fitting = fitting[:1]  # with one channel both are the same
    if len(fitting) > 1:
        raise InvalidInputError(f"{what}: channels first or last? expected layout nchw or nhwc to be given with it")
    (order, shape), *_ = fitting
    return replace(module_form(shape, order), batched=batched)


def _is_row(sizes: Sequence[int], given: Sequence[int] | None) -> bool:
    """Whether (N, C, H, W) or (N, H, W, C) are all pixels of another image in a row, as layers of MATLAB have them."""
    sample = sorted(sizes[1:])
    if given is None or 1 in given[1:] or sizes[0] not in (0, 1):  # a row of pixels may be the image itself
        return False
    return sample[:-1] == [1, 1] and sample[-1] == math.prod(given)


def _fitting(
    readings: list[tuple[str, tuple[int, ...]]], given: Sequence[int] | None, what: str
) -> list[tuple[str, Shape]]:
    """The readings that fit (C, H, W), with free sizes filled in."""
    if given is None:
        if any(min(pattern) < 1 for _, pattern in readings):
            raise InvalidInputError(f"{what}: expected input_shape= to be given for the free sizes")
        return [(order, (pattern[0], pattern[1], pattern[2])) for order, pattern in readings]
    shape = (int(given[0]), int(given[1]), int(given[2]))
    found = [
        (order, shape)
        for order, pattern in readings
        if all(size in (0, wanted) for size, wanted in zip(pattern, shape, strict=True))
    ]
    if not found:
        raise InvalidInputError(f"input_shape {shape}: expected one that fits {what}")
    return found


def _flat(
    sample: tuple[int, ...], given: Sequence[int] | None, wanted: str | None, batched: bool, what: str
) -> InputForm:
    if given is None:
        raise InvalidInputError(f"{what}: expected input_shape=(channels, height, width) to be given with it")
    shape = (int(given[0]), int(given[1]), int(given[2]))
    pixels = math.prod(shape)
    if math.prod(sample) not in (0, pixels):
        raise InvalidInputError(f"input_shape {shape}: expected one that fits {what}")
    if shape[0] > 1 and wanted is None:
        raise InvalidInputError(
            f"{what}: are the {pixels} entries of {shape} images in the order of (C, H, W) or of (H, W, C)? expected "
            "layout nchw or nhwc to be given with it"
        )
    return InputForm(tuple(size if size == 1 else pixels for size in sample), shape, wanted or "nchw", batched)


@dataclass(eq=False)
class Ending:
    """The end of a network that leaves the order of its answers as it is, while it is taken off.

    Attributes:
        dropped: what was taken off, in words.
        steps: the same as functions of a batch of vectors, in the order in which the network takes them.
        single: whether the network answers with one number.
    """

    dropped: list[str] = field(default_factory=list)
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    single: bool = False

    def drop(self, name: str) -> None:
        """Takes off one of :data:`ORDER_KEPT`."""
        self.dropped.append(name)
        self.steps.append(ORDER_KEPT[name])

    def logits(self, builder: Builder, value: Value) -> Value:
        """Two logits or more, as a vector: dimensions of size 1 go, and one logit becomes 0 and itself."""
        entries = math.prod(value.shape)
        if value.rank != 1 and max(value.shape, default=1) == entries:
            value = builder.reshape(value, (entries,), "logits")
        if value.shape == (1,):
            self.single = True
            value = builder.linear(value, torch.tensor([[0.0], [1.0]], dtype=torch.float64), None, "two_classes")
        return value

    @property
    def notes(self) -> list[str]:
        result = [f"final {name} dropped: the order of classes is the claim" for name in self.dropped]
        return [*result, "one output: class 1 where its logit is positive, else class 0"] if self.single else result

    def answer(self, logits: Tensor) -> Tensor:
        """What the network itself answers, as vectors, for logits (B, classes)."""
        value = logits[:, 1:] if self.single else logits
        for step in self.steps:
            value = step(value)
        return value


ORDER_KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "Softmax": lambda logits: logits.softmax(1),
    "LogSoftmax": lambda logits: logits.log_softmax(1),
    "Sigmoid": torch.sigmoid,
    "division by the L1 norm": lambda logits: torch.nn.functional.normalize(logits, 1.0),
    "division by the L2 norm": lambda logits: torch.nn.functional.normalize(logits, 2.0),
}
"""What may be taken off the end: the order of two entries is the same before and after."""


def softmax_over_classes(axis: int, shape: Sequence[int]) -> bool:
    """Whether a softmax over this axis, counted with the batch, is one over all entries of a sample of this shape.

    Of a single entry it is 1, whatever the entry: there is no order to keep.
    """
    at = axis - 1 if axis > 0 else len(shape) + axis
    return 0 <= at < len(shape) and axis != 0 and shape[at] == math.prod(shape) > 1
