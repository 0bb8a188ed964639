"""Recurrent layers, written out step by step: rows of the sequence are the rows of a sample (steps, features).

Gates stand in torch's order: LSTM input, forget, cell, output; GRU reset, update, new. With i, f, o the sigmoids and g,
n the tangents, LSTM: c' = f c + i g, h' = o tanh(c'); GRU: h' = n + z (h - n), n of r times the hidden part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network.builder import Builder, Value
from flowverify.network.compositions import activated, product

Cell = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LONGEST = 1024


@dataclass(frozen=True)
class Direction:
    """One layer in one direction.

    Attributes:
        inputs, hidden: weights (gates * H, features) and (gates * H, H).
        input_bias, hidden_bias: (gates * H,).
        state, memory: (H,), what it begins with; None for zeros.
        reset_after: for GRU, whether the reset gate multiplies W h + b (torch), or h itself (the original cell).
    """

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor
    hidden_bias: Tensor
    state: Tensor | None = None
    memory: Tensor | None = None
    reset_after: bool = True


@dataclass(frozen=True)
class Passed:
    """All states (steps, H) in the order of the sequence, the last one computed (H,), and the last memory of LSTM."""

    states: Value
    last: Value
    memory: Value | None


def passed(builder: Builder, cell: Cell, value: Value, weights: Direction, label: str, *, backward: bool) -> Passed:
    """A sequence (steps, features) on its way through one layer in one direction."""
    size = weights.hidden.shape[1]
    if value.rank != 2 or weights.inputs.shape != (GATES[cell] * size, value.shape[1]):
        raise InvalidInputError(
            f"{cell} with input weights {tuple(weights.inputs.shape)}: not for samples of shape {value.shape}"
        )
    steps = value.shape[0]
    if steps > LONGEST:
        raise UnsupportedOperationError(f"{cell} over {steps} steps: expected at most {LONGEST}, which are written out")
    projected = builder.linear(value, weights.inputs, weights.input_bias, label)
    states: dict[int, Value] = {}
    state: Value | Tensor = _start(weights.state, weights.hidden)
    memory: Value | Tensor = _start(weights.memory, weights.hidden)
    for step in reversed(range(steps)) if backward else range(steps):
        given = builder.index(projected, 0, step, label)
        if cell == "lstm":
            state, memory = _lstm(builder, given, state, memory, weights, size, label)
        elif cell == "gru":
            state = _gru(builder, given, state, weights, size, label)
        else:
            summed = _added(builder, given, _times(builder, state, weights.hidden, weights.hidden_bias, label), label)
            state = activated(builder, nn.Tanh() if cell == "rnn_tanh" else nn.ReLU(), summed, label)
        states[step] = state
    assert isinstance(state, Value)
    rows = [builder.reshape(states[step], (1, size), label) for step in range(steps)]
    return Passed(builder.concatenate(rows, 0, label), state, memory if isinstance(memory, Value) else None)


def _start(given: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[1], dtype=torch.float64) if given is None else given.double()


def _times(builder: Builder, state: Value | Tensor, weight: Tensor, bias: Tensor, label: str) -> Value | Tensor:
    if isinstance(state, Value):
        return builder.linear(state, weight, bias, label)
    return weight.double() @ state + bias.double()


def _added(builder: Builder, value: Value, other: Value | Tensor, label: str) -> Value:
    if isinstance(other, Value):
        return builder.total([value, other], label)
    return builder.scale_shift(value, 1.0, other, label)


def _multiplied(builder: Builder, value: Value, other: Value | Tensor, label: str) -> Value:
    if isinstance(other, Value):
        return product(builder, value, other, label)
    return builder.scale_shift(value, other, 0.0, label)


def _gate(builder: Builder, value: Value, number: int, size: int, label: str) -> Value:
    return builder.index(value, 0, slice(number * size, (number + 1) * size), label)


def _lstm(
    builder: Builder,
    given: Value,
    state: Value | Tensor,
    memory: Value | Tensor,
    weights: Direction,
    size: int,
    label: str,
) -> tuple[Value, Value]:
    summed = _added(builder, given, _times(builder, state, weights.hidden, weights.hidden_bias, label), label)
    opened = {
        name: activated(
            builder, nn.Tanh() if name == "cell" else nn.Sigmoid(), _gate(builder, summed, k, size, label), label
        )
        for k, name in enumerate(("input", "forget", "cell", "output"))
    }
    written = product(builder, opened["input"], opened["cell"], label)
    if isinstance(memory, Value) or bool((memory != 0).any()):
        written = builder.total([_multiplied(builder, opened["forget"], memory, label), written], label)
    shown = activated(builder, nn.Tanh(), written, label)
    return product(builder, opened["output"], shown, label), written


def _gru(builder: Builder, given: Value, state: Value | Tensor, weights: Direction, size: int, label: str) -> Value:
    turned, bias = weights.hidden[2 * size :], weights.hidden_bias[2 * size :]
    gates = _times(builder, state, weights.hidden[: 2 * size], weights.hidden_bias[: 2 * size], label)
    summed = _added(builder, builder.index(given, 0, slice(0, 2 * size), label), gates, label)
    opened = activated(builder, nn.Sigmoid(), summed, label)
    reset, update = (_gate(builder, opened, k, size, label) for k in (0, 1))
    if weights.reset_after:
        recalled: Value | Tensor = _multiplied(builder, reset, _times(builder, state, turned, bias, label), label)
    else:
        recalled = _times(builder, _multiplied(builder, reset, state, label), turned, bias, label)
    own = _added(builder, _gate(builder, given, 2, size, label), recalled, label)
    new = activated(builder, nn.Tanh(), own, label)
    if isinstance(state, Value):
        kept = product(builder, update, builder.difference(state, new, label), label)
    else:
        kept = product(builder, update, builder.scale_shift(new, -1.0, state, label), label)
    return builder.total([new, kept], label)
