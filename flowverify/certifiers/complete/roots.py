"""What a search starts from: bounds of neurons and margins over a ball by the engines of a bound.

The relaxation of a search lets every unstable neuron spend the whole budget; engines such as ``lifted`` (theory,
section 21) do not, and are the tighter ones where many neurons are unstable. Their bounds hold on the whole ball, so
that they may replace those of the neurons of any node, and the bound of a root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.ball import Ball, Threat
from flowverify.bounds.engine import EngineOptions
from flowverify.bounds.margins import MarginBounds
from flowverify.certifiers.complete.neuron_bounds import NeuronBounds
from flowverify.network import Network


@dataclass(frozen=True)
class RootBounds:
    """Over one ball, in exact arithmetic.

    Attributes:
        neurons: of what each ReLU reads.
        margins: lower bounds (R,) of the specification's rows.
    """

    neurons: NeuronBounds
    margins: Tensor


class Roots:
    """Bounds of one network over single balls of any threat.

    Args:
        network: in float64.
        bound: a name in :data:`flowverify.bounds.recipes.BOUNDS`, or MODULE:NAME.
        tolerance: of maxima over the ball; bounds are sound at any.
    """

    def __init__(self, network: Network, bound: str, tolerance: float) -> None:
        self._network, self._bound, self._tolerance = network, bound, tolerance
        self._engines: dict[Threat, MarginBounds] = {}

    def over(self, ball: Ball, specification: Tensor) -> RootBounds:
        """Bounds over one ball, and of linear functions (R, classes) of the output that are differences of two."""
        if ball.threat not in self._engines:
            options = EngineOptions(tolerance=self._tolerance)
            self._engines[ball.threat] = MarginBounds(
                self._network, ball.threat, self._bound, dtype=torch.float64, options=options
            )
        neurons, margins = self._engines[ball.threat].neurons_and_margins(ball, specification[None])
        found = NeuronBounds([], [])
        for low, high in neurons:
            # What is not a number bounds nothing.
            found.lower.append(low[0].flatten().nan_to_num(nan=-torch.inf))
            found.upper.append(high[0].flatten().nan_to_num(nan=torch.inf))
        return RootBounds(found, margins[0].nan_to_num(nan=-torch.inf))
