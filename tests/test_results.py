"""A certificate is the same after it was written down and read."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowverify.attack import make_attack
from flowverify.ball import WassersteinBall
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.network import Network
from flowverify.results import Certificate, Verdict
from flowverify.smoothing import SmoothedCertificate

NUMBERS = st.floats(0, 1e6)
CERTIFICATES = st.builds(
    Certificate,
    verdict=st.sampled_from(Verdict),
    label=st.integers(0, 9),
    prediction=st.integers(0, 9),
    method=st.sampled_from(["fine-tuned", "package:Mine"]),
    bound=st.just("best"),
    ground=st.sampled_from(["l1", "l2^2"]),
    radius=NUMBERS,
    margin=st.none() | st.floats(-1e6, 1e6),
    seconds=NUMBERS.map(lambda seconds: round(seconds, 6)),
    upper_radius=st.none() | NUMBERS,
    note=st.text(),
    cap=st.none() | NUMBERS,
)


@given(CERTIFICATES)
@settings(deadline=None)
def test_round_trip(certificate):
    record = json.loads(json.dumps(certificate.to_json()))
    assert Certificate.from_json(record) == certificate
    assert Certificate.from_json({"index": 3, "dataset": "digits", **record}) == certificate


def test_a_witness_is_not_written():
    plain = Certificate(Verdict.FALSIFIED, 1, 2, "complete", "branch-and-bound", "l1", 0.1, None, 0.5)
    shown = replace(plain, witness=torch.ones(1, 2, 2))
    assert shown.to_json() == plain.to_json() and "witness" not in shown.to_json()
    assert "note" not in plain.to_json() and "upper_radius" not in plain.to_json()


def test_what_is_no_certificate_is_refused():
    record = Certificate(Verdict.CERTIFIED, 1, 1, "vanilla", "crown", "l1", 0.1, 0.2, 0.5).to_json()
    with pytest.raises(UnknownNameError, match="unknown verdict 'sure': expected one of certified, error, falsified"):
        Certificate.from_json(record | {"verdict": "sure"})
    lacking = {key: value for key, value in record.items() if key not in ("label", "ground")}
    with pytest.raises(InvalidInputError, match=re.escape("expected a certificate, which has label, ground too")):
        Certificate.from_json(lacking)


def test_a_smoothed_certificate_is_one_too():
    shared = {"label": 1, "prediction": None, "method": "wasserstein-smoothing", "bound": "tight", "ground": "l2"}
    own = {"probability": 0.9, "successes": 45, "samples": 50, "base_accuracy": 0.8, "alpha": 0.05}
    found = SmoothedCertificate(verdict=Verdict.UNKNOWN, radius=0.0, seconds=0.25, **shared, **own)
    record = json.loads(json.dumps(found.to_json()))
    assert SmoothedCertificate.from_json(record) == found and record.items() >= {**shared, **own}.items()
    assert Certificate.from_json(record).verdict is Verdict.UNKNOWN


def test_an_attack_speaks_of_verdicts_too():
    network = Network.sequential((1, 2, 2), [nn.Flatten(), nn.Linear(4, 2, bias=False)])
    images = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    with torch.no_grad():
        network(images)  # the first pixel speaks for class 0, the second for class 1
        next(network.parameters()).copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    found = make_attack("frank-wolfe", network).run(images, torch.tensor([0, 0]), WassersteinBall(0.7))
    assert [found.to_json(k)["verdict"] for k in range(2)] == ["falsified", "misclassified"]
    far = make_attack("frank-wolfe", network).run(images[:1], torch.tensor([0]), WassersteinBall(0.1))
    assert far.to_json(0)["verdict"] == "unknown" and far.to_json(0)["outcome"] == "not found"
