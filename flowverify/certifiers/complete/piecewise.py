"""Piecewise linear networks as networks of affine operations and ReLUs, which is what complete searches know.

Both rewritings are exact but for the rounding of 1 - s, a constant like any other (theory, section 15):

- LeakyReLU of any slope s: s x + (1 - s) relu(x);
- a maximum pool: max(a, b) = a + relu(b - a), in pairs, then in pairs of these, and so on.
"""

from __future__ import annotations

import copy

from torch import nn

from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, operation_name
from flowverify.network.graph import Node
from flowverify.network.lowering import lower, pooling_windows
from flowverify.network.operations import Add, Index, Reshape, Subtract


def relus_only(network: Network) -> Network:
    """The same function; in float64, unless its activations are ReLUs as it is.

    Raises:
        UnsupportedOperationError: an activation that is not piecewise linear, named.
    """
    for node in network.activations:
        if not isinstance(node.operation, nn.ReLU | nn.LeakyReLU | nn.MaxPool2d):
            raise UnsupportedOperationError(
                f"complete certification: layer {node.name!r} is {operation_name(node.operation)}; expected affine "
                "layers and ReLU, LeakyReLU or MaxPool2d"
            )
    if all(isinstance(node.operation, nn.ReLU) for node in network.activations):
        return network
    apart: list[Node] = []
    for node in network.nodes:
        apart += _maximum(network, node) if isinstance(node.operation, nn.MaxPool2d) else [node]
    whole = Network(network.input_shape, copy.deepcopy(apart))
    return lower(whole, lambda operation: not isinstance(operation, nn.LeakyReLU)).graph


def _maximum(network: Network, node: Node) -> list[Node]:
    """The nodes of a maximum pool: the k-th pixels of all windows side by side, for each k, and their maximum."""
    assert isinstance(node.operation, nn.MaxPool2d)
    channels, height, width = network.shape(node.inputs[0])
    windows = pooling_windows(node.operation, height, width)
    nodes, shape = list[Node](), (channels, windows.shape[1])

    def emit(part: str, operation: nn.Module, *inputs: str, shape: tuple[int, ...] = shape) -> str:
        nodes.append(Node(f"{node.name}_{part}", operation, inputs, shape))
        return nodes[-1].name

    flat = emit("flat", Reshape((channels, height * width)), node.inputs[0], shape=(channels, height * width))
    rivals = [emit(f"member{k}", Index(1, places.tolist()), flat) for k, places in enumerate(windows)]
    while len(rivals) > 1:
        winners = list[str]()
        for first, second in zip(rivals[::2], rivals[1::2], strict=False):
            label = f"pair{len(nodes)}"
            ahead = emit(f"{label}_ahead", nn.ReLU(), emit(f"{label}_difference", Subtract(), second, first))
            winners.append(emit(label, Add(), first, ahead))
        rivals = winners + rivals[2 * len(winners) :]
    nodes.append(Node(node.name, Reshape(node.shape), (rivals[0],), node.shape))
    return nodes
