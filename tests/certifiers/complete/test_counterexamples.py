"""The nearest counterexample: back to the boundary, and farther out where the network's own precision is in the way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flowverify import Network
from flowverify.ball import Threat
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.network.subject import Subject

IMAGE = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)


class Hesitant(Subject):
    """Answers the label until float64 prefers the other class by a surplus: what coarse rounding can do."""

    def __init__(self, surplus: float) -> None:
        network = Network.sequential((1, 1, 2), [nn.Flatten(), nn.Linear(2, 2)]).double()
        with torch.no_grad():
            network.nodes[1].operation.get_parameter("weight").copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
            network.nodes[1].operation.get_parameter("bias").copy_(torch.tensor([0.5, 0.0]))
        super().__init__(network)
        self._surplus = surplus

    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.exact_logits(images)
        return logits[:, 1] - logits[:, 0] > self._surplus


def moved(share: float) -> Tensor:
    """The image with this share of its mass a pixel to the right, at a distance of as much."""
    return torch.tensor([[[[1.0 - share, share]]]], dtype=torch.float64)


def test_a_point_is_pulled_back_to_the_boundary() -> None:
    nearest = NearestCounterexample(Hesitant(0.0), IMAGE, 0, Threat())
    nearest.offer(moved(0.9))
    assert 0.5 < nearest.budget <= 0.5 * (1 + 1e-6)
    assert nearest.witness is not None and float(nearest.witness[0, 0, 1]) == pytest.approx(nearest.budget)
    assert nearest.disputed == math.inf


@pytest.mark.parametrize("surplus", [1e-5, 1e-2, 0.1, 0.39])
def test_where_its_own_precision_hesitates_it_is_looked_for_farther_out(surplus: float) -> None:
    nearest = NearestCounterexample(Hesitant(surplus), IMAGE, 0, Threat())
    nearest.offer(moved(0.9))
    assert 0.5 + surplus < nearest.budget <= 0.5 + surplus + 0.4 / 32
    assert nearest.disputed == math.inf


def test_what_its_own_precision_never_confirms_is_disputed_and_no_counterexample() -> None:
    nearest = NearestCounterexample(Hesitant(0.5), IMAGE, 0, Threat())
    nearest.offer(moved(0.9))
    assert (nearest.budget, nearest.witness) == (math.inf, None)
    assert nearest.disputed == pytest.approx(0.5)
