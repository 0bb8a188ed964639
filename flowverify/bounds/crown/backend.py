"""The only module that imports auto_LiRPA: finds it, makes it importable, hides what its releases name differently.

Two lines of releases are supported: 0.3, the newest on the package registry, which needs a few names that
torch and numpy have since removed, and 0.7, from the project's own repository, which runs unchanged.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from flowverify.errors import DependencyError

INSTALL_HINT = (
    "install it with `pip install --no-deps auto-LiRPA==0.3` and "
    "`pip install appdirs graphviz packaging pyyaml tqdm`, or take 0.7 from its repository "
    "(github.com/Verified-Intelligence/auto_LiRPA)"
)


def _restore_removed_names() -> None:
    """Puts back what auto_LiRPA 0.3 imports and current numpy and torch no longer have."""
    if "numpy.lib.arraysetops" not in sys.modules:
        try:
            import numpy.lib.arraysetops  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            stand_in = types.ModuleType("numpy.lib.arraysetops")
            stand_in.isin = np.isin  # type: ignore[attr-defined]
            sys.modules["numpy.lib.arraysetops"] = stand_in
    import torch.onnx.symbolic_helper as symbolic_helper

    if not hasattr(symbolic_helper, "_set_opset_version"):
        exporter_settings = _exporter_settings()

        def set_opset_version(version: int) -> None:
            exporter_settings.export_onnx_opset_version = version

        symbolic_helper._set_opset_version = set_opset_version  # type: ignore[attr-defined]
    node = torch._C.Node
    if not hasattr(node, "__getitem__"):

        def attribute(self: Any, name: str) -> Any:
            return getattr(self, self.kindOf(name))(name)

        node.__getitem__ = attribute  # type: ignore[method-assign]


def _exporter_settings() -> Any:
    for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(name).GLOBALS
        except ImportError:
            continue
    raise ImportError(f"torch {torch.__version__} has no TorchScript ONNX exporter, which auto_LiRPA traces with")


def _accept_remove_duplicate(bounded_module: Any) -> None:
    """Lets 0.3's override of ``Module._named_members`` take the argument that torch now passes."""
    original = bounded_module._named_members
    if "remove_duplicate" in inspect.signature(original).parameters:
        return

    def named_members(
        self: Any,
        get_members_fn: Callable[..., Any],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        yield from original(self, get_members_fn, prefix=prefix, recurse=recurse)

    bounded_module._named_members = named_members


def _concretize_first_layers(bounded_module: Any) -> None:
    """Bounds a layer on the input by ``concretize`` where the perturbation asks for it, not by intervals.

    auto_LiRPA takes a short cut for a linear layer right on the input: interval propagation, which is exact
    for its own norms. For ours it would be the bound of the surrounding box.
    """
    original = bounded_module.check_IBP_first_linear

    def check_first_linear(self: Any, node: Any) -> Any:
        inputs = getattr(node, "inputs", None)
        perturbation = getattr(inputs[0], "perturbation", None) if inputs else None
        if getattr(perturbation, "exact_by_concretize", False):
            return False
        return original(self, node)

    bounded_module.check_IBP_first_linear = check_first_linear


def _contiguous(operation: Any) -> None:
    """Keeps coefficients in order before and after an operation's backward pass: it, or what follows, takes views."""
    original = operation.bound_backward

    def in_order(part: Any) -> Any:
        return part.contiguous() if isinstance(part, torch.Tensor) else part

    def bound_backward(self: Any, last_lower: Any, last_upper: Any, *inputs: Any, **keywords: Any) -> Any:
        pairs, *constants = original(self, in_order(last_lower), in_order(last_upper), *inputs, **keywords)
        return [tuple(in_order(part) for part in pair) for pair in pairs], *constants

    operation.bound_backward = bound_backward


def _guard_tangents(bound_activation: Any) -> None:
    """Takes the values at the ends for bounds of an increasing function where its tangents are not to be trusted.

    Tables of tangents end at +-500, and what is beyond is cut off before chords are drawn; intervals shorter than 1e-6
    get the slope of one end for a chord.
    """
    original = bound_activation.bound_relax

    def bound_relax(self: Any, x: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, x, *arguments, **keywords)
        lower, upper = x.lower, x.upper
        # Anything that is not inside for certain, NaN among it.
        trusted = (lower > -TANGENT_LIMIT) & (upper < TANGENT_LIMIT) & (upper - lower > SHORTEST_CHORD)
        if getattr(self, "lw", None) is not None and not bool(trusted.all()):
            zero = torch.zeros_like(lower)
            self.lw, self.uw = torch.where(trusted, self.lw, zero), torch.where(trusted, self.uw, zero)
            self.lb = torch.where(trusted, self.lb, self.forward(lower))
            self.ub = torch.where(trusted, self.ub, self.forward(upper))
        return result

    bound_activation.bound_relax = bound_relax


TANGENT_LIMIT = 499.0
SHORTEST_CHORD = 1e-5

try:
    # auto_LiRPA sets warning filters for the whole process as it is imported, and then provokes warnings.
    with warnings.catch_warnings(record=True):
        _restore_removed_names()
        import auto_LiRPA
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
        from auto_LiRPA.bound_ops import BoundMaxPool, BoundRelu, BoundSigmoid, BoundTanh, BoundTranspose
        from auto_LiRPA.linear_bound import LinearBound
        from auto_LiRPA.patches import Patches, patches_to_matrix
        from auto_LiRPA.utils import eyeC
except (ImportError, AttributeError) as error:
    raise DependencyError(f"auto_LiRPA cannot be used ({error}); {INSTALL_HINT}") from error

_accept_remove_duplicate(BoundedModule)
_concretize_first_layers(BoundedModule)
_contiguous(BoundMaxPool)
_contiguous(BoundTranspose)
_guard_tangents(BoundSigmoid)  # before its base class: each then has a method of its own
_guard_tangents(BoundTanh)

VERSION = str(getattr(auto_LiRPA, "__version__", "unknown"))
_COMPUTE_BOUNDS = inspect.signature(BoundedModule.compute_bounds).parameters
INTERMEDIATE_KEYWORD = "interm_bounds" if "interm_bounds" in _COMPUTE_BOUNDS else "intermediate_layer_bounds"
# What ``concretize`` returns for patches: 0.3 wants the shape of the layer, 0.7 one row of neurons an image.
PATCHES_KEEP_SHAPE = INTERMEDIATE_KEYWORD == "intermediate_layer_bounds"

# Sparse features of 0.3 fail under CROWN-Optimized, and in every release the interval pre-screen of unstable
# neurons trusts `ptb.norm` and `ptb.eps` alone; neither is worth having here, where the neurons to bound are
# chosen by the caller.
BOUND_OPTIONS: dict[str, Any] = {
    "sparse_intermediate_bounds": False,
    "sparse_conv_intermediate_bounds": False,
    "sparse_intermediate_bounds_with_ibp": False,
    "sparse_spec_alpha": False,
    "sparse_features_alpha": False,
    "conv_mode": "matrix",
}

ACTIVATIONS = (BoundRelu, BoundSigmoid, BoundTanh, BoundMaxPool)

__all__ = [
    "ACTIVATIONS",
    "BOUND_OPTIONS",
    "INTERMEDIATE_KEYWORD",
    "PATCHES_KEEP_SHAPE",
    "VERSION",
    "BoundedModule",
    "BoundedTensor",
    "LinearBound",
    "Patches",
    "PerturbationLpNorm",
    "eyeC",
    "patches_to_matrix",
]
