"""Images, labels and logits that nothing takes, whoever is asked."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import flowverify as fv
from flowverify.api import make_certifier
from flowverify.attack import ATTACKS, make_attack
from flowverify.conventions import check_channels_first, check_labels
from flowverify.errors import DataError, InvalidInputError
from flowverify.export.folder import Source, write_folder
from flowverify.export.plan import Request
from flowverify.network import Network, from_torch, read_onnx
from flowverify.registry import METHODS
from flowverify.smoothing import Noise, SmoothedClassifier, SplitClassifier, Splitting
from flowverify.smoothing.attack import attack_smoothed
from flowverify.training.loop import train
from flowverify.training.recipe import Recipe

CERTIFIERS = ("vanilla", "fine-tuned", "linear", "linear-lp", "complete", "vanilla-complete", "milp")


def classifier(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def smoothed(kind, network):
    if kind == "splitting":
        return SplitClassifier(network, Splitting(0.1, 2)).certify
    whole = SmoothedClassifier(network, Noise(0.1))
    if kind == "attack":
        return lambda images, labels: attack_smoothed(whole, images, labels, n=10)
    return getattr(whole, kind)


def export(network, images, labels, folder):
    canonical = from_torch(network, images.shape[1:])
    source, request = Source("model", "data", "test", (0,)), Request("linear", (0.1,))
    return write_folder(folder / "out", canonical, images, labels, request, source)


def everybody(network, folder):
    """What takes a network, images and labels, by name; call it with images and labels."""
    ball = fv.WassersteinBall(0.1)
    takers = {name: lambda x, y, n=name: fv.certify_batch(network, x, y, ball, n) for name in CERTIFIERS}
    takers |= {
        f"radius, {name}": lambda x, y, n=name: fv.certified_radius(network, x, y, n) for name in CERTIFIERS[::4]
    }
    takers["one image"] = lambda x, y: fv.certify(network, x, y if isinstance(y, bool) else y[0], ball)
    takers["search of one image"] = lambda x, y: make_certifier(network, "complete", input_shape=x.shape[1:]).start(
        x[0], y if isinstance(y, bool) else y[0]
    )
    takers |= {f"attack, {name}": lambda x, y, n=name: make_attack(n, network).run(x, y, ball) for name in ATTACKS}
    takers |= {
        f"smoothing, {kind}": lambda x, y, k=kind: smoothed(k, network)(x, y)
        for kind in ("predict", "certify", "splitting", "attack")
    }
    takers["export"] = lambda x, y: export(network, x, y, folder)
    return takers


NAMES = sorted(everybody(None, None))
IMAGE = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_methods_are_all_here():
    assert set(METHODS) == set(CERTIFIERS)


@pytest.mark.parametrize("name", NAMES)
class TestEverybody:
    @pytest.mark.parametrize("labels", [torch.tensor([True]), np.array([False]), [True], True])
    def test_refuses_booleans_as_labels(self, name, labels, tmp_path):
        with pytest.raises(InvalidInputError, match="labels of type torch.bool and length 1: expected 1 integers"):
            everybody(classifier(), tmp_path)[name](IMAGE, labels)

    def test_one_logit_is_two_classes_or_refused(self, name, tmp_path):
        """Those that read a network take its sign; those that ask the module itself know no second class."""
        asked = everybody(classifier(1), tmp_path)[name]
        if name.startswith(("attack", "smoothing")):
            with pytest.raises(InvalidInputError, match="expected logits of shape .*classes >= 2"):
                asked(IMAGE, torch.tensor([0]))
        else:
            asked(IMAGE, torch.tensor([0]))


@pytest.mark.parametrize("method", CERTIFIERS)
def test_the_sign_of_one_logit_decides(method):
    """The logit is -0.1, and positive as soon as a tenth of the mass has moved down by a row."""
    network = classifier(1)
    network[1].weight.data = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, -1).clone()
    network[1].bias.data.fill_(-1.1)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 1] = 1.0
    radius = float(fv.certified_radius(network, image, torch.tensor([0]), method)[0])
    assert 0.098 <= radius <= 0.1 + 1e-6
    assert str(fv.certify(network, image[0], 0, fv.WassersteinBall(0.11), method).verdict) != "certified"


class TestTraining:
    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (np.array([True, False]), DataError, "labels of type torch.bool and length 2: expected 2 integers"),
            (np.array([0, 0]), InvalidInputError, "expected logits of shape .*classes >= 2"),
        ],
    )
    def test_refuses(self, labels, error, message, tmp_path):
        np.savez(tmp_path / "own.npz", images=np.ones((2, 1, 4, 4), np.float32), labels=labels)
        recipe = Recipe("own", str(tmp_path / "own.npz"), "mlp", 1, hidden=(4,))
        with pytest.raises(error, match=message):
            train(recipe)


class TestLabels:
    @pytest.mark.parametrize("given", [[2, 0], (2, 0), np.uint16([2, 0]), torch.tensor([2, 0], dtype=torch.int8)])
    def test_integers_of_every_kind(self, given):
        labels = check_labels(given, 2, 3)
        assert labels.dtype == torch.int64 and labels.tolist() == [2, 0]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([1, True], "labels of type torch.bool and length 2"),
            ([np.bool_(False), 1], "labels of type torch.bool and length 2"),
            (np.bool_(True), "labels of type torch.bool and length 1"),
            (["a", "b"], "labels: .*expected 2 integers"),
            (None, "labels: .*expected 2 integers"),
            ([0.0, 1.0], "labels of type torch.float32 and length 2"),
            ([1j, 0], "labels of type torch.complex64 and length 2"),
            ([1], "length 1: expected 2 integers"),
            ([0, 3], r"label 3 \(image 1\): expected a class of the model, 0 to 2"),
            ([-1, 0], r"label -1 \(image 0\): expected a class of the model, 0 to 2"),
        ],
    )
    def test_everything_else_is_refused(self, given, message):
        with pytest.raises(InvalidInputError, match=message):
            check_labels(given, 2, 3)


def test_a_network_has_two_outputs():
    with pytest.raises(InvalidInputError, match=r"output of shape \(batch, 1\): expected logits .*classes >= 2"):
        Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 1)])


LAST = [(8, 8, 3), (28, 28, 1), (5, 4, 4), (64, 48, 3)]
FIRST = [(3, 8, 8), (1, 4, 3), (3, 3, 3), (2, 6, 1), (4, 3, 3)]
DOUBTFUL = [(5, 6, 7), (8, 8, 2)]


def onnx_file(folder, sizes, before=(), perm=None, batch="N"):
    """An affine file for input [batch, *sizes]: elementwise operators, perhaps a Transpose, then Flatten and Gemm."""
    nodes, name = [], "x"
    for operator in before:
        nodes.append(helper.make_node(operator, [name, "two"] if operator == "Mul" else [name], [f"{name}y"]))
        name += "y"
    if perm is not None:
        nodes.append(helper.make_node("Transpose", [name], ["turned"], perm=perm))
        name = "turned"
    pixels = int(np.prod([size for size in sizes if isinstance(size, int)])) if all(sizes) else 1
    weight = np.arange(2 * pixels, dtype=np.float32).reshape(2, pixels)
    nodes += [
        helper.make_node("Flatten", [name], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], ["out"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *sizes])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 2])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(2, np.float32), "b"),
            numpy_helper.from_array(np.array(2, np.float32), "two"),
        ],
    )
    path = folder / "file.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


class TestChannels:
    @pytest.mark.parametrize("sizes", LAST)
    def test_shapes_that_look_like_channels_last(self, sizes, tmp_path):
        with pytest.raises(InvalidInputError, match=r"\(N, H, W, C\), channels last; expected channels first"):
            check_channels_first(sizes, "images")
        np.savez(tmp_path / "last.npz", images=np.ones((2, *sizes), np.uint8), labels=[0, 1])
        first = (sizes[2], *sizes[:2])
        data = fv.load_dataset(tmp_path / "last.npz")
        assert data.input_shape == first
        with pytest.raises(DataError, match=r"images of shape .*expected channels first, \(N, C, H, W\)"):
            fv.Dataset(data.images.permute(0, 2, 3, 1), data.labels, "last", "test")
        path = onnx_file(tmp_path, sizes)
        assert read_onnx(path).input_shape == first
        assert read_onnx(path, sizes).input_shape == sizes  # whoever says so means so many channels

    def test_levels_keep_their_places(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (2, 8, 7, 3), np.uint8)
        np.savez(tmp_path / "last.npz", images=images, labels=[0, 1])
        found = fv.load_dataset(tmp_path / "last.npz").images
        torch.testing.assert_close(found[1, 2, 5, 4] * 255, torch.tensor(float(images[1, 5, 4, 2])))

    @pytest.mark.parametrize("sizes", FIRST)
    def test_shapes_beyond_doubt_are_read(self, sizes, tmp_path):
        check_channels_first(sizes, "images")
        np.savez(tmp_path / "first.npz", images=np.ones((2, *sizes), np.uint8), labels=[0, 1])
        assert fv.load_dataset(tmp_path / "first.npz").input_shape == sizes
        assert read_onnx(onnx_file(tmp_path, sizes)).input_shape == sizes

    @pytest.mark.parametrize("sizes", DOUBTFUL)
    def test_nothing_is_guessed(self, sizes, tmp_path):
        path = onnx_file(tmp_path, sizes)
        with pytest.raises(InvalidInputError, match="channels first or last. expected layout nchw or nhwc"):
            read_onnx(path)
        assert read_onnx(path, sizes).input_shape == sizes

    @pytest.mark.parametrize("before", [(), ("Identity",), ("Mul", "Identity")])
    @pytest.mark.parametrize("sizes", [(8, 8, 3), (3, 3, 3), (6, 5, 2)])
    def test_a_file_that_turns_its_images_has_channels_last(self, before, sizes, tmp_path):
        path = onnx_file(tmp_path, sizes, before, perm=[0, 3, 1, 2])
        first = (sizes[2], *sizes[:2])
        for given in (None, first):
            assert read_onnx(path, given).input_shape == first
        if first != sizes:
            with pytest.raises(InvalidInputError, match="expected one that fits input 'x'"):
                read_onnx(path, sizes)

    def test_other_transposes_are_no_evidence(self, tmp_path):
        assert read_onnx(onnx_file(tmp_path, (3, 4, 5), perm=[0, 2, 3, 1])).input_shape == (3, 4, 5)
