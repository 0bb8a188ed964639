"""A network inside auto_LiRPA whose intermediate bounds are set from outside, one activation after another."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowverify.bounds.crown.backend import (
    ACTIVATIONS,
    BOUND_OPTIONS,
    INTERMEDIATE_KEYWORD,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
)
from flowverify.errors import BoundError, FlowverifyError, UnsupportedOperationError
from flowverify.network import Add, Graph, Permute, Reshape, ScaleShift, Subtract, operation_name

Interval = tuple[Tensor, Tensor]

__all__ = ["BoundedNetwork", "Interval", "handed_over", "l1_ball"]

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
