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
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowverify.certify.certificate import Certificate, Verdict
    from flowverify.certify.functions import certified_radius, certify, certify_batch
    from flowverify.certify.make import make_certifier
    from flowverify.certify.radius import search_radius
    from flowverify.certify.verify import Certifier
    from flowverify.data import Dataset, load_dataset
    from flowverify.errors import FlowverifyError
    from flowverify.network import FoldedNetwork, Network, fold, read_onnx, write_onnx
    from flowverify.threat import WassersteinBall
    from flowverify.zoo import load_model
else:
    from flowverify import certify

__version__ = "0.1.0"

_MODULES = {
    "Certificate": "certify.certificate",
    "Certifier": "certify.verify",
    "Dataset": "data",
    "FlowverifyError": "errors",
    "FoldedNetwork": "network",
    "Network": "network",
    "Verdict": "certify.certificate",
    "WassersteinBall": "threat",
    "certified_radius": "certify.functions",
    "certify_batch": "certify.functions",
    "fold": "network",
    "load_dataset": "data",
    "load_model": "zoo",
    "make_certifier": "certify.make",
    "read_onnx": "network",
    "search_radius": "certify.radius",
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
    "certified_radius",
    "certify",
    "certify_batch",
    "fold",
    "load_dataset",
    "load_model",
    "make_certifier",
    "read_onnx",
    "search_radius",
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


class _CallablePackage(ModuleType):
    """``flowverify.certify`` is the function of that name and the subpackage that holds it.

    The import system would put the subpackage in the function's place as soon as anything in it is imported.
    """

    def __call__(
        self,
        model: Any,
        image: Any,
        label: Any,
        ball: Any,
        method: str = "fine-tuned",
        bound: str = "best",
        *,
        domain: Any = "auto",
    ) -> Any:
        """Certifies one image; see :func:`flowverify.certify.functions.certify`."""
        from flowverify.certify.functions import certify

        return certify(model, image, label, ball, method, bound, domain=domain)


if not TYPE_CHECKING:
    certify.__class__ = _CallablePackage
