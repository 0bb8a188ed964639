"""Ground cost x who was asked x verdict: what comes out is right, and every counterexample lies within its radius."""

from functools import cache

import pytest
import torch

from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.export.folder import Layout, Source, write_folder
from flowverify.export.marabou import MarabouCertifier, MarabouProcess, marabou_missing
from flowverify.export.plan import Request
from flowverify.export.results import collect, descend, repaired
from flowverify.results import Verdict
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.ground import parse_ground
from flowverify.transport.references import flow_by_transport
from tests.export.exact import least_misclassifying_budget, small_image, small_network

GROUNDS = ("l1", "l2", "l2^2", "l1^1.5", "local:3")
FALSIFIED, CERTIFIED, UNKNOWN = Verdict.FALSIFIED, Verdict.CERTIFIED, Verdict.UNKNOWN


# Between neighbours a move costs the same under l1 and its powers, and under l2^2: the ball around the ball has its
# counterexamples at the same radius, and there is nothing unknown.
SAME = ("l1", "l1^1.5", "l2^2")
VERDICTS = [
    (ground, verdict)
    for ground in GROUNDS
    for verdict in (CERTIFIED, FALSIFIED, UNKNOWN)
    if verdict is not UNKNOWN or ground not in SAME
]
# What is unknown to cuts ends with the question that linear starts with, after seconds.
QUESTIONS = [
    *(("linear", *row) for row in VERDICTS),
    *(
        pytest.param("cuts", *row, marks=[] if row[0] == "l1" else [pytest.mark.slow])
        for row in VERDICTS
        if row[1] is not UNKNOWN
    ),
]


@cache
def case():
    network, image = small_network(7, "linear"), small_image(107)
    return network, image, int(network(image[None]).argmax())


@cache
def exact(ground):
    """Both ends of the exact radius; for l1 by a mixed-integer program that shares no code with the package."""
    network, image, label = case()
    if ground == "l1":
        return (least_misclassifying_budget(network, image, label) / float(image.sum()),) * 2
    found = CompleteCertifier(network).search(image[None], torch.tensor([label]), Threat(ground))[0]
    return found.radius, found.upper_radius


def radius_for(verdict, ground):
    """A radius at which this is what can be known: outside verifiers are asked about the l1 ball around the ball."""
    low, high = exact(ground)
    covered = parse_ground(ground).from_l1(exact("l1")[0])
    if verdict is CERTIFIED:
        return 0.99 * covered
    if verdict is FALSIFIED:
        return 1.05 * high
    assert 1.01 * covered < 0.99 * low
    return (covered + low) / 2


@pytest.fixture(scope="module")
def process():
    with MarabouProcess() as running:
        yield running


@pytest.mark.skipif(bool(marabou_missing()), reason=marabou_missing() or "Marabou is there")
@pytest.mark.parametrize(("encoding", "ground", "verdict"), QUESTIONS)
def test_marabou(encoding, ground, verdict, process, monkeypatch):
    monkeypatch.setattr("flowverify.export.marabou.MarabouProcess", lambda: process)
    monkeypatch.setattr(MarabouCertifier, "close", lambda self: None)  # the process is shared
    network, image, label = case()
    ball = WassersteinBall(radius_for(verdict, ground), ground)
    engine = MarabouCertifier(network, encoding=encoding, timeout=3600.0)
    found = engine.certify(image[None], torch.tensor([label]), ball)[0]
    assert found.verdict is verdict, found.note
    if verdict is FALSIFIED:
        assert exact(ground)[0] * (1 - 1e-6) <= found.upper_radius <= ball.radius


@pytest.mark.parametrize(("ground", "verdict"), VERDICTS)
def test_answers_of_a_verifier_from_outside(ground, verdict, tmp_path):
    """It is right about what it was asked: ``unsat``, or ``sat`` with a point just beyond the boundary in l1."""
    pytest.importorskip("onnxruntime")
    network, image, label = case()
    radius = radius_for(verdict, ground)
    request = Request("linear", (radius,), ground=ground)
    source = Source("small", "random", "test", (7,))
    manifest = write_folder(
        tmp_path / "out", network, image[None], torch.tensor([label]), request, source, Layout(timeout=1.0)
    )
    (one,) = manifest["instances"]
    answer = "unsat" if verdict is CERTIFIED else "sat"
    (tmp_path / "results.csv").write_text(f"{one['onnx']},{one['vnnlib']},{answer},1.0\n")
    if answer == "sat":
        nearest = CompleteCertifier(network).search(image[None], torch.tensor([label]))[0]
        assert nearest.upper_radius <= parse_ground(ground).to_l1(radius)  # of the ball that was asked about
        flow = flow_by_transport(image[None].double(), nearest.witness[None], mass_tolerance=1e-6)[0]
        values = torch.cat([flow.clamp(min=0), (-flow).clamp(min=0)]).tolist()
        name = f"{one['vnnlib'].removeprefix('vnnlib/').removesuffix('.vnnlib')}.counterexample"
        (tmp_path / name).write_text("sat\n" + "\n".join(f"(X_{k} {value!r})" for k, value in enumerate(values)))
    ((index, found),) = collect(network, tmp_path / "out", tmp_path / "results.csv")
    assert (index, found.verdict, found.ground) == (7, verdict, ground), found.note
    if verdict is FALSIFIED:
        assert exact(ground)[0] * (1 - 1e-6) <= found.upper_radius <= radius
    if verdict is UNKNOWN:
        assert found.note.startswith("replay: the original network keeps the label, margin ")


@pytest.mark.parametrize("cap", [None, 1.6])
@pytest.mark.parametrize("ground", GROUNDS)
def test_steps_from_a_point_anywhere_stay_in_the_ball(ground, cap):
    """Starting far outside: with all mass in the first pixel, negative pixels, and at another mass."""
    network, image, label = case()
    certifier = CompleteCertifier(network)
    image = image.double()
    corner = torch.zeros_like(image)
    corner[0, 0, 0] = image.sum()
    for point in (corner, image - 2 * corner, 1.3 * image.flip(-1), image):
        for radius in (0.05, 0.6):
            ball = WassersteinBall(radius, ground, cap)
            start = repaired(point, image, ball)
            best, margin = descend(certifier.subject, start, image, label, ball)
            for found in (start, best):
                assert bool((found >= 0).all()) and (cap is None or bool((found <= cap).all()))
                torch.testing.assert_close(found.sum(), image.sum(), rtol=1e-12, atol=0)
                assert float(wasserstein_distance(image, found, ground, mass_tolerance=1e-9)) <= radius
            logits = network.double()(best[None])[0]
            network.float()
            others = torch.cat([logits[:label], logits[label + 1 :]])
            assert margin == pytest.approx(float(logits[label] - others.max()), abs=1e-9)
