"""Constants that conversion computes are those of exact arithmetic, to one rounding of float64."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from flowverify.network import Graph, Network, Node, ScaleShift, affine_rows, fold, from_torch, read_onnx, write_onnx
from flowverify.network.builder import normalisation

SHAPE = (2, 3, 4)
PIXELS = 24
ACCURATE = 1e-13  # relative: far below one rounding to float32


class Normalised(nn.Module):
    """Constants of all kinds, computed in the forward pass; Python's numbers are float64."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.7])[:, None, None])
        self.register_buffer("std", torch.tensor([0.3, 0.9])[:, None, None])
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(PIXELS, 3))

    def forward(self, images: Tensor) -> Tensor:
        value = (images - self.mean) * (1 / self.std.square()).to(images.dtype)
        value = self.linear((torch.sub(value, self.mean, alpha=0.3) / 0.3081).flatten(1))
        return torch.addmm(self.linear.bias, value, self.linear.weight[:, :3].exp(), beta=0.1, alpha=1.7)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    norms = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5),
        nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3),
    )  # fmt: skip
    for layer in norms:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 2)
    return {"norms": norms.eval(), "traced": Normalised().eval()}


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= ACCURATE * expected.abs().max()).all())


@pytest.mark.parametrize("name", list(modules()))
def test_in_float64_the_network_is_the_module_in_float64(name: str) -> None:
    module = modules()[name].requires_grad_(False)
    network, images = from_torch(module, SHAPE), torch.rand(5, *SHAPE, dtype=torch.float64)
    expected = copy.deepcopy(module).double()(images)
    assert network.dtype == torch.float32
    assert same(copy.deepcopy(network).double()(images), expected)
    assert same(copy.deepcopy(network).double().float().double()(images), expected)
    assert not same(network(images.float()).double(), expected)
    # Through what others make of it.
    last = network.nodes[-1].name
    assert same(network.before(last).double()(images), expected)
    middle = network.nodes[1].name
    between = network.before(middle).double()(images)
    assert same(network.after(middle).double()(between), expected)
    again = Network(SHAPE, [Node(n.name, n.operation, n.inputs, n.shape) for n in copy.deepcopy(network).nodes])
    assert same(again.double()(images), expected)
    affine = max(network.affine_of_input() - {"input"}, key=[n.name for n in network.nodes].index)
    rows, bias = affine_rows(network, affine)
    value = network.before(affine).double()(images)
    assert same(images.flatten(1) @ rows.T + bias, value.flatten(1))
    folded = fold(copy.deepcopy(network).double())
    flow = torch.zeros(5, folded.grid.edges, dtype=torch.float64)
    assert same(folded(folded.encode(flow), folded.offset(images)), expected)


def test_a_chain_of_canonical_operations_keeps_them() -> None:
    network = from_torch(modules()["norms"], SHAPE)
    chain = Network.sequential(SHAPE, [node.operation for node in network.nodes])
    images = torch.rand(5, *SHAPE, dtype=torch.float64)
    assert torch.equal(chain.double()(images), network.double()(images))


def test_a_scale_that_float32_cannot_tell_from_one_is_kept() -> None:
    network = from_torch(nn.Sequential(nn.BatchNorm2d(2, eps=1e-9), nn.Flatten(), nn.Linear(PIXELS, 2)), SHAPE)
    scale = network.double().nodes[0].operation.scale
    assert float((scale - 1 / math.sqrt(1 + 1e-9)).abs().max()) < 1e-15
    assert not bool((scale == 1).any())


def test_what_was_changed_since_stays_changed() -> None:
    network = from_torch(modules()["norms"], SHAPE)
    norm, other = network.nodes[0].operation, network.nodes[2].operation
    assert isinstance(norm, ScaleShift) and isinstance(other, ScaleShift)
    norm.shift.zero_()
    other.scale[0] += 1
    kept = other.scale.clone()
    network.double()
    assert not bool(norm.shift.any())
    assert torch.equal(other.scale, kept.double())
    assert bool((norm.scale != norm.scale.float().double()).any())  # the other constant is the exact one
    network.float().load_state_dict(network.state_dict())
    assert network.double().nodes[0].operation.scale.dtype == torch.float64


def test_a_written_file_holds_the_rounded_network(tmp_path: object) -> None:
    network, images = from_torch(modules()["norms"], SHAPE), torch.rand(5, *SHAPE, dtype=torch.float64)
    path = f"{tmp_path}/network.onnx"
    write_onnx(network, path)
    rounded = copy.deepcopy(network)
    for node in rounded.nodes:
        node.operation.__dict__.pop("exact", None)
    assert torch.equal(read_onnx(path).double()(images), rounded.double()(images))
    assert not torch.equal(network.double()(images), rounded(images))


def test_a_float64_network_carries_nothing_twice() -> None:
    network = from_torch(modules()["norms"].double(), SHAPE)
    assert not any(getattr(node.operation, "exact", {}) for node in network.nodes)


def test_copies_on_the_meta_device_are_left_alone() -> None:
    network: Graph = from_torch(modules()["norms"], SHAPE)
    assert network.to("meta").nodes[0].operation.scale.is_meta


def test_products_of_a_file_are_not_rounded(tmp_path: object) -> None:
    generator = np.random.default_rng(0)
    numbers = {
        "w": generator.standard_normal((PIXELS, 3)), "b": generator.standard_normal(3),
        "s": generator.uniform(0.2, 2, (1, 2, 1, 1)), "m": generator.uniform(0, 1, (1, 2, 1, 1)),
    }  # fmt: skip
    stored = {name: value.astype(np.float32) for name, value in numbers.items()}
    nodes = [
        helper.make_node("Div", ["m", "s"], ["ratio"]),
        helper.make_node("Cast", ["ratio"], ["shift"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "s"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "shift"], ["y"]),
        helper.make_node("Flatten", ["y"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["out"], alpha=0.3, beta=1.7),
    ]
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    path = f"{tmp_path}/network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    network, images = read_onnx(path), torch.rand(5, *SHAPE, dtype=torch.float64)
    assert network.dtype == torch.float32
    w, b, s, m = (torch.from_numpy(stored[name]).double() for name in "wbsm")
    alpha, beta = float(np.float32(0.3)), float(np.float32(1.7))
    expected = alpha * ((images - m) / s).flatten(1) @ w + beta * b
    assert same(network.double()(images), expected)


numbers = st.floats(-1e6, 1e6, width=32)


@given(weight=numbers, mean=numbers, variance=st.floats(0, 1e6, width=32), close=st.floats(-1, 1, width=32))
@settings(deadline=None, max_examples=100)
def test_normalisation_is_rounded_once(weight: float, mean: float, variance: float, close: float) -> None:
    """Also where bias and mean cancel, against the squares: scale^2 (variance + epsilon) = weight^2."""
    bias = mean * weight / math.sqrt(variance + 1e-5) * (1 + close * 2.0**-40)
    scale, shift = normalisation(
        *(torch.tensor([v], dtype=torch.float64) for v in (weight, bias, mean, variance)), 1e-5
    )
    total, unit = Fraction(variance) + Fraction(1e-5), Fraction(1, 1 << 52)
    wanted = Fraction(weight)
    low, high = (abs(Fraction(float(scale))) * (1 + sign * unit) for sign in (-1, 1))
    assert low**2 * total <= wanted**2 <= high**2 * total
    root = Fraction(math.isqrt(total.numerator * 10**200 // total.denominator), 10**100)
    exact = Fraction(bias) - Fraction(mean) * wanted / root
    assert abs(Fraction(float(shift)) - exact) <= unit * abs(exact) + Fraction(1, 10**60)


@pytest.mark.parametrize(("variance", "epsilon"), [(math.nan, 1e-5), (-1.0, 1e-5), (0.0, 0.0), (1e-320, 0.0)])
def test_normalisations_that_are_none(variance: float, epsilon: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    scale, _ = normalisation(1e300 * one, one, one, variance * one, epsilon)
    assert not bool(torch.isfinite(scale))
