"""CROWN's backward pass (Zhang et al. 2018, arXiv:1811.00866), through which gradients flow.

A linear function of a value becomes one of the values below that is nowhere less: from the value down, an affine
operation hands its coefficients through its adjoint, and an activation hands them on through the line above it where
they are positive and below it where they are negative (:mod:`flowverify.bounds.relaxations`). What remains at the
bottom is maximised over the ball as one function, so that its terms share the budget; interval bounds give the whole
budget to every neuron.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval
from flowverify.bounds.relaxations import relax
from flowverify.network import INPUT, Graph, is_affine


def pull_back(
    graph: Graph, name: str, coefficients: Tensor, intervals: Mapping[str, Interval], bottom: Collection[str] = (INPUT,)
) -> tuple[dict[str, Tensor], Tensor]:
    """Linear functions of the values at the bottom that are nowhere less than the given ones of a value above.

    The claim holds wherever the inputs of the activations lie in ``intervals``. It is differentiable in the
    coefficients, the intervals and the weights, where gradients are enabled.

    Args:
        name: a value of the graph.
        coefficients: of the value, (B, S, *shape).
        intervals: of what the activations between the bottom and the value read, each (B, *shape).
        bottom: names of values; every way from the input to the value leads through one of them.

    Returns:
        Coefficients (B, S, *shape) of the values at the bottom that have an influence, and the constants (B, S).

    Raises:
        UnsupportedOperationError: an activation that has no linear relaxation.
    """
    found: dict[str, Tensor] = {name: coefficients}
    constant = torch.zeros_like(coefficients.flatten(2)[..., 0])
    for node in reversed(graph.nodes):
        if node.name not in found or node.name in bottom:
            continue
        outer = found.pop(node.name)
        if is_affine(node.operation):
            parts, offset = _through_affine(node.operation, outer, [graph.shape(read) for read in node.inputs])
        else:
            inner, offset = _through_activation(node.operation, outer, intervals[node.inputs[0]])
            parts = [inner]
        constant = constant + offset
        for read, part in zip(node.inputs, parts, strict=True):
            found[read] = found[read] + part if read in found else part
    return found, constant


def _through_activation(operation: nn.Module, outer: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
    """Coefficients and constants of lines above ``outer`` * activation on the interval."""
    lines, rising = relax(operation, interval), outer > 0
    offset = torch.where(rising, lines.upper_offset[:, None], lines.lower_offset[:, None])
    inner = outer * torch.where(rising, lines.upper_slope[:, None], lines.lower_slope[:, None])
    return inner, (outer * offset).flatten(2).sum(2)


def _through_affine(
    operation: nn.Module, outer: Tensor, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Tensor], Tensor]:
    flat = outer.flatten(0, 1)
    if isinstance(operation, nn.Linear):
        bias = outer.new_zeros(outer.shape[:2])
        if operation.bias is not None:
            bias = (outer @ operation.bias).reshape(*outer.shape[:2], -1).sum(2)
        return [outer @ operation.weight], bias
    # Any other affine operation: its adjoint by differentiation at 0, where its value is the constant.
    trained = torch.is_grad_enabled()
    points = [flat.new_zeros(len(flat), *shape).requires_grad_(True) for shape in shapes]
    with torch.enable_grad():
        total = (flat * operation(*points)).flatten(1).sum(1)
        parts = torch.autograd.grad(total.sum(), points, create_graph=trained)
    if not trained:
        total = total.detach()
    return [part.reshape(*outer.shape[:2], *part.shape[1:]) for part in parts], total.reshape(outer.shape[:2])
