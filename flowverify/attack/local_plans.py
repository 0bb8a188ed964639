"""Local transport plans: mass moves within a k x k window around its pixel (Wong et al. 2019, Section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.ground import GroundCost, parse_ground


@dataclass(frozen=True)
class LocalCost:
    """The cost ||offset||_norm ** power of moving a unit of mass within a window.

    Wong et al. use 5 x 5 windows and the 2-norm, and in Appendix C.1 its powers 1 to 5. A power other than 1 gives
    the p-th power of the p-Wasserstein distance; a radius is then in that unit.

    Args:
        size: k, odd.
        norm: of the offset, >= 1; infinity is the maximum norm.
        power: > 0.
        distance: a ground cost's distance, in place of the norm.

    Raises:
        InvalidInputError: another size, norm or power.
    """

    size: int = 5
    norm: float = 2.0
    power: float = 1.0
    distance: GroundCost | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 != 1:
            raise InvalidInputError(f"window size {self.size}: expected an odd number >= 1")
        if not self.norm >= 1:
            raise InvalidInputError(f"norm {self.norm}: expected a number >= 1 or infinity")
        if not (0 < self.power < math.inf):
            raise InvalidInputError(f"power {self.power}: expected a finite number > 0")

    @classmethod
    def of_ground(cls, ground: str, size: int = 5) -> LocalCost:
        """The cost of this name, in its own window or in one of this size."""
        cost = parse_ground(ground)
        return cls(cost.window or size, power=cost.power, distance=cost.distance)

    def matrix(self, like: Tensor) -> Tensor:
        """(k * k,), row by row, with the precision and device of ``like``."""
        centre = self.size // 2
        steps = torch.arange(-centre, centre + 1, dtype=torch.float64)
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        if self.distance is not None:
            lengths = torch.from_numpy(self.distance.of_offset(rows.numpy(), columns.numpy()))
        else:
            lengths = torch.linalg.vector_norm(torch.stack([rows, columns], -1), ord=self.norm, dim=-1)
        return (lengths**self.power).flatten().to(like)


def windows(values: Tensor, size: int) -> Tensor:
    """The k x k neighbours of every pixel, (B, C, H, W) -> (B, C, k * k, H, W); minus infinity outside the image."""
    batch, channels, height, width = values.shape
    edge = size // 2
    padded = torch.nn.functional.pad(values, (edge, edge, edge, edge), value=-torch.inf)
    patches = torch.nn.functional.unfold(padded.reshape(batch * channels, 1, *padded.shape[2:]), size)
    return patches.reshape(batch, channels, size * size, height, width)
