"""Marabou on every encoding that it takes against exact mixed-integer programs, and everything that can go wrong."""

import json
import sys

import pytest
import torch
from contracts import quick
from typer.testing import CliRunner

import flowverify as fv
from flowverify.ball import WassersteinBall
from flowverify.cli import app
from flowverify.errors import DependencyError, FlowverifyError
from flowverify.export.marabou import MarabouCertifier, MarabouProcess, marabou_missing
from flowverify.export.outside import Outcome
from flowverify.results import Verdict
from tests.export.exact import least_misclassifying_budget, small_image, small_network

needs_marabou = pytest.mark.skipif(bool(marabou_missing()), reason=marabou_missing() or "Marabou is there")
ENCODINGS = ("cuts", "linear", "outputs", "penalty")
CASES = quick([(seed, "linear" if seed % 2 else "convolution") for seed in range(20)], 2)


def case(seed, kind):
    network, image = small_network(seed, kind), small_image(100 + seed)
    return network, image, int(network(image[None]).argmax())


@pytest.fixture(scope="module")
def process():
    with MarabouProcess() as running:
        yield running


def certifier(network, process, method="fine-tuned", encoding="linear", timeout=3600.0):
    found = MarabouCertifier(network, method, encoding=encoding, timeout=timeout, process=process)
    found.close = lambda: None  # the process is shared
    return found


@needs_marabou
@pytest.mark.parametrize(("seed", "kind"), CASES)
def test_agrees_with_an_exact_program_on_both_sides_of_the_radius(seed, kind, process):
    network, image, label = case(seed, kind)
    exact = least_misclassifying_budget(network, image, label) / float(image.sum())
    for encoding in ENCODINGS:
        engine = certifier(network, process, encoding=encoding)
        if exact == float("inf"):
            assert engine.certify(image[None], torch.tensor([label]), WassersteinBall(2.0))[0].verdict == "certified"
            continue
        for factor, expected in ((1 - 1e-3, Verdict.CERTIFIED), (1 + 1e-3, Verdict.FALSIFIED)):
            ball = WassersteinBall(exact * factor)
            found = engine.certify(image[None], torch.tensor([label]), ball)[0]
            assert found.verdict is expected, (encoding, factor, found)
            if expected is Verdict.FALSIFIED:
                assert exact * (1 - 1e-6) <= found.upper_radius <= ball.radius


@needs_marabou
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_vanilla_is_certified_up_to_the_vanilla_radius(encoding, process):
    seed = 3
    network, image, label = case(seed, "linear")
    exact = least_misclassifying_budget(network, image, label, positivity=False) / float(image.sum())
    fine_tuned = least_misclassifying_budget(network, image, label) / float(image.sum())
    assert exact < 0.99 * fine_tuned
    engine = certifier(network, process, "vanilla", encoding)
    below, above = (
        engine.certify(image[None], torch.tensor([label]), WassersteinBall(exact * factor))[0]
        for factor in (1 - 1e-3, 1 + 1e-3)
    )
    assert below.verdict is Verdict.CERTIFIED
    assert above.verdict is Verdict.UNKNOWN  # the counterexample has negative pixels: no image
    assert "replay" in above.note


@needs_marabou
def test_search_brackets_the_exact_radius(process):
    network, image, label = case(1, "linear")
    exact = least_misclassifying_budget(network, image, label) / float(image.sum())
    found = certifier(network, process).search(image[None], torch.tensor([label]))[0]
    assert found.radius <= exact <= found.upper_radius * (1 + 1e-6)
    assert found.upper_radius <= found.radius * 1.03


@needs_marabou
def test_digits_verdicts_lie_between_certificate_and_replayed_images(process):
    """No contradiction with fine-tuned certificates from below; what is falsified was replayed."""
    network, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:2]
    radii = fv.certified_radius(network, data.images, data.labels)
    engine = certifier(network, process)
    for image, label, radius in zip(data.images, data.labels, radii.tolist(), strict=True):
        low = engine.certify(image[None], label[None], WassersteinBall(0.5 * radius))[0]
        high = engine.certify(image[None], label[None], WassersteinBall(8 * radius))[0]
        assert low.verdict is Verdict.CERTIFIED
        assert high.verdict is Verdict.FALSIFIED


class FakeProcess:
    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def solve(self, *arguments):
        return self.outcomes.pop(0)

    solve_program = solve

    def close(self):
        pass


@pytest.mark.parametrize(
    ("outcome", "verdict", "note"),
    [
        (Outcome("timeout", 1.0, message="last line: round 7"), Verdict.TIMEOUT, "round 7"),
        (Outcome("error", 1.0, message="ended with exit code -11"), Verdict.ERROR, "-11"),
        (Outcome("unknown", 1.0), Verdict.UNKNOWN, "answered unknown"),
    ],
)
def test_what_is_no_proof_certifies_nothing(outcome, verdict, note):
    network, image, label = case(1, "linear")
    found = MarabouCertifier(network, encoding="linear", process=FakeProcess(outcome)).certify(
        image[None], torch.tensor([label]), WassersteinBall(0.01)
    )[0]
    assert found.verdict is verdict
    assert note in found.note


def test_a_false_counterexample_is_unknown_even_if_no_clearer_one_exists():
    network, image, label = case(1, "linear")
    centre = torch.zeros(48, dtype=torch.float64).numpy()
    fake = FakeProcess(Outcome("sat", 1.0, centre), Outcome("unsat", 1.0), Outcome("sat", 1.0, centre))
    pytest.importorskip("onnxruntime")
    found = MarabouCertifier(network, encoding="linear", process=fake).certify(
        image[None], torch.tensor([label]), WassersteinBall(1e-4)
    )[0]
    assert found.verdict is Verdict.UNKNOWN
    assert "the exported network does not confirm it" in found.note
    assert not fake.outcomes


# Told before the worker hangs: the clock that the engine sees is moved by this alone, an hour each time.
HANG = """
import os, signal, sys
print("still at it", flush=True)
with open("late", "ab", buffering=0) as late:
    late.write(b".")
os.write(int(sys.argv[1]), b"{")
while True:
    signal.pause()
"""
SCRIPTS = {
    "crash": ("import sys; print('the last thing'); sys.stdout.flush(); import os; os._exit(3)", "error", "code 3"),
    "hang": (HANG, "timeout", "still at it"),
    "nonsense": (
        'import os, sys\nfor _ in sys.stdin: os.write(int(sys.argv[1]), b\'{"result": "quit", "seconds": 0}\\n\')',
        "error",
        "'quit'",
    ),
    "garbage": ("import os, sys\nfor _ in sys.stdin: os.write(int(sys.argv[1]), b'nan?\\n')", "error", "nan?"),
}


@pytest.mark.parametrize("encoding", ["cuts", "linear"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_engine_that_breaks_down_is_an_outcome(name, encoding, tmp_path):
    script, result, message = SCRIPTS[name]
    worker, late = tmp_path / "worker.py", tmp_path / "late"
    worker.write_text(script.replace('"late"', repr(str(late))))
    late.touch()

    def clock():
        return 3600.0 * late.stat().st_size

    network, image, label = case(1, "linear")
    process = MarabouProcess(worker, clock)
    engine = MarabouCertifier(network, encoding=encoding, timeout=600.0, process=process, clock=clock)
    found = engine.certify(image[None], torch.tensor([label]), WassersteinBall(0.01))[0]
    engine.close()
    assert found.verdict == result
    assert message in found.note


@needs_marabou
def test_command_prints_the_fields_of_every_verdict(monkeypatch):
    arguments = ["verify", "digits-fc3", "--engine", "marabou", "--index", "1", "--radius", "0.02", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout.splitlines()[-1])
    expected = {"index", "label", "prediction", "method", "bound", "ground", "radius", "verdict", "seconds"}
    assert expected <= set(row)
    assert (row["verdict"], row["bound"], row["method"]) == ("certified", "marabou", "fine-tuned")


def test_command_names_the_engines():
    done = CliRunner().invoke(app, ["verify", "digits-fc3", "--engine", "z3", "--radius", "0.02"])
    assert done.exit_code == 2
    assert "unknown engine 'z3': expected one of MODULE:CLASS, alpha-beta-crown, flowverify, marabou" in done.output


def test_missing_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "maraboupy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="engine marabou: maraboupy is not installed: pip install"):
        MarabouCertifier(small_network(0, "linear"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoding": "l1-penalty"},
            "unknown encoding for marabou 'l1-penalty': expected one of cuts, linear, outputs",
        ),
        ({"timeout": 0}, "timeout: given 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(FlowverifyError, match=message):
        MarabouCertifier(small_network(0, "linear"), **options)
