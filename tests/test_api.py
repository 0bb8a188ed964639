"""The functions of one call reach every method by name."""

import pydoc
import sys
import warnings

import numpy as np
import pytest
import torch

import flowverify as fv
from flowverify.errors import DataError, DependencyError, InvalidInputError, UnknownNameError
from flowverify.registry import METHODS
from flowverify.results import Interrupted
from flowverify.smoothing import Noise, Splitting


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    network = fv.Network.sequential((1, 4, 4), [torch.nn.Flatten(), torch.nn.Linear(16, 3)])
    images = torch.rand(2, 1, 4, 4)
    return network, images, network(images).argmax(1).detach()


def test_every_method_gives_radii_and_exact_ones_agree(problem):
    network, images, labels = problem
    radii = {method: fv.certified_radius(network, images, labels, method=method) for method in METHODS}
    assert set(radii) > {"vanilla", "fine-tuned", "linear", "complete", "milp"}
    for method in ("linear-lp", "complete", "milp", "fine-tuned"):
        torch.testing.assert_close(radii[method], radii["linear"], rtol=0.0101, atol=0)
    assert bool((radii["vanilla"] <= radii["linear"]).all())


@pytest.mark.parametrize("method", ["fine-tuned", "linear", "complete"])
def test_verdicts_on_both_sides_of_the_radius(problem, method):
    network, images, labels = problem
    radius = float(fv.certified_radius(network, images[:1], labels[:1], method="linear")[0])
    inside, outside = (
        fv.certify(network, images[0], labels[0], fv.WassersteinBall(radius * factor), method=method).verdict
        for factor in (0.98, 1.02)
    )
    assert inside == "certified"
    assert outside == ("unknown" if method == "fine-tuned" else "falsified")


def test_unknown_method(problem):
    network, images, labels = problem
    with pytest.raises(UnknownNameError, match="unknown method 'guess': expected one of MODULE:CLASS, complete"):
        fv.certified_radius(network, images, labels, method="guess")


def test_attacks_and_certificates_bracket_the_exact_radius(problem):
    network, images, labels = problem
    exact = fv.certified_radius(network, images, labels, method="linear")
    nearest = fv.find_adversarial(network, images, labels, effort="fast")
    assert bool((nearest.radius >= exact).all()) and nearest.attack == "minimal"
    inside = fv.find_adversarial(network, images, labels, fv.WassersteinBall(0.9 * float(exact.min())), "frank-wolfe")
    assert inside.outcome == ("not found",) * 2
    with pytest.raises(InvalidInputError, match="option 'steps' of attack minimal: unknown"):
        fv.find_adversarial(network, images, labels, steps=3)


def test_smooth(problem):
    network, images, labels = problem
    found = fv.smooth(network, images, labels, 0.01, "l2", n0=20, n=100, seed=1)
    assert [one.ground for one in found] == ["l2"] * 2 and found[0].method == "wasserstein-smoothing"
    again = fv.smooth(network, images, labels, Noise(0.01), "l2", n0=20, n=100, seed=1)
    assert [one.radius for one in found] == [one.radius for one in again]
    split = fv.smooth(network, images, labels, Splitting(0.5, 2))
    assert split[0].bound == "exact" and split[0].alpha == 0
    with pytest.raises(InvalidInputError, match="options n: given with splitting, which has none"):
        fv.smooth(network, images, labels, Splitting(0.5, 2), n=10)


def test_options_are_taken_by_every_function(problem):
    network, images, labels = problem
    radius = fv.certified_radius(network, images, labels, method="complete", timeout=5, tolerance=0.2, adversary=None)
    exact = fv.certified_radius(network, images, labels, method="linear")
    assert bool((radius <= exact).all()) and bool((radius * 1.21 >= exact).all())
    ball = fv.WassersteinBall(0.5 * float(exact[0]))
    assert fv.certify(network, images[0], labels[0], ball, method="complete", timeout=5).verdict == "certified"
    rough = fv.certified_radius(network, images, labels, tolerance=0.5)
    assert bool((rough * 1.5 >= fv.certified_radius(network, images, labels, options={"tolerance": 1e-4})).all())


class TestInputs:
    """Tensors, numpy arrays, data sets and loaders are the same images."""

    @pytest.fixture
    def radii(self, problem):
        return fv.certified_radius(*problem)

    def test_numpy_arrays(self, problem, radii):
        network, images, labels = problem
        arrays = images.numpy(), labels.numpy()
        assert torch.equal(fv.certified_radius(network, *arrays), radii)
        ball = fv.WassersteinBall(0.9 * float(radii.min()))
        assert [one.verdict for one in fv.certify_batch(network, *arrays, ball)] == ["certified"] * 2
        assert fv.certify(network, arrays[0][0], arrays[1][0], ball).verdict == "certified"
        assert fv.certify(network, arrays[0][0], int(arrays[1][0]), ball).verdict == "certified"
        assert len(fv.find_adversarial(network, *arrays, effort="fast")) == 2
        assert len(fv.smooth(network, *arrays, 0.01, n0=10, n=20)) == 2

    @pytest.mark.parametrize("layout", ["read-only", "reversed", "big-endian", "columns"])
    def test_arrays_of_every_layout(self, problem, radii, layout):
        array = problem[1].numpy()
        if layout == "reversed":
            array = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
        elif layout != "read-only":
            array = array.astype(">f4") if layout == "big-endian" else np.asfortranarray(array)
        array.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(fv.certified_radius(problem[0], array, problem[2]), radii)

    def test_loaders_and_data_sets(self, problem, radii):
        network, images, labels = problem
        pairs = torch.utils.data.TensorDataset(images, labels)
        loader = torch.utils.data.DataLoader(pairs, batch_size=1)
        for source in (loader, pairs, fv.as_dataset(pairs)):
            assert torch.equal(fv.certified_radius(network, source), radii)
        ball = fv.WassersteinBall(0.9 * float(radii.min()))
        assert [one.verdict for one in fv.certify_batch(network, loader, ball=ball)] == ["certified"] * 2
        assert len(fv.find_adversarial(network, loader, effort="fast")) == 2
        assert len(fv.smooth(network, loader, None, 0.01, n0=10, n=20)) == 2

    def test_what_is_neither_is_refused_with_an_error_of_ours(self, problem):
        network, images, labels = problem
        ball = fv.WassersteinBall(0.1)
        with pytest.raises(InvalidInputError, match="given list, expected a torch.Tensor or a numpy array"):
            fv.certify_batch(network, images.tolist(), labels, ball)
        with pytest.raises(InvalidInputError, match="dtype object: expected a floating-point dtype"):
            fv.certify_batch(network, np.array([[None]]), labels, ball)
        with pytest.raises(InvalidInputError, match="dtype torch.uint8: expected a floating-point dtype"):
            fv.certify_batch(network, np.ones((2, 1, 4, 4), np.uint8), labels, ball)
        with pytest.raises(InvalidInputError, match="labels: given none with images of type Tensor"):
            fv.certified_radius(network, images)
        with pytest.raises(InvalidInputError, match="given Dataset, expected a torch.Tensor"):
            fv.certified_radius(network, fv.load_dataset("digits")[:2], labels)
        with pytest.raises(DataError, match="given int, expected a data set or a loader"):
            fv.certified_radius(network, 5)
        with pytest.raises(DataError, match="entry of type int, expected an image and a label"):
            fv.certified_radius(network, [5])
        with pytest.raises(DataError, match="what normalises them belongs into the network"):
            fv.certified_radius(network, [(images[0] - 0.5, 1)])
        with pytest.raises(InvalidInputError, match="ball: given None, expected a WassersteinBall"):
            fv.certify_batch(network, images, labels)
        with pytest.raises(InvalidInputError, match="label"):
            fv.certify(network, images[0], "three", ball)


class TestProgress:
    def test_a_function_is_told_how_many_are_done(self, problem):
        network, images, labels = problem
        many, seen = images.repeat(3, 1, 1, 1), []
        radii = fv.certified_radius(
            network, many, labels.repeat(3), batch_size=4, progress=lambda done, total: seen.append((done, total))
        )
        assert seen == [(4, 6), (6, 6)]
        assert torch.equal(radii, fv.certified_radius(network, many, labels.repeat(3), batch_size=4))

    def test_methods_that_take_long_tell_after_every_image(self, problem):
        network, images, labels = problem
        seen = []
        ball = fv.WassersteinBall(0.01)
        found = fv.certify_batch(
            network, images, labels, ball, "complete", progress=lambda *numbers: seen.append(numbers)
        )
        assert seen == [(1, 2), (2, 2)] and len(found) == 2

    def test_a_bar_goes_to_standard_error(self, problem, capsys):
        fv.certify_batch(*problem, fv.WassersteinBall(0.01), progress=True)
        shown = capsys.readouterr()
        assert "2/2" in shown.err and shown.out == ""

    def test_what_is_known_at_an_interruption_is_not_lost(self, problem):
        network, images, labels = problem

        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(Interrupted) as stopped:
            fv.certified_radius(network, images, labels, method="complete", progress=interrupt)
        assert [one.verdict for one in stopped.value.certificates] == ["certified"]


class TestFrames:
    def test_records_do_without_pandas(self, problem):
        certificates = fv.certify_batch(*problem, fv.WassersteinBall(0.01))
        records = fv.to_records(certificates)
        assert records == [one.to_json() for one in certificates]
        assert fv.to_records(records) == records
        assert [one["outcome"] for one in fv.to_records(fv.find_adversarial(*problem, effort="fast"))] == ["found"] * 2

    def test_a_frame_has_a_row_an_image(self, problem):
        pandas = pytest.importorskip("pandas", reason="needs pandas, which is optional")
        certificates = fv.make_certifier(problem[0], "complete").search(*problem[1:])
        frame = fv.to_frame(certificates)
        assert isinstance(frame, pandas.DataFrame) and len(frame) == 2
        assert frame["radius"].tolist() == [one.radius for one in certificates]
        assert frame["upper_radius"].tolist() == [one.upper_radius for one in certificates]
        assert len(fv.to_frame([])) == 0

    def test_without_pandas_the_error_says_what_to_install(self, problem, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(DependencyError, match=r"pip install 'flowverify\[pandas\]'; fv.to_records"):
            fv.to_frame(fv.certify_batch(*problem, fv.WassersteinBall(0.01)))

    def test_something_else_is_refused(self):
        for wrong in (5, "text", {"radius": 1}):
            with pytest.raises(InvalidInputError, match="expected a list of certificates"):
                fv.to_frame(wrong)
        with pytest.raises(InvalidInputError, match="certificate 0: given int, expected a Certificate"):
            fv.to_frame([5])


def test_help_shows_the_types_themselves():
    text = pydoc.plain(pydoc.render_doc(fv.certify))
    assert (
        "certify(model: str | pathlib.Path | torch.nn.modules.module.Module, image: torch.Tensor | numpy.ndarray"
        in text
    )
    assert "ball: flowverify.ball.WassersteinBall" in text and "-> flowverify.results.Certificate" in text
    assert "'Tensor'" not in text


def test_warnings_of_torch_stay_inside(problem, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    images = problem[1]
    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "own.pt2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fv.load_model(str(tmp_path / "own.pt2"), input_shape=(1, 4, 4))
        labels = network(images).argmax(1)
        for bound in ("crown", "alpha-crown", "best"):
            fv.certified_radius(network, images, labels, bound=bound)
        fv.find_adversarial(network, images, labels, effort="fast")
    assert not [str(one.message) for one in caught]
