"""The support function of the ball against HiGHS, its maximiser against exact W1, its gradient against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts import largest_gain, samples, sparse_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.dilation import lipschitz_constant
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.support import inner, support, support_value

BACKENDS = ("compiled", "torch")
KINDS = ("rough", "smooth", "constant", "ties", "peaks", "steep")
DOUBLE = torch.float64


def coefficients_of(kind: str, shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    values = torch.randn(count, *shape, generator=generator, dtype=DOUBLE)
    if kind == "smooth":
        return values.cumsum(-1).cumsum(-2) / 10
    if kind == "constant":  # within each channel: nothing can be gained
        return values[..., :1, :1].expand(values.shape).clone()
    if kind == "ties":
        return torch.randint(-2, 3, values.shape, generator=generator).to(DOUBLE)
    if kind == "peaks":
        return (values > 1).to(DOUBLE)
    return values * 1e4 if kind == "steep" else values


def problem(seed: int, shape: tuple[int, int, int], kind: str, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two functions, one image (share 0 lights one pixel a channel), one budget from 1e-4 pixels to 10^2."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = coefficients_of(kind, shape, 2, generator)
    image = sparse_images(shape, 1, seed, share)
    image = image * (1, 1e3)[seed % 2]
    exponent = -4 + 6 * torch.rand(1, generator=generator, dtype=DOUBLE)
    return coefficients, image, 10**exponent * image.sum()


def cases() -> list[tuple[int, tuple[int, int, int], str, float]]:
    """270 problems of two functions each: 540 linear programs, with four at 28x28."""
    generator = torch.Generator().manual_seed(20)
    chosen: list[tuple[int, tuple[int, int, int], str, float]] = []
    for seed in range(268):
        channels = (1, 3)[seed % 2]
        height, width = (int(size) for size in torch.randint(1, 9, (2,), generator=generator))
        if seed % 67 == 66:
            channels, height, width = 1, 20, 13
        chosen.append((seed, (channels, height, width), KINDS[seed % 6], (0.0, 0.15, 0.5, 1.0)[seed // 6 % 4]))
    return [*chosen, (268, (1, 28, 28), "rough", 0.2), (269, (1, 28, 28), "smooth", 0.2)]


@pytest.mark.parametrize("part", range(6))
def test_equal_to_the_linear_program(part: int) -> None:
    for seed, shape, kind, share in cases()[part::6]:
        coefficients, image, budget = problem(seed, shape, kind, share)
        both = {name: support(coefficients, image, budget, maximiser=True, backend=name) for name in BACKENDS}  # type: ignore[arg-type]
        single = support(coefficients.float(), image.float(), budget).excess
        for index, row in enumerate(coefficients):
            optimum = largest_gain(row, image[0], float(budget))
            # HiGHS is exact to 1e-10 in units of the steepest slope times what can be spent.
            slope = float(lipschitz_constant(row))
            spent = float(min(budget[0], image.sum() * (shape[1] + shape[2])))
            floor = 1e-9 * slope * spent
            # In float32 each pixel's term of c . nu is rounded, and the excess with it.
            rounding = 3e-7 * float(row.abs().max() * image.sum())
            assert abs(float(single[0, index]) - optimum) <= 1e-5 * optimum + rounding
            for name, found in both.items():
                value = float(found.excess[0, index])
                context = f"{name}, seed {seed}, {kind}, {shape}: {value} against {optimum}"
                assert abs(value - optimum) <= 1e-6 * optimum + floor, context
                assert value >= optimum - floor, context
                assert found.maximiser is not None
                check_maximiser(row, image, budget, found.maximiser[:, index], value, floor, context)


def check_maximiser(
    row: Tensor, image: Tensor, budget: Tensor, moved: Tensor, value: float, floor: float, context: str
) -> None:
    """nu* >= 0, of the mass of mu in each channel, within the budget by exact W1, and it attains the value."""
    assert (moved >= 0).all(), context
    torch.testing.assert_close(moved.sum((-1, -2)), image.sum((-1, -2)), rtol=1e-12, atol=0)
    distance = wasserstein_distance(image, moved, normalised=False)
    assert float(distance) <= float(budget) * (1 + 1e-9) + 1e-13 * float(image.sum()), context
    assert abs(float((row * (moved - image)).sum()) - value) <= 1e-8 * value + floor, context


@given(
    st.tuples(st.sampled_from([1, 2]), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 10_000),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1e-4, 0.05, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_sample_gains_more(shape: tuple[int, int, int], seed: int, kind: str, share: float, radius: float) -> None:
    images = sparse_images(shape, 2, seed, share)
    coefficients = coefficients_of(kind, shape, 3, torch.Generator().manual_seed(seed))
    budget = radius * images.flatten(1).sum(1)
    points = samples(images, budget, 30, seed)
    gains = torch.einsum("bnp,sp->bsn", (points - images[:, None]).flatten(2), coefficients.flatten(1)).amax(-1)
    for name in BACKENDS:
        excess = support(coefficients, images, budget, backend=name).excess  # type: ignore[arg-type]
        assert (gains <= excess + 1e-12 * coefficients.abs().max() * images.sum()).all()
        assert (excess <= budget[:, None] * lipschitz_constant(coefficients) * (1 + 1e-12)).all()


def test_one_step_to_the_right_by_hand() -> None:
    # Masses 0.6 and 0.4 side by side, c = (0, 1): the first may move, one pixel, gaining 1 a unit, until it
    # is used up. The second function is turned round; the second channel has no mass.
    image = torch.zeros(1, 2, 1, 2, dtype=DOUBLE)
    image[0, 0, 0] = torch.tensor([0.6, 0.4], dtype=DOUBLE)
    rows = torch.zeros(2, 2, 1, 2, dtype=DOUBLE)
    rows[0, 0, 0, 1] = rows[1, 0, 0, 0] = 1.0
    rows[:, 1] = torch.tensor([0.0, 100.0])
    for budget, expected in ((0.0, [0.0, 0.0]), (0.25, [0.25, 0.25]), (0.5, [0.5, 0.4]), (9.0, [0.6, 0.4])):
        for name in BACKENDS:
            found = support(rows, image, torch.tensor([budget]), maximiser=True, backend=name)  # type: ignore[arg-type]
            torch.testing.assert_close(found.excess, torch.tensor([expected], dtype=DOUBLE), rtol=0, atol=1e-12)
            assert found.maximiser is not None
            assert float(found.maximiser[0, 0, 0, 0, 1]) == pytest.approx(0.4 + expected[0], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_shared_expanded_and_strided_coefficients(backend: Any, dtype: torch.dtype) -> None:
    images = sparse_images((2, 5, 4), 3, 0).to(dtype)
    shared = torch.randn(19, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    budget = torch.tensor([0.1, 1.0, 3.0])
    expected = support(shared, images, budget, backend=backend, maximiser=True)
    assert expected.maximiser is not None
    assert expected.excess.dtype == expected.maximiser.dtype == dtype
    assert expected.excess.shape == expected.multiplier.shape == (3, 19)
    strided = shared.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for coefficients in (shared.expand(3, *shared.shape), strided, shared[:, :, :, :]):
        found = support(coefficients, images, budget, backend=backend, maximiser=True)
        torch.testing.assert_close(found.excess, expected.excess, rtol=0, atol=0)
        torch.testing.assert_close(found.maximiser, expected.maximiser, rtol=0, atol=0)
    # Each image and each function is a problem of its own.
    alone = torch.stack(
        [support(shared[k : k + 1], images[1:2], budget[1:2], backend=backend).excess[0, 0] for k in range(19)]
    )
    torch.testing.assert_close(alone, expected.excess[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_guesses_change_no_value(backend: Any) -> None:
    images = sparse_images((1, 6, 6), 2, 3, 0.5)
    rows = torch.randn(17, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    budget = torch.tensor([0.05, 0.8])
    exact = support(rows, images, budget, backend=backend)
    scale = exact.multiplier
    for guess in (scale, scale * 1.01, scale * 0.99, scale * 1e3, scale * 1e-9, -scale, torch.full_like(scale, 1e-300)):
        found = support(rows, images, budget, guess=guess, backend=backend)
        torch.testing.assert_close(found.excess, exact.excess, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loose_tolerance_only_loosens(backend: Any) -> None:
    images = sparse_images((1, 6, 6), 4, 3, 0.5)
    rows = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    budget = torch.tensor([0.01, 0.1, 0.8, 20.0])
    exact = support(rows, images, budget, backend=backend).excess
    loosened = []
    for tolerance in (1e-6, 0.01, 0.3):
        found = support(rows, images, budget, tolerance=tolerance, backend=backend).excess
        assert (found >= exact * (1 - 1e-9)).all()
        assert (found <= exact / (1 - tolerance) * (1 + 1e-9)).all()
        loosened.append(int((found > exact * (1 + 1e-9)).sum()))
    assert loosened[2] > loosened[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_concave_in_the_budget_and_zero_at_zero(backend: Any) -> None:
    image = sparse_images((3, 4, 5), 1, 0)
    rows = torch.randn(9, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    budgets = torch.linspace(0, 10, 21, dtype=DOUBLE)
    values = support(rows, image.expand(21, -1, -1, -1), budgets, backend=backend).excess
    assert (values[0] == 0).all()
    rises = values.diff(dim=0)
    assert (rises >= -1e-12).all()
    assert (rises.diff(dim=0) <= 1e-9).all()
    # More than enough to send everything to the channel's best pixel.
    everything = support(rows, image, torch.tensor([1e6]), backend=backend).excess
    best = (rows.amax((-1, -2)) * image.sum((-1, -2))).sum(1) - inner(rows, image)[0]
    torch.testing.assert_close(everything[0], best)
    nothing = support(torch.zeros_like(rows), image, budgets[-1:], backend=backend, maximiser=True)
    assert (nothing.excess == 0).all()
    assert nothing.maximiser is not None
    assert torch.equal(nothing.maximiser, image.expand_as(nothing.maximiser[0])[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_mass_gains_nothing(backend: Any) -> None:
    image = torch.zeros(1, 1, 3, 3, dtype=DOUBLE)
    rows = torch.rand(2, 1, 3, 3, dtype=DOUBLE)
    found = support(rows, image, torch.tensor([1.0]), backend=backend, maximiser=True)
    assert (found.excess == 0).all()
    assert found.maximiser is not None
    assert (found.maximiser == 0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_gradient_in_all_arguments(shared: bool) -> None:
    # h is piecewise smooth; random real data stand off its kinks by far more than the step of 1e-6.
    generator = torch.Generator().manual_seed(4)
    shape = (3, 2, 3, 4) if shared else (2, 3, 2, 3, 4)
    coefficients = torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_(True)
    images = (torch.rand(2, 2, 3, 4, generator=generator, dtype=DOUBLE) + 0.1).requires_grad_(True)
    budget = torch.tensor([0.3, 2.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(support_value, (coefficients, images, budget))
    value = support_value(coefficients, images, budget)
    found = support(coefficients, images, budget, maximiser=True)
    torch.testing.assert_close(value, inner(coefficients, images) + found.excess)
    for_budget = torch.autograd.grad(value.sum(), budget)[0]
    torch.testing.assert_close(for_budget, found.multiplier.sum(1))


def test_gradient_of_one_image_leaves_the_others_alone() -> None:
    images = sparse_images((1, 4, 4), 2, 0)
    rows = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=DOUBLE).requires_grad_(True)
    value = support_value(rows, images, torch.tensor([0.2, 0.2]))
    gradient = torch.autograd.grad(value[1, 2], rows)[0]
    found = support(rows, images, torch.tensor([0.2, 0.2]), maximiser=True).maximiser
    assert found is not None
    torch.testing.assert_close(gradient[1, 2], found[1, 2])
    assert float(gradient[0].abs().max()) == float(gradient[1, :2].abs().max()) == 0.0


IMAGES = torch.ones(2, 1, 3, 4)
ROWS = torch.ones(5, 1, 3, 4)


@pytest.mark.parametrize(
    ("coefficients", "images", "budget", "message"),
    [
        (ROWS, IMAGES[0], torch.ones(2), r"images of shape \(1, 3, 4\): expected \(B, C, H, W\)"),
        (ROWS[:, 0], IMAGES, torch.ones(2), r"coefficients of shape \(5, 3, 4\): expected \(2, S, \*\(1, 3, 4\)\)"),
        (ROWS.mT, IMAGES, torch.ones(2), r"coefficients of shape \(5, 1, 4, 3\)"),
        (ROWS.expand(3, 5, 1, 3, 4), IMAGES, torch.ones(2), r"of shape \(3, 5, 1, 3, 4\): expected \(2, S"),
        (ROWS, IMAGES, torch.ones(3), r"budget of shape \(3,\): expected \(2,\)"),
        (ROWS, IMAGES, torch.tensor(1.0), r"budget of shape \(\): expected \(2,\)"),
        (ROWS, IMAGES, torch.tensor([1.0, -1e-9]), r"expected finite numbers >= 0"),
        (ROWS, IMAGES, torch.tensor([torch.nan, 1.0]), r"budget \[nan, 1.0\]: expected finite numbers >= 0"),
        (ROWS, IMAGES, torch.tensor([torch.inf, 1.0]), r"budget \[inf, 1.0\]: expected finite numbers >= 0"),
    ],
)
def test_bad_problems(coefficients: Tensor, images: Tensor, budget: Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        support(coefficients, images, budget)
    with pytest.raises(InvalidInputError, match=message):
        support_value(coefficients, images, budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_proves_nothing_is_refused_or_nan(backend: Any) -> None:
    budget = torch.ones(2)
    with pytest.raises(InvalidInputError, match="images with a pixel of -1.0: expected finite values >= 0"):
        support(ROWS, -IMAGES, budget, backend=backend)
    with pytest.raises(InvalidInputError, match=r"guess of shape \(2, 1\): expected \(2, 5\)"):
        support(ROWS, IMAGES, budget, guess=torch.ones(2, 1), backend=backend)
    for value in (torch.nan, torch.inf):
        rows = torch.where(torch.eye(3, 4) > 0, value, ROWS)
        assert support(rows, IMAGES, budget, backend=backend).excess.isnan().all()
    assert support(ROWS[:0], IMAGES, budget, backend=backend).excess.shape == (2, 0)
    assert support(ROWS, IMAGES[:0], budget[:0], backend=backend).excess.shape == (0, 5)
