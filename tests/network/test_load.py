import pytest
import torch
from torch import nn

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.network import load_network, write_onnx
from flowverify.network.reading import Reading

SHAPE = (1, 4, 5)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 3))


def test_every_kind_of_source_gives_the_same_network(tmp_path):
    network = load_network(module(), SHAPE)
    path = tmp_path / "network.onnx"
    write_onnx(network, path)
    images = torch.rand(2, *SHAPE)
    for source in (network, path, str(path)):
        torch.testing.assert_close(load_network(source)(images), module()(images))
    assert load_network(network, SHAPE) is network


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="module Sequential without input_shape"):
        load_network(module())
    with pytest.raises(InvalidInputError, match=r"input shape \(1, 5, 4\): expected \(1, 4, 5\)"):
        load_network(load_network(module(), SHAPE), (1, 5, 4))
    with pytest.raises(InvalidInputError, match="network of type int: expected a path, a module or a Network"):
        load_network(3)
    with pytest.raises(ModelFileError, match="expected an existing ONNX file"):
        load_network(str(tmp_path / "nothing.onnx"))


FACTORY = """
from torch import nn
from beside import SIZE

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 3))

def nothing():
    return 3

def broken():
    raise ValueError("no such model")
"""


class TestFiles:
    SHAPE = (1, 4, 5)

    @pytest.fixture
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval()

    def same(self, module, source, **more) -> None:
        images = torch.rand(3, *self.SHAPE)
        torch.testing.assert_close(load_network(source, self.SHAPE, **more)(images), module(images))

    def test_exported_programs(self, module, tmp_path) -> None:
        path, sample = tmp_path / "m.pt2", torch.zeros(2, *self.SHAPE)
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(module, (sample,), dynamic_shapes=shapes), path)
        self.same(module, path)

    @pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 1, 4, 5))])
    def test_torchscript(self, make, module, tmp_path) -> None:
        torch.jit.save(make(module), tmp_path / "m.pt")
        self.same(module, tmp_path / "m.pt")
        self.same(module, str(tmp_path / "m.pt"))

    def test_factories(self, tmp_path) -> None:
        (tmp_path / "net.py").write_text(FACTORY)
        (tmp_path / "beside.py").write_text("SIZE = 20\n")
        module = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
        source = f"{tmp_path / 'net.py'}:make"
        for state in (module.state_dict(), {"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}):
            torch.save(state, tmp_path / "weights.pt")
            self.same(module, source, reading=Reading(weights=str(tmp_path / "weights.pt")))
        assert load_network(source, self.SHAPE).num_classes == 3

    @pytest.mark.parametrize(
        ("end", "weights", "message"),
        [
            (":nothing", None, "net.py:nothing': returned int, expected a torch.nn.Module"),
            (":broken", None, "net.py:broken': ValueError: no such model"),
            (":missing", None, "net.py:missing': AttributeError: .*missing"),
            (":make", "nowhere.pt", "nowhere.pt': expected an existing file"),
            (":make", "net.py", "cannot be read .*: expected a state dict"),
        ],
    )
    def test_bad_factories(self, end, weights, message, tmp_path) -> None:
        (tmp_path / "net.py").write_text(FACTORY)
        (tmp_path / "beside.py").write_text("SIZE = 20\n")
        reading = Reading(weights=None if weights is None else str(tmp_path / weights))
        with pytest.raises(ModelFileError, match=message):
            load_network(f"{tmp_path / 'net.py'}{end}", self.SHAPE, reading)

    def test_what_a_bare_pt_file_needs(self, module, tmp_path) -> None:
        torch.save(module.state_dict(), tmp_path / "m.pt")
        with pytest.raises(ModelFileError, match=r"m.pt' cannot be read .*weights with PATH.py:FACTORY and weights="):
            load_network(tmp_path / "m.pt", self.SHAPE)
        for name in ("none.pt", "none.pt2"):
            with pytest.raises(ModelFileError, match=f"{name}': expected an existing file"):
                load_network(tmp_path / name, self.SHAPE)
        with pytest.raises(InvalidInputError, match="without input_shape: expected"):
            load_network(tmp_path / "m.pt")
        with pytest.raises(InvalidInputError, match="expected with a factory, PATH.py:FACTORY, alone"):
            load_network(tmp_path / "m.onnx", self.SHAPE, Reading(weights="w.pt"))
