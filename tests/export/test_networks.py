"""Exported networks equal the original; the penalty is sound for any weight and exact for the default one."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.errors import UnsupportedOperationError
from flowverify.export.encodings import decimal, penalty_terms, round_down, round_up
from flowverify.export.plan import Request, plan
from flowverify.network import Add, Concatenate, Graph, Network, Node, ScaleShift, onnx_model, write_onnx
from flowverify.network.lowering import lower
from flowverify.transport.distance import channel_masses
from flowverify.transport.references import flow_by_transport
from tests.contracts import samples
from tests.export.exact import least_margin, small_image, small_network

ALLOWED = {"Gemm", "MatMul", "Add", "Conv", "Relu", "Flatten", "Reshape"}
ENCODINGS = ("linear", "outputs", "penalty", "l1-penalty")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def convolutional():
    return Network.sequential(
        (2, 5, 4),
        [
            ScaleShift(2.0, -0.1), nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2), nn.ReLU(),
            ScaleShift(torch.rand(4, 1, 1), torch.rand(4, 1, 1)), nn.AvgPool2d(2, 1, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(120, 4),
        ],
    )  # fmt: skip


def residual():
    size = (2, 5, 4)
    nodes = [
        Node("first", nn.Conv2d(2, 2, 3, padding=1), ("input",), size),
        Node("relu", nn.ReLU(), ("first",), size),
        Node("second", nn.Conv2d(2, 2, 3, padding=1), ("relu",), size),
        Node("sum", Add(), ("first", "second"), size),
        Node("relu_2", nn.ReLU(), ("sum",), size),
        Node("flat", nn.Flatten(), ("relu_2",), (40,)),
        Node("last", nn.Linear(40, 4), ("flat",), (4,)),
    ]
    return Network(size, nodes)


def branching():
    size = (6,)
    return Graph(
        size,
        [
            Node("a", nn.ReLU(), ("input",), size),
            Node("b", Concatenate(0), ("a", "input"), (12,)),
            Node("c", nn.LeakyReLU(0.1), ("b",), (12,)),
            Node("d", ScaleShift(torch.rand(12), torch.rand(12)), ("c",), (12,)),
            Node("e", Add(), ("b", "d"), (12,)),
        ],
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("make", [lambda: small_network(0, "convolution"), residual], ids=["convolution", "residual"])
def test_a_layer_stands_right_before_every_relu(make, encoding):
    """Where alpha-beta-CROWN looks for it, and stops if it finds a reshape."""
    network = make()
    images = torch.rand(1, *network.input_shape)
    export = next(plan(network, images, network(images).argmax(1), Request(encoding, (0.1,))))
    relus = [node for node in export.network.graph.nodes if isinstance(node.operation, nn.ReLU)]
    assert relus
    for node in relus:
        assert isinstance(export.network.graph.node(node.inputs[0]).operation, nn.Linear | nn.Conv2d | Add)


def flows(inputs, count, reach):
    """Random inputs whose flows are sparse and nonnegative (split) or signed (delta), of norm up to ``reach``."""
    generator = np.random.default_rng(0)
    values = generator.exponential(size=(count, inputs.flows)) * (generator.random((count, inputs.flows)) < 0.2)
    if inputs.form == "delta":
        values *= generator.choice([-1, 1], size=values.shape)
    return values * (reach / np.abs(values).sum(1).clip(1e-9).max())


@pytest.mark.parametrize("reference", ["image", "uniform", "point:1,2"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "make",
    [lambda: small_network(1, "linear"), convolutional, residual],
    ids=["linear", "convolution", "residual"],
)
def test_equals_the_original_in_onnxruntime(make, encoding, reference, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = make()
    images = torch.rand(3, *network.input_shape)
    labels = network(images).argmax(1)
    for export in plan(network, images, labels, Request(encoding, (0.1, 0.2), reference=reference)):
        exported, inputs = export.network, export.network.inputs
        path = tmp_path / "network.onnx"
        write_onnx(exported.graph, path)
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert {node.op_type for node in model.graph.node} <= ALLOWED
        assert model.ir_version == 8 and model.opset_import[0].version == 13
        values = np.tile(export.instances[0].centre, (1000, 1))
        values[:, : inputs.flows] += flows(inputs, 1000, 0.3)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {"input": values.astype(np.float32)})[0]
        pictures = torch.stack([inputs.image(row) for row in values])
        expected = network.double()(pictures).numpy()
        network.float()
        if exported.encoding.penalised:
            label, most = export.instances[0].label, plan_limit(export)
            others = [t for t in range(expected.shape[1]) if t != label]
            penalty = np.array([penalty_terms(inputs, row, most, True) for row in values])
            expected = expected[:, [label]] - expected[:, others] + exported.penalty_weight * penalty[:, None]
            np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)
        else:
            np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
        if encoding == "outputs":
            k = 2 * expected.shape[1]
            np.testing.assert_allclose(found[:, k], values[:, : inputs.flows].sum(1), rtol=1e-5)
            np.testing.assert_allclose(found[:, k + 1 :], pictures.flatten(1).numpy(), atol=1e-5)


def plan_limit(export):
    instance, inputs = export.instances[0], export.network.inputs
    return float(instance.centre[: inputs.flows].sum()) + instance.budget


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("positivity", [True, False])
def test_every_image_of_the_ball_is_in_the_question(encoding, positivity):
    """Soundness: box, constraints and outputs let every image of the ball through, with its own margin or less."""
    network = small_network(2, "linear")
    image = small_image(5)
    label = int(network(image[None]).argmax())
    request = Request(encoding, (0.2,), positivity, "uniform")
    (export,) = plan(network, image[None], torch.tensor([label]), request)
    instance, inputs = export.instances[0], export.network.inputs
    budget = 0.2 * image.double().sum()
    points = samples(image[None], budget[None], 50)[0]
    moves = flow_by_transport(image[None].double().expand(50, -1, -1, -1), points, mass_tolerance=1e-6)
    rounded = Graph(export.network.graph.input_shape, export.network.graph.float().nodes).double()
    for point, move in zip(points, moves, strict=True):
        values = instance.centre.copy()
        parts = [move.clamp(min=0), (-move).clamp(min=0)] if inputs.form == "split" else [move]
        values[: inputs.flows] += torch.cat(parts).numpy()
        prop = instance.property
        assert (values >= prop.lower - 1e-9).all() and (values <= prop.upper + 1e-9).all()
        outputs = rounded(torch.from_numpy(values)[None])[0].numpy()
        for one in prop.constraints:
            assert holds(one, values)
        logits = network.double()(point[None])[0]
        margin = logits[label] - torch.cat([logits[:label], logits[label + 1 :]])
        for case, own in zip(prop.unsafe, margin.tolist(), strict=True):
            first, *inside = case  # never less unsafe than the image is, and inside the constraints
            assert all(holds(one, outputs) for one in inside)
            total = sum(outputs[k] for k in first.plus) - sum(outputs[k] for k in first.minus)
            unsafe_by = first.bound - total if first.relation == "<=" else total - first.bound
            assert unsafe_by >= -own - 1e-9


def holds(one, values, slack=1e-9):
    total = sum(values[k] for k in one.plus) - sum(values[k] for k in one.minus)
    return total <= one.bound + slack if one.relation == "<=" else total >= one.bound - slack


def test_penalty_is_exact_for_the_default_weight_and_sound_for_any():
    """HiGHS: the penalised minimum over the box is the minimum over the ball, or below it for small weights."""
    gaps = []
    for seed in range(4):
        network, image = small_network(seed, "linear"), small_image(seed)
        label = int(network(image[None]).argmax())
        radius = 0.3
        (export,) = plan(network, image[None], torch.tensor([label]), Request("penalty", (radius,)))
        budget = radius * float(image.double().sum())
        for target in export.network.targets:
            exact = least_margin(network, image, label, target, budget)
            weights = (0.0, 0.02 * export.network.penalty_weight, export.network.penalty_weight)
            nothing, small, full = (
                least_margin(network, image, label, target, budget, penalty_weight=weight) for weight in weights
            )
            assert nothing <= small + 1e-6 and small <= full + 1e-6 and full <= exact + 1e-6
            assert full == pytest.approx(exact, abs=1e-5)
            gaps.append(exact - small)
    assert max(gaps) > 1e-3


class TestLowering:
    @pytest.mark.parametrize("make", [convolutional, branching])
    def test_same_function_with_few_operations(self, make):
        graph = make().double()
        lowered = lower(graph).graph
        values = torch.randn(20, *graph.input_shape, dtype=torch.float64)
        torch.testing.assert_close(lowered(values), graph(values), rtol=1e-12, atol=1e-12)
        operations = {node.op_type for node in onnx_model(lowered).graph.node}
        assert operations <= ALLOWED
        for node in lowered.nodes:
            if isinstance(node.operation, nn.Conv2d):
                assert node.operation.groups == 1 and node.operation.dilation == (1, 1)

    @pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.Sigmoid()])
    def test_what_cannot_be_written_is_named(self, layer):
        network = Network.sequential((1, 4, 4), [nn.Conv2d(1, 1, 1), layer, nn.Flatten()])
        with pytest.raises(UnsupportedOperationError, match=type(layer).__name__ + r"\): cannot be exported with Gemm"):
            lower(network)


def test_shared_networks():
    """One network for all images and radii of a reference; for margins one a label."""
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:6]
    labels = network(data.images).argmax(1)
    for encoding, expected in (
        ("linear", 1),
        ("outputs", 1),
        ("penalty", len(set(labels.tolist()))),
        ("l1-penalty", 6),
    ):
        exports = list(plan(network, data.images, labels, Request(encoding, (0.1, 0.2), reference="uniform")))
        assert len(exports) == expected
        assert sum(len(export.instances) for export in exports) == 12
    assert len(set(channel_masses(data.images)[:, 0].tolist())) > 1


def test_rounding_to_float32_never_crosses():
    values = np.array([0.1, -0.1, 1 / 3, 0.0, 1e-9, 16777217.0])
    for rounded, sign in ((round_up(values), 1), (round_down(values), -1)):
        assert (sign * (rounded - values) >= 0).all()
        assert (rounded == rounded.astype(np.float32)).all()
        assert np.abs(rounded - values).max() <= 1.0
    for value in (*values.tolist(), 1e-12, 3.5e15):
        text = decimal(value)
        assert float(text) == value and "e" not in text and "." in text
    with pytest.raises(ValueError, match="finite"):
        decimal(float("nan"))
