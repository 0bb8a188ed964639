"""flowverify: certifies image classifiers against 1-Wasserstein perturbations.

    import flowverify as fv

    model = fv.load_model("digits-fc3")
    data = fv.load_dataset("digits")
    certificate = fv.certify(model, data.images[0], data.labels[0], fv.WassersteinBall(radius=0.03))

The names of ``__all__`` are the public interface. They are imported when they are first used: importing the
package is cheap, and it works without auto_LiRPA, which only certification needs.

Docstrings cite the sections of docs/theory.md as "theory, section 5": statements, proofs and sources are there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowverify.api import (
        certified_radius,
        certify,
        certify_batch,
        find_adversarial,
        make_certifier,
        smooth,
        to_frame,
        to_records,
    )
    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.incomplete import Certifier, search_radius
    from flowverify.curves import plot_curve
    from flowverify.data import Dataset, as_dataset, load_dataset
    from flowverify.errors import FlowverifyError
    from flowverify.figures import plot_certificate
    from flowverify.network import FoldedNetwork, Network, fold, read_onnx, write_onnx
    from flowverify.results import Certificate, Verdict
    from flowverify.zoo import load_model

__version__ = "0.2.0"

_MODULES = {
    "Certificate": "results",
    "Certifier": "certifiers.incomplete",
    "Dataset": "data",
    "FlowverifyError": "errors",
    "FoldedNetwork": "network",
    "Network": "network",
    "Verdict": "results",
    "WassersteinBall": "ball",
    "as_dataset": "data",
    "certified_radius": "api",
    "certify": "api",
    "certify_batch": "api",
    "find_adversarial": "api",
    "fold": "network",
    "load_dataset": "data",
    "load_model": "zoo",
    "make_certifier": "api",
    "plot_certificate": "figures",
    "plot_curve": "curves",
    "read_onnx": "network",
    "search_radius": "certifiers.incomplete",
    "smooth": "api",
    "to_frame": "api",
    "to_records": "api",
    "write_onnx": "network",
}

__all__ = [
    "Certificate",
    "Certifier",
    "Dataset",
    "FlowverifyError",
    "FoldedNetwork",
    "Network",
    "Verdict",
    "WassersteinBall",
    "__version__",
    "as_dataset",
    "certified_radius",
    "certify",
    "certify_batch",
    "find_adversarial",
    "fold",
    "load_dataset",
    "load_model",
    "make_certifier",
    "plot_certificate",
    "plot_curve",
    "read_onnx",
    "search_radius",
    "smooth",
    "to_frame",
    "to_records",
    "write_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flowverify' has no attribute {name!r}")
    value = getattr(import_module(f"flowverify.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
