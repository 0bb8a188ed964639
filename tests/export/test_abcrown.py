"""alpha-beta-CROWN, played by a program that reads what it reads and writes what it writes."""

import fcntl
import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

import flowverify as fv
from flowverify.ball import WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.options import AlphaBetaCrownOptions
from flowverify.cli import app
from flowverify.doctor import Status, examine
from flowverify.errors import DataError, DependencyError, FlowverifyError, InvalidInputError
from flowverify.export.abcrown import PROGRAM, PYTHON, AlphaBetaCrown, AlphaBetaCrownCertifier, abcrown_command
from flowverify.results import Verdict
from flowverify.transport.references import flow_by_transport
from tests.export.exact import least_misclassifying_budget, small_image, small_network

pytest.importorskip("onnxruntime")

# Its own reading of files (read_vnnlib.py, load_model.py), and what abcrown.py says about them (utils.py and
# attack_utils.py of release 2025.12). Every run takes the next of the answers and keeps the configuration it was given.
STAND_IN = r"""
import json, os, pathlib, re, sys
import numpy, onnx, yaml

here = pathlib.Path(__file__).parent
settings = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
runs = json.loads((here / "runs.json").read_text()) if (here / "runs.json").exists() else []
(here / "runs.json").write_text(json.dumps([*runs, settings]))
answer = json.loads((here / "answers.json").read_text())[len(runs)]
print("Configurations:", settings)

model = onnx.load(settings["model"]["onnx_path"])
onnx.checker.check_model(model)
inputs = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
outputs = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
results = pathlib.Path(settings["general"]["results_file"])
if "vnnlib_path" in settings["specification"]:
    comparison = r"\((?:<=|>=) [XY]_\d+ (?:[XY]_\d+|-?[0-9.]+)\)"
    declared, box = set(), set()
    for line in open(settings["specification"]["vnnlib_path"]):
        line = line.partition(";")[0].strip()
        if found := re.fullmatch(r"\(declare-const ([XY]_\d+) Real\)", line):
            declared.add(found[1])
        elif line and not re.fullmatch(rf"\(assert (?:{comparison}|\(or (?:\(and {comparison}+\) ?)+\))\)", line):
            raise AssertionError(f"failed parsing line: {line}")
        box |= set(re.findall(r"^\(assert \((<=|>=) (X_\d+) ", line))
    assert declared == {f"X_{k}" for k in range(inputs)} | {f"Y_{k}" for k in range(outputs)}
    assert box == {(sign, f"X_{k}") for sign in ("<=", ">=") for k in range(inputs)}
else:  # the data of a loader: the origin with a radius
    name, loader, size = re.fullmatch(
        r'Customized\("(.+)\.py", "(.+)", inputs=(\d+)\)', settings["data"]["dataset"]
    ).groups()
    sys.path.insert(0, os.getcwd())
    data = getattr(__import__(name), loader)(settings["specification"], int(size))
    assert data["X"].shape == (1, inputs) and data["norm"] == 1 == settings["specification"]["norm"]
    assert data["eps"] == settings["specification"]["epsilon"] > 0 and settings["data"]["num_outputs"] == outputs

exec(answer["before"])
if "values" in answer:
    with open(settings["attack"]["cex_path"], "w") as file:
        file.write("(")
        for k, value in enumerate(numpy.array(answer["values"], dtype=numpy.float64)):
            file.write("(X_{}  {})\n".format(k, value))
        file.write("(Y_0  {})".format(0.5))
        for k in range(1, outputs):
            file.write("\n(Y_{}  {})".format(k, -0.5))
        file.write(")")
if "vnnlib_path" in settings["specification"]:
    print("Result:", answer["word"])
    with open(results, "w") as file:
        file.write(answer["word"])
        if answer["word"] == "sat":
            file.write("\n" + open(settings["attack"]["cex_path"]).read())
else:
    results.write_bytes(b"pickled")
    print(f"Result: {answer['word']} in 0.1234 seconds")
sys.stdout.flush()
exec(answer["after"])
"""


class StandIn:
    def __init__(self, folder):
        self.folder, self.program = folder, folder / "abcrown.py"
        self.program.write_text(STAND_IN)

    def answers(self, *answers):
        plain = [{"word": one} if isinstance(one, str) else one for one in answers]
        complete = [{"before": "", "after": "", **one} for one in plain]
        (self.folder / "answers.json").write_text(json.dumps(complete))
        return self

    @property
    def runs(self):
        return json.loads((self.folder / "runs.json").read_text())

    def certifier(self, clock=None, method="fine-tuned", **options):
        given = AlphaBetaCrownOptions(program=str(self.program), **{"encoding": "penalty", **options})
        return AlphaBetaCrownCertifier(case()[0], method, options=given, **({"clock": clock} if clock else {}))

    def certify(self, radius=0.01, **options):
        _, image, label = case()
        certifier = self.certifier(**options)
        certifier.prepare()
        return certifier.certify(image[None], torch.tensor([label]), WassersteinBall(radius))[0]


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path)


def case():
    network, image = small_network(1, "linear"), small_image(101)
    return network, image, int(network(image[None]).argmax())


def nearest(form="split"):
    """The exact radius from above, and the inputs that lead to the image there."""
    network, image, label = case()
    found = CompleteCertifier(network).search(image[None], torch.tensor([label]))[0]
    flow = flow_by_transport(image[None].double(), found.witness[None], mass_tolerance=1e-6)[0]
    values = torch.cat([flow.clamp(min=0), (-flow).clamp(min=0)]) if form == "split" else flow
    return found.radius, found.upper_radius, values.tolist()


CENTRE = {"word": "sat", "values": [0.0] * 48}  # the image itself, which is no counterexample


class TestAnswers:
    def test_unsat_is_certified(self, stand_in):
        found = stand_in.answers("unsat").certify(0.01, clock=lambda: 0.0)
        assert (found.verdict, found.bound, found.radius) == (Verdict.CERTIFIED, "alpha-beta-crown", 0.01)
        (settings,) = stand_in.runs
        assert settings["general"]["double_fp"] is True and settings["general"]["device"] == "cpu"
        assert settings["bab"] == {"timeout": 300.0, "decision_thresh": 0.0}
        assert "norm" not in settings["specification"] and "attack" in settings

    def test_a_counterexample_is_replayed(self, stand_in):
        low, high, values = nearest()
        radius = 1.02 * high
        found = stand_in.answers({"word": "sat", "values": values}).certify(radius)
        assert found.verdict is Verdict.FALSIFIED
        assert low <= found.upper_radius <= radius

    def test_a_false_counterexample_is_unknown(self, stand_in):
        found = stand_in.answers(CENTRE, "timeout", CENTRE).certify(1e-4)
        assert found.verdict is Verdict.UNKNOWN
        assert "the exported network does not confirm it" in found.note
        assert [run["attack"].get("pgd_order") for run in stand_in.runs] == [None, None, "skip"]

    def test_a_false_counterexample_does_not_prevent_a_proof(self, stand_in):
        assert stand_in.answers(CENTRE, "unsat", "unsat").certify(1e-4).verdict is Verdict.CERTIFIED

    def test_unsat_about_clearer_counterexamples_proves_nothing(self, stand_in):
        assert stand_in.answers(CENTRE, "unsat", "timeout").certify(1e-4).verdict is Verdict.UNKNOWN

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ({"word": "unsafe-bab"}, "with no counterexample to replay: witness .*counterexample.txt: cannot be read"),
            ({"word": "sat", "values": [0.0] * 47}, "47 inputs, expected X_0 to X_47"),
            ({"word": "sat", "values": [float("nan")] + [0.0] * 47}, "with a counterexample that is not finite"),
            ({"word": "unknown"}, "it answered unknown"),
        ],
    )
    def test_sat_without_a_counterexample_is_unknown(self, stand_in, answer, reason):
        found = stand_in.answers(answer).certify()
        assert found.verdict is Verdict.UNKNOWN
        assert re.search(reason, found.note)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ({"word": "unsat", "before": "print('out of it', file=sys.stderr); os._exit(3)"}, "code 3; .*: out of it"),
            ({"word": "unsat", "before": "raise MemoryError('no memory')"}, "exit code 1; last line: .*no memory"),
            ({"word": "unsat", "after": "sys.exit(4)"}, "exit code 4; last line: Result: unsat"),
            ({"word": "unsat", "after": "os.kill(os.getpid(), 11)"}, "exit code -11"),
            ({"word": "not unsat"}, "it answered 'not unsat'"),
            ({"word": ""}, "it gave no answer"),
            ({"word": "unsat", "after": "results.unlink()"}, "it gave no answer"),
            ({"word": "unsat", "after": "results.write_bytes(bytes(range(256)))"}, "it gave no answer"),
        ],
    )
    def test_what_breaks_down_is_an_error(self, stand_in, answer, reason):
        found = stand_in.answers(answer).certify()
        assert found.verdict is Verdict.ERROR
        assert re.search(reason, found.note)

    def test_early_timeout_is_unknown_and_a_late_one_a_timeout(self, stand_in):
        assert stand_in.answers("timeout").certify().verdict is Verdict.UNKNOWN
        (stand_in.folder / "runs.json").unlink()

        def clock():  # an hour has passed when it is done
            return 3600.0 * (stand_in.folder / "runs.json").exists()

        assert stand_in.answers("timeout").certify(clock=clock, timeout=4000.0).verdict is Verdict.UNKNOWN
        (stand_in.folder / "runs.json").unlink()
        late = {"word": "timeout", "after": "pathlib.Path(here / 'late').touch()"}

        def later():
            return 3600.0 * (stand_in.folder / "late").exists()

        assert stand_in.answers(late).certify(clock=later, timeout=3590.0).verdict is Verdict.TIMEOUT

    def test_what_hangs_is_ended_with_all_that_it_started(self, stand_in):
        """Its clock is moved by the hanging program alone; the lock is free once all who had it are gone."""
        hang = """
import fcntl, signal
lock = open(here / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
os.fork()
print("still at it", flush=True)
(here / "late").touch()
while True:
    signal.pause()
"""

        def clock():
            return 3600.0 * (stand_in.folder / "late").exists()

        found = stand_in.answers({"word": "unsat", "before": hang}).certify(clock=clock, timeout=600.0)
        assert found.verdict is Verdict.TIMEOUT
        assert "did not stop by itself after 600 s; last line: still at it" in found.note
        with (stand_in.folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

    def test_a_misclassified_image_is_not_asked_about(self, stand_in):
        _, image, label = case()
        wrong = torch.tensor([(label + 1) % 3])
        found = stand_in.answers().certifier().certify(image[None], wrong, WassersteinBall(0.1))[0]
        assert found.verdict is Verdict.MISCLASSIFIED
        assert not (stand_in.folder / "runs.json").exists()


class TestOwnBall:
    """l1-penalty: its L1 ball, of data from a loader, whose results are pickled: the log says them."""

    def test_safe_is_certified(self, stand_in):
        found = stand_in.answers("safe-incomplete").certify(0.01, encoding="l1-penalty")
        assert found.verdict is Verdict.CERTIFIED
        (settings,) = stand_in.runs
        assert settings["specification"]["norm"] == 1.0 and settings["attack"]["pgd_order"] == "skip"
        assert settings["specification"]["epsilon"] == pytest.approx(0.01 * float(case()[1].sum()))

    def test_unsafe_is_replayed(self, stand_in):
        low, high, values = nearest("delta")
        answer = {"word": "unsafe-bab", "values": values}
        found = stand_in.answers(answer).certify(1.02 * high, encoding="l1-penalty")
        assert found.verdict is Verdict.FALSIFIED and found.upper_radius >= low

    @pytest.mark.parametrize(
        ("answer", "verdict"),
        [
            ("unknown", Verdict.UNKNOWN),
            ("safe (timed out)", Verdict.UNKNOWN),
            ("unsafe-bab", Verdict.UNKNOWN),
            ("saf", Verdict.ERROR),
            ({"word": "safe", "before": "print('Result: unknown in 0.1 seconds')"}, Verdict.ERROR),
        ],
    )
    def test_else_nothing_is(self, stand_in, answer, verdict):
        assert stand_in.answers(answer).certify(encoding="l1-penalty").verdict is verdict


class TestBoth:
    def test_its_own_ball_is_asked_about_first(self, stand_in):
        assert stand_in.answers("safe").certify(encoding="both").verdict is Verdict.CERTIFIED
        assert "vnnlib_path" not in stand_in.runs[0]["specification"]

    def test_then_the_box_with_what_time_is_left(self, stand_in):
        _, high, values = nearest()
        stand_in.answers("unknown", {"word": "sat", "values": values})
        found = stand_in.certify(1.02 * high, encoding="both", clock=lambda: 0.0, timeout=100.0)
        assert found.verdict is Verdict.FALSIFIED
        assert [run["bab"]["timeout"] for run in stand_in.runs] == [50.0, 100.0]  # no time has passed

    @pytest.mark.parametrize("answers", [("saf", "timeout"), ("unknown", "saf")])
    def test_an_error_is_not_hidden(self, stand_in, answers):
        found = stand_in.answers(*answers).certify(encoding="both")
        assert found.verdict is Verdict.ERROR and "it answered 'saf'" in found.note


class TestSettings:
    def test_of_a_file_reach_it_unless_they_are_what_is_asked(self, stand_in, tmp_path):
        own = tmp_path / "own.yaml"
        own.write_text("solver: {batch_size: 7}\nbab: {timeout: 1e9, decision_thresh: -5}\ngeneral: {double_fp: no}\n")
        stand_in.answers("unsat").certify(config=str(own), timeout=9.0)
        (settings,) = stand_in.runs
        assert settings["solver"] == {"batch_size": 7} and settings["general"]["double_fp"] is False
        assert settings["bab"]["decision_thresh"] == 0 and 1 <= settings["bab"]["timeout"] <= 9

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("specification: {norm: 1}", InvalidInputError, "section 'specification', expected only general, solver"),
            ("debug: {rescale_vnnlib_ptb: 0.1}", InvalidInputError, "section 'debug'"),
            ("general: 3", InvalidInputError, "expected sections of settings"),
            ("", InvalidInputError, "expected sections of settings"),
            ("general: {", DataError, "expected YAML"),
            (None, DataError, "cannot be read"),
        ],
    )
    def test_that_cannot_be(self, stand_in, tmp_path, text, error, message):
        own = tmp_path / "own.yaml"
        if text is not None:
            own.write_text(text)
        with pytest.raises(error, match=message):
            stand_in.certifier(config=str(own))

    def test_of_branching_are_not_for_its_own_ball(self, stand_in, tmp_path):
        own = tmp_path / "own.yaml"
        general = "{complete_verifier: auto, seed: 3, csv_name: other.csv, root_path: elsewhere}"
        own.write_text(f"bab: {{max_domains: 9}}\ngeneral: {general}\nsolver: {{batch_size: 7}}\n")
        stand_in.answers("unknown", "timeout").certify(config=str(own), encoding="both")
        ball, box = stand_in.runs
        assert "max_domains" not in ball["bab"] and box["bab"]["max_domains"] == 9
        assert (ball["general"]["complete_verifier"], box["general"]["complete_verifier"]) == ("bab", "auto")
        assert ball["general"]["seed"] == box["general"]["seed"] == 3 and ball["solver"] == box["solver"]
        assert ball["general"]["csv_name"] is box["general"]["csv_name"] is None and not ball["general"]["root_path"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"encoding": "linear"},
                "encoding for alpha-beta-crown 'linear': expected one of both, l1-penalty",
            ),
            ({"timeout": 0.0}, "timeout: given 0.0"),
            ({"device": "tpu"}, "device of alpha-beta-crown 'tpu': expected one of cpu, cuda"),
        ],
    )
    def test_options_that_cannot_be(self, stand_in, options, message):
        with pytest.raises(FlowverifyError, match=message):
            stand_in.certifier(**options)


class TestProgram:
    def test_option_before_environment(self, tmp_path, monkeypatch):
        monkeypatch.delenv(PYTHON, raising=False)
        paths = [tmp_path / name for name in ("given.py", "named.py", "run")]
        for path in paths:
            path.write_text("#!/bin/sh\nexit 3\n")
        paths[2].chmod(0o755)
        monkeypatch.setenv(PROGRAM, str(paths[1]))
        assert abcrown_command(str(paths[0])) == [sys.executable, str(paths[0])]
        assert abcrown_command() == [sys.executable, str(paths[1])]
        monkeypatch.setenv(PYTHON, str(paths[2]))
        assert abcrown_command() == [str(paths[2]), str(paths[1])]
        assert abcrown_command(python=sys.executable)[0] == sys.executable
        assert abcrown_command(str(paths[2])) == [str(paths[2])]
        engine = AlphaBetaCrown(AlphaBetaCrownOptions(program=str(paths[2])))
        outcome = engine.solve({"specification": {}}, 48, tmp_path, 1.0)
        assert outcome.result == "error" and "exit code 3" in outcome.message

    def test_what_cannot_be_run_is_an_error(self, tmp_path):
        path = tmp_path / "binary"
        path.write_bytes(b"\x7fELF, but not really")
        path.chmod(0o755)
        engine = AlphaBetaCrown(AlphaBetaCrownOptions(program=str(path)))
        outcome = engine.solve({"specification": {}}, 48, tmp_path, 1.0)
        assert outcome.result == "error" and "it cannot be run (Exec format error)" in outcome.message

    @pytest.mark.parametrize(
        ("program", "python", "message"),
        [
            (
                "",
                "",
                "no program is named; install https://.* by --option program=PATH or FLOWVERIFY_ABCROWN",
            ),
            ("nowhere.py", "", "there is no program nowhere.py; install"),
            ("no-such-program", "", "there is no program no-such-program; install"),
            (__file__, "no-such-python", "there is no Python no-such-python; name that of the environment"),
        ],
    )
    def test_missing(self, program, python, message, monkeypatch):
        monkeypatch.delenv(PROGRAM, raising=False)
        with pytest.raises(DependencyError, match=f"^engine alpha-beta-crown: {message}"):
            abcrown_command(program, python)

    def test_without_what_replays_need(self, stand_in, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DependencyError, match="replays need onnxruntime: pip install 'flowverify\\[runtime\\]'"):
            stand_in.certifier()

    def test_the_doctor_says_so(self, stand_in, monkeypatch):
        monkeypatch.delenv(PROGRAM, raising=False)
        absent = {one.name: one for one in examine()}["alpha-beta-crown"]
        assert absent.status is Status.ABSENT and "no program is named; install" in absent.detail
        monkeypatch.setenv(PROGRAM, str(stand_in.program))
        assert {one.name: one for one in examine()}["alpha-beta-crown"].status is Status.OK


@pytest.mark.slow
@pytest.mark.skipif(bool(AlphaBetaCrownCertifier.missing()), reason=AlphaBetaCrownCertifier.missing() or "it is there")
@pytest.mark.parametrize(("seed", "kind"), [(2, "convolution"), (5, "linear")])
def test_the_real_one_contradicts_no_exact_program(seed, kind):
    network, image = small_network(seed, kind), small_image(100 + seed)
    label = network(image[None]).argmax(1)
    exact = least_misclassifying_budget(network, image, int(label)) / float(image.sum())
    engine = AlphaBetaCrownCertifier(network, options=AlphaBetaCrownOptions(timeout=40.0))
    low, above, high = (
        engine.certify(image[None], label, WassersteinBall(factor * exact))[0].verdict for factor in (0.5, 1.01, 1.5)
    )
    assert low is Verdict.CERTIFIED
    assert {above, high} <= {Verdict.FALSIFIED, Verdict.UNKNOWN, Verdict.TIMEOUT}
    if kind == "linear":  # its attack finds nothing on the other
        assert high is Verdict.FALSIFIED


class TestUse:
    def test_in_the_library(self, stand_in):
        network, image, label = case()
        options = {"engine": "alpha-beta-crown", "program": str(stand_in.program), "timeout": 9}
        stand_in.answers("safe", "safe-incomplete")
        assert fv.certify(network, image, label, WassersteinBall(0.01), **options).verdict == "certified"
        vanilla = fv.certify(network, image, label, WassersteinBall(0.01), "vanilla", **options)
        assert (vanilla.verdict, vanilla.method) == ("certified", "vanilla")

    def test_on_the_command_line(self, stand_in, monkeypatch):
        monkeypatch.setenv(PROGRAM, str(stand_in.program))
        stand_in.answers("safe", "unknown", "timeout")
        arguments = ["verify", "digits-fc3", "--engine", "alpha-beta-crown", "--radius", "0.02", "--index", "0:2"]
        done = CliRunner().invoke(app, [*arguments, "--timeout", "9", "--json"])
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["verdict"], row["bound"]) for row in rows] == [
            ("certified", "alpha-beta-crown"),
            ("unknown", "alpha-beta-crown"),
        ]
        assert all(run["bab"]["timeout"] <= 9 for run in stand_in.runs)

    def test_missing_on_the_command_line(self, monkeypatch):
        monkeypatch.delenv(PROGRAM, raising=False)
        done = CliRunner().invoke(app, ["verify", "digits-fc3", "--engine", "alpha-beta-crown", "--radius", "0.02"])
        assert done.exit_code == 2
        assert "engine alpha-beta-crown: no program is named; install" in " ".join(done.output.split())
