"""The problem in small, for the steps of a search: mostly in float32, and only the pixels near the image's mass.

Nothing here is a bound. What the steps lead to is bounded in float64 on all pixels, by
:func:`~flowverify.certifiers.complete.relaxation.lower_bound`, for which any multipliers will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from flowverify.certifiers.complete.affine_maps import AffineMaps, Stage
from flowverify.certifiers.complete.balls import Polytope

MARGIN = 3  # pixels around the mass: the moves of an optimal plan are short


@dataclass(frozen=True)
class Sketch:
    """Maps and ball on a window of the image; ``source`` are the maps that these are of."""

    source: AffineMaps
    maps: AffineMaps
    ball: Polytope


_sketches: WeakKeyDictionary[Polytope, dict[torch.dtype, Sketch]] = WeakKeyDictionary()


def sketch_of(maps: AffineMaps, ball: Polytope, kind: torch.dtype = torch.float32) -> Sketch:
    """The sketch of these maps around this ball, made once."""
    known = _sketches.setdefault(ball, {}).get(kind)
    if known is not None and known.source is maps:
        return known
    rows, columns = _window(ball)
    places = torch.arange(maps.pixels, device=ball.image.device).reshape(ball.image.shape)
    window = places[:, rows, columns].flatten()
    stages = []
    for stage in maps.stages:
        weights = {s: (w[:, window] if s == 0 else w).to(kind).contiguous() for s, w in stage.weights.items()}
        stages.append(Stage(stage.bias.to(kind), weights))
    small = type(ball)(ball.image[:, rows, columns].to(kind).contiguous(), ball.budget, ball.ground, ball.cap)
    found = Sketch(maps, AffineMaps(tuple(stages), maps.names, len(window)), small)
    _sketches[ball][kind] = found
    return found


def _window(ball: Polytope) -> tuple[slice, slice]:
    """The rows and columns near the mass; all of them where points need no mass to move."""
    found = []
    mass = ball.image.sum(0) > 0
    for axis, size in ((1, mass.shape[0]), (0, mass.shape[1])):
        held = mass.any(axis).nonzero().flatten()
        if ball.feasible and len(held):
            found.append(slice(max(0, int(held[0]) - MARGIN), min(size, int(held[-1]) + 1 + MARGIN)))
        else:
            found.append(slice(0, size))
    return found[0], found[1]
