"""Projected Sinkhorn: Lambert's W, the local windows, the projection against a quadratic program, any lambda."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import lambertw

from flowverify.attack import LocalCost, project_sinkhorn
from flowverify.attack.sinkhorn import lambert_of_exponential, windows
from flowverify.errors import InvalidInputError


def problem(count=3, shape=(1, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images[:, :, 0, 1] = 0
    images /= images.flatten(1).sum(1)[:, None, None, None]
    points = images + 0.1 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images, points


class TestLambert:
    def test_equals_scipy(self):
        argument = torch.linspace(-40, 500, 2000, dtype=torch.float64)
        expected = lambertw(np.exp(argument.numpy())).real
        np.testing.assert_allclose(lambert_of_exponential(argument).numpy(), expected, rtol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_solves_its_equation_where_the_exponential_overflows(self, dtype):
        argument = torch.tensor([800.0, 1e4, 1e8], dtype=dtype)
        value = lambert_of_exponential(argument)
        torch.testing.assert_close(value + value.log(), argument)

    def test_limits(self):
        value = lambert_of_exponential(torch.tensor([-torch.inf, -200.0, -60.0], dtype=torch.float64))
        assert value[0] == 0
        torch.testing.assert_close(value[1:].log(), torch.tensor([-200.0, -60.0], dtype=torch.float64))


class TestLocalCost:
    def test_values(self):
        assert LocalCost(3, 2.0).matrix(torch.zeros(1)).tolist() == pytest.approx(
            [math.sqrt(2), 1, math.sqrt(2), 1, 0, 1, math.sqrt(2), 1, math.sqrt(2)]
        )
        corner = {(1.0, 1.0): 4, (2.0, 2.0): 8, (math.inf, 1.0): 2, (2.0, 5.0): 8**2.5}
        for (norm, power), expected in corner.items():
            assert float(LocalCost(5, norm, power).matrix(torch.zeros(1))[0]) == pytest.approx(expected)

    def test_windows_pair_with_the_costs(self):
        images = torch.arange(12.0).reshape(1, 1, 3, 4)
        patches = windows(images, 3)
        assert patches.shape == (1, 1, 9, 3, 4)
        assert patches[0, 0, 4].equal(images[0, 0])
        assert patches[0, 0, 5, 1, 1] == images[0, 0, 1, 2] and patches[0, 0, 1, 1, 1] == images[0, 0, 0, 1]
        assert patches[0, 0, 0, 0, 0] == -torch.inf

    @pytest.mark.parametrize("arguments", [(4,), (0,), (3, 0.5), (3, 2.0, 0.0), (3, 2.0, math.inf)])
    def test_bad_values(self, arguments):
        with pytest.raises(InvalidInputError, match="expected"):
            LocalCost(*arguments)


def nearest_by_program(image, point, radius, cost, window):
    """min ||z - w||^2 over z with a local plan of cost <= radius, by SLSQP on the plan."""
    channels, height, width = image.shape
    edge = window // 2
    pairs = [
        ((c * height + i) * width + j, (c * height + k) * width + m, cost[(k - i + edge) * window + m - j + edge])
        for c in range(channels)
        for i in range(height)
        for j in range(width)
        for k in range(max(0, i - edge), min(height, i + edge + 1))
        for m in range(max(0, j - edge), min(width, j + edge + 1))
    ]
    sources, goals, costs = (np.array(part) for part in zip(*pairs, strict=True))
    x, w = image.numpy().ravel(), point.numpy().ravel()
    spread, gather = np.zeros((len(x), len(pairs))), np.zeros((len(x), len(pairs)))
    spread[sources, np.arange(len(pairs))] = 1
    gather[goals, np.arange(len(pairs))] = 1
    start = np.where(sources == goals, x[sources], 0.0)
    found = minimize(
        lambda p: ((gather @ p - w) ** 2).sum(),
        start,
        jac=lambda p: 2 * gather.T @ (gather @ p - w),
        bounds=[(0, None)] * len(pairs),
        constraints=[
            {"type": "eq", "fun": lambda p: spread @ p - x, "jac": lambda p: spread},
            {"type": "ineq", "fun": lambda p: radius - costs @ p, "jac": lambda p: -costs},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert found.success
    return gather @ found.x


class TestProjection:
    @pytest.mark.parametrize("shape", [(1, 3, 3), (2, 2, 3)])
    def test_tends_to_the_projection(self, shape):
        images, points = problem(2, shape)
        cost = LocalCost(3)
        radius = torch.tensor([0.05, 0.2], dtype=torch.float64)
        expected = np.stack(
            [
                nearest_by_program(images[k], points[k], float(radius[k]), cost.matrix(images).numpy(), 3)
                for k in range(2)
            ]
        )
        errors = []
        for regularisation in (10.0, 1e2, 1e3):
            found = project_sinkhorn(images, points, radius, cost, regularisation, iterations=5000, tolerance=1e-13)
            assert bool(found.converged.all())
            errors.append(float(np.abs(found.image.flatten(1).numpy() - expected).max()))
        assert errors[-1] < 4e-3 and errors[-1] < errors[0] / 10 and errors == sorted(errors, reverse=True)

    def test_mass_and_cost_at_convergence(self):
        images, points = problem(3, (3, 5, 5))
        radius = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64)
        found = project_sinkhorn(images, points, radius, LocalCost(5), 100.0, iterations=2000, tolerance=1e-12)
        assert bool((found.image >= 0).all())
        torch.testing.assert_close(found.image.sum((-1, -2)), images.sum((-1, -2)), rtol=1e-4, atol=0)
        assert bool((found.cost <= radius * (1 + 1e-3)).all())

    @pytest.mark.parametrize("regularisation", [1.0, 10.0, 1e3, 1e4, 1e5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_no_overflow_and_no_nan(self, regularisation, dtype):
        images, points = problem(4, (1, 8, 8), seed=1)
        points = torch.stack([points[0], points[1] + 1, points[2] * 0, points[3] - 10])
        radius = torch.tensor([1e-6, 0.3, 2.0, 0.0])
        found = project_sinkhorn(images.to(dtype), points.to(dtype), radius.to(dtype), LocalCost(5), regularisation)
        assert bool(torch.isfinite(found.image).all()) and bool((found.image >= 0).all())
        assert bool(torch.isfinite(found.cost).all())

    def test_images_do_not_depend_on_each_other(self):
        images, points = problem(3, (1, 6, 6), seed=2)
        radius = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
        together = project_sinkhorn(images, points, radius, LocalCost(5))
        for k in range(3):
            alone = project_sinkhorn(images[k : k + 1], points[k : k + 1], radius[k : k + 1], LocalCost(5))
            torch.testing.assert_close(alone.image[0], together.image[k], rtol=1e-9, atol=1e-15)
            assert int(alone.iterations) == int(together.iterations[k])

    def test_bad_input(self):
        images, points = problem(2)
        with pytest.raises(InvalidInputError, match="expected a finite number > 0"):
            project_sinkhorn(images, points, torch.ones(2), LocalCost(3), 0.0)
        with pytest.raises(InvalidInputError, match=r"expected .*\(B, C, H, W\) twice"):
            project_sinkhorn(images, points[:1], torch.ones(2), LocalCost(3))
