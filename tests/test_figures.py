"""Worst cases lie in their balls and are as bad as they say; pictures are PNG files of them that say what they show."""

import re
import struct
import sys

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.figures import draw_adversarial, draw_worst_cases, worst_cases
from flowverify.grid import Grid
from flowverify.network import from_torch
from flowverify.results import Certificate, Verdict

RADII = (0.05, 0.2, 1.0)


@pytest.fixture(scope="module")
def digits():
    data = fv.load_dataset("digits")[:3]
    return fv.load_model("digits-fc3"), data.images, data.labels.tolist()


def certificate(
    label: int, radius: float, ground: str = "l1", cap: float | None = None, verdict: Verdict = Verdict.CERTIFIED
) -> Certificate:
    return Certificate(verdict, label, label, "fine-tuned", "best", ground, radius, 1.0, 0.1, cap=cap)


@pytest.fixture
def diagonal():
    """f_0 - f_1 = x_00 - x_11 on four pixels falls most by moves along the diagonal, of length 2 (l1), sqrt 2 (l2)."""
    layer = nn.Linear(4, 2, bias=False)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])})
    return from_torch(nn.Sequential(nn.Flatten(), layer), (1, 2, 2)), torch.tensor([[[[0.7, 0.1], [0.1, 0.1]]]])


@pytest.fixture
def titles(monkeypatch):
    """All text of pictures that are drawn, instead of the files."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found = []

    def collect(figure, *_, **__):
        found.extend(text.get_text() for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(Figure, "savefig", collect)
    return found


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


@pytest.mark.parametrize("ground", ["l1", "l2", "l2^2", "l1^1.5", "local:3", "local:3:l1"])
def test_distance_is_for_the_ground_cost_of_the_ball(digits, ground):
    network, images, labels = digits
    for case in worst_cases(network, images, labels, [0.2] * 3, ground):
        ball = fv.WassersteinBall(case.distance, ground)
        assert bool(ball.contains(case.image[None], case.worst[None])[0])
        assert not bool(ball.with_radius(0.999 * case.distance).contains(case.image[None], case.worst[None])[0])
        assert case.distance <= 0.2 * (1 + 1e-9)


def test_an_l2_radius_is_not_drawn_beside_an_l1_length(diagonal, titles):
    network, image = diagonal
    (case,) = draw_worst_cases(network, image, [certificate(0, 0.188, "l2")], "none.png")
    assert case.distance == pytest.approx(0.188) and case.flow_length == pytest.approx(0.188 * 2**0.5)
    (first,) = [title for title in titles if "radius" in title]
    assert "certified radius 0.1880 pixels (W1, l2; fine-tuned)" in first
    (last,) = [title for title in titles if "nu*:" in title]
    assert "W1, l2 = 0.1880 pixels" in last and "0.2659 (W1, l1)" in last


@pytest.mark.parametrize(
    ("ground", "cap", "name"),
    [
        ("l1", None, "W1, l1;"),
        ("l2^2", None, "W2, l2^2;"),
        ("l1^1.5", None, "W1.5, l1^1.5;"),
        ("l1", 1.0, "W1, l1, cap 1;"),
    ],
)
def test_every_distance_in_a_picture_has_its_ground_cost(diagonal, titles, ground, cap, name):
    draw_worst_cases(*diagonal, [certificate(0, 0.1, ground, cap)], "none.png")
    assert any(name in title for title in titles if "radius" in title)
    assert not [title for title in titles if re.search(r"W[\d.]* *=", title)]
    lengths = [title for title in titles if "pixels" in title]
    assert len(lengths) == 2 and all(re.search(r"W[\d.]+, (l1|l2|local)", title) for title in lengths)


def test_pictures_say_what_is_only_to_first_order_and_what_is_not_certified(diagonal, titles):
    draw_worst_cases(*diagonal, [certificate(0, 0.1)], "none.png")
    (plain,) = [title for title in titles if "worst case" in title]
    assert plain.startswith("worst case to first order")
    titles.clear()
    draw_worst_cases(*diagonal, [certificate(0, 0.1, cap=1.0, verdict=Verdict.UNKNOWN)], "none.png")
    (capped,) = [title for title in titles if "worst case" in title]
    assert capped.startswith("nearly worst case to first order")
    (first,) = [title for title in titles if "label" in title]
    assert "unknown, not certified, at radius" in first and "certified radius" not in first


def test_lengths_of_flows_under_adversarial_images_are_labelled(diagonal, titles):
    image = diagonal[1].double()
    moved = image + torch.tensor([[[[-0.1, 0.0], [0.0, 0.1]]]], dtype=torch.float64)
    draw_adversarial(image, moved, ["W1, l2 = 0.1414 pixels"], ["none.png"])
    assert "difference\narrows: flow of length 0.2000 pixels (W1, l1)" in titles


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
