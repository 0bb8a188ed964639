"""Random networks as users write them: canonical operations with every option, and layers that are lowered to them."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.network import Concatenate, Index, Pad, Permute, Reshape
from flowverify.network.curves import CURVES
from flowverify.network.operations import OPERATIONS, OperationRecord

DRAWN = [record for record in OPERATIONS if not record.steep and record.kind not in CURVES]  # with an exact oracle
DEPTH = 8
WIDEST = 60  # entries of a value: small, so that a minute tries many networks
KINDS = {"general": 0.62, "affine": 0.1, "tiny": 0.2, "offset": 0.08}  # with their shares
READ_LAYER_BY_LAYER = (
    nn.Linear, nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Flatten, nn.AvgPool2d, nn.MaxPool2d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Identity,
)  # fmt: skip


class Wired(nn.Module):
    """Steps one after the other, each of which reads values computed before; value 0 is the input.

    Args:
        sequence: the operations; one that stands there twice is used twice.
        wiring: the values that each of them reads.
    """

    def __init__(self, sequence: Sequence[nn.Module], wiring: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(dict.fromkeys(sequence))
        order = {id(step): k for k, step in enumerate(self.steps)}
        self.order = tuple(order[id(step)] for step in sequence)
        self.wiring = tuple(wiring)

    @property
    def sequence(self) -> list[nn.Module]:
        return [self.steps[k] for k in self.order]

    def values(self, images: Tensor) -> list[Tensor]:
        found = [images]
        for k, inputs in zip(self.order, self.wiring, strict=True):
            found.append(self.steps[k](*(found[i] for i in inputs)))
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.values(images)[-1]


class Normalise(nn.Module):
    """(x - mean) / deviation, one of each for every channel."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, value: Tensor) -> Tensor:
        return (value - self.mean) / self.deviation


class Sliced(nn.Module):
    """Every second entry of the last dimension, or all but the first."""

    def __init__(self, start: int, step: int) -> None:
        super().__init__()
        self.start, self.step = start, step

    def forward(self, value: Tensor) -> Tensor:
        return value[..., self.start :: self.step]


class Flipped(nn.Module):
    """The last dimension backwards."""

    def forward(self, value: Tensor) -> Tensor:
        return value.flip(-1)


class Halves(nn.Module):
    """The two halves of the last dimension in the other order, by split and cat."""

    def forward(self, value: Tensor) -> Tensor:
        first, second = value.split([value.shape[-1] // 2, value.shape[-1] - value.shape[-1] // 2], -1)
        return torch.cat([second, first], -1)


def moves_data(step: nn.Module) -> bool:
    """Whether a step only moves entries, and puts zeros."""
    kinds = (nn.Flatten, nn.ZeroPad2d, Reshape, Permute, Index, Pad, Concatenate, Sliced, Flipped, Halves)
    return isinstance(step, kinds)


@dataclass(frozen=True)
class Drawn:
    """A random network.

    Attributes:
        module: as the package is given it.
        oracle: the same weights in float64 and in evaluation mode.
        shape: of its images.
        kind: one of ``KINDS``: any operations; affine ones; a chain of Linear and few ReLUs; such a chain whose
            weights have large common offsets, which cancel.
    """

    module: nn.Module
    oracle: Wired
    shape: tuple[int, int, int]
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        tensors = (t for t in [*self.module.parameters(), *self.module.buffers()] if t.is_floating_point())
        return next((tensor.dtype for tensor in tensors), torch.float32)

    @property
    def is_affine(self) -> bool:
        activations = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.MaxPool2d)
        return not any(isinstance(step, activations) for step in self.oracle.steps)


def draw_network(dice: random.Random, shape: tuple[int, int, int], kind: str) -> Drawn:
    """A random network of this kind for images of this shape; its weights come from torch's generator."""
    while True:
        drawn = _draw(dice, shape, kind)
        try:  # an operation that is used twice may have constants that fit a batch of 2 only by chance
            drawn.oracle(torch.zeros(3, *shape, dtype=torch.float64))
        except RuntimeError:
            continue
        return drawn


def _draw(dice: random.Random, shape: tuple[int, int, int], kind: str) -> Drawn:
    dtype = dice.choice([torch.float32, torch.float64])
    builder = _Builder(dice, shape, dtype)
    if kind in ("tiny", "offset"):
        builder.append(nn.Flatten())
        for _ in range(dice.choice([1, 1, 2])):
            builder.append(nn.Linear(builder.shape[-1], dice.randint(1, 3)))
            builder.append(nn.ReLU())
    else:
        for _ in range(dice.randint(1, DEPTH)):
            builder.grow(affine=kind == "affine")
    classes = dice.randint(2, 4)
    if kind == "general" and dice.random() < 0.05 and len(builder.shape) == 3:
        for last in (nn.Conv2d(builder.shape[0], classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()):
            builder.append(last)
    else:
        if len(builder.shape) > 1:
            builder.append(nn.Flatten())
        builder.append(nn.Linear(builder.shape[0], classes))
        if kind == "general" and dice.random() < 0.1:
            builder.append(dice.choice([nn.ReLU, nn.LeakyReLU, nn.Tanh])())  # a Sigmoid would be dropped
    _draw_weights(dice, builder.sequence, dtype, kind)
    oracle = Wired(builder.sequence, builder.wiring)
    chain = all(inputs == (k,) for k, inputs in enumerate(builder.wiring))
    known = all(type(step) in READ_LAYER_BY_LAYER for step in builder.sequence)
    module: nn.Module = nn.Sequential(*builder.sequence) if chain and known and dice.random() < 0.9 else oracle
    module.train(dice.random() < 0.5)
    return Drawn(module, copy.deepcopy(oracle).double().eval().requires_grad_(False), shape, kind)


def shift_outputs(network: Drawn, shift: Tensor) -> bool:
    """Adds to the outputs by the last layer's bias, in the network and in its oracle; False if it has none."""
    steps = list(network.module) if isinstance(network.module, nn.Sequential) else network.module.sequence
    last, exact = steps[-1], network.oracle.sequence[-1]
    if not isinstance(last, nn.Linear) or steps.count(last) > 1 or not isinstance(exact, nn.Linear):
        return False
    with torch.no_grad():
        last.bias += shift.to(last.bias)
        exact.bias.copy_(last.bias)
    return True


class _Builder:
    def __init__(self, dice: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dice, self.dtype = dice, dtype
        self.shapes: list[tuple[int, ...]] = [tuple(shape)]
        self.sequence: list[nn.Module] = []
        self.wiring: list[tuple[int, ...]] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[-1]

    def append(self, step: nn.Module, inputs: tuple[int, ...] | None = None) -> bool:
        """Adds a step that reads these values (the last one by default), if it can and stays small."""
        inputs = (len(self.sequence),) if inputs is None else inputs
        step = step.to(self.dtype).eval()
        try:
            with torch.no_grad():
                result = step(*(torch.zeros(2, *self.shapes[k], dtype=self.dtype) for k in inputs))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        whole = result.ndim > 1 and result.shape[0] == 2 and bool(torch.isfinite(result).all())
        if not whole or not 0 < result[0].numel() <= WIDEST:
            return False
        self.shapes.append(tuple(result.shape[1:]))
        self.sequence.append(step)
        self.wiring.append(inputs)
        return True

    def grow(self, *, affine: bool) -> None:
        """One more step, of any kind that takes the values there are."""
        for _ in range(20):
            inputs, step = self._draw(affine)
            if step is not None and self.append(step, inputs):
                return

    def _draw(self, affine: bool) -> tuple[tuple[int, ...], nn.Module | None]:
        last, choice = len(self.sequence), self.dice.random()
        if choice < 0.2 and last:
            same = [k for k, shape in enumerate(self.shapes[:-1]) if shape == self.shape]
            if same:
                record = self.dice.choice([record for record in DRAWN if record.arity != 1])
                others = self.dice.choices(same, k=1 if record.arity or self.dice.random() < 0.7 else 2)
                inputs = [last, *others]
                self.dice.shuffle(inputs)
                return tuple(inputs), self._variant(record, self.shape)
        at = self.dice.randrange(last) if last and self.dice.random() < 0.1 else last
        if choice < 0.28 and last:
            return (at,), self.dice.choice([s for s, i in zip(self.sequence, self.wiring, strict=True) if len(i) == 1])
        if choice < 0.45:
            return (at,), self._user_layer(self.shapes[at])
        single = [record for record in DRAWN if record.arity == 1 and (record.affine or not affine)]
        weights = [3 if record.kind in (nn.Linear, nn.Conv2d, nn.ReLU) else 1 for record in single]
        return (at,), self._variant(self.dice.choices(single, weights)[0], self.shapes[at])

    def _variant(self, record: OperationRecord, shape: tuple[int, ...]) -> nn.Module | None:
        variants = record.variants(shape)
        return self.dice.choice(variants) if variants else None

    def _user_layer(self, shape: tuple[int, ...]) -> nn.Module | None:
        flat: list[nn.Module] = [nn.Dropout(0.5), Flipped(), Sliced(1, 1), Sliced(0, 2), Halves()]
        if len(shape) < 3:
            return self.dice.choice([*flat, nn.BatchNorm1d(shape[0]), nn.BatchNorm1d(shape[0], affine=False)])
        channels = shape[0]
        mean, deviation = torch.rand(2, channels, 1, 1, dtype=torch.float64)
        return self.dice.choice(
            [
                *flat,
                nn.BatchNorm2d(channels),
                nn.BatchNorm2d(channels, affine=False, eps=1e-3),
                nn.ZeroPad2d(self.dice.choice([(0, 1, 0, 1), (1, 1, 1, 1), (2, 0, 1, 0)])),
                nn.Conv2d(channels, 2, self.dice.choice([2, 3, (2, 3)]), padding="same"),
                nn.Conv2d(channels, 2, 2, padding="same", dilation=self.dice.choice([1, 2])),
                nn.AdaptiveAvgPool2d(self.dice.choice([1, 2, (1, 2)])),
                nn.AvgPool2d(2, ceil_mode=True),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.AvgPool2d(self.dice.choice([2, 3]), self.dice.choice([1, 2, 3]), 1),
                Normalise(mean, 0.1 + deviation),
            ]
        )  # fmt: skip


@torch.no_grad()
def _draw_weights(dice: random.Random, sequence: Sequence[nn.Module], dtype: torch.dtype, kind: str) -> None:
    """Normal weights of the usual size; in some networks every layer has its own scale, in some a wild one."""
    spread = dice.choices([0.0, 1.0, 3.0, 6.0], [0.55, 0.2, 0.1, 0.15])[0]
    offset = dice.choice([10, 20, 27, 40, 50]) if kind == "offset" else None
    for step in dict.fromkeys(sequence):
        if isinstance(step, nn.BatchNorm1d | nn.BatchNorm2d):
            assert step.running_mean is not None
            assert step.running_var is not None
            step.running_mean.normal_()
            step.running_var.uniform_(0.05, 2)
            if step.weight is not None:
                step.weight.normal_()
                step.bias.normal_()
        elif isinstance(step, nn.Linear | nn.Conv2d):
            scale = 10 ** dice.uniform(-spread, spread)
            fan_in = step.weight[0].numel()
            step.weight.copy_(torch.randn(step.weight.shape, dtype=torch.float64) * (2 / fan_in) ** 0.5 * scale)
            if offset is not None and (step is sequence[-1] or dice.random() < 0.3):
                step.weight += 2.0**offset
            if step.bias is not None:
                step.bias.copy_(torch.randn(step.bias.shape, dtype=torch.float64) * 0.3 * scale)
    for step in sequence:
        step.to(dtype)
