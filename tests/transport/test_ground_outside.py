"""A ground cost from outside of the package: one class, and everything takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ot
import pytest
import scipy.optimize
import torch

import flowverify as fv
from flowverify.attack import make_attack
from flowverify.ball import Threat
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.transport import ground as grounds
from flowverify.transport.ground import FloatArray, GroundCost, parse_ground, register_ground


@dataclass(frozen=True)
class Chebyshev(GroundCost):
    """The maximum norm: a king's moves."""

    name = "chebyshev"
    l1_factor = 2.0

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return np.maximum(np.abs(rows), np.abs(columns))


@dataclass(frozen=True)
class Steep(GroundCost):
    """l1 with rows that cost ``weight`` times as much: a cost with a number in its name."""

    weight: float
    forms = ("steep:W",)
    l1_factor = 1.0

    @property
    def name(self) -> str:
        return f"steep:{self.weight:g}"

    @classmethod
    def parse(cls, text: str) -> GroundCost | None:
        found = re.fullmatch(r"steep:([0-9.]+)", text)
        return None if found is None else cls(float(found[1]))

    def of_offset(self, rows: FloatArray, columns: FloatArray) -> FloatArray:
        return self.weight * np.abs(rows) + np.abs(columns)


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(grounds, "GROUNDS", dict(grounds.GROUNDS))
    for cost in (Chebyshev, Steep):
        register_ground(cost)
    yield
    grounds._find.cache_clear()


def matrix(ground: str, height: int, width: int) -> np.ndarray:
    """Costs between all pixels, written apart from the package."""
    base, _, power = ground.partition("^")
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    apart = np.abs(place[:, None] - place[None]).astype(float)
    kind = base.rpartition(":")[2] if base.startswith("local") else base
    costs = apart.max(-1) if kind == "chebyshev" else float(kind.partition(":")[2] or 3) * apart[..., 0] + apart[..., 1]
    if base.startswith("local"):
        costs = np.where(apart.max(-1) <= int(base.split(":")[1]) // 2, costs, 1e6)
    return np.asarray(costs ** float(power or 1))


def exact(ground: str, image: torch.Tensor, other: torch.Tensor) -> float:
    """W_p of normalised images of one channel, by POT."""
    mu, nu = (one.double().numpy().ravel() / float(image.double().sum()) for one in (image, other))
    power = float(ground.partition("^")[2] or 1)
    costs = matrix(ground, *image.shape[-2:])
    return float(ot.emd2(mu, nu / nu.sum() * mu.sum(), costs, numItermax=1_000_000) ** (1 / power))


NAMES = ("chebyshev", "chebyshev^2", "local:3:chebyshev", "steep:3", "steep:2^1.5")


@pytest.mark.parametrize("ground", NAMES)
def test_distances_and_support(ground: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 1, 3, 4, dtype=torch.float64)
    others = torch.rand(3, 1, 3, 4, dtype=torch.float64)
    others *= (images.sum((1, 2, 3)) / others.sum((1, 2, 3)))[:, None, None, None]
    threat = Threat(ground)
    assert threat.ground == ground and threat.name == f"W{threat.cost.power:g}, {ground}"
    for image, other, found in zip(images, others, threat.distance(images, others).tolist(), strict=True):
        known = exact(ground, image, other)
        assert found == pytest.approx(known, rel=1e-6) if known < 100 else found == np.inf
    ball = threat.ball(images, threat.budget(0.3, images))
    functions = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    solution = ball.support(functions, maximiser=True)
    assert solution.maximiser is not None
    costs = matrix(ground, 3, 4)
    for k, image in enumerate(images):
        for s, function in enumerate(functions):
            # Plans P >= 0 from the image, row by row: their sums, and what they cost.
            value = function.flatten().numpy()
            sums = np.kron(np.eye(12), np.ones((1, 12)))
            found = scipy.optimize.linprog(
                -np.tile(value, 12), costs.reshape(1, -1), [float(ball.budget[k])], sums, image.flatten().numpy()
            )
            gain = -found.fun - float((function * image).sum())
            assert float(solution.excess[k, s]) == pytest.approx(gain, rel=1e-7, abs=1e-9)
    for s in range(2):
        assert bool(ball.contains(solution.maximiser[:, s], 1e-7).all())


@pytest.mark.parametrize("ground", NAMES)
@pytest.mark.parametrize("cap", [None, 1.0])
def test_certificates_are_below_what_attacks_find(ground: str, cap: float | None) -> None:
    data, network = fv.load_dataset("digits")[:4], fv.load_model("digits-fc3")
    certified = fv.certified_radius(network, data.images, data.labels, bound="crown-ibp", ground=ground, cap=cap)
    found = make_attack("minimal", network, effort="fast").minimise(data.images, data.labels, ground, cap)
    assert found.outcome.count("found") == 4 and bool((certified > 0).all())
    for image, other, radius, below in zip(data.images, found.images, found.radius, certified, strict=True):
        assert float(radius) == pytest.approx(exact(ground, image, other), rel=1e-6)
        assert 0 < float(below) < float(radius)
    ball = fv.WassersteinBall(float(certified.min()) * 0.99, ground, cap)
    assert str(fv.certify(network, data.images[0], int(data.labels[0]), ball).verdict) == "certified"


def test_order_of_the_distances() -> None:
    """chebyshev <= l1 <= 2 chebyshev: so are certified radii, in the other direction."""
    data, network = fv.load_dataset("digits")[:3], fv.load_model("digits-fc3")
    l1, king = (
        fv.certified_radius(network, data.images, data.labels, bound="crown-ibp", ground=ground)
        for ground in ("l1", "chebyshev")
    )
    assert bool((king <= l1 * 1.02).all()) and bool((king >= l1 / 2 * 0.98).all())
    assert Threat("chebyshev").cost.to_l1(0.1) == 0.2 and Threat("chebyshev^2").cost.to_l1(0.1) == pytest.approx(0.02)


def test_names_list_what_was_registered() -> None:
    with pytest.raises(
        UnknownNameError, match="unknown ground cost 'king': expected one of chebyshev, l1, l2, .*steep:W"
    ):
        parse_ground("king")
    assert parse_ground("local:5:chebyshev^2").name == "local:5:chebyshev^2"


def made(**changes: object) -> type[GroundCost]:
    return type("Made", (Chebyshev,), {"name": f"made{len(str(changes))}", **changes})


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (made(l1_factor=1.5), r"expected \|rows\| \+ \|columns\| to be at most l1_factor, 1\.5, times the distance"),
        (made(l1_over_power=lambda self, power: 1.0), r"to be at most 1 times the cost \(l1_over_power\)"),
        (made(of_offset=lambda self, i, j: 0.5 * (abs(i) + abs(j))), "0 for what stays and at least 1 for every move"),
        (made(of_offset=lambda self, i, j: 1.0 + abs(i) + abs(j)), "0 for what stays"),
        (made(of_offset=lambda self, i, j: np.where(i > 0, 3.0, 2.0) * (abs(i) + abs(j))), "the same number in both"),
        (made(of_offset=lambda self, i, j: (abs(i) + abs(j)) * np.nan), "expected the same number|0 for what stays"),
        (made(of_offset=lambda self, i, j: 1.0), "a float64 number for each offset"),
        (made(of_offset=lambda self, i, j: (abs(i) + abs(j)).astype(np.float32)), "a float64 number for each offset"),
    ],
)
def test_what_is_no_cost_is_refused(cost: type[GroundCost], message: str) -> None:
    register_ground(cost)
    image = torch.rand(1, 1, 4, 5)
    name = str(cost.name)
    for use in (lambda: Threat(name).check(image), lambda: fv.WassersteinBall(0.1, name).around(image)):
        with pytest.raises(InvalidInputError, match=f"ground cost '{name}' on images of 4 x 5: .*{message}"):
            use()


def test_one_class_a_form() -> None:
    assert register_ground(Chebyshev) is Chebyshev
    with pytest.raises(InvalidInputError, match="ground cost 'l1': given a second class of this form, expected one"):
        register_ground(type("Other", (Chebyshev,), {"name": "l1"}))
