"""Compositions of engines: tighter at every neuron, whatever one of them does not know; and engines from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.engine import Batch, EngineOptions, nothing
from flowverify.bounds.intervals import Interval
from flowverify.bounds.margins import MarginBounds
from flowverify.bounds.recipes import BOUNDS, ENGINES, Bound
from flowverify.errors import (
    BoundError,
    FlowverifyError,
    InvalidInputError,
    UnknownNameError,
    UnsupportedOperationError,
)
from flowverify.network import Network
from flowverify.registry import Entry

OUTSIDE = '''
from flowverify.bounds.intervals import IntervalEngine, IntervalRun


class Halves(IntervalEngine):
    """Intervals of the first two entries alone, and margins."""

    def start(self, batch):
        return HalvesRun(self, batch)


class HalvesRun(IntervalRun):
    def tighten(self, name, wanted=None):
        lower, upper = super().tighten(name)
        lower[:, 2:], upper[:, 2:] = float("nan"), float("inf")
        return lower, upper
'''


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3)]
    return Network.sequential((1, 6, 6), layers).double()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def bounds(network: Network, bound: str | Bound, threat: Threat | None = None) -> MarginBounds:
    return MarginBounds(network, threat, bound, dtype=torch.float64, options=EngineOptions(alpha_iterations=2))


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("positive", [True, False])
def test_several_engines_are_at_every_neuron_as_tight_as_each_over_the_same_intervals(
    network: Network, images: Tensor, positive: bool
) -> None:
    threat = Threat(positive=positive)
    ball = threat.ball(images, 0.4)
    found = {name: bounds(network, name, threat).neurons(ball) for name in ("ibp", "crown", "best")}
    for name in ("ibp", "crown"):
        for (low, high), (other_low, other_high) in zip(found["best"], found[name], strict=True):
            assert (low >= other_low - 1e-12).all() and (high <= other_high + 1e-12).all()
    assert any((best[0] > ibp[0]).any() for best, ibp in zip(found["best"], found["ibp"], strict=True))


def test_every_engine_has_a_bound_of_its_own(network: Network, images: Tensor) -> None:
    ball = Threat().ball(images, 0.0)
    clean = network(images)
    expected = clean.gather(1, LABELS[:, None]) - clean
    others = torch.arange(3) != LABELS[:, None]
    for name in ENGINES:
        found = bounds(network, Bound("alone", (name,), (name,))).margins(ball, LABELS)
        torch.testing.assert_close(found, expected[others].reshape(4, 2), rtol=0, atol=1e-9)


class TestFromOutside:
    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "somebody.py").write_text(OUTSIDE)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "somebody", raising=False)

    def test_one_class_is_an_engine_by_its_path(self, network: Network, images: Tensor) -> None:
        ball = Threat().ball(images, 0.4)
        mine = Bound("mine", ("somebody:Halves", "crown"), ("somebody:Halves",))
        both = Bound("both", ("interval", "crown"), ("interval",))
        engine = bounds(network, mine)
        for (low, high), (least, most) in zip(engine.neurons(ball), bounds(network, both).neurons(ball), strict=True):
            assert torch.equal(low, least) and torch.equal(high, most)
        assert engine.margins(ball, LABELS).shape == (4, 2)

    def test_one_entry_makes_it_a_bound_by_name(
        self, network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(ENGINES, "halves", Entry("halves", "somebody:Halves"))
        monkeypatch.setitem(BOUNDS, "mine", Bound("mine", ("interval", "halves"), ("halves",)))
        ball = Threat().ball(images, 0.4)
        assert torch.equal(bounds(network, "mine").margins(ball, LABELS), bounds(network, "ibp").margins(ball, LABELS))

    @pytest.mark.parametrize("name", ["somebody:Thirds", "nobody:Halves", "halves"])
    def test_what_is_not_there_is_named(self, name: str) -> None:
        with pytest.raises((UnknownNameError, InvalidInputError), match=f"engine of bounds '{name}': .*MODULE:CLASS"):
            ENGINES.find(name)


class Failing:
    """Breaks down where it is told."""

    place, kind = "", BoundError

    def __init__(self, *arguments: object) -> None:
        self.notes: list[str] = []
        self.fail("init")

    def fail(self, place: str) -> None:
        if place == self.place:
            raise self.kind(f"no {place}")

    def start(self, batch: Batch) -> Failing:
        self.fail("start")
        self.batch = batch
        return self

    def tighten(self, name: str, wanted: Tensor) -> Interval:
        self.fail("tighten")
        return nothing(self.batch.intervals[name][0])

    def margins(self, specification: Tensor) -> Tensor:
        self.fail("margins")
        return torch.full(specification.shape[:2], torch.nan, dtype=specification.dtype)


@pytest.mark.parametrize("kind", [BoundError, UnsupportedOperationError])
@pytest.mark.parametrize("place", ["init", "start", "tighten", "margins", ""])
def test_a_bound_goes_on_without_an_engine_that_fails(
    network: Network, images: Tensor, place: str, kind: type[FlowverifyError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no harm from one that knows nothing."""
    monkeypatch.setattr(Failing, "place", place)
    monkeypatch.setattr(Failing, "kind", kind)
    name = f"{__name__}:Failing"
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    ball = Threat().ball(images, 0.4)
    expected = bounds(network, "ibp")
    engine = bounds(network, Bound("", ("interval", name), ("interval", name)))
    for _ in range(2):
        assert torch.equal(engine.margins(ball, LABELS), expected.margins(ball, LABELS))
        for (low, high), (least, most) in zip(engine.neurons(ball), expected.neurons(ball), strict=True):
            assert torch.equal(low, least) and torch.equal(high, most)
    assert engine.notes == ([f"bounded without {name}: no {place}"] if place else [])
    if place:
        with pytest.raises(kind, match=f"no {place}; the bounds ibp and best take this network"):
            bounds(network, Bound("", (name,), (name,))).margins(ball, LABELS)
