"""The least budget against Lemma 8's linear program solved by HiGHS, and its own duality."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from contracts import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from flowverify.errors import InvalidInputError
from flowverify.grid import Grid
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.support import least_budget, support


def program_optimum(coefficients: torch.Tensor, image: torch.Tensor, target: float) -> float:
    """min sum(p + q) with x + A(p - q) >= 0 and A^T c . (p - q) >= m; infinite where HiGHS finds it infeasible."""
    incidence = Grid.of(image).incidence_scipy()
    gain = incidence.T @ coefficients.flatten().numpy()
    constraints = scipy.sparse.vstack(
        [scipy.sparse.hstack([-incidence, incidence]), scipy.sparse.csr_array(-np.concatenate([gain, -gain])[None])]
    )
    bounds = np.concatenate([image.flatten().numpy(), [-target]])
    result = linprog(np.ones(2 * gain.size), A_ub=constraints, b_ub=bounds, bounds=(0, None), method="highs")
    assert result.status in (0, 2), result.message
    return float(result.fun) if result.status == 0 else np.inf


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    channels, height, width = int(generator.choice([1, 1, 3])), *(int(n) for n in generator.integers(1, 9, 2))
    if height * width == 1:
        width = 2
    shape = (channels, height, width)
    image = torch.from_numpy(generator.random((1, *shape)) * (generator.random((1, *shape)) < generator.random()))
    image[0, 0, 0, 0] += 0.1
    coefficients = torch.from_numpy(generator.standard_normal((1, 3, *shape)))
    if seed % 3 == 0:
        coefficients = coefficients.round()  # ties
    everything = torch.tensor([1e4], dtype=torch.float64)
    most = support(coefficients, image, everything).excess
    return coefficients, image, most * torch.from_numpy(generator.random((1, 3)) * 1.05)


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("block", quick(range(10), 5))
def test_equals_the_linear_program(block: int, backend: str) -> None:
    for seed in range(block * 34, block * 34 + 34):  # 10 * 34 * 3 problems
        coefficients, image, target = random_case(seed)
        found = least_budget(coefficients, image, target, maximiser=True, backend=backend)  # type: ignore[arg-type]
        assert found.maximiser is not None
        for problem in range(3):
            goal, budget = float(target[0, problem]), float(found.budget[0, problem])
            optimum = program_optimum(coefficients[0, problem], image[0], goal)
            assert budget == pytest.approx(optimum, rel=1e-6, abs=1e-9), (seed, problem)
            nearest = found.maximiser[:, problem]
            assert bool((nearest >= 0).all())
            if np.isfinite(optimum):
                gain = float((coefficients[:, problem] * (nearest - image)).sum())
                assert gain == pytest.approx(goal, rel=1e-9, abs=1e-12)
                distance = float(wasserstein_distance(image, nearest, normalised=False))
                assert distance <= budget * (1 + 1e-9) + 1e-12


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_is_the_inverse_of_the_support_function(seed: int) -> None:
    coefficients, image, target = random_case(seed)
    budget = least_budget(coefficients, image, target).budget
    for problem in torch.isfinite(budget[0]).nonzero().flatten().tolist():
        eps = budget[:, problem]
        own = coefficients[:, problem : problem + 1]
        gained = float(support(own, image, eps).excess)
        assert gained == pytest.approx(float(target[0, problem]), rel=1e-8, abs=1e-10)
        if eps > 1e-6:  # a little less does not gain as much
            assert float(support(own, image, eps * (1 - 1e-4)).excess) < float(target[0, problem])


def test_hand_computed() -> None:
    # A row of three pixels, all mass 2 on the first, c = (0, 1, 3): the cheapest gain is 3/2 a step, to the end.
    image = torch.tensor([[[[2.0, 0.0, 0.0]]]], dtype=torch.float64)
    coefficients = torch.tensor([[[[[0.0, 1.0, 3.0]]]]], dtype=torch.float64)
    for goal, expected in ((0.0, 0.0), (1.5, 1.0), (6.0, 4.0), (6.1, np.inf), (-1.0, 0.0)):
        target = torch.tensor([[goal]], dtype=torch.float64)
        assert float(least_budget(coefficients, image, target).budget) == pytest.approx(expected)


def test_shared_coefficients_and_float32() -> None:
    coefficients, image, target = random_case(4)
    images, targets = image.repeat(2, 1, 1, 1), target.repeat(2, 1)
    expected = least_budget(coefficients, image, target).budget
    shared = least_budget(coefficients[0], images, targets).budget
    torch.testing.assert_close(shared, expected.repeat(2, 1))
    rounded = least_budget(coefficients.float(), image.float(), target * 0.9)
    exact = least_budget(coefficients, image, target * 0.9)
    torch.testing.assert_close(rounded.budget.double(), exact.budget, rtol=1e-4, atol=1e-5)


def test_bad_targets() -> None:
    coefficients, image, target = random_case(4)
    with pytest.raises(InvalidInputError, match=r"target of shape \(1, 2\): expected \(1, 3\)"):
        least_budget(coefficients, image, target[:, :2])
    with pytest.raises(InvalidInputError, match="no NaN"):
        least_budget(coefficients, image, target * torch.nan)
    with pytest.raises(InvalidInputError, match="coefficients of shape"):
        least_budget(coefficients[..., :-1], image, target)
