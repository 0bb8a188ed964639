"""Data sets: what is loaded, and what is refused with which message."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flowverify.data import Dataset, as_dataset, is_whole, load_dataset, parse_index, without_validation
from flowverify.errors import DataError, InvalidInputError, UnknownNameError


def compressed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # gzip files state a time


def idx(array: np.ndarray) -> bytes:
    """IDX by its definition: 0, 0, type 8 (unsigned byte), dimensions, big-endian sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([7, 0, 2], dtype=np.uint8)


@pytest.fixture
def mnist_dir(tmp_path: Path) -> Path:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(compressed(idx(IMAGES)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


@pytest.fixture(scope="module")
def mnist_test() -> Dataset:
    root = os.environ.get("FLOWVERIFY_DATA")
    if not root or not (Path(root) / "mnist").is_dir():
        pytest.skip("needs the MNIST files in $FLOWVERIFY_DATA/mnist")
    return load_dataset("mnist")


class TestDataset:
    def test_slices_and_lists_select_images_with_their_labels(self) -> None:
        data = load_dataset("digits")
        part = data[2:5]
        assert len(part) == 3 and part.name == "digits" and part.split == "test"
        torch.testing.assert_close(part.images, data.images[2:5])
        torch.testing.assert_close(data[data.labels == 3].images, data.images[data.labels == 3])
        assert len(data[range(4)]) == 4 and len(data[[]]) == 0
        assert data[[4, 2]].labels.tolist() == [int(data.labels[4]), int(data.labels[2])]

    def test_integer_gives_image_and_label(self) -> None:
        data = load_dataset("digits")
        image, label = data[3]
        assert image.shape == (1, 8, 8) and label == int(data.labels[3])
        assert len(list(data[:7])) == 7

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.int64), "expected float32 of shape"),
            (torch.zeros(2, 1, 3, 3).double(), torch.zeros(2, dtype=torch.int64), "expected float32"),
            (torch.zeros(2, 1, 3, 3), torch.zeros(3, dtype=torch.int64), r"expected int64 of shape \(2,\)"),
            (torch.zeros(2, 1, 3, 3), torch.zeros(2), "expected int64"),
            (torch.full((1, 1, 2, 2), torch.nan), torch.zeros(1, dtype=torch.int64), "NaN"),
            (torch.full((1, 1, 2, 2), torch.inf), torch.zeros(1, dtype=torch.int64), "infinite"),
            (torch.full((1, 1, 2, 2), -0.5), torch.zeros(1, dtype=torch.int64), "go down to -0.5"),
            (torch.zeros(1, 1, 2, 2), torch.tensor([-1]), "labels go down to -1"),
        ],
    )
    def test_malformed_content_is_refused(self, images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Dataset(images, labels, "mine", "test")


class TestDigits:
    def test_split_is_disjoint_complete_and_stratified(self) -> None:
        train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
        assert len(train) + len(test) == 1797
        share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
        assert bool(((share - 0.3).abs() < 0.005).all())
        everything = torch.cat([train.images, test.images]).flatten(1)
        assert len(np.unique(everything.numpy(), axis=0)) == 1797

    def test_validation_is_the_end_of_train(self) -> None:
        train, validation = load_dataset("digits", "train"), load_dataset("digits", "validation")
        assert (validation.split, len(validation)) == ("validation", len(train) // 10)
        assert torch.equal(torch.cat([without_validation(train).images, validation.images]), train.images)
        many = Dataset(torch.zeros(60_000, 1, 1, 1), torch.zeros(60_000, dtype=torch.int64), "m", "train")
        assert len(without_validation(many)) == 55_000

    def test_split_never_changes(self) -> None:
        test = load_dataset("digits", "test")
        assert len(test) == 539
        assert test.labels[:12].tolist() == [0, 1, 4, 5, 8, 5, 6, 5, 9, 9, 1, 3]
        assert float(test.images.double().sum()) == 10520

    def test_pixels_are_shares_of_sixteen(self) -> None:
        images = load_dataset("digits").images
        assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
        assert bool((images * 16 == (images * 16).round()).all())


class TestMnist:
    def test_reads_gzip_and_raw_files(self, mnist_dir: Path) -> None:
        data = load_dataset("mnist", data_dir=mnist_dir)
        assert data.images.shape == (3, 1, 4, 5) and data.labels.tolist() == [7, 0, 2]
        torch.testing.assert_close(data.images[1, 0, 0], torch.arange(20, 25) / 255)

    def test_finds_the_subfolder(self, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nested = mnist_dir / "mnist"
        nested.mkdir()
        for path in mnist_dir.glob("t10k*"):
            path.rename(nested / path.name)
        assert len(load_dataset("mnist", data_dir=mnist_dir)) == 3
        monkeypatch.setenv("FLOWVERIFY_DATA", str(mnist_dir))
        assert len(load_dataset("mnist")) == 3

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("t10k-images-idx3-ubyte.gz", b"not gzip", "cannot be read as gzip"),
            ("t10k-images-idx3-ubyte.gz", compressed(idx(IMAGES))[:-12], "cannot be read as gzip"),
            ("t10k-images-idx3-ubyte.gz", compressed(idx(IMAGES)[:-1]), "75 bytes, expected 76"),
            ("t10k-images-idx3-ubyte.gz", compressed(idx(IMAGES)[:10]), "expected at least the 16"),
            ("t10k-images-idx3-ubyte.gz", compressed(idx(LABELS)), "starts with 00000801, expected 00000803"),
            ("t10k-images-idx3-ubyte.gz", compressed(b""), "starts with nothing"),
            ("t10k-labels-idx1-ubyte", idx(LABELS) + b"0", "12 bytes, expected 11"),
            ("t10k-labels-idx1-ubyte", idx(LABELS[:2]), "2 labels, expected 3"),
        ],
        ids=[
            "not gzip", "cut gzip", "byte missing", "cut header", "labels for images", "empty", "byte too many",
            "labels missing",
        ],
    )  # fmt: skip
    def test_corrupt_file_is_named(self, mnist_dir: Path, file: str, content: bytes, message: str) -> None:
        (mnist_dir / file).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load_dataset("mnist", data_dir=mnist_dir)
        assert file in str(caught.value) and "\n" not in str(caught.value)

    def test_missing_file_is_named(self, mnist_dir: Path) -> None:
        with pytest.raises(DataError, match=r"no file train-images-idx3-ubyte\.gz"):
            load_dataset("mnist", "train", mnist_dir)

    def test_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such folder"):
            load_dataset("mnist", data_dir=tmp_path / "absent")

    def test_failed_download_is_a_data_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What pooch does where the bytes do not have the published checksum."""
        pooch = pytest.importorskip("pooch")

        def retrieve(*given: object) -> str:
            raise ValueError(f"{given[2]} does not match the known hash {given[1]}")

        monkeypatch.delenv("FLOWVERIFY_DATA", raising=False)
        monkeypatch.setattr(pooch, "retrieve", retrieve)
        with pytest.raises(DataError, match="nor could it be downloaded .*does not match the known hash"):
            load_dataset("mnist")

    def test_official_test_set(self, mnist_test: Dataset) -> None:
        """Mean and standard deviation of the 10,000 official test images."""
        assert mnist_test.images.shape == (10000, 1, 28, 28)
        assert float(mnist_test.images.double().mean()) == pytest.approx(0.13251460584233693, abs=1e-8)
        assert float(mnist_test.images.double().std()) == pytest.approx(0.310480247930535, abs=1e-7)
        assert mnist_test.labels[:5].tolist() == [7, 2, 1, 0, 4]


class TestNpz:
    def test_levels_are_divided_by_255(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "mine.npz", images=IMAGES, labels=LABELS)
        data = load_dataset(path)
        assert data.images.shape == (3, 1, 4, 5) and data.name == "mine" and data.labels.dtype == torch.int64
        torch.testing.assert_close(data.images[2, 0, 3, 4], torch.tensor(59 / 255))

    def test_floats_are_taken_as_they_are(self, tmp_path: Path) -> None:
        images = np.full((2, 3, 4, 5), 1.25)
        path = write_npz(tmp_path / "mine.npz", images=images, labels=np.array([0, 1]))
        assert bool((load_dataset(str(path)).images == 1.25).all())

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": IMAGES}, "no array 'labels'"),
            ({"labels": LABELS}, "no array 'images'"),
            ({"images": IMAGES, "labels": LABELS[:2]}, r"labels of shape \(2,\)"),
            ({"images": IMAGES, "labels": LABELS[:, None]}, r"labels of shape \(3, 1\)"),
            ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels of type torch.float64"),
            ({"images": IMAGES, "labels": LABELS > 0}, "labels of type torch.bool and length 3: expected 3 integers"),
            ({"images": IMAGES, "labels": LABELS.astype(int) - 9}, r"label -\d \(image \d\): expected >= 0"),
            ({"images": IMAGES[0], "labels": LABELS}, "expected float32 of shape"),
            (
                {"images": IMAGES.astype(int), "labels": LABELS},
                "images of type int64, expected uint8 or float",
            ),
            ({"images": IMAGES - 1.0, "labels": LABELS}, "images go down to -1"),
            ({"images": IMAGES * np.nan, "labels": LABELS}, "NaN"),
            ({"images": IMAGES * 1e300, "labels": LABELS}, "infinite"),
            ({"images": np.array([None, {}]), "labels": LABELS}, "plain arrays"),
        ],
    )
    def test_malformed_file_is_refused(self, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
        path = write_npz(tmp_path / "mine.npz", **arrays)
        with pytest.raises(DataError, match=message) as caught:
            load_dataset(path)
        assert str(caught.value).startswith(str(path))

    @pytest.mark.parametrize("keep", [0, 10, -40])
    def test_truncated_file_is_refused(self, tmp_path: Path, keep: int) -> None:
        path = write_npz(tmp_path / "mine.npz", images=IMAGES, labels=LABELS)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match="cannot be read as .npz"):
            load_dataset(path)

    def test_single_array_is_not_a_data_set(self, tmp_path: Path) -> None:
        with (tmp_path / "mine.npz").open("wb") as stream:
            np.save(stream, IMAGES)
        with pytest.raises(DataError, match=r"cannot be read as \.npz .*single array"):
            load_dataset(tmp_path / "mine.npz")

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file"):
            load_dataset(tmp_path / "absent.npz")


class TestCifar10Sample:
    def test_reads_colour_images(self, tmp_path: Path) -> None:
        images = np.full((2, 3, 32, 32), 51, dtype=np.uint8)
        write_npz(tmp_path / "cifar10_test_2.npz", images=images, labels=np.array([3, 8]))
        data = load_dataset("cifar10-sample", data_dir=tmp_path)
        assert data.input_shape == (3, 32, 32) and data.name == "cifar10-sample"
        torch.testing.assert_close(data.images[0, 0, 0, 0], torch.tensor(0.2))

    def test_absence_says_where_it_was_expected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FLOWVERIFY_DATA", raising=False)
        with pytest.raises(DataError, match="FLOWVERIFY_DATA/cifar10_sample"):
            load_dataset("cifar10-sample")

    def test_has_no_train_split(self) -> None:
        with pytest.raises(DataError, match="no train split"):
            load_dataset("cifar10-sample", "train")


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(
        UnknownNameError,
        match="unknown data set 'minst': .*digits, fashion-mnist, hf:OWNER/NAME, kmnist",
    ):
        load_dataset("minst")
    with pytest.raises(UnknownNameError, match="unknown split 'dev': expected one of test, train, validation"):
        load_dataset("digits", split="dev")


class TestParseIndex:
    @given(st.data(), st.integers(1, 500))
    def test_slices_select_what_python_selects(self, data: st.DataObject, length: int) -> None:
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        step = data.draw(st.integers(1, 9))
        everything = list(range(length))
        assert list(parse_index(f"{start}:{stop}", length)) == everything[start:stop]
        assert list(parse_index(f":{stop}", length)) == everything[:stop]
        assert list(parse_index(f"{start}:", length)) == everything[start:]
        assert list(parse_index(f"{start}:{stop}:{step}", length)) == everything[start:stop:step]
        assert parse_index(":", length) == range(length)

    @given(st.lists(st.integers(0, 99), min_size=1))
    def test_lists_keep_their_order(self, chosen: list[int]) -> None:
        assert parse_index(",".join(map(str, chosen)), 100) == chosen

    @given(st.text(max_size=12))
    @example("0\x1f")  # whitespace to strip, and none to int
    def test_any_text_gives_valid_positions_or_one_error(self, text: str) -> None:
        try:
            chosen = parse_index(text, 50)
        except InvalidInputError:
            return
        assert len(chosen) > 0 and all(0 <= index < 50 for index in chosen)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a form like"),
            ("-1", "expected a form like"),
            ("a:b", "expected a form like"),
            ("3,,4", "expected a form like"),
            ("5:5", "selects none of 10"),
            ("7:3", "selects none of 10"),
            ("0:11", "ends at 11, expected at most 10"),
            ("10", "10 given, expected 0 to 9"),
            ("0:5:0", "expected a step >= 1"),
        ],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            parse_index(text, 10)


class TestFamilies:
    """Small files in the formats of the authors."""

    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
    def test_idx_files(self, name: str, mnist_dir: Path) -> None:
        data = load_dataset(name, data_dir=mnist_dir)
        assert (data.name, data.input_shape, data.labels.tolist()) == (name, (1, 4, 5), [7, 0, 2])
        with pytest.raises(DataError, match=f"expected the four files of {name} in IDX format"):
            load_dataset(name, "train", mnist_dir)

    @pytest.mark.parametrize(("name", "labels"), [("cifar10", 1), ("cifar100", 2)])
    @pytest.mark.parametrize("inside", [True, False])
    def test_cifar(self, name: str, labels: int, inside: bool, tmp_path: Path) -> None:
        folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
        where = tmp_path / folder if inside else tmp_path
        where.mkdir(exist_ok=True)
        records = np.random.default_rng(0).integers(0, 256, (12, labels + 3072), np.uint8)
        records[:, :labels] %= 10
        records[:2].tofile(where / ("test_batch.bin" if name == "cifar10" else "test.bin"))
        for k in range(5):
            file = f"data_batch_{k + 1}.bin" if name == "cifar10" else "train.bin"
            records[2 + 2 * k : 4 + 2 * k].tofile(where / file)
        test, train = (load_dataset(name, split, tmp_path) for split in ("test", "train"))
        assert test.labels.tolist() == records[:2, labels - 1].tolist()
        assert len(train) == (10 if name == "cifar10" else 2)
        assert test.input_shape == (3, 32, 32)
        torch.testing.assert_close(test.images[1, 2, 5, 7] * 255, torch.tensor(float(records[1, labels + 2215])))

    def test_broken_cifar(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"test_batch.bin: cannot be read .*cifar10's binary version"):
            load_dataset("cifar10", data_dir=tmp_path)
        (tmp_path / "test_batch.bin").write_bytes(b"123")
        with pytest.raises(DataError, match=r"test_batch.bin: 3 bytes, expected records of 3073"):
            load_dataset("cifar10", data_dir=tmp_path)


class TestFolders:
    def write(self, folder: Path, mode: str, size: tuple[int, int] = (5, 4)) -> dict[str, np.ndarray]:
        image = pytest.importorskip("PIL.Image")
        random, found = np.random.default_rng(0), {}
        for name in ("b/1.png", "a/2.png", "a/1.png"):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            found[name] = random.integers(0, 256, shape, np.uint8)
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            image.fromarray(found[name]).save(folder / name)
        return found

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_classes_and_images_in_the_order_of_their_names(self, mode: str, tmp_path: Path) -> None:
        found = self.write(tmp_path, mode)
        data = load_dataset(str(tmp_path))
        assert data.labels.tolist() == [0, 0, 1]
        assert data.input_shape == ((1 if mode == "L" else 3), 4, 5)
        expected = found["a/2.png"][..., None] if mode == "L" else found["a/2.png"]
        torch.testing.assert_close(data.images[1] * 255, torch.from_numpy(expected.transpose(2, 0, 1)).float())

    def test_splits(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            self.write(tmp_path / split, "L", (5, 4) if split == "test" else (3, 4))
        assert load_dataset(tmp_path / "test").input_shape == load_dataset(tmp_path).input_shape == (1, 4, 5)
        assert load_dataset(tmp_path, "train").input_shape == (1, 4, 3)
        with pytest.raises(DataError, match="has the splits train, test, given validation"):
            load_dataset(tmp_path, "validation")
        self.write(tmp_path / "validation", "L", (6, 4))
        assert load_dataset(tmp_path, "validation").input_shape == (1, 4, 6)
        assert not is_whole(tmp_path) and is_whole(tmp_path / "train")

    def test_what_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images, expected at least one"):
            load_dataset(tmp_path)
        self.write(tmp_path / "x", "L")
        (tmp_path / "x" / "a" / "3.png").write_bytes(b"nothing")
        with pytest.raises(DataError, match=r"3.png: cannot be read as an image"):
            load_dataset(tmp_path / "x")
        self.write(tmp_path / "y", "L")
        self.write(tmp_path / "y" / "c", "L", (2, 2))
        (tmp_path / "y" / "c" / "9.png").write_bytes((tmp_path / "y" / "c" / "a" / "1.png").read_bytes())
        with pytest.raises(DataError, match="expected one shape"):
            load_dataset(tmp_path / "y")


class TestOthersObjects:
    IMAGES = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    LABELS = torch.tensor([3, 1, 2, 0])

    def same(self, data: Dataset) -> None:
        torch.testing.assert_close(data.images, self.IMAGES)
        assert data.labels.tolist() == self.LABELS.tolist()

    def test_torch_data_sets_and_loaders(self) -> None:
        pairs = torch.utils.data.TensorDataset(self.IMAGES, self.LABELS)
        self.same(as_dataset(pairs))
        self.same(as_dataset(torch.utils.data.DataLoader(pairs, batch_size=3)))
        assert len(as_dataset(torch.utils.data.DataLoader(pairs, batch_size=3), limit=2)) == 2

    def test_mappings_of_pil_images(self) -> None:
        image = pytest.importorskip("PIL.Image")
        levels = (self.IMAGES * 255).to(torch.uint8)
        rows = [
            {"img": image.fromarray(one.permute(1, 2, 0).numpy()), "label": int(label)}
            for one, label in zip(levels, self.LABELS, strict=True)
        ]
        data = as_dataset(rows, name="mine", split="train")
        torch.testing.assert_close(data.images, levels / 255)
        assert (data.name, data.split) == ("mine", "train")
        grey = as_dataset([(image.fromarray(levels[0, 0].numpy()), 1)])
        torch.testing.assert_close(grey.images[0, 0], levels[0, 0] / 255)

    def test_what_is_refused(self) -> None:
        with pytest.raises(DataError, match="own: an entry of type int, expected an image and a label"):
            as_dataset([3])
        with pytest.raises(DataError, match="own: an entry of type list, expected an image and a label"):
            as_dataset([{"picture": 3}])
        with pytest.raises(DataError, match="no images"):
            as_dataset([])
