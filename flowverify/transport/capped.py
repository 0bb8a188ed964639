"""The support function of the ball with a cap on the pixels, nu <= cap: an upper bound, tightened step by step.

The cap adds one multiplier eta_j >= 0 for every target pixel to the duality (theory, sections 5 and 10):

    h_cap(c) = min over lambda, eta >= 0 of
               lambda * eps + sum_i mu_i max_j (c_j - eta_j - lambda d(i, j)) + cap * sum_j eta_j
             = min over eta >= 0 of  h(c - eta) + cap * sum_j eta_j,

with h the support function without a cap. EVERY eta >= 0 gives a sound bound (weak duality), and eta = 0 that without
a cap, so the result is never worse. The function of eta is convex, and cap - nu*(c - eta) is a subgradient: a pixel
that receives more than the cap costs more, one that has room costs less. The steps are Polyak's with an estimated
optimum (Polyak 1969; Brannlund 1993): a share below the best value so far, which shrinks whenever a step fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport import compiled
from flowverify.transport.backend import Backend, use_compiled

STEPS = 15
FIRST_SHARE = 0.15  # by which the optimum is first believed to lie below the best value
SHRINK = 0.6  # of that share when a step does not improve
ENOUGH = 1e-3  # relative; no more steps where the share has become this small
DEAREST = 5.0  # prices at most this many times the largest coefficient: the bound on rounding counts on it
CHUNK = 1 << 22  # entries of coefficients at a time


@dataclass(frozen=True)
class CappedSupport:
    """The bound for every image and coefficient vector.

    Attributes:
        excess: an upper bound of max c . (nu - mu) over the capped ball, (B, S).
        multiplier: lambda, (B, S).
        reduced: c - eta, (B, S, C, H, W).
        maximiser: if it was asked for (as ``reduced``), nu* of ``reduced`` without a cap, (B, S, C, H, W): the bound's
            gradient in c. It is in the ball, but some of its pixels may lie above the cap.
    """

    excess: Tensor
    multiplier: Tensor
    reduced: Tensor | None
    maximiser: Tensor | None


def support_capped(
    coefficients: Tensor,  # (B, S, C, H, W), or (S, C, H, W) shared by all images
    images: Tensor,  # (B, C, H, W)
    budget: Tensor,  # (B,)
    cap: float,
    *,
    tolerance: float | None = None,
    maximiser: bool = False,
    backend: Backend = "auto",
    ground: str = "l1",
    steps: int = STEPS,
) -> CappedSupport:
    """Bounds S linear functions over the capped ball around each of B images.

    Raises:
        InvalidInputError: an image has a pixel above the cap; and as
            :func:`flowverify.transport.support.support`.
    """
    check_below(images, cap)
    if use_compiled(backend, images):
        rule = (steps, FIRST_SHARE, SHRINK, ENOUGH, DEAREST)
        return CappedSupport(*compiled.solve_capped(coefficients, images, budget, cap, rule, maximiser, ground))
    batch, shape = images.shape[0], coefficients.shape[-4:]
    if coefficients.ndim == 4:
        coefficients = coefficients.expand(batch, *shape)
    images_at_once = max(1, CHUNK // max(1, shape.numel()))
    at_once = max(1, CHUNK // max(1, shape[1:].numel()))
    rows = []
    for start in range(0, batch, images_at_once):
        part = slice(start, start + images_at_once)
        pieces = [
            _descend(
                coefficients[part, first : first + at_once], images[part], budget[part], cap, tolerance, backend,
                ground, steps,
            )
            for first in range(0, shape[0], at_once)
        ]  # fmt: skip
        rows.append([torch.cat(values, 1) for values in zip(*pieces, strict=True)])
    return CappedSupport(*(torch.cat(values) for values in zip(*rows, strict=True)))


def check_below(images: Tensor, cap: float | None) -> None:
    """Raises InvalidInputError if a pixel of the images (B, C, H, W) is above the cap, where there is one."""
    if cap is None:
        return
    above = (images > cap).flatten(1).any(1).nonzero().flatten()
    if above.numel():
        at = int(above[0])
        raise InvalidInputError(
            f"image {at} has a pixel of {float(images[at].max()):g}: expected at most the cap, {cap:g}"
        )


def _descend(
    coefficients: Tensor,
    images: Tensor,
    budget: Tensor,
    cap: float,
    tolerance: float | None,
    backend: Backend,
    ground: str,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from flowverify.transport.support import support

    room = (cap - images.double())[:, None]
    reduced = coefficients
    best: Tensor | None = None
    share = torch.full(coefficients.shape[:2], FIRST_SHARE, dtype=torch.float64, device=images.device)
    for step in range(steps + 1):
        found = support(
            reduced,
            images,
            budget,
            tolerance=tolerance,
            maximiser=True,
            backend=backend,
            ground=ground,
        )
        assert found.maximiser is not None
        # From the rounded c - eta, so that rounding it costs no soundness.
        prices = coefficients.double() - reduced.double()
        value = found.excess.double() + (prices * room).flatten(2).sum(-1)
        if best is None:
            best, multiplier, best_reduced, moved = value, found.multiplier, reduced, found.maximiser
        else:
            better = value < best
            share = torch.where(better, share, share * SHRINK)
            wide = better[..., None, None, None]
            best, multiplier = torch.where(better, value, best), torch.where(better, found.multiplier, multiplier)
            best_reduced = torch.where(wide, reduced, best_reduced)
            moved = torch.where(wide, found.maximiser, moved)
        slope = cap - found.maximiser.double()
        slope = torch.where((prices <= 0) & (slope > 0), 0.0, slope)
        size = slope.square().flatten(2).sum(-1)
        if step == steps or not bool(((size > 0) & (share > ENOUGH) & (best > 0)).any()):
            break
        length = torch.where(size > 0, (value - (1 - share) * best) / size, 0.0)
        prices = (prices - length[..., None, None, None] * slope).clamp(min=0)
        prices = torch.minimum(prices, DEAREST * coefficients.double().abs().amax((-3, -2, -1), keepdim=True))
        reduced = (coefficients.double() - prices).to(coefficients.dtype)
        reduced = torch.minimum(reduced, coefficients)
    assert best is not None
    return best.to(images.dtype), multiplier, best_reduced, moved
