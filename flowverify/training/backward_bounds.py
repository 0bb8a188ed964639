"""CROWN's backward pass (Zhang et al. 2018, arXiv:1811.00866) through which the weights can be trained.

A linear function of the output becomes one of the image: from the output down, an affine operation hands its
coefficients through its adjoint, and a ReLU hands them on through a line above it where they are positive and
below it where they are negative. What remains is maximised over the ball as one function, so that its terms
share the budget: interval bounds give the whole budget to every neuron. The intervals that decide about the
lines are those of interval propagation (CROWN-IBP; Zhang et al. 2020, arXiv:1906.06316).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval
from flowverify.errors import UnsupportedOperationError
from flowverify.network.graph import Node
from flowverify.network.operations import is_affine, operation_name


def check_relaxable(nodes: Sequence[Node]) -> None:
    """Raises UnsupportedOperationError unless every operation is affine or a ReLU."""
    for node in nodes:
        if not is_affine(node.operation) and not isinstance(node.operation, nn.ReLU):
            raise UnsupportedOperationError(
                f"layer {node.name!r}: bound crown-ibp trains ReLU networks only, given "
                f"{operation_name(node.operation)} (the bound ibp takes any)"
            )


def pull_back(
    nodes: Sequence[Node], coefficients: Tensor, intervals: Mapping[str, Interval]
) -> tuple[dict[str, Tensor], Tensor]:
    """Linear functions of the values below ``nodes`` that are nowhere less than the given ones of their output.

    Args:
        nodes: in topological order; the last one is the output.
        coefficients: of the output, (B, S, *shape).
        intervals: of the inputs of every ReLU, each (B, *shape).

    Returns:
        Coefficients (B, S, *shape) of the values that ``nodes`` read from outside, and the constants (B, S).
    """
    pending: dict[str, Tensor] = {nodes[-1].name: coefficients}
    constant = torch.zeros_like(coefficients.flatten(2)[..., 0])
    for node in reversed(nodes):
        outer = pending.pop(node.name, None)
        if outer is None:
            continue
        if isinstance(node.operation, nn.ReLU):
            lower, upper = (bound[:, None] for bound in intervals[node.inputs[0]])
            inner, rise = _through_relu(outer, lower, upper)
            parts, constant = [inner], constant + rise.flatten(2).sum(2)
        else:
            parts, offset = _through_affine(node, outer, [intervals[name][0].shape[1:] for name in node.inputs])
            constant = constant + offset
        for name, part in zip(node.inputs, parts, strict=True):
            pending[name] = pending[name] + part if name in pending else part
    return pending, constant


def _through_relu(outer: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and constants of lines above ``outer`` * relu on [lower, upper]."""
    open_entries = (lower < 0) & (upper > 0)
    on = (lower >= 0).to(outer.dtype)
    chord = torch.where(open_entries, upper / (upper - lower).clamp(min=torch.finfo(outer.dtype).tiny), on)
    below = torch.where(open_entries, (upper > -lower).to(outer.dtype), on)  # the line of least area
    rising = outer > 0
    rise = torch.where(rising & open_entries, -outer * chord * lower, 0.0)
    return outer * torch.where(rising, chord, below), rise


def _through_affine(node: Node, outer: Tensor, shapes: Sequence[torch.Size]) -> tuple[list[Tensor], Tensor]:
    operation, flat = node.operation, outer.flatten(0, 1)
    if isinstance(operation, nn.Linear):
        bias = outer.new_zeros(outer.shape[:2])
        if operation.bias is not None:
            bias = (outer @ operation.bias).reshape(*outer.shape[:2], -1).sum(2)
        return [outer @ operation.weight], bias
    # Any other affine operation: its adjoint by differentiation at 0, where its value is the constant.
    points = [flat.new_zeros(len(flat), *shape).requires_grad_(True) for shape in shapes]
    with torch.enable_grad():
        value = operation(*points)
        total = (flat * value).flatten(1).sum(1)
        parts = torch.autograd.grad(total.sum(), points, create_graph=torch.is_grad_enabled(), retain_graph=True)
    return [part.reshape(*outer.shape[:2], *part.shape[1:]) for part in parts], total.reshape(outer.shape[:2])
