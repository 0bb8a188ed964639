"""The only module that imports auto_LiRPA: it makes it importable, hides what its releases name differently, and holds
networks in it, whose intermediate bounds are set from outside, one activation after another.

Two lines of releases are supported: 0.3, the newest on the package registry, which needs a few names that
torch and numpy have since removed, and 0.7, from the project's own repository, which runs unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowverify.errors import BoundError, DependencyError, FlowverifyError, UnsupportedOperationError
from flowverify.network import Add, Graph, Permute, Reshape, ScaleShift, Subtract, operation_name

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
    "BoundedNetwork",
    "BoundedTensor",
    "Interval",
    "LinearBound",
    "Patches",
    "PerturbationLpNorm",
    "eyeC",
    "handed_over",
    "host_call",
    "l1_ball",
    "patches_to_matrix",
    "with_batch_axes",
]


Interval = tuple[Tensor, Tensor]

_HANDED_OVER = (
    nn.Linear, nn.Conv2d, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Flatten,
    Reshape, Permute, ScaleShift, Add, Subtract,
)  # fmt: skip


def handed_over(operation: nn.Module) -> bool:
    """Whether auto_LiRPA gets an operation, which it bounds right with these options (theory, section 14).

    Not among them: average pooling, which it pulls back by interpolation, wrong where windows overlap, leave gaps or
    reach into padding; maximum pooling of any but windows side by side; dilated convolutions; LeakyReLU, whose chord
    it takes for an upper bound whatever the slope; entries picked twice, of which it forgets one; values side by
    side, which 0.7.1 refuses to pull back.
    """
    if isinstance(operation, nn.Conv2d):
        return tuple(operation.dilation) == (1, 1)
    if isinstance(operation, nn.MaxPool2d):
        size = operation.kernel_size
        apart = isinstance(size, tuple) and size[1] == 1 and operation.stride == size
        return apart and operation.padding == 0 and operation.dilation == 1
    return isinstance(operation, _HANDED_OVER)


def l1_ball(budget: Tensor) -> Any:
    """auto_LiRPA's own L1 ball, of one radius an input: budget (B,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its dual norm is computed as 1 / (1 - 1/1)
        return PerturbationLpNorm(norm=1, eps=budget[:, None])


class BoundedNetwork:
    """Linear bounds of one traced module, with the intervals of its activations given by the caller.

    Args:
        module: the network; its first input is the perturbed one, all inputs are batched.
        inputs: sample inputs, of any batch size, to trace with.
        preactivations: the values that the activations of the module read for these inputs, in the
            order of evaluation. They identify the nodes of auto_LiRPA's graph, and are compared with its own.

    Raises:
        UnsupportedOperationError: an operation that is not :func:`handed_over`, or that auto_LiRPA does not know.
        BoundError: its graph does not compute the same values.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preactivations: Sequence[Tensor]) -> None:
        for graph in module.modules():
            for node in graph.nodes if isinstance(graph, Graph) else ():
                if not handed_over(node.operation):
                    raise UnsupportedOperationError(
                        f"node {node.name!r} ({operation_name(node.operation)}): not handed over to auto_LiRPA"
                    )
        try:
            # auto_LiRPA 0.3 makes the look-up tables of tanh and sigmoid here, in torch's default precision.
            with host_call(inputs[0].dtype):
                self._module = BoundedModule(
                    with_batch_axes(module), tuple(inputs), bound_opts=dict(BOUND_OPTIONS), device=inputs[0].device
                )
                self._module.eval()
                self._module(*inputs)
        except NotImplementedError as error:
            raise UnsupportedOperationError(f"auto_LiRPA cannot take this network: {_first_line(error)}") from error
        except Exception as error:
            raise BoundError(f"auto_LiRPA failed to trace the network: {_first_line(error)}") from error
        read = [node.inputs[0] for node in self._module._modules.values() if isinstance(node, ACTIVATIONS)]
        self.names: list[str] = [node.name for node in read]
        self._shapes: list[torch.Size] = [expected.shape[1:] for expected in preactivations]
        if len(read) != len(preactivations):
            raise BoundError(f"auto_LiRPA sees {len(read)} activations in the network, expected {len(preactivations)}")
        for node, expected in zip(read, preactivations, strict=True):
            value = self._module.get_forward_value(node)
            scale = float(expected.abs().max()) + 1e-30
            if value.shape != expected.shape or not torch.allclose(value, expected, rtol=0, atol=1e-4 * scale):
                raise BoundError(f"auto_LiRPA's value at node {node.name!r} is not the network's")

    def crown(
        self,
        inputs: Sequence[Tensor],
        perturbation: Any,
        specification: Tensor,
        intervals: Sequence[Interval | None],
        *,
        node: int | None = None,
        lower: bool = True,
        upper: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Backward linear bounds of ``specification`` applied to a node, (B, S) each.

        Args:
            inputs: as for the module; the first one is perturbed.
            specification: (B, S, size of the node), possibly an expanded view.
            intervals: of what each activation reads, in the order of the constructor's; None where it is not known,
                which must not be below the node.
            node: the index of the activation whose input is bounded; None for the output.
        """
        name = None
        if node is not None:
            name = self.names[node]
            specification = specification.reshape(*specification.shape[:2], *self._shapes[node])
        return self._compute("backward", inputs, perturbation, specification, intervals, name, lower, upper)

    def alpha_crown(
        self,
        inputs: Sequence[Tensor],
        perturbation: Any,
        specification: Tensor,
        intervals: Sequence[Interval | None],
        *,
        iterations: int,
        learning_rate: float,
    ) -> Tensor:
        """Lower bounds of ``specification`` applied to the output, with optimised slopes; (B, S)."""
        self._module.set_bound_opts(
            {
                "optimize_bound_args": {
                    **self._module.bound_opts["optimize_bound_args"],
                    "iteration": iterations,
                    "lr_alpha": learning_rate,
                }
            }
        )
        lower, _ = self._compute("CROWN-Optimized", inputs, perturbation, specification, intervals, None, True, False)
        assert lower is not None
        return lower.detach()

    def _compute(
        self,
        method: str,
        inputs: Sequence[Tensor],
        perturbation: Any,
        specification: Tensor,
        intervals: Sequence[Interval | None],
        name: str | None,
        lower: bool,
        upper: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        arguments = (BoundedTensor(inputs[0], perturbation), *inputs[1:])
        known = {
            key: list(interval)
            for key, interval in zip(self.names, intervals, strict=True)
            if interval is not None and key != name
        }
        gradients = contextlib.nullcontext() if method == "CROWN-Optimized" else torch.no_grad()
        try:
            with gradients, host_call(inputs[0].dtype):
                bounds = self._module.compute_bounds(
                    x=arguments,
                    C=specification,
                    method=method,
                    final_node_name=name,
                    bound_lower=lower,
                    bound_upper=upper,
                    **{INTERMEDIATE_KEYWORD: known},
                )
        except torch.OutOfMemoryError as error:
            raise MemoryError(_first_line(error)) from error
        except (FlowverifyError, MemoryError):
            raise
        except RuntimeError as error:
            if "can't allocate memory" in str(error) or "out of memory" in str(error):
                raise MemoryError(_first_line(error)) from error
            raise BoundError(f"auto_LiRPA's {method} failed: {_first_line(error)}") from error
        except Exception as error:
            raise BoundError(f"auto_LiRPA's {method} failed: {_first_line(error)}") from error
        batch = inputs[0].shape[0]
        return tuple(None if bound is None else bound.reshape(batch, -1) for bound in bounds[:2])  # type: ignore[return-value]


def with_batch_axes(module: nn.Module) -> nn.Module:
    """A copy whose elementwise constants have a batch axis of 1: auto_LiRPA 0.3 cannot broadcast without."""
    module = copy.deepcopy(module)
    for graph in module.modules():
        if not isinstance(graph, Graph):
            continue
        for node in graph.nodes:
            operation = node.operation
            if isinstance(operation, ScaleShift):
                for name in ("scale", "shift"):
                    constant = getattr(operation, name)
                    missing = [1] * (1 + len(node.shape) - constant.ndim)
                    setattr(operation, name, constant.reshape(*missing, *constant.shape))
    return module


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def host_call(dtype: torch.dtype) -> Iterator[None]:
    """What auto_LiRPA is called in: it prints progress and divides by zero on purpose, which does not belong in a
    program's output, and makes some tensors in torch's default precision.
    """
    before = torch.get_default_dtype()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
