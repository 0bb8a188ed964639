"""Objects show themselves on one line, without their tensors; in notebooks as tables and pictures.

Pictures are PNG files that any reader takes.
"""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

import flowverify as fv
from flowverify.figures import worst_cases
from flowverify.notebook import data_address, png
from flowverify.results import Certificate, Verdict

CERTIFICATE = Certificate(
    Verdict.CERTIFIED, 3, 3, "complete", "branch-and-bound", "l2", 0.0512345, 0.25, 1.5,
    upper_radius=0.0601, note="a <note>", cap=1.0, witness=torch.ones(1, 8, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return fv.load_dataset("digits")


@pytest.fixture(scope="module")
def found(data):
    return fv.find_adversarial(fv.load_model("digits-fc3"), data[:3], effort="fast")


def test_a_certificate_says_what_is_claimed():
    assert repr(CERTIFICATE) == (
        "Certificate(certified: label 3, predicted 3, radius 0.05123 pixels (W1, l2, cap 1), at most 0.0601 pixels "
        "(W1, l2, cap 1), margin 0.25, method complete, bound branch-and-bound, seconds 1.5, note a <note>)"
    )


def test_a_smoothed_certificate_has_its_own_name(data):
    (one,) = fv.smooth(fv.load_model("digits-fc3"), data[:1], None, 0.002, n0=10, n=50)
    assert repr(one).startswith("SmoothedCertificate(") and "wasserstein-smoothing" in repr(one)


def test_a_data_set_says_how_many_images_of_which_shape(data):
    assert repr(data) == "Dataset(digits, test: 539 images of 1 x 8 x 8, labels 0 to 9)"
    assert repr(data[:1]) == f"Dataset(digits, test: 1 image of 1 x 8 x 8, labels {data.labels[0]} to {data.labels[0]})"
    assert repr(data[:0]) == "Dataset(digits, test: 0 images of 1 x 8 x 8)"


def test_networks_say_what_they_take_and_what_they_are_made_of():
    network = fv.load_model("digits-fc3")
    assert repr(network) == "Network(1 x 8 x 8 -> 10; 3,466 parameters; Flatten, Linear, ReLU, Linear, ReLU, Linear)"
    assert repr(fv.fold(network)).startswith("FoldedNetwork(flows of 112 -> ")
    deep = fv.Network.sequential((1, 2, 2), [torch.nn.Flatten(), *[torch.nn.Linear(4, 4) for _ in range(30)]])
    assert ", ... 19 more, Linear)" in repr(deep) and repr(deep).count("Linear") == 11


@pytest.mark.parametrize("name", ["data", "found", "worst case", "certificate", "network", "folded"])
def test_no_line_holds_tensors(name, data, found):
    network = fv.load_model("digits-fc3")
    shown = {
        "data": data,
        "found": found,
        "worst case": worst_cases(network, data.images[:1], [0], [0.1])[0],
        "certificate": CERTIFICATE,
        "network": network,
        "folded": fv.fold(network),
    }[name]
    assert len(repr(shown)) < 300 and "tensor(" not in repr(shown) and "\n" not in repr(shown)


def test_attacks_say_what_they_found(found):
    assert repr(found).startswith("AttackResult(minimal, 3 images: 3 found; radii 0.0")
    assert " pixels (W1, l1); " in repr(found)


@pytest.mark.parametrize("name", ["data", "found", "certificate", "network"])
def test_notebooks_get_well_formed_html(name, data, found):
    shown = {"data": data, "found": found, "certificate": CERTIFICATE, "network": fv.load_model("digits-fc3")}[name]
    text = " ".join(ElementTree.fromstring(shown._repr_html_()).itertext())
    expected = {"data": "539 images", "found": "outcome", "certificate": "a <note>", "network": "Flatten"}
    assert expected[name] in text


def test_notebooks_see_the_first_images(data):
    html = data._repr_html_()
    assert html.count("<img ") == 16 and html.count("data:image/png;base64,") == 16
    assert f'alt="image 0, label {data.labels[0]}"' in html


GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (2, 1, 3)])
def test_readers_get_the_levels_back(shape):
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow to read them")
    image = GENERATOR.random(shape) / shape[0]
    with image_module.open(io.BytesIO(png(image))) as read:
        read.verify()
    with image_module.open(io.BytesIO(png(image))) as read:
        assert read.mode == ("RGB" if shape[0] == 3 else "L") and read.size == (shape[2], shape[1])
        levels = np.asarray(read)
    expected = np.moveaxis(image, 0, -1) if shape[0] == 3 else image.sum(0)
    np.testing.assert_allclose(levels / 255, expected, atol=0.5 / 255 + 1e-12)


def test_white_and_what_is_above_it():
    content = np.array([[[0.0, 0.5, 1.0]]])
    assert png(content, white=0.5) == png(np.array([[[0.0, 1.0, 1.0]]]))
    assert png(content, white=0.5) != png(content)


def test_an_address_holds_the_file():
    image = GENERATOR.random((1, 3, 3))
    head, _, body = data_address(image).partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == png(image)
