"""Votes of a base classifier on noisy copies of images: seeded by counter, cut to a memory limit.

A random number is a function of a key and its position, so that no batching changes it: SplitMix64 (Steele, Lea and
Flood 2014, "Fast Splittable Pseudorandom Number Generators"): output number k of a key is mix(key + (k + 1) * GAMMA)
modulo 2^64. The same integers come out of numpy, of torch on any device and of the compiled kernel.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.network import Network
from flowverify.network.subject import Subject, close_to, surplus
from flowverify.smoothing.noise import Noise

MEMORY = 256 * 2**20  # bytes of noisy images and of what the network makes of them
ROWS = {"cpu": 128, "cuda": 65536}  # at most, together: more no longer fit the caches, or no longer gain


class Voter(Subject):
    """A copy of a network in evaluation mode, asked about batches that fit into memory.

    Args:
        network: maps (N, C, H, W) to logits (N, classes), in any floating-point precision.
        memory: bytes that a batch and the network's values for it may take, roughly; never fewer than 16 images.

    Raises:
        InvalidInputError: as :class:`~flowverify.network.subject.Subject`, or no memory.
    """

    filled_to = 16
    precisions = Subject.precisions | {torch.float16, torch.bfloat16}

    def __init__(self, network: nn.Module, memory: int = MEMORY) -> None:
        super().__init__(copy.deepcopy(network) if isinstance(network, Network) else network)
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise InvalidInputError(f"memory: given {memory!r}, expected a number of bytes >= 1")
        _let_activations_overwrite(self.own)
        self.memory = memory
        self._plan: tuple[tuple[int, ...], int, int] | None = None  # of images of this shape: rows, classes

    def classes(self, images: Tensor) -> int:
        return self.plan(images.shape[1:])[1]

    def plan(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many images (C, H, W) go through the network at once, and how many classes it has.

        Raises:
            InvalidInputError: the network does not take such images or does not return logits.
        """
        if self._plan is None or self._plan[0] != tuple(shape):
            sizes: list[int] = []

            def record(_module: nn.Module, _given: object, value: object) -> None:
                if isinstance(value, Tensor):
                    sizes.append(value.numel())

            hooks = [module.register_forward_hook(record) for module in self.own.modules()]
            try:
                logits = self._logits(torch.zeros(self.filled_to, *shape, dtype=self.dtype, device=self.device))
            finally:
                for hook in hooks:
                    hook.remove()
            width = 10 * prod(shape) + sum(sizes) // self.filled_to  # with noise drawn ahead
            if self.device.type != "cpu":
                width += 128 * prod(shape)  # the integers and values of the noise
            fit = self.memory // (width * self.dtype.itemsize)
            most = min(fit, ROWS.get(self.device.type, ROWS["cuda"]))
            rows = max(self.filled_to, most // self.filled_to * self.filled_to)
            self._plan = (tuple(shape), rows, logits.shape[1])
        return self._plan[1:]

    def votes(self, batch: Tensor, what: str) -> Tensor:
        """The class of each image, int64 (N,); -1 where none is strictly the best.

        A class is the best by the rule of :mod:`flowverify.network.subject`, in the network's own precision and, where
        that is near a tie, in float64 too: the base classifier is a function with one more answer, "none", for which
        certificates hold as well.

        Raises:
            InvalidInputError: as :meth:`logits_of`.
        """
        logits = self.logits_of(batch, what)
        winners = logits.argmax(1)
        close = close_to(logits, winners, self.dtype)
        if close.numel():
            best = winners[close]
            exact = self.exact_logits(batch[close])
            ahead = (surplus(logits[close], best) < 0) & (surplus(exact, best) < 0)
            winners[close] = torch.where(ahead, best, -1)
        return winners

    def logits_of(self, batch: Tensor, what: str) -> Tensor:
        """Logits (N, classes), without gradients.

        Raises:
            InvalidInputError: the network returns NaN on ``what``, does not take such images, or does not return
                logits.
        """
        count, logits = len(batch), self._logits(batch)
        undefined = logits.isnan().any(1)
        if undefined.any():
            raise InvalidInputError(
                f"{what}: the model returns NaN on {int(undefined.sum())} of {count} noisy images, expected numbers"
            )
        return logits

    def _logits(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.call(self.own, batch)


def _let_activations_overwrite(network: nn.Module) -> None:
    """Lets each ReLU of a canonical network overwrite what it alone reads, which saves its memory."""
    if isinstance(network, Network):
        nodes = {node.name: node for node in network.nodes}
        readers = Counter(name for node in network.nodes for name in node.inputs)
        for node in network.nodes:
            source = nodes.get(node.inputs[0])
            fresh = source is not None and isinstance(source.operation, nn.Conv2d | nn.Linear)
            if isinstance(node.operation, nn.ReLU) and fresh and readers[node.inputs[0]] == 1:
                node.operation.inplace = True


AHEAD = 8  # noise is drawn for so many batches of the network at once, to be worth dividing among threads


def noisy_images(image: Tensor, noise: Noise, key: int, first: int, count: int) -> Tensor:
    """Samples ``first`` to ``first + count - 1`` of image + mass * noise, (C, H, W) -> (count, C, H, W).

    Sample j is a function of ``key`` and j alone. The noise is computed in float32, in the compiled kernel on the
    CPU and by torch elsewhere; the two differ by rounding.
    """
    mass = float(image.double().sum())
    if image.device.type == "cpu":
        return _compiled(image, noise, key, first, count, mass)
    grid = Grid.of(image)
    drawn = integers(noise, grid, key, first, count, image.device)
    values = from_integers(drawn, noise.distribution).to(image.dtype) * (mass * noise.scale)
    moved = grid.divergence(values) if noise.domain == "flow" else values.reshape(count, *image.shape)
    return image + moved


def integers(noise: Noise, grid: Grid, key: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """The random integers of samples ``first`` and following, int64 (count, edges) or (count, pixels).

    A sample on flows takes two planes of the image's size a channel, one for rightward and one for downward flows,
    and leaves out what would leave the grid.
    """
    channels, height, width = grid.image_shape
    planes = 2 if noise.domain == "flow" else 1
    length = planes * grid.pixels
    stride = length + length % 2
    drawn = halves(key, first * stride, count * stride, device).reshape(count, stride)[:, :length]
    if noise.domain == "pixels":
        return drawn
    both = drawn.reshape(count, channels, 2, height, width)
    return grid.join(both[:, :, 0, :, :-1], both[:, :, 1, :-1, :])


def from_integers(drawn: Tensor, distribution: str) -> Tensor:
    """Noise of scale 1 from integers that are uniform on [-2^31, 2^31), float32 of the same shape."""
    if distribution == "uniform":
        return drawn.float() * 2.0**-31
    magnitude = -torch.log((drawn & 0x7FFFFFFF).float() * 2.0**-31 + 2.0**-31)
    return torch.where(drawn >= 0, magnitude, -magnitude)


def _compiled(image: Tensor, noise: Noise, key: int, first: int, count: int, mass: float) -> Tensor:
    from flowverify.smoothing.noise_kernel import noisy_samples

    single = image.dtype == torch.float32
    base = (image if single else torch.zeros_like(image, dtype=torch.float32)).contiguous().numpy()
    result = np.empty((count, *image.shape), np.float32)
    scale, laplace, flow = np.float32(noise.scale * mass), noise.distribution == "laplace", noise.domain == "flow"

    def work(start: int, end: int) -> None:
        noisy_samples(base, np.uint64(key), first + start, scale, laplace, flow, result[start:end])

    threads = min(torch.get_num_threads(), max(1, count // 64))
    if threads == 1:
        work(0, count)
    else:
        edges = np.linspace(0, count, threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, edges[:-1], edges[1:]))
    drawn = torch.from_numpy(result)
    return drawn if single else image + drawn.to(image.dtype)


class Sampler:
    """Counts of the classes that a base classifier gives to noisy copies of images.

    Args:
        network: maps (N, C, H, W) to logits (N, classes); it is copied and put into evaluation mode.
        noise: what is added, in units of each image's mass.
        seed: of the noise. The samples of an image are a function of the seed, the image's position, and the stage
            they are for: no batch size, memory limit, or selection of images changes them. Within an
            image they are independent, and so are those of different images and stages.
        memory: see :class:`~flowverify.smoothing.sampling.Voter`.

    Raises:
        InvalidInputError: not a torch module, a seed that is no integer >= 0, no memory.
    """

    def __init__(self, network: nn.Module, noise: Noise, *, seed: int = 0, memory: int = MEMORY) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InvalidInputError(f"seed: given {seed!r}, expected an integer >= 0")
        self.voter = Voter(network, memory)
        self.noise, self.seed = noise, seed

    def counts(
        self,
        images: Tensor,
        samples: int,
        stage: int,
        positions: Sequence[int],
        on_samples: Callable[[int], None] | None = None,
    ) -> Tensor:
        """How often each class wins on ``samples`` noisy copies of each image, int64 (B, classes) on the CPU.

        Copies on which no class is strictly the best count for none.

        Args:
            images: (B, C, H, W), valid images.
            positions: of the images in their data set, which name their streams of random numbers.
            on_samples: called with the number of samples done since the last call.

        Raises:
            InvalidInputError: the network does not take such images, or returns NaN.
        """
        images = images.to(self.voter.device, self.voter.dtype)
        rows, classes = self.voter.plan(images.shape[1:])
        rows *= AHEAD
        total = torch.zeros(len(images), classes, dtype=torch.int64)
        # Runs of consecutive samples, packed so that a batch of the network is full whatever ``samples`` is.
        batch: list[tuple[int, Tensor]] = []
        room = rows
        for index, (image, position) in enumerate(zip(images, positions, strict=True)):
            key, done = derive_key(self.seed, position, stage), 0
            while done < samples:
                part = min(room, samples - done)
                batch.append((index, noisy_images(image, self.noise, key, done, part)))
                done, room = done + part, room - part
                if not room or (done == samples and index == len(images) - 1):
                    self._vote(batch, total, positions)
                    if on_samples is not None:
                        on_samples(rows - room)
                    batch, room = [], rows
        return total

    def _vote(self, batch: list[tuple[int, Tensor]], total: Tensor, positions: Sequence[int]) -> None:
        owners = [index for index, _ in batch]
        named = ", ".join(str(positions[index]) for index in owners[:3])
        rows = torch.cat([part for _, part in batch]) if len(batch) > 1 else batch[0][1]
        tiles = torch.split(rows, self.voter.plan(rows.shape[1:])[0])
        winners = torch.cat([self.voter.votes(tile, f"image {named}") for tile in tiles]).cpu()
        row = torch.tensor(owners).repeat_interleave(torch.tensor([len(part) for _, part in batch]))
        some = winners >= 0
        total.index_put_((row[some], winners[some]), some[some].to(total.dtype), accumulate=True)


GAMMA = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1


def mix(value: int) -> int:
    """The finalizer of SplitMix64, a bijection of the integers below 2^64."""
    value = ((value ^ (value >> 30)) * FIRST) & MASK
    value = ((value ^ (value >> 27)) * SECOND) & MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One key for a tuple of integers, such as (seed, position of the image, stage)."""
    key = 0
    for part in parts:
        key = mix((key + GAMMA) & MASK ^ mix(part & MASK))
    return key


def words(key: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """The outputs ``first`` to ``first + count - 1`` of a key as int64 (the same bits), of shape (count,)."""
    positions = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    value = positions * signed(GAMMA) + signed(key)
    value = (value ^ _shifted(value, 30)) * signed(FIRST)
    value = (value ^ _shifted(value, 27)) * signed(SECOND)
    return value ^ _shifted(value, 31)


def halves(key: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """32-bit integers as int64 in [-2^31, 2^31), (count,): number 2k is the low half of output k, 2k + 1 the high."""
    start = first // 2
    both = words(key, start, (first + count + 1) // 2 - start, device)
    pairs = torch.stack([(both << 32) >> 32, both >> 32], dim=1).flatten()
    return pairs[first - 2 * start : first - 2 * start + count]


def signed(value: int) -> int:
    """The two's complement reading of 64 bits, which is how torch holds them."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(value: Tensor, places: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (value >> places) & ((1 << (64 - places)) - 1)
