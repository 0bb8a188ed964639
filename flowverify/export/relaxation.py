"""Linear lower bounds of a lowered graph's values as functions of its input: where cuts get their directions from.

ReLU over an interval l < 0 < u lies below the line u / (u - l) (x - l), and above x or 0, of which the one with the
smaller area in between is taken (CROWN: Zhang et al. 2018, section 3.2). Going backward from a value, each ReLU is
replaced by the line that keeps a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowverify.bounds.intervals import Interval
from flowverify.network import INPUT, Graph


def unsettled(interval: Interval) -> Tensor:
    """Which entries may be on either side of 0, flat."""
    lower, upper = (bound.flatten() for bound in interval)
    return (lower < 0) & (upper > 0)


def upper_slope(interval: Interval) -> Tensor:
    """The slope of the line above ReLU: u / (u - l) where 0 is inside, 1 or 0 elsewhere; shaped as the interval."""
    lower, upper = interval
    return upper.clamp(min=0) / (upper.clamp(min=0) - lower.clamp(max=0)).clamp(min=torch.finfo(lower.dtype).tiny)


def linear_lower_bounds(
    graph: Graph, name: str, rows: Tensor, intervals: Mapping[str, Interval]
) -> tuple[Tensor, Tensor]:
    """Coefficients a (S, inputs) and constants k (S,) with rows @ value >= a . input + k.

    The claim holds for every input for which the inputs of the ReLUs are in ``intervals``.

    Args:
        graph: float64, of the operations of :func:`flowverify.network.lowering.lower`.
        name: a node of the graph, or "input".
        rows: (S, entries of the value).
        intervals: of the values that ReLUs before ``name`` read, (1, *shape) each.
    """
    constant = rows.new_zeros(len(rows))
    if name == INPUT:
        return rows, constant
    position = next(k for k, node in enumerate(graph.nodes) if node.name == name)
    gradients: dict[str, Tensor] = {name: rows.reshape(-1, *graph.nodes[position].shape)}
    for node in reversed(graph.nodes[: position + 1]):
        gradient = gradients.pop(node.name, None)
        if gradient is None:
            continue
        if isinstance(node.operation, nn.ReLU):
            lower, upper = intervals[node.inputs[0]]
            above = upper_slope((lower, upper))
            below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, (upper > -lower).double()))
            negative = gradient.clamp(max=0)
            constant = constant + (negative * (-lower.clamp(max=0) * above)).flatten(1).sum(1)
            parts = [gradient.clamp(min=0) * below + negative * above]
        else:
            values = [
                gradient.new_zeros(len(rows), *_shape(graph, source)).requires_grad_(True) for source in node.inputs
            ]
            with torch.enable_grad():
                result = node.operation(*values)
            parts = list(torch.autograd.grad(result, values, gradient))
            constant = constant + (result.detach() * gradient).flatten(1).sum(1)
        for source, part in zip(node.inputs, parts, strict=True):
            gradients[source] = gradients[source] + part if source in gradients else part
    return gradients[INPUT].flatten(1), constant


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    return graph.input_shape if name == INPUT else graph.node(name).shape
