"""A certificate is the same after it was written down and read."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.results import Certificate, Verdict

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
