"""Best moves of mass: against the l1 solvers of the package, and against linear programs that share no code."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.support import best_moves, least_budget, offsets_by_cost, support


def problems(count=6, shape=(2, 5, 4), seed=0, empty=0.4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images = torch.where(torch.rand(count, *shape, generator=generator) < empty, 0.0, images)
    images[:, 0, 0, 0] += 0.1
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64), images


def gain_by_program(coefficients, image, budget, ground, cap=None):
    """max c . (nu - mu) over full plans of one image, by HiGHS."""
    channels, height, width = image.shape
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    difference = place[:, None] - place[None]
    cost = np.abs(difference).sum(-1) if ground == "l1" else np.sqrt((difference**2).sum(-1))
    area = height * width
    rows, gains, costs, goals = [], [], [], []
    for channel in range(channels):
        c = coefficients[channel].flatten().numpy()
        for i in range(area):
            rows += [channel * area + i] * area
            goals += list(channel * area + np.arange(area))
            gains += list(c - c[i])
            costs += list(cost[i])
    size = len(rows)
    conserve = coo_array((np.ones(size), (rows, np.arange(size))), shape=(channels * area, size)).tocsr()
    limits, most = [coo_array(np.array(costs)[None])], [budget]
    if cap is not None:
        limits.append(coo_array((np.ones(size), (goals, np.arange(size))), shape=(channels * area, size)))
        most += [cap] * (channels * area)
    found = linprog(
        -np.array(gains), A_ub=vstack(limits).tocsr(), b_ub=most, A_eq=conserve, b_eq=image.flatten().numpy(),
        method="highs",
    )  # fmt: skip
    assert found.status == 0
    return -found.fun


class TestWithoutCap:
    @pytest.mark.parametrize("ground", ["l1", "l2"])
    @pytest.mark.parametrize("radius", [0.02, 0.3, 1.1, 50.0])
    def test_equals_the_linear_program(self, ground, radius):
        coefficients, images = problems(3)
        budget = radius * images.flatten(1).sum(1)
        found = best_moves(coefficients, images, budget=budget, ground=ground)
        for k in range(len(images)):
            expected = gain_by_program(coefficients[k], images[k], float(budget[k]), ground)
            assert float(found.gain[k]) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("radius", [0.01, 0.2, 1.0])
    def test_equals_the_support_function(self, radius):
        coefficients, images = problems(20, (1, 9, 8), seed=1)
        budget = radius * images.flatten(1).sum(1)
        expected = support(coefficients[:, None], images, budget).excess[:, 0]
        torch.testing.assert_close(best_moves(coefficients, images, budget=budget).gain, expected, rtol=1e-9, atol=0)

    def test_equals_the_least_budget(self):
        coefficients, images = problems(20, (1, 9, 8), seed=2)
        target = 0.4 * images.flatten(1).sum(1)
        expected = least_budget(coefficients[:, None], images, target[:, None]).budget[:, 0]
        found = best_moves(coefficients, images, target=target)
        torch.testing.assert_close(found.cost, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.gain, target, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("ground", ["l1", "l2"])
    def test_the_image_has_what_is_claimed(self, ground):
        coefficients, images = problems(10, (2, 6, 7), seed=3)
        budget = 0.3 * images.flatten(1).sum(1)
        found = best_moves(coefficients, images, budget=budget, ground=ground)
        assert bool((found.image >= 0).all())
        torch.testing.assert_close(found.image.sum((-1, -2)), images.sum((-1, -2)), rtol=1e-13, atol=0)
        gain = (coefficients * (found.image - images)).flatten(1).sum(1)
        torch.testing.assert_close(found.gain, gain, rtol=1e-9, atol=1e-12)
        exact = wasserstein_distance(images, found.image, ground, normalised=False, mass_tolerance=1e-9)
        torch.testing.assert_close(found.cost, exact, rtol=1e-9, atol=1e-12)
        assert bool((found.cost <= budget * (1 + 1e-12)).all())

    def test_an_unreachable_target_gains_all_there_is(self):
        coefficients, images = problems(4, seed=4)
        found = best_moves(coefficients, images, target=torch.full((4,), 1e9))
        top = coefficients.flatten(2).amax(2)[..., None, None]
        torch.testing.assert_close(found.gain, ((top - coefficients) * images).flatten(1).sum(1))
        assert bool((found.slope == 0).all())

    def test_nothing_to_gain_moves_nothing(self):
        coefficients, images = problems(3)
        for c, budget in ((torch.ones_like(coefficients), 1.0), (coefficients, 0.0)):
            found = best_moves(c, images, budget=torch.full((3,), budget))
            assert torch.equal(found.image, images) and bool((found.gain == 0).all()) and bool((found.cost == 0).all())

    def test_threads_change_nothing(self):
        coefficients, images = problems(9, seed=5)
        budget = images.flatten(1).sum(1)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            many = best_moves(coefficients, images, budget=budget)
        finally:
            torch.set_num_threads(threads)
        for k in range(9):
            alone = best_moves(coefficients[k : k + 1], images[k : k + 1], budget=budget[k : k + 1])
            assert torch.equal(alone.image[0], many.image[k])


class TestWithCap:
    @pytest.mark.parametrize("ground", ["l1", "l2"])
    @pytest.mark.parametrize("radius", [0.05, 0.4])
    def test_close_to_the_linear_program_and_feasible(self, ground, radius):
        coefficients, images = problems(4, (1, 6, 6), seed=6)
        budget = radius * images.flatten(1).sum(1)
        found = best_moves(coefficients, images, budget=budget, ground=ground, cap=1.1)
        assert bool((found.image >= 0).all()) and bool((found.image <= 1.1).all())
        torch.testing.assert_close(found.image.sum((-1, -2)), images.sum((-1, -2)), rtol=1e-13, atol=0)
        exact = wasserstein_distance(images, found.image, ground, normalised=False, mass_tolerance=1e-9)
        assert bool((exact <= found.cost * (1 + 1e-9)).all()) and bool((found.cost <= budget * (1 + 1e-9)).all())
        for k in range(len(images)):
            best = gain_by_program(coefficients[k], images[k], float(budget[k]), ground, cap=1.1)
            assert 0.9 * best <= float(found.gain[k]) <= best * (1 + 1e-9)

    def test_target_is_reached(self):
        coefficients, images = problems(5, (1, 6, 6), seed=7)
        target = 0.2 * images.flatten(1).sum(1)
        found = best_moves(coefficients, images, target=target, cap=1.1)
        torch.testing.assert_close(found.gain, target, rtol=1e-9, atol=0)

    def test_a_full_image_cannot_move(self):
        images = torch.ones(1, 1, 3, 3, dtype=torch.float64)
        found = best_moves(torch.arange(9.0).reshape(1, 1, 3, 3), images, budget=torch.ones(1), cap=1.0)
        assert torch.equal(found.image, images) and float(found.gain) == 0


def test_offsets_come_in_order_of_cost():
    offsets, costs = offsets_by_cost(3, 4, "l2")
    assert len(offsets) == 5 * 7 and list(offsets[0]) == [0, 0]
    np.testing.assert_allclose(costs, np.hypot(offsets[:, 0], offsets[:, 1]))
    assert (np.diff(costs) >= 0).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"coefficients": torch.zeros(1, 1, 3, 4)}, "expected two equal shapes"),
            ({"coefficients": torch.full((1, 1, 3, 3), torch.nan)}, "coefficients: given NaN"),
            ({"budget": torch.ones(2)}, r"budget of shape \(2,\): expected \(1,\)"),
            ({"target": torch.tensor([torch.nan])}, "no NaN"),
            ({"cap": 0.5}, "expected at most the cap"),
        ],
    )
    def test_says_what_was_given(self, change, message):
        arguments = {"coefficients": torch.zeros(1, 1, 3, 3), "images": torch.ones(1, 1, 3, 3)}
        arguments |= {"budget": torch.ones(1)} | change
        with pytest.raises(InvalidInputError, match=message):
            best_moves(arguments.pop("coefficients"), arguments.pop("images"), **arguments)

    def test_unknown_ground(self):
        with pytest.raises(UnknownNameError, match="unknown ground cost 'l3'"):
            best_moves(torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3), ground="l3")
