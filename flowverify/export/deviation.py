"""How far a change at one place of a network can reach: rounding of weights, and moved mass.

Both bounds propagate absolute values: |W v| <= |W| |v|, and ReLU enlarges no difference. They hold for every
input, whatever the pattern of active neurons.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flowverify.network.graph import INPUT, Graph
from flowverify.network.operations import Add

_LAYERS = (nn.Linear, nn.Conv2d)


def largest_change(graph: Graph, change: Tensor) -> Tensor:
    """A bound on the change of every output, for a change of the input of at most ``change`` in every entry.

    Args:
        graph: of the operations of :func:`flowverify.network.lowering.lower`.
        change: (B, *input_shape), nonnegative.
    """
    absolute = copy.deepcopy(graph)
    for node in absolute.nodes:
        if isinstance(node.operation, _LAYERS):
            node.operation.weight.abs_()
            if node.operation.bias is not None:
                node.operation.bias.zero_()
    result: Tensor = absolute(change)
    return result


def rounding_change(graph: Graph, centres: Tensor, reach: Tensor, flows: int) -> Tensor:
    """How much the outputs change at most when the weights of ``graph`` are rounded to float32; (B, outputs).

    The bound is for all inputs X with sum over the first ``flows`` entries of |X - centre| <= reach, the other
    entries being those of the centre. In the first layers |dW X + db| <= |dW centre + db| + reach * max_k |dW_k|;
    behind them |W'v' - Wv| <= |W'| |v' - v| + |W' - W| |v|.

    Args:
        graph: float64, of the operations of :func:`~flowverify.network.lowering.lower`; only Linear reads the input.
        centres: (B, inputs) and reach (B,), one row for each ball.
    """
    change: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    for node in graph.nodes:
        operation, sources = node.operation, node.inputs
        if isinstance(operation, _LAYERS):
            rounded, step, absolute = (copy.deepcopy(operation) for _ in range(3))
            for exact, near, difference, positive in zip(
                operation.parameters(), rounded.parameters(), step.parameters(), absolute.parameters(), strict=True
            ):
                near.copy_(exact.float().double())
                difference.copy_(near - exact)
                positive.copy_(exact.abs())
            if sources == (INPUT,):
                change[node.name] = step(centres).abs() + reach[:, None] * step.weight[:, :flows].abs().amax(1)
                size[node.name] = operation(centres).abs() + reach[:, None] * absolute.weight[:, :flows].amax(1)
                continue
            for layer in (rounded, step):
                for parameter in layer.parameters():
                    parameter.abs_()
            shift = rounded(torch.zeros_like(change[sources[0]]))
            change[node.name] = rounded(change[sources[0]]) - shift + step(size[sources[0]])
            size[node.name] = absolute(size[sources[0]])
        elif isinstance(operation, Add):
            change[node.name] = operation(*(change[name] for name in sources))
            size[node.name] = operation(*(size[name] for name in sources))
        else:
            change[node.name] = operation(change[sources[0]])
            size[node.name] = operation(size[sources[0]])
    return change[graph.output]
