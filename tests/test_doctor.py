"""The doctor finds what is there, what is missing, and survives what is broken."""

import importlib

import pytest

from flowverify import doctor
from flowverify.doctor import Status, examine


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in examine()}


def test_this_installation_is_whole(findings):
    failed = [finding for finding in findings.values() if finding.status is Status.FAILED]
    assert not failed
    assert {"Python", "torch", "numba", "POT", "onnx", "auto_LiRPA", "models", "HiGHS", "MNIST"} <= set(findings)


def test_the_self_test_knows_its_answer(findings):
    assert "exact is 0.5" in findings["auto_LiRPA"].detail
    assert "digits-fc3" in findings["models"].detail


def test_a_missing_extra_is_absent_with_advice(monkeypatch):
    real = importlib.import_module

    def missing(name):
        if name == "cvxpy":
            raise ImportError("No module named 'cvxpy'")
        return real(name)

    monkeypatch.setattr(doctor, "import_module", missing)
    finding = {finding.name: finding for finding in examine()}["cvxpy"]
    assert finding.status is Status.ABSENT
    assert finding.advice == "pip install 'flowverify[solvers]'"


def test_a_broken_package_fails_with_advice():
    def breaks():
        raise RuntimeError("cannot load\nlibrary")

    finding = doctor._guarded("torch", breaks, "pip install torch")
    assert finding == doctor.Finding("torch", Status.FAILED, "RuntimeError: cannot load library", "pip install torch")


@pytest.mark.parametrize("root", ["", "nowhere", "empty"])
def test_missing_data_is_absent(tmp_path, monkeypatch, root):
    (tmp_path / "empty" / "mnist").mkdir(parents=True)
    monkeypatch.setenv("FLOWVERIFY_DATA", str(tmp_path / root) if root else "")
    finding = doctor._mnist()
    assert finding.status is Status.ABSENT
    assert finding.advice
