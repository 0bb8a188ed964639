"""What is to be bounded: linear functions of what a network computes, over the images of a ball.

The steps of a search look at the problem in small: mostly in float32, and only at the pixels near the image's mass.
Nothing in that is a bound. What the steps lead to is bounded in float64 on all pixels, by
:func:`~flowverify.certifiers.complete.relaxation.lower_bound`, for which any multipliers will do (theory, section 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowverify.certifiers.complete.affine_maps import AffineMaps, Stage
from flowverify.certifiers.complete.settings import DEFAULTS, SearchSettings
from flowverify.certifiers.complete.single_ball import SingleBall
from flowverify.certifiers.complete.workers import Workers


@dataclass(frozen=True, eq=False)
class Problem:
    """min over the ball of specification . z_stage, one problem for each row of ``specification``.

    Attributes:
        maps: of the network.
        ball: around the image.
        stage: of the maps.
        specification: (R, n_stage).
        settings: of the search.
        workers: do chunks of rows at a time.
    """

    maps: AffineMaps
    ball: SingleBall
    stage: int
    specification: Tensor
    settings: SearchSettings = DEFAULTS
    workers: Workers = field(default_factory=Workers)
    _reduced: dict[torch.dtype, tuple[AffineMaps, SingleBall]] = field(default_factory=dict, repr=False)

    @classmethod
    def outputs(cls, maps: AffineMaps, ball: SingleBall, settings: SearchSettings = DEFAULTS) -> Problem:
        """Each of the network's outputs."""
        bias = maps.stages[-1].bias
        return cls(maps, ball, maps.layers, torch.eye(len(bias), dtype=bias.dtype, device=bias.device), settings)

    def at(self, stage: int, specification: Tensor) -> Problem:
        """Functions of another stage."""
        return replace(self, stage=stage, specification=specification)

    def rows(self, chosen: Tensor | slice) -> Problem:
        """These rows."""
        return replace(self, specification=self.specification[chosen])

    def on(self, ball: SingleBall) -> Problem:
        """Over another ball."""
        return replace(self, ball=ball, _reduced={})

    def reduced(self, kind: torch.dtype = torch.float32) -> Problem:
        """In this precision, on a window of the image; its values are near the problem's own, and no bounds."""
        if kind not in self._reduced:
            self._reduced[kind] = self._reduce(kind)
        maps, ball = self._reduced[kind]
        return replace(self, maps=maps, ball=ball, specification=self.specification.to(kind), _reduced={})

    def _reduce(self, kind: torch.dtype) -> tuple[AffineMaps, SingleBall]:
        rows, columns = self._window()
        image = self.ball.image
        places = torch.arange(self.maps.pixels, device=image.device).reshape(image.shape)
        window = places[:, rows, columns].flatten()
        stages = []
        for stage in self.maps.stages:
            weights = {s: (w[:, window] if s == 0 else w).to(kind).contiguous() for s, w in stage.weights.items()}
            stages.append(Stage(stage.bias.to(kind), weights))
        return AffineMaps(tuple(stages), self.maps.names, len(window)), self.ball.window(rows, columns, kind)

    def _window(self) -> tuple[slice, slice]:
        """The rows and columns near the mass; all of them where points need no mass to move."""
        found = []
        mass, margin = self.ball.image.sum(0) > 0, self.settings.ascent.window
        for axis, size in ((1, mass.shape[0]), (0, mass.shape[1])):
            held = mass.any(axis).nonzero().flatten()
            if self.ball.positive and len(held):
                found.append(slice(max(0, int(held[0]) - margin), min(size, int(held[-1]) + 1 + margin)))
            else:
                found.append(slice(0, size))
        return found[0], found[1]
