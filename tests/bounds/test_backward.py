"""The backward pass: nowhere below the function that it replaces, through branches, and down to where it is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowverify.bounds.relaxations import pull_back
from flowverify.errors import UnsupportedOperationError
from flowverify.network import Add, Concatenate, Graph, Node, ScaleShift

DOUBLE = torch.float64


def branching(activation: nn.Module) -> Graph:
    """Two ways from each value to the next, and a constant."""
    torch.manual_seed(0)
    nodes = [
        Node("a", nn.Linear(6, 6, dtype=DOUBLE), ("input",), (6,)),
        Node("b", activation, ("a",), (6,)),
        Node("c", Add(), ("b", "input"), (6,)),
        Node("d", ScaleShift(torch.tensor(-1.5, dtype=DOUBLE), torch.tensor(0.25, dtype=DOUBLE)), ("c",), (6,)),
        Node("e", Concatenate(0), ("d", "b"), (12,)),
        Node("f", activation, ("e",), (12,)),
        Node("g", nn.Linear(12, 4, dtype=DOUBLE), ("f",), (4,)),
    ]
    return Graph((6,), nodes)


def box(graph: Graph) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Points of two boxes, (2, N, 6), and the least and largest values there."""
    torch.manual_seed(1)
    centre = torch.randn(2, 1, 6, dtype=DOUBLE)
    points = centre + 0.6 * (2 * torch.rand(2, 3000, 6, dtype=DOUBLE) - 1)
    values = graph.values(points.flatten(0, 1))
    ends = {}
    for name, value in values.items():
        grouped = value.unflatten(0, (2, -1))
        ends[name] = grouped.amin(1), grouped.amax(1)
    return points, ends


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("name", ["input", "a", "c", "f", "g"])
def test_holds_at_every_point(activation: nn.Module, name: str) -> None:
    graph = branching(activation)
    points, intervals = box(graph)
    size = graph.shape(name)[0]
    rows = torch.randn(2, 5, size, dtype=DOUBLE)
    found, constant = pull_back(graph, name, rows, intervals)
    assert set(found) == {"input"}
    above = torch.einsum("bsp,bnp->bns", found["input"], points) + constant[:, None]
    values = graph.values(points.flatten(0, 1))[name].unflatten(0, (2, -1))
    gap = above - torch.einsum("bse,bne->bns", rows, values)
    assert (gap >= -1e-9).all()
    if name in ("input", "a"):
        assert gap.abs().max() < 1e-9


def test_stops_at_the_bottom() -> None:
    graph = branching(nn.ReLU())
    points, intervals = box(graph)
    found, constant = pull_back(graph, "g", torch.eye(4, dtype=DOUBLE).expand(2, 4, 4), intervals, ("b", "c"))
    assert set(found) == {"b", "c"}
    values = {name: value.unflatten(0, (2, -1)) for name, value in graph.values(points.flatten(0, 1)).items()}
    above = sum(torch.einsum("bsp,bnp->bns", part, values[name]) for name, part in found.items()) + constant[:, None]
    assert (above - values["g"] >= -1e-9).all()


def test_gradients_reach_the_weights() -> None:
    graph = branching(nn.Tanh())
    _, intervals = box(graph)
    graph.requires_grad_(True)
    weight = graph.node("a").operation.get_parameter("weight")

    def total() -> Tensor:
        found, constant = pull_back(graph, "g", torch.ones(2, 1, 4, dtype=DOUBLE), intervals)
        return found["input"].square().sum() + constant.sum()

    total().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    ends = []
    for change in (1e-6, -2e-6):
        weight.data[1, 2] += change
        ends.append(float(total().detach()))
    assert float(weight.grad[1, 2]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    with torch.no_grad():
        assert not total().requires_grad


def test_what_has_no_lines_is_named() -> None:
    pool = Graph((1, 2, 2), [Node("a", nn.MaxPool2d(2), ("input",), (1, 1, 1))])
    interval = torch.zeros(1, 1, 2, 2, dtype=DOUBLE), torch.ones(1, 1, 2, 2, dtype=DOUBLE)
    with pytest.raises(UnsupportedOperationError, match="MaxPool2d"):
        pull_back(pool, "a", torch.ones(1, 1, 1, 1, 1, dtype=DOUBLE), {"input": interval})
