"""The segment from a clean image to an adversarial one.

W1(mu, (1 - t) mu + t nu) = t W1(mu, nu) for every t in [0, 1]: W1 is the maximum of f . (nu - mu) over
1-Lipschitz f, which is homogeneous in nu - mu. For a ground cost that is no metric, the cost of the cheapest plan is
convex: at most t times that to nu. Nonnegativity, mass and a cap hold on the whole segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.attack.model import AttackedModel
from flowverify.ball import between
from flowverify.network.subject import surplus

BEYOND = 0.01  # a trial lands this far past the expected crossing, since only that side is of use
SETTLED = 3e-4  # of the clean margin: what is beyond the boundary by so little is near enough
ALLOWANCE = 1.1  # times the rounding beyond which a misclassification is looked for: it should not hang by a hair
NUDGES = (0.0, 1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 5e-3, 1e-2)


def first_crossing(
    model: AttackedModel,
    clean: Tensor,  # (B, C, H, W)
    far: Tensor,  # (B, C, H, W)
    labels: Tensor,  # (B,)
    margins: tuple[Tensor, Tensor],  # (B,) each
    *,
    above: Tensor | None = None,  # (B,)
    steps: int = 4,
    settled: float = SETTLED,
) -> Tensor:
    """A share t in (0, 1], (B,), at which max f_t - f_y exceeds ``above`` in the model's own precision.

    Bracketing by the Illinois rule, at most ``steps`` evaluations of each image; the margin is nearly linear on
    short segments, so few are needed. It need not be the first crossing where there are several.

    Args:
        margins: max f_t - f_y at ``clean`` and at ``far``, where it is expected to exceed ``above``.
        above: 0 by default.
        settled: an image is done at a point that exceeds ``above`` by at most this share of the clean margin.
    """
    above = torch.zeros_like(margins[0]) if above is None else above
    low_value, high_value = margins[0] - above, margins[1] - above
    low, high = torch.zeros_like(low_value), torch.ones_like(high_value)
    reached, side = high_value.clone(), torch.zeros_like(low)
    for _ in range(steps):
        rows = (~((reached > 0) & (reached <= settled * margins[0].abs()))).nonzero().flatten()
        if not rows.numel():
            break
        start, end, under, over = low[rows], high[rows], low_value[rows], high_value[rows]
        share = under / (under - over)
        share = torch.where((share > 0) & (share < 1), share, 0.5).clamp(1e-6, 1 - 1e-6)
        trial = start + (end - start) * (share + (1 - share) * BEYOND)
        value = model.margins(between(clean[rows], far[rows], trial), labels[rows]) - above[rows]
        crossed = value > 0
        # The side that stays for a second time counts half, so that both ends move.
        low_value[rows] = torch.where(crossed, torch.where(side[rows] > 0, under / 2, under), value)
        high_value[rows] = torch.where(crossed, value, torch.where(side[rows] < 0, over / 2, over))
        reached[rows] = torch.where(crossed, value, reached[rows])
        low[rows], high[rows] = torch.where(crossed, start, trial), torch.where(crossed, trial, end)
        side[rows] = torch.where(crossed, 1.0, -1.0).to(side.dtype)
    return high


def confirmed_crossing(
    model: AttackedModel,
    clean: Tensor,  # (B, C, H, W)
    far: Tensor,  # (B, C, H, W)
    labels: Tensor,  # (B,)
    logits: tuple[Tensor, Tensor],  # (B, classes) each
    cap: float | None = None,
) -> Tensor:
    """Images just beyond the boundary by which the network is fooled (:mod:`flowverify.network.subject`).

    Where no point tried is, the image is ``far``.

    Args:
        logits: at ``clean`` and at ``far``, in the model's own precision.
    """
    margins = surplus(logits[0], labels), surplus(logits[1], labels)
    share = first_crossing(model, clean, far, labels, margins, above=model.rounding(logits[1], ALLOWANCE))
    result, confirmed = far.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for nudge in NUDGES:
        trial = share * (1 + nudge)
        todo = (~confirmed & (trial <= 1)).nonzero().flatten()
        if not todo.numel():
            break
        images = between(clean[todo], far[todo], trial[todo]).clamp(max=torch.inf if cap is None else cap)
        hit = model.fooled(images, labels[todo])
        result[todo[hit]], confirmed[todo[hit]] = images[hit], True
    return result
