"""Growing radii: the first radius at which an attack succeeds is its answer (Wong et al. 2019, Section 5)."""

from __future__ import annotations

from dataclasses import dataclass

from flowverify.errors import InvalidInputError


@dataclass(frozen=True)
class Schedule:
    """The radius starts at ``first`` and grows by ``factor`` every ``every`` of ``iterations`` steps.

    Raises:
        InvalidInputError: a radius that is not positive, a factor below 1, fewer than one step.
    """

    first: float
    factor: float
    every: int
    iterations: int

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.factor >= 1 and self.every >= 1 and self.iterations >= 1):
            raise InvalidInputError(f"{self}: expected first > 0, factor >= 1, every >= 1 and iterations >= 1")

    def radius(self, iteration: int) -> float:
        """The radius of a step, counted from 0."""
        return self.first * self.factor ** (iteration // self.every)


MNIST = Schedule(0.3, 1.1, 10, 200)
CIFAR10 = Schedule(0.001, 1.17, 10, 400)
