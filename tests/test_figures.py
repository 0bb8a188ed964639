"""Worst cases lie in their balls and are as bad as they say; pictures are PNG files of them."""

import struct
import sys

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.certify.certificate import Certificate, Verdict
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.figures import draw_worst_cases, worst_cases
from flowverify.grid import Grid
from flowverify.network import from_torch

RADII = (0.05, 0.2, 1.0)


@pytest.fixture(scope="module")
def digits():
    data = fv.load_dataset("digits")[:3]
    return fv.load_model("digits-fc3"), data.images, data.labels.tolist()


def certificate(label: int, radius: float) -> Certificate:
    return Certificate(Verdict.CERTIFIED, label, label, "fine-tuned", "best", "l1", radius, 1.0, 0.1)


def test_worst_cases_lie_on_the_border_of_their_balls(digits):
    network, images, labels = digits
    for case, radius in zip(worst_cases(network, images, labels, RADII), RADII, strict=True):
        ball = fv.WassersteinBall(radius)
        assert bool(ball.contains(case.image[None], case.worst[None])[0])
        assert case.distance == pytest.approx(radius, rel=1e-6)
        assert bool(fv.WassersteinBall(radius, "l2").contains(case.image[None], case.worst[None])[0])


def test_the_flow_leads_from_the_image_to_the_worst_case(digits):
    network, images, labels = digits
    for case in worst_cases(network, images, labels, RADII):
        torch.testing.assert_close(Grid.of(case.image).apply(case.image, case.flow), case.worst, rtol=0, atol=1e-9)
        assert case.margins[1] < case.margins[0]


def test_linear_network_has_the_exact_worst_case():
    """f_0 - f_1 = x_left - x_right on two pixels falls by 2 for each unit of mass that moves right."""
    layer = nn.Linear(2, 2, bias=False)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    network = from_torch(nn.Sequential(nn.Flatten(), layer), (1, 1, 2))
    (case,) = worst_cases(network, torch.tensor([[[[0.75, 0.25]]]]), [0], [0.25])
    assert case.worst.flatten().tolist() == pytest.approx([0.5, 0.5])
    assert case.margins == pytest.approx((0.5, 0.0))
    assert (case.label, case.rival) == (0, 1)


def test_radius_zero_moves_nothing(digits):
    network, images, labels = digits
    (case,) = worst_cases(network, images[:1], labels[:1], [0.0])
    assert torch.equal(case.worst, case.image)
    assert case.distance == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 20), (2, 1, 5)])
def test_draws_a_png(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *shape, generator=generator)
    network = from_torch(nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3)), shape)
    path = tmp_path / "picture.png"
    cases = draw_worst_cases(network, images, [certificate(0, 0.1), certificate(2, 0.0)], path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600 and height > 300
    assert [case.label for case in cases] == [0, 2]


def test_bad_input(tmp_path, digits, monkeypatch):
    network, images, labels = digits
    with pytest.raises(InvalidInputError, match="given 3 images, 2 labels and 3 radii"):
        worst_cases(network, images, labels[:2], RADII)
    with pytest.raises(InvalidInputError, match="expected at least one"):
        draw_worst_cases(network, images[:0], [], tmp_path / "none.png")
    with pytest.raises(OSError, match="nowhere"):
        draw_worst_cases(network, images[:1], [certificate(0, 0.1)], tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"flowverify\[plot\]"):
        draw_worst_cases(network, images[:1], [certificate(0, 0.1)], tmp_path / "a.png")
