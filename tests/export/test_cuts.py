"""The question over the first layer's values: no image is left out of it, and cuts cut off nothing but other points."""

import numpy as np
import pytest
import torch
from torch import nn

from flowverify.ball import Threat
from flowverify.bounds.margins import MarginBounds
from flowverify.export.cuts import ReducedQuestion, write_program
from flowverify.export.encodings import take_apart
from flowverify.network import Add, Graph, Network, Node
from tests.contracts import samples
from tests.export.exact import small_image, small_network

BUDGET = 0.4


def deep():
    torch.manual_seed(3)
    modules = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2), nn.LeakyReLU(0.1), nn.Flatten()]
    return Network.sequential((1, 4, 4), [*modules, nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)])


def question(network, image, positivity=True, budget=BUDGET):
    label = int(network(image[None].double()).argmax())
    ball = Threat(positive=positivity).ball(image.double(), budget)
    return ReducedQuestion(take_apart(network), ball, label), label


def variables(graph, values):
    """All variables of a program at input values (B, inputs), by running the graph."""
    found, named = [values], {"input": values.reshape(-1, *graph.input_shape)}
    for node in graph.nodes:
        named[node.name] = node.operation(*(named[name] for name in node.inputs))
        if not isinstance(node.operation, nn.Flatten) and "Reshape" not in type(node.operation).__name__:
            found.append(named[node.name].flatten(1))
    return torch.cat(found, 1).detach().numpy()


@pytest.mark.parametrize("positivity", [True, False])
@pytest.mark.parametrize("make", [lambda: small_network(5, "linear"), lambda: small_network(4, "convolution"), deep])
def test_every_image_of_the_ball_is_in_the_program(make, positivity):
    network, image = make().double(), small_image(2)
    asked, _ = question(network, image, positivity)
    points = samples(image[None], torch.tensor([BUDGET], dtype=torch.float64), 300)[0]
    first = points.flatten(1) @ asked.weight.T + asked.bias
    values = variables(asked.graph, first)
    tight = 0
    for target in range(2):
        program = asked.program(target)
        inside = np.delete(np.arange(values.shape[1]), program.outputs)
        assert (values[:, inside] >= program.lower[inside]).all() and (values[:, inside] <= program.upper[inside]).all()
        np.testing.assert_allclose(program.equations @ values.T, np.tile(program.right[:, None], 300), atol=1e-9)
        slack = program.limits[:, None] - program.inequalities @ values.T
        assert (slack >= 0).all()
        tight += int((slack.min(1) < 1e-3).sum())
        np.testing.assert_allclose(values[:, program.relus[:, 1]], values[:, program.relus[:, 0]].clip(0), atol=1e-12)
        assert (values[:, program.outputs[target]] >= float(asked.margins[target]) - 1e-9).all()
    assert tight  # a sample reaches some of the cuts


@pytest.mark.parametrize("positivity", [True, False])
def test_hidden_neurons_share_the_budget(positivity):
    """Their intervals are within lifted ones, and narrower than without these."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)]
    network, image = Network.sequential((1, 4, 4), layers).double(), small_image(2)
    asked, _ = question(network, image, positivity)
    (name,) = set(asked._intervals) - {"input"}
    low, high = asked._intervals[name]
    lifted = MarginBounds(network, asked.ball.threat, "lifted", dtype=torch.float64).neurons(asked.ball)[-1]
    assert (low >= lifted[0] - 1e-9).all() and (high <= lifted[1] + 1e-9).all()
    asked._bound_values({})
    before = asked._intervals[name]
    assert float((high - low).sum()) < 0.99 * float((before[1] - before[0]).sum())


def test_the_program_of_a_branching_graph_holds_for_its_values():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    nodes = [
        Node("a", nn.ReLU(), ("input",), (6,)),
        Node("b", Add(), ("a", "input"), (6,)),
        Node("c", layer, ("b",), (4,)),
    ]
    graph = Graph((6,), nodes)
    low, high = torch.full((1, 6), -1.0, dtype=torch.float64), torch.full((1, 6), 0.7, dtype=torch.float64)
    points = low + (high - low) * torch.rand(2000, 6, dtype=torch.float64)
    program = write_program(graph, {"input": (low, high)})
    residual = program.equations @ variables(graph, points).T - program.right[:, None]
    np.testing.assert_allclose(residual, 0, atol=1e-12)


@pytest.mark.parametrize("positivity", [True, False])
def test_a_cut_excludes_the_point_and_no_image(positivity):
    network, image = small_network(5, "linear").double(), small_image(2)
    asked, _ = question(network, image, positivity)
    points = (
        samples(image[None], torch.tensor([BUDGET], dtype=torch.float64), 300)[0].flatten(1) @ asked.weight.T
        + asked.bias
    )
    wanted = asked.middle + 3 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    before = len(asked.cuts[0][0])
    found = asked.refine(0, wanted.numpy())
    directions, reach = (part[before:] for part in asked.cuts[0])
    assert found.cut and len(directions)
    assert (directions @ wanted > reach).all()
    assert (points @ directions.T <= reach + 1e-9).all()
    assert len(asked.cuts[1][0]) == before
    assert (found.images >= 0).all()
    np.testing.assert_allclose(found.images.sum((-1, -2, -3)), float(image.double().sum()), rtol=1e-9)


def test_the_value_of_an_image_gives_no_cut_and_that_image():
    network, image = small_network(5, "linear").double(), small_image(2)
    asked, _ = question(network, image)
    point = samples(image[None], torch.tensor([BUDGET], dtype=torch.float64), 3)[0, 0]
    value = asked.weight @ point.flatten() + asked.bias
    found = asked.refine(0, value.numpy())
    assert not found.cut
    torch.testing.assert_close(asked.weight @ found.images[1].flatten() + asked.bias, value, rtol=0, atol=0.05)


def test_an_affine_network_is_decided_by_its_bound():
    torch.manual_seed(1)
    network = Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 3)]).double()
    image = small_image(2)
    asked, label = question(network, image, budget=0.0)
    logits = network(image[None].double())[0]
    expected = logits[label] - logits[[t for t in range(3) if t != label]]
    torch.testing.assert_close(asked.margins, expected.detach(), rtol=1e-9, atol=1e-9)
