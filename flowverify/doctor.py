"""What is installed, what works, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flowverify.registry import ENGINES


class Status(StrEnum):
    """The outcome of one check."""

    OK = "ok"
    ABSENT = "absent"  # not there, and not needed for certification
    FAILED = "failed"  # certification needs it


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""


_OPTIONAL = {
    "matplotlib": ("matplotlib", "pictures", "pip install 'flowverify[plot]'"),
    "cvxpy": ("cvxpy", "linear programs, to check against", "pip install 'flowverify[solvers]'"),
    "highspy": ("HiGHS", "linear programs, to check against", "pip install 'flowverify[solvers]'"),
    "onnxruntime": ("onnxruntime", "replaying exported networks", "pip install 'flowverify[runtime]'"),
}


def examine() -> list[Finding]:
    """Runs every check; a check that breaks down is a finding, never an exception."""
    required: list[tuple[str, Callable[[], Finding], str]] = [
        ("Python", _python, "install Python 3.11 or newer"),
        ("torch", _torch, "pip install torch"),
        ("numba", _numba, "pip install --force-reinstall numba"),
        ("POT", _transport, "pip install --force-reinstall POT"),
        ("onnx", _onnx, "pip install onnx"),
        ("auto_LiRPA", _lirpa, "pip install --no-deps auto-LiRPA==0.3"),
        ("digits", _digits, "pip install scikit-learn"),
        ("models", _models, "pip install --force-reinstall --no-deps flowverify"),
    ]
    findings = [_guarded(name, check, advice) for name, check, advice in required]
    return [*findings, *(_optional(module) for module in _OPTIONAL), *_engines(), _mnist()]


def _guarded(name: str, check: Callable[[], Finding], advice: str) -> Finding:
    try:
        finding = check()
    except Exception as error:  # a broken installation can raise anything
        return Finding(name, Status.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}", advice)
    return finding if finding.status is Status.OK else Finding(name, finding.status, finding.detail, advice)


def _python() -> Finding:
    status = Status.OK if sys.version_info >= (3, 11) else Status.FAILED
    return Finding("Python", status, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    devices = f"CUDA: {', '.join(names)}" if names else "no CUDA device, computes on the CPU"
    return Finding("torch", Status.OK, f"{torch.__version__}; {devices}; {torch.get_num_threads()} threads")


def _numba() -> Finding:
    """The compiled support function against the one in torch."""
    import torch

    from flowverify.transport.support import support

    generator = torch.Generator().manual_seed(0)
    coefficients = torch.rand(2, 3, 1, 5, 4, generator=generator, dtype=torch.float64)
    images = torch.rand(2, 1, 5, 4, generator=generator, dtype=torch.float64)
    budget = torch.tensor([0.1, 2.0], dtype=torch.float64)
    compiled, plain = (support(coefficients, images, budget, backend=name).excess for name in ("compiled", "torch"))
    error = float((compiled - plain).abs().max())
    detail = f"{version('numba')}; compiled support function and torch differ by {error:.0e}"
    return Finding("numba", Status.OK if error < 1e-8 else Status.FAILED, detail)


def _transport() -> Finding:
    import torch

    from flowverify.transport.distance import wasserstein_distance

    ends = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2)
    distance = float(wasserstein_distance(ends[:1], ends[1:], "l1"))
    status = Status.OK if abs(distance - 1) < 1e-12 else Status.FAILED
    return Finding("POT", status, f"{version('POT')}; W1 of neighbouring pixels is {distance:g}, expected 1")


def _onnx() -> Finding:
    import_module("flowverify.network")
    return Finding("onnx", Status.OK, version("onnx"))


def _lirpa() -> Finding:
    """A certified radius that is known: on a 2x2 image, f = relu(x), f_0 - f_3 = 0.5 falls by 1 a pixel."""
    import torch
    from torch import nn

    from flowverify.api import certified_radius
    from flowverify.bounds.crown.backend import VERSION

    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(4))
        second.weight.copy_(torch.eye(4)[[0, 3]])
    module = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)
    image = torch.tensor([[[[0.75, 0.0], [0.0, 0.25]]]])
    radius = float(certified_radius(module, image, torch.tensor([0]), bound="crown")[0])
    status = Status.OK if 0.48 < radius <= 0.5 else Status.FAILED
    return Finding("auto_LiRPA", status, f"{VERSION}; self-test certifies {radius:.4f} pixels, exact is 0.5")


def _digits() -> Finding:
    from flowverify.data import load_dataset

    return Finding("digits", Status.OK, f"scikit-learn {version('scikit-learn')}; {len(load_dataset('digits'))} images")


def _models() -> Finding:
    """Loading a model checks its SHA-256."""
    from flowverify.zoo import list_models, load_model, models_folder

    names = [card.name for card in list_models() if load_model(card.name)]
    status = Status.OK if names else Status.FAILED
    return Finding("models", status, f"{', '.join(names) or 'none'} in {models_folder()}, SHA-256 as on the cards")


def _optional(module: str) -> Finding:
    name, purpose, advice = _OPTIONAL[module]
    try:
        import_module(module)
        return Finding(name, Status.OK, version(module))
    except (ImportError, PackageNotFoundError) as error:
        return Finding(name, Status.ABSENT, f"{' '.join(str(error).split())}; needed for {purpose}", advice)


def _engines() -> list[Finding]:
    """The outside engines, by what each says of itself."""
    findings = []
    for name in ENGINES:
        try:
            missing = getattr(ENGINES.find(name), "missing", None)
            reason = missing() if missing is not None else None
        except Exception as error:  # a broken installation can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if reason is not None:
            status = Status.ABSENT if reason else Status.OK
            findings.append(Finding(name, status, reason or f"--engine {name} can be run"))
    return findings


def _mnist() -> Finding:
    root = os.environ.get("FLOWVERIFY_DATA")
    advice = "set FLOWVERIFY_DATA to the folder that holds mnist/, or let the first use download it"
    if not root:
        return Finding("MNIST", Status.ABSENT, "FLOWVERIFY_DATA is not set", advice)
    folder = Path(root) / "mnist"
    if not folder.is_dir():
        return Finding("MNIST", Status.ABSENT, f"no folder {folder}", advice)
    try:
        from flowverify.data import load_dataset

        return Finding("MNIST", Status.OK, f"{len(load_dataset('mnist'))} test images in {folder}")
    except Exception as error:  # the message is the finding
        return Finding("MNIST", Status.ABSENT, " ".join(str(error).split()), advice)
