"""Threats and balls: their units, their members, the way into them, their covers, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowverify.ball import Ball, Threat, WassersteinBall, check_images, distance_name
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.transport.ground import ground_cost


def digits(count: int = 2, *shape: int) -> Tensor:
    images = torch.rand(count, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(0))
    return images + 0.1


def move(images: Tensor, share: float, start: tuple[int, int], end: tuple[int, int]) -> Tensor:
    """Moves ``share`` of each image's mass from one pixel to another, in its first channel."""
    moved, amount = images.clone(), share * images.sum((1, 2, 3))
    moved[:, 0, start[0], start[1]] -= amount
    moved[:, 0, end[0], end[1]] += amount
    return moved


def test_budget_is_the_radius_times_the_mass() -> None:
    images = torch.stack([torch.full((2, 3, 4), 0.5), torch.full((2, 3, 4), 0.25)])
    budget = WassersteinBall(0.1).budget(images)
    assert budget.tolist() == pytest.approx([1.2, 0.6], rel=1e-15)
    assert budget.dtype == torch.float64
    assert WassersteinBall(0.1).budget(images[0]).tolist() == pytest.approx([1.2], rel=1e-15)


def test_membership_on_both_sides_of_the_sphere() -> None:
    """1/256 of the mass moves by (1, 2): W1 is 3/256 for l1 and sqrt(5)/256 for l2, whatever the mass."""
    images = torch.ones(3, 1, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 7.0, 0.01])[:, None, None, None]
    moved = move(images, 1 / 256, (2, 2), (3, 4))
    for ground, distance in (("l1", 3 / 256), ("l2", math.sqrt(5) / 256)):
        ball = WassersteinBall(distance, ground)
        assert ball.contains(images, moved).tolist() == [True] * 3
        assert ball.with_radius(distance * (1 + 1e-5)).contains(images, moved).tolist() == [True] * 3
        assert ball.with_radius(distance * (1 - 1e-5)).contains(images, moved).tolist() == [False] * 3
        assert ball.with_radius(distance * (1 - 1e-5)).contains(images, moved, tolerance=1e-4).all()


def test_membership_is_decided_image_by_image() -> None:
    images = digits(6)
    perturbed = images.clone()
    perturbed[1] = move(images[1:2], 0.001, (0, 0), (0, 1))[0]
    perturbed[2] = move(images[2:3], 0.01, (0, 0), (7, 7))[0]
    perturbed[3, 0, 0, 0] += 0.01
    perturbed[4, 0, 0, 0] = math.nan
    perturbed[5, 0, :2, 0] += torch.tensor([-1.0, 1.0]) * (images[5, 0, 0, 0] + 1e-4)
    ball = WassersteinBall(0.1)
    assert ball.contains(images, perturbed).tolist() == [True, True, False, False, False, False]
    assert ball.contains(images[2], perturbed[2]).tolist() == [False]


def test_radius_zero_contains_the_image_only() -> None:
    images = digits()
    ball = WassersteinBall(0)
    assert ball.contains(images, images.clone()).all()
    assert not ball.contains(images, move(images, 1e-4, (0, 0), (0, 1))).any()


def test_mass_may_not_change_nor_cross_channels() -> None:
    images = digits(1, 2, 4, 4)
    ball = WassersteinBall(10.0)
    assert ball.contains(images, images.flip(-1)).all()
    assert not ball.contains(images, images * (1 + 1e-4)).any()
    assert ball.contains(images, images * (1 + 1e-6)).all()
    crossed = images.clone()
    crossed[:, 0, 0, 0] -= 0.05
    crossed[:, 1, 0, 0] += 0.05
    assert not ball.contains(images, crossed).any()


def test_cap() -> None:
    images = torch.full((1, 1, 2, 2), 0.75)
    moved = images.clone()
    moved[0, 0, 0] += torch.tensor([0.5, -0.5])
    assert WassersteinBall(1.0).contains(images, moved).all()
    assert WassersteinBall(1.0, cap=1.25).contains(images, moved).all()
    assert not WassersteinBall(1.0, cap=1.2).contains(images, moved).any()


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_l1_ball_of_l1_radius_contains_the_ball(seed: int) -> None:
    images, others = torch.rand(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    others = others / others.sum() * images.sum()
    l2, l1 = (WassersteinBall(1.0, ground) for ground in ("l2", "l1"))
    low, high = 0.0, 10.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (low, middle) if l2.with_radius(middle).contains(images, others, 0.0) else (middle, high)
    assert l1.with_radius(l2.with_radius(high).l1_radius).contains(images, others)
    assert not l1.with_radius(low * (1 - 1e-5)).contains(images, others)


def test_l1_radius() -> None:
    assert WassersteinBall(0.3).l1_radius == 0.3
    assert WassersteinBall(0.3, "l2").l1_radius == 0.3 * math.sqrt(2)
    images = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    diagonal = images.flip(-1, -2)
    assert WassersteinBall(1.4143, "l2").contains(images, diagonal).all()
    assert not WassersteinBall(1.4143, "l1").contains(images, diagonal).any()
    assert WassersteinBall(WassersteinBall(1.4143, "l2").l1_radius).contains(images, diagonal).all()


def test_ball_is_a_frozen_value() -> None:
    ball = WassersteinBall(np.float32(0.5), ground="l2", cap=Fraction(3, 2))  # type: ignore[arg-type]
    assert ball == WassersteinBall(0.5, "l2", 1.5)
    assert (type(ball.radius), type(ball.cap)) == (float, float)
    assert ball.with_radius(1) == WassersteinBall(1.0, "l2", 1.5)
    assert len({ball, WassersteinBall(0.5, "l2", 1.5)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        ball.radius = 1.0  # type: ignore[misc]


BAD_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, "0.1", None, True, 1j, torch.tensor(0.1), [0.1]]


@pytest.mark.parametrize("radius", [*BAD_NUMBERS, -0.1])
def test_bad_radius(radius: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"radius: given .*, expected a finite number >= 0 \(pixels\)"):
        WassersteinBall(radius)
    with pytest.raises(InvalidInputError, match="radius: given"):
        WassersteinBall(0.1).with_radius(radius)


@pytest.mark.parametrize("cap", [value for value in [*BAD_NUMBERS, 0.0, -1.0] if value is not None])
def test_bad_cap(cap: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"cap: given .*, expected None or a finite number > 0"):
        WassersteinBall(0.1, cap=cap)


def test_bad_ground() -> None:
    with pytest.raises(UnknownNameError, match="unknown ground cost 'linf': expected one of l1, l2"):
        WassersteinBall(0.1, ground="linf")


def test_check_images() -> None:
    images = digits().half()
    assert check_images(images) is images
    assert check_images(images[0]).shape == (1, 1, 8, 8)
    assert check_images(images, Grid(8, 8)) is images
    with pytest.raises(InvalidInputError, match=r"images of shape \(2, 1, 8, 8\): expected \(\.\.\., 1, 7, 8\)"):
        check_images(images, Grid(7, 8))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.25, r"images: value -0\.25 at \(1, 0, 2, 3\), expected finite and >= 0"),
        (math.nan, r"images: value nan at \(1, 0, 2, 3\)"),
        (math.inf, r"images: value inf at \(1, 0, 2, 3\)"),
    ],
)
def test_bad_pixels_are_named(value: float, message: str) -> None:
    images = digits()
    images[1, 0, 2, 3] = value
    images[1, 0, 5, 5] = -9.0
    for check in (
        check_images,
        Threat().check,
        WassersteinBall(0.1).budget,
        lambda bad: WassersteinBall(0.1).contains(bad, bad),
    ):
        with pytest.raises(InvalidInputError, match=message):
            check(images)


def test_bad_images() -> None:
    images = digits()
    images[1] = 0.0
    with pytest.raises(InvalidInputError, match=r"images: image 1 has mass 0\.0, expected a positive mass"):
        check_images(images)
    with pytest.raises(InvalidInputError, match=r"images of dtype torch\.uint8: expected a floating-point dtype"):
        check_images(torch.ones(1, 1, 2, 2, dtype=torch.uint8))
    for shape in ((8, 8), (1, 1, 1, 8, 8), (1, 0, 8, 8)):
        with pytest.raises(InvalidInputError, match=r"images of shape \(.*\): expected \(B, C, H, W\) or \(C, H, W\)"):
            check_images(torch.ones(shape))
    with pytest.raises(InvalidInputError, match=r"images: given list, expected a torch\.Tensor"):
        check_images([[1.0]])  # type: ignore[arg-type]


def test_bad_perturbed_images() -> None:
    images, ball = digits(), WassersteinBall(0.1)
    with pytest.raises(InvalidInputError, match=r"perturbed of shape \(1, 1, 8, 8\): expected that of images"):
        ball.contains(images, images[:1])
    for perturbed in ([1.0], torch.ones(2, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(InvalidInputError, match=r"perturbed: given (list|torch\.int64), expected a floating-point"):
            ball.contains(images, perturbed)  # type: ignore[arg-type]


def test_membership_for_powers_and_windows_by_hand() -> None:
    """A block of three equal pixels moves by one pixel: each by one step, or the last one over the others."""
    images = torch.zeros(1, 1, 3, 7, dtype=torch.float64)
    images[..., 1, 1:4] = 1 / 3
    moved = torch.zeros_like(images)
    moved[..., 1, 2:5] = 1 / 3
    # Plans: three moves by 1, of cost 3 * 1 / 3 = 1; or one by 3, of cost 3^p / 3.
    for ground, distance in (("l1", 1.0), ("l2", 1.0), ("l2^2", 1.0), ("l1^3", 1.0), ("local:3", 1.0)):
        assert WassersteinBall(distance * (1 + 1e-9), ground).contains(images, moved).all(), ground
        assert not WassersteinBall(distance * (1 - 1e-4), ground).contains(images, moved).any(), ground
    far = torch.zeros_like(images)
    far[..., 1, 4:7] = 1 / 3  # by 3 in every plan for a power; out of reach for a window of 5
    assert WassersteinBall(3.0, "l2^2").contains(images, far).all()
    assert not WassersteinBall(2.9, "l2^2").contains(images, far).any()
    assert not WassersteinBall(100.0, "local:5").contains(images, far).any()
    assert WassersteinBall(3.0, "local:7").contains(images, far).all()


def test_budget_of_a_power() -> None:
    images = torch.full((1, 1, 4, 4), 0.5)
    assert WassersteinBall(0.1, "l2^2").budget(images).item() == pytest.approx(0.08)
    with pytest.raises(InvalidInputError, match="a window of 5 pixels on images of 4 x 4: expected at most 4"):
        WassersteinBall(0.1, "local:5").budget(images)


def test_an_image_above_the_cap_is_an_error() -> None:
    images = digits(2)
    images[1, 0, 3, 3] = 1.5
    ball = WassersteinBall(0.1, cap=1.2)
    with pytest.raises(InvalidInputError, match=r"image 1 has a pixel of 1\.5: expected at most the cap, 1\.2"):
        ball.contains(images, images)
    with pytest.raises(InvalidInputError, match=r"image 1 has a pixel of 1\.5"):
        ball.threat.check(images)
    assert Threat().check(images) is images


GROUNDS = ("l1", "l2", "l2^2", "l1^1.5", "local:3", "local:3:l1^2")


def plan_cost(source: Tensor, target: Tensor, ground: str) -> float:
    """Of the cheapest plan, for each unit of mass, by POT with full cost matrices; infinite if there is none."""
    costs = ground_cost(source.shape[-2:], ground).numpy()
    far = 1e5
    total = 0.0
    for mu, nu in zip(source.flatten(1).numpy(), target.flatten(1).numpy(), strict=True):
        value = ot.emd2(mu / mu.sum(), nu / nu.sum(), np.where(np.isfinite(costs), costs, far), numItermax=1_000_000)
        total += mu.sum() * value
    cost = total / float(source.sum())
    return cost if cost < 100 else np.inf


def random_pairs(seed: int, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 2, 3, 4, generator=generator, dtype=torch.float64)
    others = torch.rand(count, 2, 3, 4, generator=generator, dtype=torch.float64) ** 3
    return images, others * (images.sum((-1, -2)) / others.sum((-1, -2)))[..., None, None]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(GROUNDS), st.integers(0, 10**6), st.floats(0.01, 0.4))
def test_what_is_pulled_back_lies_in_the_ball_and_goes_far(ground: str, seed: int, radius: float) -> None:
    images, others = random_pairs(seed)
    ball = WassersteinBall(radius, ground).around(images)
    found, power = ball.pull_back(others), ball.threat.cost.power
    assert bool(ball.contains(found).all())
    for image, other, back in zip(images, others, found, strict=True):
        before, after = plan_cost(image, other, ground), plan_cost(image, back, ground)
        assert after <= radius**power * (1 + 1e-7)
        if before <= radius**power * (1 - 1e-9):
            assert torch.equal(back, other)
        elif np.isinf(before):
            assert torch.equal(back, image)
        elif power == 1 and not ground.startswith("local"):
            assert after >= radius * (1 - 1e-6)  # all of the way that there is


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1.0, 1.3]), st.floats(0.01, 3.0))
def test_what_is_repaired_is_an_image_of_the_threat_model(seed: int, cap: float | None, noise: float) -> None:
    images, _ = random_pairs(seed)
    candidates = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).double()
    candidates[0, 0, 0, 0] = torch.nan
    threat = Threat(cap=cap)
    found = threat.repair(images, candidates)
    assert bool(threat.admits(images, found).all()) and torch.equal(found[0], images[0])


THREATS = [Threat(ground, cap) for ground in GROUNDS for cap in (None, 1.5)] + [
    Threat(ground, positive=False) for ground in GROUNDS
]
threats = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.name)


@threats
def test_budget_and_radius_are_inverse(threat: Threat) -> None:
    images = digits(3, 2, 4, 4)
    radius = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    budget = threat.budget(radius, images)
    assert budget.dtype == torch.float64 and budget[0] == 0
    for image, one, found in zip(images, radius.tolist(), budget.tolist(), strict=True):
        assert found == pytest.approx(one**threat.cost.power * float(image.double().sum()), rel=1e-12)
    torch.testing.assert_close(threat.radius(budget, images), radius, rtol=1e-12, atol=0)
    assert torch.equal(threat.budget(0.3, images)[1], budget[1])


@threats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_support_is_attained_and_not_exceeded(threat: Threat, dtype: torch.dtype) -> None:
    """No member of the ball exceeds it; without a cap, its maximiser is a member that attains it."""
    images = random_pairs(0)[0]
    functions = torch.randn(3, 4, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ball = threat.ball(images, threat.budget(torch.tensor([0.02, 0.1, 0.4]), images)).to(dtype=dtype)
    found = ball.support(functions.to(dtype), maximiser=True)
    assert found.excess.dtype == dtype and found.maximiser is not None
    flat = (functions[:, :, None] * (found.maximiser.double() - images[:, None])[:, :, None]).flatten(2).sum(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    if threat.cap is None:
        torch.testing.assert_close(found.excess.double(), flat, rtol=tolerance, atol=tolerance)
    if threat.positive:
        best = torch.stack([ball.best_moves(functions[:, k]).gain for k in range(4)], 1)
        assert bool((best <= found.excess.double() * (1 + tolerance) + tolerance).all())
    if dtype == torch.float64 and (threat.positive or threat.cost.is_metric):
        for k in range(4):
            member = ball.best_moves(functions[:, k]).image if threat.positive else found.maximiser[:, k]
            assert bool(ball.contains(member, 1e-7).all())
            assert not bool(ball.with_budget(ball.budget * 0.9).contains(member).any()) or threat.cap is not None
    shared = ball.support(functions[0].to(dtype)).excess
    torch.testing.assert_close(shared[0], found.excess[0], rtol=tolerance, atol=tolerance)


@threats
def test_covers_are_looser_and_contain_the_ball(threat: Threat) -> None:
    images = random_pairs(3)[0]
    functions = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ball = threat.ball(images, threat.budget(torch.tensor([0.02, 0.3, 1.1]), images))
    own = ball.support(functions).excess
    covers = threat.covers()
    assert covers[0] == threat and len(set(covers)) == len(covers)
    for looser in [*covers, Threat("l1", threat.cap, threat.positive)]:
        around = ball.within(looser)
        assert around.threat == looser
        value = around.support(functions).excess
        if threat.cap is None and looser.cap is None:
            assert bool((value >= own * (1 - 1e-9)).all())
        if threat.positive and looser.positive:
            for function in functions:
                member = ball.best_moves(function.expand_as(images)).image
                assert bool(around.contains(member, 1e-7).all())
    assert torch.equal(ball.within(threat).budget, ball.budget)


def test_only_looser_threats_cover() -> None:
    ball = Threat("l2", 1.5).ball(digits(), 1.0)
    for tighter in (Threat("l2", 1.2), Threat("l2^2"), Threat("local:3")):
        with pytest.raises(InvalidInputError, match=r"balls of W1, l2, cap 1\.5 within balls of .*: expected a looser"):
            ball.within(tighter)
    with pytest.raises(InvalidInputError, match="within balls of W1, l1: expected a looser threat"):
        Threat(positive=False).ball(digits(), 1.0).within(Threat())


def test_flows_may_pass_where_there_is_no_mass() -> None:
    """From an empty pixel to its neighbour: 1 unit at distance 1, which no nonnegative image allows."""
    images = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    images[0, 0, 0, 0] = 1.0
    moved = images.clone()
    moved[0, 0, 1, 1:] += torch.tensor([-0.5, 0.5])
    flows = Threat(positive=False)
    assert flows.price(images, moved).tolist() == pytest.approx([0.5])
    assert (
        flows.ball(images, 0.5 * (1 + 1e-12)).contains(moved).all()
        and not flows.ball(images, 0.49).contains(moved).any()
    )
    back = flows.ball(images, 0.25).pull_back(moved)
    torch.testing.assert_close(back, images + 0.5 * (moved - images))
    assert not Threat().admits(images, moved).any()
    assert flows.price(images, images).tolist() == [0.0]
    with pytest.raises(InvalidInputError, match=r"flows at ground cost 'l2\^2': expected a metric"):
        Threat("l2^2", positive=False).price(images, moved)
    with pytest.raises(InvalidInputError, match="moves in balls of W1, l1, flows: expected a threat that is positive"):
        flows.ball(images, 1.0).best_moves(images)
    with pytest.raises(InvalidInputError, match="cap: given 1 for images whose pixels may be negative, expected None"):
        Threat(cap=1.0, positive=False)


def test_a_ball_is_a_batch() -> None:
    images = digits(4)
    ball = Threat("l2^2").ball(images, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert len(ball) == 4 and ball.grid == Grid(8, 8)
    part = ball[torch.tensor([2, 0])]
    assert isinstance(part, Ball) and part.budget.tolist() == [2.0, 0.0] and torch.equal(part.images, images[[2, 0]])
    assert ball[1:3].budget.tolist() == [1.0, 2.0]
    torch.testing.assert_close(ball.mass, images.double().sum((1, 2, 3)))
    torch.testing.assert_close(ball.radius**2 * ball.mass, ball.budget)
    narrow = ball.to(dtype=torch.float64).with_budget(ball.budget / 2)
    assert narrow.images.dtype == torch.float64 and narrow.budget.tolist() == [0.0, 0.5, 1.0, 1.5]
    around = WassersteinBall(0.1, "l2^2").around(images[0])
    assert around.threat == Threat("l2^2") and around.radius.tolist() == pytest.approx([0.1])
    far = Threat().unlimited(images)
    assert far.contains(images.flip(-1)).all() and torch.isinf(far.radius).all()
    assert Threat("local:3").largest_radius(Grid(8, 8)) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (torch.ones(3), r"budget of shape \(3,\): expected \(2,\) or a number"),
        (torch.ones(2, 1), r"budget of shape \(2, 1\)"),
        (-1.0, r"budget -1\.0: expected finite numbers >= 0"),
        (torch.tensor([0.0, math.inf]), r"budget \[0\.0, inf\]: expected finite"),
        (math.nan, "budget nan: expected finite"),
    ],
)
def test_bad_budgets(budget: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Threat().ball(digits(), budget)


def test_names() -> None:
    assert distance_name("l2") == "W1, l2" == Threat("l2").name
    assert distance_name("l1^1.5", 1.0) == "W1.5, l1^1.5, cap 1"
    assert Threat("local:5:l2", positive=False).name == "W1, local:5, flows"
