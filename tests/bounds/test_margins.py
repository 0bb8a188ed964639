"""What the margin engine refuses, falls back on, and does not let a batch change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowverify.ball import Threat
from flowverify.bounds.crown.backend import BoundedNetwork
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.incomplete import Certifier
from flowverify.errors import BoundError, UnsupportedOperationError
from flowverify.network import Network


def pooled(kernel: int, stride: int) -> Network:
    torch.manual_seed(0)
    modules = [nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(kernel, stride), nn.ReLU(), nn.Flatten()]
    width = Network.sequential((1, 6, 6), modules).num_classes
    return Network.sequential((1, 6, 6), [*modules, nn.Linear(width, 3)])


@pytest.mark.parametrize("bound", ["crown", "best"])
def test_what_the_host_cannot_take_is_refused_or_bounded_by_others(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaking down as it is built, and in the middle of a batch."""

    def refuse(*arguments: object, **options: object) -> None:
        raise BoundError("auto_LiRPA's backward failed: for the test")

    labels = torch.tensor([0, 1])
    ball = Threat().ball(torch.rand(2, 1, 6, 6), torch.tensor([0.1, 0.2]))
    expected = MarginBounds(pooled(3, 2), bound="lifted").margins(ball, labels)
    for method in ("__init__", "crown"):
        with monkeypatch.context() as patch:
            engine = MarginBounds(pooled(3, 2), bound=bound) if method == "crown" else None
            patch.setattr(BoundedNetwork, method, refuse)
            if bound == "crown":
                with pytest.raises(BoundError, match="for the test; the bounds ibp and best take this network"):
                    (engine or MarginBounds(pooled(3, 2), bound=bound)).margins(ball, labels)
                continue
            engine = engine or MarginBounds(pooled(3, 2), bound=bound)
            assert torch.equal(engine.margins(ball, labels), expected)
            assert engine.notes == ["bounded without crown: auto_LiRPA's backward failed: for the test"]


def test_slopes_that_the_host_cannot_optimise_are_those_of_crown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BoundError("for the test")

    network = Network.sequential((1, 6, 6), [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)])
    labels = torch.tensor([0, 1])
    ball = Threat().ball(torch.rand(2, 1, 6, 6), torch.tensor([0.1, 0.2]))
    engine = MarginBounds(network, bound="alpha-crown")
    monkeypatch.setattr(BoundedNetwork, "alpha_crown", refuse)
    expected = MarginBounds(network, bound="crown").margins(ball, labels)
    for _ in range(2):
        assert torch.equal(engine.margins(ball, labels), expected)
    assert engine.notes == ["slopes are not optimised: for the test"]


def test_operations_that_are_not_handed_over_are_named() -> None:
    network = pooled(3, 2)
    sample = torch.rand(2, 1, 6, 6)
    with pytest.raises(UnsupportedOperationError, match=r"'1_MaxPool2d' \(MaxPool2d\): not handed over to auto_LiRPA"):
        BoundedNetwork(network, (sample,), [network.values(sample)["0_Conv2d"]])


def test_alpha_crown_through_a_pool_is_crown_and_says_so() -> None:
    labels = torch.tensor([0, 1])
    ball = Threat().ball(torch.rand(2, 1, 6, 6), torch.tensor([0.1, 0.2]))
    optimised, plain = (MarginBounds(pooled(2, 2), bound=bound) for bound in ("alpha-crown", "crown"))
    assert torch.equal(optimised.margins(ball, labels), plain.margins(ball, labels))
    assert "cannot optimise slopes through MaxPool2d" in optimised.notes[0]
    certifier = Certifier(pooled(2, 2), "fine-tuned", "alpha-crown")
    predicted = pooled(2, 2)(ball.images[:1]).argmax(1)
    assert "MaxPool2d" in certifier.search(ball.images[:1], predicted)[0].note


@pytest.mark.parametrize("bound", ["crown", "best"])
def test_bounds_of_an_image_do_not_depend_on_its_batch(bound: str) -> None:
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)]
    network = Network.sequential((1, 6, 6), layers).double()
    images = torch.rand(8, 1, 6, 6, dtype=torch.float64)
    labels = network(images).argmax(1)
    ball = Threat().ball(images, torch.linspace(0, 2, 8))
    engine = MarginBounds(network, bound=bound, dtype=torch.float64)
    together, neurons = engine.margins(ball, labels), engine.neurons(ball)
    for index in range(8):
        one = slice(index, index + 1)
        torch.testing.assert_close(engine.margins(ball[one], labels[one]), together[one], rtol=1e-9, atol=1e-9)
        for alone, among in zip(engine.neurons(ball[one]), neurons, strict=True):
            for end, same in zip(alone, among, strict=True):
                torch.testing.assert_close(end, same[one], rtol=1e-9, atol=1e-9)
