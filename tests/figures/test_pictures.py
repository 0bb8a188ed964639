"""Worst cases lie in their balls and are as bad as they say; pictures are PNG files of them that say what they show."""

import re
import struct
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.errors import DependencyError, InvalidInputError
from flowverify.figures import Change, draw_adversarial, draw_worst_cases, image_name, worst_cases
from flowverify.figures.files import show_flow
from flowverify.grid import Grid
from flowverify.network import from_torch
from flowverify.results import Certificate, Verdict
from flowverify.transport.references import minimal_flow

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


def test_titles_name_the_image_and_show_what_is_proven_beside_the_first_order_margin(diagonal, titles):
    name = image_name("folder/net.onnx", "digits", "test", 7)
    draw_worst_cases(*diagonal, [certificate(0, 0.1)], "none.png", [name])
    (head,) = [title for title in titles if "label" in title]
    assert head.startswith("net.onnx, digits test, image 7: label 0, predicted 0\ncertified radius 0.1000")
    (worst,) = [title for title in titles if "worst case" in title]
    assert "f0 - f1 = " in worst and worst.endswith("proven of the whole ball: at least 1")
    titles.clear()
    draw_worst_cases(*diagonal, [certificate(0, 0.1, verdict=Verdict.UNKNOWN)], "none.png")
    (worst,) = [title for title in titles if "worst case" in title]
    assert worst.endswith("bound over the whole ball: 1, which proves nothing")


def test_the_original_is_as_bright_as_it_is_whatever_the_other_has(monkeypatch):
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    image = torch.tensor([[[[0.7, 0.1], [0.1, 0.1]]]], dtype=torch.float64)
    moved = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    draw_adversarial(image, moved, ["W1, l1 = 1.4 pixels"], ["none.png"])
    before, behind, _ = (axes for axes in found[0].axes if axes.images)
    for axes in (before, behind):
        assert axes.images[0].get_clim() == pytest.approx((0.0, 0.7))
    assert behind.get_xlabel() == "1 pixel above white, up to 1.4 x (orange)"
    above = behind.images[0].cmap.get_over()
    assert above[0] > above[2] + 0.3  # not grey


def test_arrows_of_neighbouring_edges_do_not_overlap():
    """Mass that goes right through three pixels: two arrows, each between the centres of its pixels."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    image, other = torch.zeros(2, 1, 28, 28, dtype=torch.float64)
    image[0, 9, 4], other[0, 9, 6] = 1.0, 1.0
    (flow,) = minimal_flow(image[None], other[None])
    axes = Figure().subplots()
    show_flow(axes, Change(image, other, flow))
    (arrows,) = [drawn for drawn in axes.collections if isinstance(drawn, PolyCollection)]
    spans = sorted((path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in arrows.get_paths())
    assert len(spans) == 2
    assert spans[0][0] >= 4 and spans[0][1] <= 5 <= spans[1][0] and spans[1][1] <= 6


def test_channels_that_share_an_edge_have_arrows_of_their_own_side_by_side():
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    image, other = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
    image[:, 3, 4], other[:, 3, 5] = 1.0, 1.0
    (flow,) = minimal_flow(image[None], other[None])
    axes = Figure().subplots()
    show_flow(axes, Change(image, other, flow))
    drawn = [one for one in axes.collections if isinstance(one, PolyCollection)]
    spans = sorted((p.vertices[:, 1].min(), p.vertices[:, 1].max()) for one in drawn for p in one.get_paths())
    assert len(spans) == 3 and spans[0][1] < spans[1][0] and spans[1][1] < spans[2][0]
    assert len({tuple(one.get_facecolor()[0]) for one in drawn}) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["red moves", "green moves", "blue moves"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 6)])
def test_a_gif_moves_from_the_image_to_the_worst_case(tmp_path, shape):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *shape, generator=generator)
    network = from_torch(nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3)), shape)
    path = tmp_path / "moving.gif"
    draw_worst_cases(network, images, [certificate(0, 0.3), certificate(1, 0.2)], path, ["one", "two"])
    with Image.open(path) as moving:
        assert moving.format == "GIF" and moving.n_frames == 20
        first = moving.convert("RGB").tobytes()
        moving.seek(19)
        assert moving.convert("RGB").tobytes() != first
    path = tmp_path / "found.gif"
    rolled = images[:1].double().roll(1, -1)
    draw_adversarial(images[:1].double(), rolled, ["W1, l1 = 1 pixel"], [path])
    with Image.open(path) as moving:
        assert moving.n_frames == 20


def test_a_falsified_image_is_shown_with_its_counterexample(diagonal, titles):
    network, image = diagonal[0], torch.tensor([[[[0.7, 0.1], [0.1, 0.1]]]], dtype=torch.float64)
    witness = torch.tensor([[[0.1, 0.1], [0.1, 0.7]]], dtype=torch.float64)
    shown = replace(certificate(0, 2.0, verdict=Verdict.FALSIFIED), witness=witness, margin=None)
    (case,) = draw_worst_cases(network, image, [shown], "none.png")
    assert case.counterexample and torch.equal(case.worst, witness)
    assert case.margins[1] == pytest.approx(-0.6) and case.predicted == 1
    (title,) = [title for title in titles if title.startswith("counterexample")]
    assert "predicted 1, f0 - f1 = -0.60" in title and "nu*" not in " ".join(titles)


class TestPlotCertificate:
    def test_draws_on_given_axes(self, digits):
        from matplotlib.figure import Figure

        network, images, labels = digits
        axes = Figure().subplots()
        assert fv.plot_certificate(network, images[0], certificate(labels[0], 0.1), ax=axes, name="mine") is axes
        assert axes.get_title().splitlines()[0] == f"mine: label {labels[0]}, predicted {labels[0]}"
        assert axes.get_title().splitlines()[-1] == "proven of the whole ball: at least 1"
        assert axes.images and axes.collections

    def test_three_axes_get_image_worst_case_and_flow(self, digits):
        from matplotlib.figure import Figure

        network, images, labels = digits
        axes = Figure().subplots(1, 3)
        fv.plot_certificate(network, images[:1], certificate(labels[0], 0.1), ax=axes)
        assert [bool(one.images) for one in axes] == [True] * 3
        assert "worst case to first order" in axes[1].get_title()

    def test_a_module_of_ones_own_gets_a_figure(self, monkeypatch):
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        image = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
        axes = fv.plot_certificate(module, image, certificate(0, 0.1))
        assert len(axes) == 3 and pyplot.get_fignums()
        pyplot.close("all")

    def test_bad_input(self, digits):
        from matplotlib.figure import Figure

        network, images, labels = digits
        with pytest.raises(InvalidInputError, match="given 2 axes, expected one or three"):
            fv.plot_certificate(network, images[0], certificate(labels[0], 0.1), ax=Figure().subplots(1, 2))
        with pytest.raises(InvalidInputError, match="expected one image"):
            fv.plot_certificate(network, images, certificate(labels[0], 0.1), ax=Figure().subplots())


def test_certificates_of_several_threats_are_not_drawn_in_one_picture(digits):
    network, images, labels = digits
    both = [certificate(labels[0], 0.1), certificate(labels[1], 0.1, "l2")]
    with pytest.raises(InvalidInputError, match="2 ground costs and caps: expected the same"):
        draw_worst_cases(network, images[:2], both, "none.png")
    with pytest.raises(InvalidInputError, match="given 1 names for 2 images"):
        draw_worst_cases(network, images[:2], [both[0], both[0]], "none.png", ["one"])
