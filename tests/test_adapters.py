"""Attacks and certification as foolbox's, ART's and VERONA's own."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.adapters import art_attack, foolbox_attack, verona_module
from flowverify.attack import MinimalRadius
from flowverify.errors import DependencyError, InvalidInputError, UnknownNameError
from flowverify.network import write_onnx


def digits(count):
    data = fv.load_dataset("digits")[:count]
    return fv.load_model("digits-fc3"), data.images, data.labels


def test_foolbox():
    foolbox = pytest.importorskip("foolbox", reason="an optional extra")
    network, images, labels = digits(5)
    expected = MinimalRadius(network).minimise(images, labels, "l1", 1.0).radius
    attack = foolbox_attack(MinimalRadius(network), "l1", 1.0)
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    raw, clipped, success = attack(model, images, labels, epsilons=[None, 1e-3, 2.0])
    assert success.tolist() == [[True] * 5, [False] * 5, [True] * 5]
    torch.testing.assert_close(attack.distance(images, raw[0]), expected.float(), rtol=1e-4, atol=0)
    assert bool((attack.distance(images, clipped[1]) <= 1e-3 * (1 + 1e-3)).all())


def test_art():
    estimators = pytest.importorskip("art.estimators.classification", reason="an optional extra")
    network, images, labels = digits(5)
    options = {"model": network, "loss": nn.CrossEntropyLoss(), "input_shape": (1, 8, 8), "nb_classes": 10}
    classifier = estimators.PyTorchClassifier(**options)
    for y in (labels.numpy(), nn.functional.one_hot(labels, 10).numpy(), None):
        found = art_attack(classifier, "minimal", "l2").generate(images.numpy(), y)
        assert found.dtype == images.numpy().dtype
        assert (classifier.predict(found).argmax(1) != labels.numpy()).all()
    other = estimators.PyTorchClassifier(preprocessing=(0.5, 0.5), **options)
    with pytest.raises(InvalidInputError, match="not those of its torch module"):
        art_attack(other).generate(images.numpy())
    with pytest.raises(InvalidInputError, match="expected art's PyTorchClassifier"):
        art_attack(network)


@pytest.mark.parametrize(
    ("package", "make"),
    [("foolbox", foolbox_attack), ("art", art_attack), ("ada_verona", lambda _: verona_module())],
)
def test_what_to_install(package, make, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    network, _, _ = digits(1)
    with pytest.raises(DependencyError, match="pip install"):
        make(MinimalRadius(network))


# The names and fields of ada-verona 1.0.3.
VERONA = {
    "__init__": "",
    "database/__init__": "",
    "database/verification_result": """
        from dataclasses import dataclass

        @dataclass
        class CompleteVerificationData:
            result: str
            took: float
            counter_example: str | None = None
            obtained_labels: list[str] = None
            err: str = ""
            stdout: str = ""
        """,
    "database/verification_context": """
        class VerificationContext:
            def __init__(self, network, data_point, tmp_path, property_generator, save_epsilon_results=True):
                self.network, self.data_point, self.tmp_path = network, data_point, tmp_path
                self.property_generator, self.save_epsilon_results = property_generator, save_epsilon_results
        """,
    "database/data_point": """
        from dataclasses import dataclass
        import torch

        @dataclass
        class DataPoint:
            id: str
            label: int
            data: torch.Tensor
        """,
    "database/networks": """
        import torch

        class ONNXNetwork:
            def __init__(self, path):
                self._path = path

            @property
            def path(self):
                return self._path

            def load_pytorch_model(self):
                raise AssertionError("onnx2torch may convert it otherwise")

        class TorchModelWrapper(torch.nn.Module):
            def __init__(self, torch_model, input_shape):
                super().__init__()
                self.torch_model, self.input_shape = torch_model, input_shape

            def forward(self, x):
                return self.torch_model(x.reshape(*self.input_shape))

        class PyTorchNetwork:
            def __init__(self, model, path):
                self.model, self.path, self.loaded = model, path, 0

            def load_pytorch_model(self):
                self.loaded += 1
                return TorchModelWrapper(self.model, [-1, 1, 8, 8])
        """,
    "verification_module/__init__": "",
    "verification_module/verification_module": """
        from abc import ABC, abstractmethod

        class VerificationModule(ABC):
            @abstractmethod
            def verify(self, verification_context, epsilon):
                raise NotImplementedError
        """,
    "verification_module/property_generator": """
        class One2AnyPropertyGenerator:
            def __init__(self, number_classes=10, data_lb=0, data_ub=1):
                self.number_classes, self.data_lb, self.data_ub = number_classes, data_lb, data_ub

        class One2OnePropertyGenerator(One2AnyPropertyGenerator):
            def __init__(self, target_class, number_classes=10, data_lb=0, data_ub=1):
                super().__init__(number_classes, data_lb, data_ub)
                self.target_class = target_class
        """,
}


@pytest.fixture
def verona(tmp_path, monkeypatch):
    """The stand-in package, and how an experiment asks about image 0 of digits."""
    for name, text in VERONA.items():
        path = tmp_path / "packages" / "ada_verona" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    for name in [name for name in sys.modules if name.split(".")[0] == "ada_verona"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield lambda *arguments, **named: _ask(tmp_path, *arguments, **named)
    for name in [name for name in sys.modules if name.split(".")[0] == "ada_verona"]:
        del sys.modules[name]


def _ask(folder, verifier, epsilon, data=None, label=None, target=None, network=None):
    from ada_verona.database.data_point import DataPoint
    from ada_verona.database.networks import ONNXNetwork
    from ada_verona.database.verification_context import VerificationContext
    from ada_verona.verification_module import property_generator

    model, images, labels = digits(1)
    if network is None:
        write_onnx(model, folder / "net.onnx")
        network = ONNXNetwork(folder / "net.onnx")
    wrong = property_generator.One2AnyPropertyGenerator()
    if target is not None:
        wrong = property_generator.One2OnePropertyGenerator(target)
    point = DataPoint("0", int(labels[0]) if label is None else label, images[0] if data is None else data)
    return verifier.verify(VerificationContext(network, point, folder, wrong), epsilon)


class TestVerona:
    def test_epsilon_is_the_radius(self, verona):
        network, images, labels = digits(1)
        exact = fv.make_certifier(network, "complete").search(images, labels)[0]
        verifier = verona_module("complete", timeout=600)
        below, above = verona(verifier, 0.99 * exact.radius), verona(verifier, 1.02 * exact.upper_radius)
        assert (below.result, below.counter_example, below.obtained_labels, below.err) == ("UNSAT", None, None, "")
        assert above.result == "SAT" and above.took > 0
        assert isinstance(above.obtained_labels, np.ndarray)  # what every version of VERONA writes to its table
        (answered,) = above.obtained_labels.tolist()
        lines = above.counter_example.splitlines()
        pixels = torch.tensor([float(line.strip("()").split()[1]) for line in lines if "X_" in line])
        outputs = [float(line.strip("()").split()[1]) for line in lines if "Y_" in line]
        assert lines[0] == "sat" and len(lines) == 1 + 64 + 10
        assert int(network(pixels.reshape(1, 1, 8, 8)).argmax()) == answered == outputs.index(max(outputs)) != labels[0]

    def test_what_is_neither_is_a_timeout(self, verona):
        found = verona(verona_module("fine-tuned"), 1.0)
        assert (found.result, found.obtained_labels) == ("TIMEOUT", None)

    def test_misclassified_is_sat_at_any_epsilon(self, verona):
        label = int(digits(1)[2][0])
        found = verona(verona_module("fine-tuned"), 0.0, label=(label + 1) % 10)
        assert found.result == "SAT" and found.obtained_labels.tolist() == [label]

    def test_one_target(self, verona):
        network, images, labels = digits(1)
        target = int(network(images)[0].argmin())
        every = fv.certified_radius(network, images, labels)
        one = fv.make_certifier(network, target=target).search(images, labels)[0].radius
        assert one > 1.05 * every
        assert verona(verona_module("fine-tuned"), 0.99 * one).result == "TIMEOUT"
        assert verona(verona_module("fine-tuned"), 0.99 * one, target=target).result == "UNSAT"

    def test_networks_of_torch_are_taken_as_they_are_and_once(self, verona, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        verifier = verona_module("linear")
        images = digits(1)[1]
        label = int(module(images).argmax())
        from ada_verona.database.networks import PyTorchNetwork

        network = PyTorchNetwork(module, tmp_path / "weights.pt")
        radius = float(fv.certified_radius(module, images, [label], "linear"))
        for factor, expected in ((0.99, "UNSAT"), (1.01, "TIMEOUT")):
            for data in (images[0], images, images[0, 0]):
                found = verona(verifier, factor * radius, data=data, label=label, network=network)
                assert found.result in (expected, "SAT")[: 1 + (factor > 1)]
        assert network.loaded == 1

    def test_shapes_ground_costs_and_caps(self, verona):
        flat = digits(1)[1].flatten()
        verifier = verona_module("fine-tuned", "l2", 1.0, (1, 8, 8))
        assert verifier.name == "flowverify (fine-tuned, W1, l2, cap 1)"
        assert verona(verifier, 0.01, data=flat).result == "UNSAT"

    def test_errors_are_an_outcome_with_the_reason(self, verona, tmp_path):
        found = verona(verona_module("fine-tuned"), 0.1, data=-torch.ones(1, 8, 8))
        assert found.result == "ERR" and "value -1.0 at (0, 0, 0, 0), expected finite and >= 0" in found.err
        found = verona(verona_module("fine-tuned"), 0.1, data=torch.ones(64))
        assert found.result == "ERR" and "input shape" in found.err
        found = verona(verona_module("fine-tuned", input_shape=(1, 9, 9)), 0.1)
        assert found.result == "ERR" and "data point of shape (1, 8, 8): expected one image (1, 9, 9)" in found.err
        found = verona(verona_module("fine-tuned"), -1.0)
        assert found.result == "ERR" and "radius" in found.err

    def test_what_cannot_be(self, verona):
        with pytest.raises(UnknownNameError, match="unknown method 'luck'"):
            verona_module("luck")
        with pytest.raises(UnknownNameError, match="unknown ground cost 'l7'"):
            verona_module(ground="l7")
