"""How far float64 arithmetic may be from exact arithmetic, a priori: a bound that sees cancellation.

Every number that bounds of a network are made of is a sum of products along the network's paths: of weights, of slopes
of activations, of what the image or a bias puts in at the start. Computed in any order with at most n roundings on each
product, it is off by at most gamma_n = n u / (1 - n u), u = 2^-53, times the same sum of absolute values (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1 and section 3.1). :func:`magnitudes` are these sums,

    P(image) = reach * (largest coefficient of a pixel),     P(z) = |W| P(a) + |b|,     P(a) = gain * P(z) + |f(0)|.

*Reach.* A linear function c of the image that is bounded over a ball, c . mu + excess(c), has terms of at most
max |c| times: the mass, for c . mu; four times the mass, for sums of mu_i (D_i - c_i), where a scan or a cost rounds
c_j - lambda d(i, j), of which -|c_i| <= c_i <= c_j - lambda d(i, j) <= |c_j|; twice the budget, for lambda * budget,
since no multiplier that is kept is worse than Lip(c) <= 2 max |c| (mass moves at a cost of at least 1); as much again,
where a cap changes c. Reach is 8 (mass + budget). Points of the ball have sum |nu| <= mass + 2 budget, which is less.

*Gain.* A relaxation of an activation is a line with a slope of at most L, its Lipschitz constant, that meets the
activation within the neuron's bounds, which are at most P(z) themselves: |intercept| <= |f(0)| + 2 L P(z), for ReLU
P(z) / 2. So gain >= 3 L, for ReLU 3/2, makes P the magnitude of all that relaxations pass on. A neuron's bounds may be
off by e(z), and a relaxation holds within the bounds only: beyond, it is off by at most v e(z), v = 2 L, for ReLU
v = 1. With gain >= 2 v, e <= (1 + k/2) gamma_n P after k activations on a path: in F = e - gamma_n P, the part that
comes from below, F(a) <= L F(z) + v e(z), and F(z) <= (k/2) gamma_n P(z) makes F(a) <= (k/2 + 1/2) gamma_n P(a).

*Roundings.* On a path through an operation lie at most: the products and sums of a value and, going backward, of a
coefficient (fan-in and fan-out), one sum over all its entries (biases and intercepts), and a few for constants (which
are the float64 numbers nearest to the user's, see :mod:`flowverify.network.builder`), slopes, intercepts, ends and the
activation itself: ``FEW``. At the image: sums over pixels, edges and the scan's rows and columns. n is the sum of all.

Assumed about bounds that are computed elsewhere (auto_LiRPA's): matrix products and convolutions are sums of products,
in any order (no Strassen, Winograd or Fourier transform); relaxations are lines as above; steps of optimisers need no
care, as any slope within [0, L] is sound. Underflow is covered by ``TINY``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowverify.errors import UnsupportedOperationError
from flowverify.network.graph import INPUT, Graph, Node
from flowverify.network.operations import (
    Add,
    Concatenate,
    Index,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Subtract,
    operation_name,
)

UNIT = 2.0**-53
FEW = 32  # roundings of one operation beside its sums
TINY = 1e-290  # far above what underflow loses, far below what matters
INFLATED = 1 + 1e-6  # magnitudes are sums of nonnegative terms: their own rounding is a tiny share of them

_MOVING = (nn.AvgPool2d, nn.Flatten, Reshape, Permute, Index, Pad, Concatenate)


def reach(mass: Tensor, budget: Tensor | float) -> Tensor:
    """By what the largest coefficient of a pixel is multiplied, for images of this mass and balls of this budget."""
    return 8 * (mass + budget)


def roundings(network: Graph) -> int:
    """n: how many roundings lie on any path of a computation of bounds."""
    pixels = math.prod(network.input_shape)
    count = 4 * pixels + 4 * sum(network.input_shape[1:]) + 2 * FEW
    for node in network.nodes:
        operation = node.operation
        count += math.prod(node.shape) + len(node.inputs) + FEW
        if isinstance(operation, nn.Linear):
            count += operation.in_features + operation.out_features
        elif isinstance(operation, nn.Conv2d):
            window = math.prod(operation.kernel_size)
            count += (operation.in_channels + operation.out_channels) // operation.groups * window
        elif isinstance(operation, nn.AvgPool2d):
            size = operation.kernel_size
            count += 2 * (size * size if isinstance(size, int) else math.prod(size))
    return count


def gamma(network: Graph) -> float:
    """gamma_n of a network; infinite for one that is too large for any claim."""
    share = roundings(network) * UNIT
    return share / (1 - share) if share < 0.5 else math.inf


def depth(network: Graph) -> int:
    """The largest number of activations on a path."""
    deepest = {INPUT: 0}
    activations = {node.name for node in network.activations}
    for node in network.nodes:
        deepest[node.name] = max(deepest[name] for name in node.inputs) + (node.name in activations)
    return deepest[network.output]


def magnitudes(network: Graph, *, relaxed: bool) -> dict[str, Tensor]:
    """P of each value, in two parts (2, *shape), float64: P = first + reach * second.

    Args:
        relaxed: for what passes through relaxations; otherwise the gain is L, and P bounds the values.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """
    device = next((tensor.device for tensor in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
    start = torch.ones(2, *network.input_shape, dtype=torch.float64, device=device)
    start[0] = 0
    found, apart = {INPUT: start}, {INPUT}
    with torch.no_grad():
        for node in network.nodes:
            inputs = [found[name] for name in node.inputs]
            value = _through(node.operation, inputs, relaxed, apart.issuperset(node.inputs))
            value[0] += TINY
            found[node.name] = value
            if apart.issuperset(node.inputs) and _keeps_apart(node, inputs[0].shape[1:]):
                apart.add(node.name)
    return {name: value * INFLATED for name, value in found.items()}


def _through(operation: nn.Module, inputs: list[Tensor], relaxed: bool, apart: bool) -> Tensor:
    """The rule of one operation; ``apart`` says that no two entries of its input depend on the same pixel."""
    value = inputs[0]
    if isinstance(operation, nn.Linear):
        weight = operation.weight.double().abs()
        result = functional.linear(value, weight)
        if apart:  # a unit of mass is in one place: the largest coefficient, not the sum
            result[1] = (weight * value[1][..., None, :]).amax(-1)
        return _with_bias(result, None if operation.bias is None else operation.bias)
    if isinstance(operation, nn.Conv2d):
        result = functional.conv2d(
            value, operation.weight.double().abs(), None, operation.stride, operation.padding, operation.dilation,
            operation.groups,
        )  # fmt: skip
        return _with_bias(result, None if operation.bias is None else operation.bias[:, None, None])
    if isinstance(operation, ScaleShift):
        return _with_bias(value * operation.scale.double().abs(), operation.shift)
    if isinstance(operation, Add | Subtract):
        return torch.stack(torch.broadcast_tensors(*inputs)).sum(0)  # type: ignore[no-untyped-call]
    if isinstance(operation, _MOVING):
        return operation(*inputs).clone()  # type: ignore[no-any-return]
    known = _LIPSCHITZ.get(type(operation))
    if known is None:
        raise UnsupportedOperationError(f"rounding: no rule for operation {operation_name(operation)}")
    constant, at_zero = known(operation), float(_AT_ZERO.get(type(operation), 0.0))
    if relaxed:
        constant *= 2.0 if isinstance(operation, nn.ReLU) else 6.0
    if isinstance(operation, nn.MaxPool2d):
        return constant * operation(value)  # type: ignore[no-any-return]
    result = constant * value
    result[0] += at_zero
    return result


# The largest slope. With 6 L, LeakyReLU may as well be computed as a x + (1 - a) relu(x).
_LIPSCHITZ: dict[type[nn.Module], Callable[[nn.Module], float]] = {
    nn.ReLU: lambda operation: 1.0,
    nn.LeakyReLU: lambda operation: max(1.0, abs(float(operation.negative_slope))),  # type: ignore[arg-type]
    nn.Sigmoid: lambda operation: 0.25,
    nn.Tanh: lambda operation: 1.0,
    nn.MaxPool2d: lambda operation: 1.0,
}
_AT_ZERO: dict[type[nn.Module], float] = {nn.Sigmoid: 0.5}


def _with_bias(value: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return value
    both = bias.double().abs() * torch.ones_like(value)
    both[1] = 0
    return value + both


def _keeps_apart(node: Node, before: tuple[int, ...]) -> bool:
    operation = node.operation
    if isinstance(operation, Index):
        chosen, size = operation.selection, before[operation.dim]
        return not isinstance(chosen, tuple) or len({position % size for position in chosen}) == len(chosen)
    if isinstance(operation, ScaleShift):
        return node.shape == tuple(before)
    return isinstance(operation, nn.Flatten | Reshape | Permute | Pad)


class RoundingBound:
    """What rounding may change in lower bounds of margins of one network, and in its margins themselves.

    Args:
        network: in float64.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
    """

    def __init__(self, network: Graph) -> None:
        self._gamma = gamma(network) * (1 + depth(network) / 2)
        self._output = magnitudes(network, relaxed=True)[network.output].flatten(1)

    def margins(self, mass: Tensor, budget: Tensor | float = 0.0) -> Tensor:
        """By how much bounds of f_y - f_t for images of this mass (B,) over balls of this budget may be off, (B,).

        Infinite or NaN where nothing can be said.
        """
        fixed, moving = self._output.to(mass.device)
        logits = fixed + reach(mass.double(), budget)[:, None] * moving
        return 2 * self._gamma * logits.amax(1)
