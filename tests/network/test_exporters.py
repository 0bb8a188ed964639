"""Files as torch's two exporters write them, read back: the same values as the module."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flowverify as fv
from flowverify.network import read_onnx

SHAPE = (1, 6, 8)


class Rows(nn.Module):
    """A recurrent layer over the rows of the image."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layer(images[:, 0])[0][:, -1])


class Attention(nn.Module):
    """Rows that attend to each other, with the heads apart from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.last = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(images[:, 0])
        query, key, value = (
            part.reshape(-1, 6, 2, 4).permute(0, 2, 1, 3) for part in self.project(rows).chunk(3, dim=2)
        )
        shares = (query @ key.transpose(2, 3) / 2).softmax(3)
        return self.last((shares @ value).permute(0, 2, 1, 3).reshape(-1, 6, 8).mean(1))


class MergedHeads(nn.Module):
    """Attention whose heads torch puts into one dimension with the batch, which is the second one of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0]
        return self.last((rows + self.attend(rows, rows, rows)[0]).mean(1))


class Encoder(nn.Module):
    """A layer of a transformer with the batch as the second dimension all along."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layer(images[:, 0].transpose(0, 1)).mean(0))


class Images(nn.Module):
    """Convolutions down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm, self.last = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        value = nn.functional.silu(self.norm(self.up(nn.functional.gelu(self.down(images)))))
        value = nn.functional.interpolate(nn.functional.hardswish(value), scale_factor=2, mode="bilinear")
        return self.last(nn.functional.max_pool2d(value, 3, 2, 1, ceil_mode=True).mean((2, 3)))


MODULES = {
    "lstm": lambda: Rows(nn.LSTM(8, 5, batch_first=True)),
    "gru": lambda: Rows(nn.GRU(8, 5, batch_first=True)),
    "rnn": lambda: Rows(nn.RNN(8, 5, batch_first=True)),
    "attention": Attention,
    "merged heads": MergedHeads,
    "encoder": Encoder,
    "images": Images,
}


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name in MODULES for opset in (13, 17) if (name, opset) != ("encoder", 13)]
)
def test_the_older_exporter(name: str, opset: int, tmp_path: Path) -> None:
    check(name, tmp_path, opset_version=opset, dynamo=False, dynamic_axes={"x": {0: "n"}})


@pytest.mark.parametrize("name", MODULES)
def test_the_newer_exporter(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    check(name, tmp_path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},))


def test_merged_heads_of_one_image_are_certified(tmp_path: Path) -> None:
    path = check("merged heads", tmp_path, opset_version=17, dynamo=False)
    network, images = read_onnx(path, SHAPE), torch.rand(2, *SHAPE)
    classes = network(images).argmax(1)
    assert [
        one.verdict
        for one in fv.certify_batch(network, images, classes, fv.WassersteinBall(1e-4), method="vanilla", bound="ibp")
    ] == ["certified"] * 2


def check(name: str, folder: Path, **options: object) -> Path:
    """Writes a module; what is read is the same, image by image."""
    torch.manual_seed(0)
    module, images = MODULES[name]().eval(), torch.rand(3, *SHAPE)
    given = images if "dynamic_axes" in options or "dynamic_shapes" in options else images[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (given,), folder / "model.onnx", input_names=["x"], **options)
    found = read_onnx(folder / "model.onnx", SHAPE)(images)
    torch.testing.assert_close(found, module(images).detach(), rtol=1e-4, atol=1e-5)
    return folder / "model.onnx"
