"""Hands problems to the compiled CPU kernels, and says when: the torch implementations take all other devices.

A batch of rows is one job a run of neurons, on as many threads as torch has. A search that asks about one image and
budget again and again prepares that problem once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowverify.transport.ground import offsets_by_cost, steepest_offsets

Array = NDArray[Any]


def solve(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    guess: Tensor,
    tolerance: float,
    maximiser: bool,
    ground: str = "l1",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Excess, multiplier and maximiser of every problem; see :func:`flowverify.transport.support.support`."""
    if ground != "l1":
        return _solve_knapsacks(coefficients, images, budget[:, None].expand_as(guess), maximiser, ground)
    from flowverify.transport import scan_kernel

    batch = _Batch(coefficients, images)
    budgets, guesses = budget.numpy(), guess.contiguous().numpy()
    excess, multipliers, brackets = batch.empty(), batch.empty(), batch.empty(2)
    maximisers = batch.empty(batch.pixels, batch.mass.dtype) if maximiser else None

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        scan_kernel.solve_problems(
            batch.rows(index), batch.mass[index], *layout, budgets[index], guesses[index], tolerance, batch.shape,
            first, last, excess[index], multipliers[index], brackets[index],
        )  # fmt: skip
        if maximisers is not None:
            scan_kernel.maximise_problems(
                batch.rows(index), batch.mass[index], *layout, np.full(batch.problems, budgets[index]),
                brackets[index], batch.shape, first, last, maximisers[index],
            )  # fmt: skip

    batch.run(work)
    return batch.tensor(excess), batch.tensor(multipliers), batch.image_tensor(maximisers)


def _solve_knapsacks(
    coefficients: Tensor, images: Tensor, budgets: Tensor, maximiser: bool, ground: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`solve`, for any ground cost and a budget for every problem, (B, S)."""
    from flowverify.transport import moves_kernel

    batch = _Batch(coefficients, images)
    mass, limits = batch.mass.astype(np.float64), budgets.contiguous().numpy()
    offsets, costs = offsets_by_cost(*batch.shape[1:], ground)
    excess, multipliers = batch.empty(), batch.empty()
    maximisers = batch.empty(batch.pixels, batch.mass.dtype) if maximiser else None
    none = np.empty((0, batch.pixels), batch.mass.dtype)

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        moves_kernel.solve_problems(
            batch.rows(index), mass[index], batch.shape, offsets, costs, limits[index], first, last, excess[index],
            multipliers[index], none if maximisers is None else maximisers[index],
        )  # fmt: skip

    batch.run(work)
    return batch.tensor(excess), batch.tensor(multipliers), batch.image_tensor(maximisers)


def solve_capped(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    cap: float,
    rule: tuple[int, float, float, float, float],
    maximiser: bool,
    ground: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Excess, multiplier, reduced coefficients and maximiser; see :mod:`flowverify.transport.support`."""
    from flowverify.transport import moves_kernel

    batch = _Batch(coefficients, images)
    mass, budgets = batch.mass.astype(np.float64), budget.double().numpy()
    offsets, costs = offsets_by_cost(*batch.shape[1:], ground)
    excess, multipliers = batch.empty(), batch.empty()
    wanted = batch.images.shape[0] if maximiser else 0
    moved, reduced = (np.empty((wanted, batch.problems, batch.pixels), batch.mass.dtype) for _ in range(2))
    none = np.empty((0, batch.pixels), batch.mass.dtype)

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        moves_kernel.solve_capped(
            batch.rows(index), mass[index], batch.shape, offsets, costs, budgets[index], cap, rule, first, last,
            excess[index], multipliers[index], reduced[index] if maximiser else none,
            moved[index] if maximiser else none,
        )  # fmt: skip

    batch.run(work)
    pictures = (batch.image_tensor(reduced), batch.image_tensor(moved)) if maximiser else (None, None)
    return batch.tensor(excess), batch.tensor(multipliers), *pictures


def lipschitz_constants(coefficients: Tensor, ground: str) -> Tensor:
    """Lip(c) of every problem, (S, C, H, W) -> (S,), in the dtype of the coefficients."""
    from flowverify.transport import moves_kernel

    count, *shape = coefficients.shape
    rows = coefficients.detach().contiguous().reshape(count, -1).numpy()
    offsets, costs = steepest_offsets(*shape[1:], ground)
    result = np.zeros(count)

    def work(first: int, last: int) -> None:
        moves_kernel.lipschitz_constants(rows, tuple(shape), offsets, costs, first, last, result)

    share_out(work, count)
    return torch.from_numpy(result).to(coefficients.dtype)


def solve_least_budget(
    coefficients: Tensor, images: Tensor, target: Tensor, ground: str = "l1"
) -> tuple[Tensor, Tensor, Tensor]:
    """Budget, multiplier and bracket; see :func:`flowverify.transport.support.least_budget`."""
    if ground != "l1":
        return _least_knapsacks(coefficients, images, target, ground)
    from flowverify.transport import scan_kernel

    batch = _Batch(coefficients, images)
    targets = target.contiguous().numpy()
    budgets, multipliers, brackets = batch.empty(), batch.empty(), batch.empty(2)

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        scan_kernel.solve_least_budgets(
            batch.rows(index), batch.mass[index], *layout, targets[index], batch.shape, first, last, budgets[index],
            multipliers[index], brackets[index],
        )  # fmt: skip

    batch.run(work)
    return torch.from_numpy(budgets), batch.tensor(multipliers), torch.from_numpy(brackets)


def _least_knapsacks(
    coefficients: Tensor, images: Tensor, target: Tensor, ground: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`solve_least_budget`, for any ground cost; there is no bracket, and what is returned for it is 0."""
    from flowverify.transport import moves_kernel

    batch = _Batch(coefficients, images)
    mass, targets = batch.mass.astype(np.float64), target.contiguous().numpy()
    offsets, costs = offsets_by_cost(*batch.shape[1:], ground)
    budgets, multipliers = batch.empty(), batch.empty()

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        moves_kernel.solve_least_budgets(
            batch.rows(index), mass[index], batch.shape, offsets, costs, targets[index], first, last, budgets[index],
            multipliers[index],
        )  # fmt: skip

    batch.run(work)
    return torch.from_numpy(budgets), batch.tensor(multipliers), torch.zeros(*budgets.shape, 2)


def maximise(coefficients: Tensor, images: Tensor, budget: Tensor, bracket: Tensor, ground: str = "l1") -> Tensor:
    """The mix of the plans on both sides of the bracket that spends the budget: nu*, (B, S, C, H, W)."""
    if ground != "l1":
        found = _solve_knapsacks(coefficients, images, budget, True, ground)[2]
        assert found is not None
        return found
    from flowverify.transport import scan_kernel

    batch = _Batch(coefficients, images)
    budgets, brackets = budget.contiguous().numpy(), bracket.contiguous().numpy()
    maximisers = batch.empty(batch.pixels, batch.mass.dtype)

    def work(index: int, layout: tuple[Array, Array, Array], first: int, last: int) -> None:
        scan_kernel.maximise_problems(
            batch.rows(index), batch.mass[index], *layout, budgets[index], brackets[index], batch.shape, first, last,
            maximisers[index],
        )  # fmt: skip

    batch.run(work)
    moved = batch.image_tensor(maximisers)
    assert moved is not None
    return moved


class _Batch:
    """Problems (images x coefficient vectors) as NumPy arrays, and the threads that work on them."""

    def __init__(self, coefficients: Tensor, images: Tensor) -> None:
        self.images = images
        self.problems = coefficients.shape[-4]
        self.shape: tuple[int, ...] = tuple(images.shape[1:])
        self.pixels = images[0].numel()
        self.mass = images.contiguous().reshape(images.shape[0], -1).numpy()
        self._shared = coefficients.ndim == 4
        self._rows = coefficients.contiguous().reshape(-1, self.problems, self.pixels).numpy()

    def rows(self, index: int) -> Array:
        return self._rows[0 if self._shared else index]  # type: ignore[no-any-return]

    def empty(self, size: int | None = None, dtype: Any = np.float64) -> Array:
        shape = (self.images.shape[0], self.problems)
        return np.empty(shape if size is None else (*shape, size), dtype)

    def tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.images.dtype)

    def image_tensor(self, values: Array | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(values).reshape(*values.shape[:2], *self.shape)

    def run(self, work: Callable[[int, tuple[Array, Array, Array], int, int], None]) -> None:
        from flowverify.transport.scan_kernel import LANES

        workers, images = torch.get_num_threads(), self.images.shape[0]
        jobs_an_image = max(1, -(-4 * workers // max(1, images))) if workers > 1 else 1
        chunk = max(LANES, -(-self.problems // (jobs_an_image * LANES)) * LANES)  # whole vectors
        jobs: list[tuple[int, tuple[Array, Array, Array], int, int]] = []
        for index in range(images):
            layout = mass_layout(self.mass[index].reshape(self.shape))
            jobs.extend(
                (index, layout, first, min(first + chunk, self.problems)) for first in range(0, self.problems, chunk)
            )

        def each(first: int, last: int) -> None:
            for job in jobs[first:last]:
                work(*job)

        share_out(each, len(jobs))


def mass_layout(mass: Array) -> tuple[Array, Array, Array]:
    """Columns that hold mass, and for each pixel that does its place in the kernel's two layouts."""
    _, height, width = mass.shape
    columns = np.flatnonzero(mass.any(axis=(0, 1)))
    position = np.full(width, -1)
    position[columns] = np.arange(columns.size)
    channel, row, column = np.nonzero(mass)
    holders = np.stack(
        [channel, (channel * width + column) * height + row, row * columns.size + position[column]], axis=1
    )
    return columns, np.ascontiguousarray(holders), np.ascontiguousarray(mass[channel, row, column])


def share_out(work: Callable[[int, int], None], count: int) -> None:
    """Calls ``work(first, last)`` on runs of 0..count, on as many threads as torch has."""
    workers = min(torch.get_num_threads(), count)
    if workers <= 1:
        work(0, count)
        return
    size = -(-count // (4 * workers))
    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, count, size)
        for outcome in [pool.submit(work, start, min(start + size, count)) for start in starts]:
            outcome.result()


Backend = Literal["auto", "compiled", "torch"]


def use_compiled(backend: Backend, images: Tensor) -> bool:
    """Whether the compiled kernels take these images: on the CPU, in float32 or float64, unless told not to."""
    possible = images.device.type == "cpu" and images.dtype in (torch.float32, torch.float64)
    return possible and backend != "torch"


class Prepared:
    """As :func:`flowverify.transport.compiled.solve` with l1 ground cost, again and again: what stays is kept.

    Nothing is checked. Coefficients that are not finite give an excess without meaning.

    Args:
        image: (C, H, W), on the CPU, float32 or float64, which is then the dtype of all coefficients.
        budget: mass times distance.
    """

    def __init__(self, image: Tensor, budget: float) -> None:
        self._shape: tuple[int, ...] = tuple(image.shape)
        self._mass = image.contiguous().reshape(-1).numpy()
        self._layout = mass_layout(self._mass.reshape(self._shape))
        self._budget = float(budget)

    def solve(
        self, coefficients: Tensor, guess: Tensor | None, tolerance: float, maximiser: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Excess (S,) and multiplier (S,), float64, and maximisers (S, pixels), for coefficients (S, pixels)."""
        from flowverify.transport import scan_kernel

        rows = coefficients.contiguous().numpy()
        count = len(rows)
        guesses = np.zeros(count) if guess is None else guess.contiguous().numpy()
        excess, multipliers, brackets = np.empty(count), np.empty(count), np.empty((count, 2))
        points = np.empty((count if maximiser else 0, self._mass.size), self._mass.dtype)
        budgets = np.full(count, self._budget) if maximiser else guesses

        def work(first: int, last: int) -> None:
            scan_kernel.solve_problems(
                rows, self._mass, *self._layout, self._budget, guesses, tolerance, self._shape, first, last, excess,
                multipliers, brackets,
            )  # fmt: skip
            if maximiser:
                scan_kernel.maximise_problems(
                    rows, self._mass, *self._layout, budgets, brackets, self._shape, first, last, points
                )  # fmt: skip

        share_out(work, count)
        return torch.from_numpy(excess), torch.from_numpy(multipliers), torch.from_numpy(points) if maximiser else None
