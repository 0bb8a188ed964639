"""Single images from pictures and arrays: what is in the file is what comes out, and what leaves a doubt is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowverify.data import load_dataset
from flowverify.data.files import read_image, read_picture
from flowverify.errors import DataError, InvalidInputError

pillow = pytest.importorskip("PIL.Image")
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], 2)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    image = pillow.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


class TestPictures:
    def test_levels_become_shares(self, tmp_path: Path) -> None:
        grey = read_picture(save(tmp_path / "grey.png", GREY))
        torch.testing.assert_close(grey, torch.tensor([[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]]))
        colour = read_picture(save(tmp_path / "colour.png", COLOUR))
        torch.testing.assert_close(colour * 255, torch.from_numpy(COLOUR.transpose(2, 0, 1)).float())

    def test_sixteen_bits_are_not_cut_off(self, tmp_path: Path) -> None:
        path = save(tmp_path / "deep.png", GREY.astype(np.uint16) * 257)
        torch.testing.assert_close(read_picture(path), read_picture(save(tmp_path / "grey.png", GREY)))
        assert read_picture(path, 3).shape == (3, 2, 3)

    def test_turned_into_what_is_wanted(self, tmp_path: Path) -> None:
        grey, colour = save(tmp_path / "grey.png", GREY), save(tmp_path / "colour.png", COLOUR)
        found = read_image(grey, channels=3)
        assert found.note == "turned into colour"
        torch.testing.assert_close(found.pixels, read_picture(grey).expand(3, -1, -1))
        found = read_image(colour, channels=1)
        assert found.note == "turned into grey values" and found.pixels.shape == (1, 2, 3)
        assert read_image(grey, channels=1).note == read_image(colour, channels=3).note == ""

    def test_palettes_are_looked_up(self, tmp_path: Path) -> None:
        path = tmp_path / "palette.png"
        pillow.fromarray(COLOUR).quantize(6).save(path)
        torch.testing.assert_close(read_picture(path) * 255, torch.from_numpy(COLOUR.transpose(2, 0, 1)).float())

    def test_transparency_is_refused_where_it_shows(self, tmp_path: Path) -> None:
        opaque = np.concatenate([COLOUR, np.full((2, 3, 1), 255, np.uint8)], 2)
        assert read_picture(save(tmp_path / "opaque.png", opaque)).shape == (3, 2, 3)
        opaque[0, 0, 3] = 254
        with pytest.raises(DataError, match=r"clear.png: has transparent pixels, expected an opaque picture"):
            read_picture(save(tmp_path / "clear.png", opaque))

    def test_folders_are_read_alike(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        path = save(tmp_path / "a" / "deep.png", GREY.astype(np.uint16) * 257)
        torch.testing.assert_close(load_dataset(tmp_path).images[0], read_picture(path))


class TestArrays:
    @pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (1, 1, 2, 3)])
    def test_one_image(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        np.save(tmp_path / "one.npy", GREY.reshape(shape))
        torch.testing.assert_close(read_image(tmp_path / "one.npy").pixels * 255, torch.from_numpy(GREY[None]).float())

    def test_channels_last_are_moved_with_a_note(self, tmp_path: Path) -> None:
        np.save(tmp_path / "last.npy", np.tile(COLOUR, (3, 3, 1)) / 255.0)
        found = read_image(tmp_path / "last.npy")
        assert found.pixels.shape == (3, 6, 9) and "channels last" in found.note

    def test_several(self, tmp_path: Path) -> None:
        images = np.arange(5 * 12, dtype=np.float64).reshape(5, 2, 6)
        np.save(tmp_path / "several.npy", images)
        torch.testing.assert_close(read_image(tmp_path / "several.npy", 4).pixels[0], torch.tensor(images[4]).float())
        with pytest.raises(InvalidInputError, match="holds 5 images, expected an index"):
            read_image(tmp_path / "several.npy")
        with pytest.raises(InvalidInputError, match="index 5: .* holds 5 images, expected 0 to 4"):
            read_image(tmp_path / "several.npy", 5)

    def test_labels_of_an_npz(self, tmp_path: Path) -> None:
        path = tmp_path / "own.npz"
        np.savez(path, images=np.stack([GREY, GREY]), labels=np.array([3, 7]))
        assert (read_image(path, 0).label, read_image(path, 1).label) == (3, 7)
        with pytest.raises(InvalidInputError, match="holds 2 images, expected an index"):
            read_image(path)
        np.savez(path, anything=GREY)
        found = read_image(path)
        assert found.label is None and found.pixels.shape == (1, 2, 3)


def write(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "broken.npy").write_bytes(b"nothing")
    (folder / "text.txt").write_text("7")
    np.savez(folder / "two.npz", a=GREY, b=GREY)
    np.save(folder / "line.npy", GREY[0])
    np.save(folder / "words.npy", np.array([["a", "b"]]))
    np.save(folder / "objects.npy", np.array([[None, 1]]), allow_pickle=True)
    save(folder / "grey.png", GREY)
    np.save(folder / "one.npy", GREY)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("none.png", None, "no such file"),
        ("text.txt", None, "expected a file that ends in .png"),
        ("broken.png", None, "cannot be read as an image"),
        ("broken.npy", None, "cannot be read as an array"),
        ("two.npz", None, "holds a, b, expected images, or one array"),
        ("line.npy", None, r"shape \(3,\), expected \(H, W\)"),
        ("words.npy", None, "expected uint8 or float"),
        ("objects.npy", None, "cannot be read as an array"),
        ("grey.png", 0, "index 0: given with the picture"),
        ("one.npy", 0, "index 0: given with the one image"),
    ],
)
def test_what_is_refused(name: str, index: int | None, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises((DataError, InvalidInputError), match=message):
        read_image(tmp_path / name, index)
