"""Small pictures are PNG files that any reader takes."""

import base64
import io

import numpy as np
import pytest

from flowverify.png import data_address, png

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
