import copy
import pickle

import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.network import (
    Add,
    Concatenate,
    Graph,
    Index,
    Network,
    Node,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Subtract,
    is_affine,
    is_elementwise_activation,
    operation_name,
)

SHAPE = (1, 4, 5)


def chain():
    torch.manual_seed(0)
    return Network.sequential(
        SHAPE, [nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)]
    )


def diamond():
    torch.manual_seed(0)
    return Network(
        SHAPE,
        [
            Node("flat", nn.Flatten(), ("input",), (20,)),
            Node("left", nn.Linear(20, 4), ("flat",), (4,)),
            Node("right", nn.Tanh(), ("left",), (4,)),
            Node("sum", Add(), ("left", "right", "left"), (4,)),
            Node("both", Concatenate(0), ("sum", "left"), (8,)),
            Node("out", nn.Linear(8, 3), ("both",), (3,)),
        ],
    )


def test_chain_computes_its_layers_in_turn():
    network = chain()
    images = torch.randn(3, *SHAPE)
    value = images
    for node in network.nodes:
        value = node.operation(value)
        assert tuple(value.shape[1:]) == node.shape
    assert torch.equal(network(images), value)
    assert network.is_sequential
    assert not network.is_affine
    assert network.num_classes == 3
    assert network.grid == Grid(4, 5, 1)
    assert [node.name for node in network.activations] == ["1_ReLU", "2_MaxPool2d"]
    assert network.affine_of_input() == {"input", "0_Conv2d"}


def test_diamond():
    network = diamond()
    images = torch.randn(3, *SHAPE)
    values = network.values(images)
    left = values["left"]
    expected = network.node("out").operation(torch.cat([2 * left + left.tanh(), left], 1))
    torch.testing.assert_close(network(images), expected)
    assert not network.is_sequential
    assert [node.name for node in network.consumers("left")] == ["right", "sum", "both"]
    assert network.affine_of_input() == {"input", "flat", "left"}
    assert network.before("sum").output_shape == (4,)
    rest = network.after("left")
    torch.testing.assert_close(rest(left), network(images))
    with pytest.raises(InvalidInputError, match="value 'right': expected one that the output depends on alone"):
        network.after("right")


def test_affine_network():
    network = Network.sequential(SHAPE, [ScaleShift(2.0, 1.0), nn.Flatten(), nn.Linear(20, 3)])
    assert network.is_affine
    assert network.activations == []


def test_traced_network_serves_every_batch_size():
    for network in (chain(), diamond()):
        traced = torch.jit.trace(network, torch.randn(1, *SHAPE))
        images = torch.randn(3, *SHAPE)
        torch.testing.assert_close(traced(images), network(images))


def test_precision_gradients_and_mode():
    network = chain()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    network.requires_grad_(True)(torch.randn(2, *SHAPE)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not network.train().training
    assert network.double().dtype == torch.float64
    assert network(torch.randn(2, *SHAPE, dtype=torch.float64)).dtype == torch.float64
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        twin.float()
        assert (twin.nodes[0].operation.weight.dtype, network.dtype) == (torch.float32, torch.float64)


def test_sequential_leaves_the_modules_alone():
    linear = nn.Linear(20, 3)
    network = Network.sequential(SHAPE, [nn.Flatten(), linear])
    assert linear.weight.requires_grad
    network.double()
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("operation", "shapes", "function"),
    [
        (ScaleShift(torch.tensor([2.0, 3.0]), 1.0), [(3, 2)], lambda x: x * torch.tensor([2.0, 3.0]) + 1),
        (ScaleShift(torch.ones(3, 1, 1), 0.0), [(1, 2, 2)], lambda x: x.expand(-1, 3, -1, -1)),
        (ScaleShift(1.0, torch.tensor([[1.0], [2.0]])), [(2, 2)], lambda x: x + torch.tensor([[1.0], [2.0]])),
        (ScaleShift(-2.0), [(3,)], lambda x: -2 * x),
        (Reshape((3, 2)), [(2, 3)], lambda x: x.view(-1, 3, 2)),
        (Permute((2, 0, 1)), [(2, 3, 4)], lambda x: x.permute(0, 3, 1, 2)),
        (Index(1, 2), [(2, 3)], lambda x: x[:, :, 2]),
        (Index(1, -1), [(2, 3)], lambda x: x[:, :, 2]),
        (Index(0, slice(1, 5, 2)), [(6, 3)], lambda x: x[:, 1:5:2]),
        (Index(0, [2, 0, -1]), [(3, 2)], lambda x: x[:, [2, 0, 2]]),
        (Pad((1, 2, 3, 0)), [(2, 3)], lambda x: nn.functional.pad(x, (1, 2, 3, 0))),
        (Add(), [(2,), (2,), (2,)], lambda x, y, z: x + y + z),
        (Subtract(), [(2, 1), (2, 3)], lambda x, y: x - y),
        (Concatenate(1), [(2, 1), (2, 3)], lambda x, y: torch.cat([x, y], 2)),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_operations(operation, shapes, function):
    values = [torch.randn(3, *shape) for shape in shapes]
    torch.testing.assert_close(operation(*values), function(*values), rtol=0, atol=0)
    assert is_affine(operation)
    assert not is_elementwise_activation(operation)


def test_predicates():
    assert is_elementwise_activation(nn.Tanh())
    assert not is_affine(nn.Tanh())
    assert not is_affine(nn.MaxPool2d(2))
    assert not is_elementwise_activation(nn.MaxPool2d(2))
    assert operation_name(nn.Conv2d(1, 1, 1)) == "Conv2d"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.RReLU(), r"operation RReLU is not supported: expected one of Add, AvgPool2d"),
        (nn.Conv2d(1, 1, 3, padding_mode="circular"), "Conv2d with padding_mode='circular'"),
        (nn.Conv2d(1, 1, 3, padding="same"), "Conv2d with padding given as a word"),
        (nn.MaxPool2d(2, ceil_mode=True), "MaxPool2d with ceil_mode=True"),
        (nn.MaxPool2d(2, return_indices=True), "MaxPool2d with return_indices=True"),
        (nn.AvgPool2d(2, divisor_override=1), "AvgPool2d with divisor_override=1"),
        (nn.Flatten(2), "Flatten with start_dim=2"),
        (nn.Sequential(nn.ReLU()), "operation Sequential is not supported"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_operations_outside_the_canonical_set_are_refused(module, message):
    with pytest.raises(UnsupportedOperationError, match=message):
        Network.sequential(SHAPE, [module, nn.Flatten(), nn.Linear(20, 3)])


def test_hooks_are_refused():
    linear = nn.Linear(20, 3)
    linear.register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(UnsupportedOperationError, match="Linear with hooks"):
        Network.sequential(SHAPE, [nn.Flatten(), linear])


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Flatten(), nn.Linear(21, 3)], r"Linear: given samples of shape \(20,\)"),
        ([nn.Flatten(), nn.Conv2d(1, 1, 1)], r"Conv2d: given .*expected \(channels, height, width\)"),
        ([Index(0, 0), nn.AvgPool2d(2)], r"AvgPool2d: given .*expected \(channels, height, width\)"),
        ([Reshape((4, 6))], "Reshape: given .*expected as many entries"),
        ([Permute((0, 1))], "Permute: given .*expected a permutation of 0..2"),
        ([Index(3, 0)], "Index: given .*expected a dimension below 3"),
        ([Index(1, 4)], "Index: given .*out of range"),
        ([nn.Flatten(), ScaleShift(torch.rand(2, 20))], "ScaleShift: given .*expected a rank of at least 2"),
        ([nn.Flatten(), ScaleShift(torch.rand(3))], "ScaleShift: given"),
        ([nn.Flatten(), Pad((0, 0, 0, 0))], "Pad: given .*expected a rank of at least 2"),
        ([Add()], "Add: given .*expected at least 2 inputs"),
        (
            [nn.MaxPool2d(3), nn.Flatten(), Index(0, slice(4, 5))],
            "Index: given .*expected a non-empty result",
        ),
        ([nn.ReLU()], r"network output of shape \(batch, 1, 4, 5\): expected logits of shape \(batch, classes >= 2\)"),
    ],
)
def test_shapes_are_checked(modules, message):
    with pytest.raises(InvalidInputError, match=message):
        Network.sequential(SHAPE, modules)


def flat(name="flat", inputs=("input",), shape=(20,)):
    return Node(name, nn.Flatten(), inputs, shape)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([flat("input")], "node 'input': given a name that is already taken"),
        ([flat(), flat()], "node 'flat': given a name that is already taken"),
        (
            [flat(inputs=("later",))],
            r"node 'flat': given inputs \['later'\], expected names of earlier nodes",
        ),
        ([flat(shape=(5, 4))], r"node 'flat': given shape \(5, 4\), expected \(20,\)"),
        ([flat(), flat("other")], r"given values \['flat'\] that nothing reads"),
        (
            [flat(), Node("sum", Add(), ("input", "flat"), (20,))],
            "node 'sum': Add: .*expected inputs of one rank",
        ),
        (
            [flat(), Node("less", Subtract(), ("flat",), (20,))],
            "node 'less': Subtract: given .*expected exactly 2 inputs",
        ),
    ],
)
def test_structure_is_checked(nodes, message):
    with pytest.raises(InvalidInputError, match=message):
        Network(SHAPE, nodes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_must_be_finite(bad):
    linear = nn.Linear(20, 3)
    linear.bias.data[1] = bad
    with pytest.raises(InvalidInputError, match=r"node '1_Linear' \(Linear\): given a bias with NaN or infinite"):
        Network.sequential(SHAPE, [nn.Flatten(), linear])
    with pytest.raises(InvalidInputError, match=r"\(ScaleShift\): given a scale with NaN"):
        Network.sequential(SHAPE, [nn.Flatten(), ScaleShift(torch.tensor(bad))])


def test_weights_must_have_one_precision():
    with pytest.raises(InvalidInputError, match=r"torch.float32.*torch.float64.*expected all float32"):
        Network.sequential(SHAPE, [ScaleShift(torch.tensor(2.0).double()), nn.Flatten(), nn.Linear(20, 3)])
    with pytest.raises(InvalidInputError, match="torch.float16"):
        Network.sequential(SHAPE, [nn.Flatten(), nn.Linear(20, 3).half()])


def test_input_is_checked():
    network = chain()
    with pytest.raises(InvalidInputError, match=r"input of shape \(2, 1, 5, 4\): expected \(batch, 1, 4, 5\)"):
        network(torch.zeros(2, 1, 5, 4))
    with pytest.raises(InvalidInputError, match=r"input of shape \(1, 4, 5\): expected"):
        network(torch.zeros(1, 4, 5))
    with pytest.raises(InvalidInputError, match="torch.float64: expected torch.float32"):
        network(torch.zeros(2, *SHAPE, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"input shape \(4, 5\): expected \(channels"):
        Network.sequential((4, 5), [nn.Flatten(), nn.Linear(20, 3)])
    with pytest.raises(InvalidInputError, match=r"input shape: given \(0,\), expected positive sizes"):
        Graph((0,), [])
    with pytest.raises(InvalidInputError, match="node 'none': expected one of"):
        network.node("none")


def test_batch_is_only_a_batch(monkeypatch):
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, value: value.tanh() - value.tanh().mean(0))
    with pytest.raises(InvalidInputError, match="node '1_Tanh': the value of a sample depends on the rest"):
        Network.sequential(SHAPE, [nn.Flatten(), nn.Tanh()])


def test_constants_must_broadcast():
    with pytest.raises(InvalidInputError, match=r"ScaleShift: given scale \(2,\) and shift \(3,\)"):
        ScaleShift(torch.rand(2), torch.rand(3))
    with pytest.raises(InvalidInputError, match="Index: given step -1, expected a positive step"):
        Index(0, slice(None, None, -1))
    with pytest.raises(UnsupportedOperationError, match="Pad: given amounts"):
        Pad((-1, 0, 0, 0))
