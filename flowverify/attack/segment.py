"""The segment from a clean image to an adversarial one.

W1(mu, (1 - t) mu + t nu) = t W1(mu, nu) for every t in [0, 1]: W1 is the maximum of f . (nu - mu) over
1-Lipschitz f, which is homogeneous in nu - mu. Nonnegativity, mass and a cap hold on the whole segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.attack.model import AttackedModel

NUDGES = (0.0, 1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 5e-3, 1e-2)


def between(clean: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """(1 - t) clean + t far for t of shape (B,); far itself for t = 1."""
    share = share[:, None, None, None]
    return torch.where(share >= 1, far, clean + share * (far - clean)).clamp(min=0)


def first_crossing(
    model: AttackedModel,
    clean: Tensor,  # (B, C, H, W)
    far: Tensor,  # (B, C, H, W), misclassified
    labels: Tensor,  # (B,)
    steps: int,
    margins: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A share t in (0, 1], (B,), at which the point of the segment is misclassified in the model's own precision.

    Bracketing by the Illinois rule, ``steps`` evaluations of the batch; the margin is nearly linear on short
    segments, so few are needed. It need not be the first crossing where there are several.

    Args:
        margins: max f_t - f_y at ``clean`` (not positive) and at ``far`` (positive), where known.
    """
    if margins is None:
        margins = model.margins(clean, labels), model.margins(far, labels)
    low_value, high_value = margins[0].clone(), margins[1].clone()
    low, high = torch.zeros_like(low_value), torch.ones_like(high_value)
    side = torch.zeros_like(low)
    for step in range(steps):
        share = low_value / (low_value - high_value)
        share = torch.where((share > 0) & (share < 1), share, 0.5).clamp(1e-6, 1 - 1e-6)
        trial = low + (high - low) * share
        # Lands beyond the crossing rather than just before it: only that side is of use.
        trial = trial + (high - trial) * (0.02 if step < steps - 1 else 0.005)
        value = model.margins(between(clean, far, trial), labels)
        crossed = value > 0
        # The side that stays for a second time counts half, so that both ends move.
        low_value = torch.where(crossed, torch.where(side > 0, low_value / 2, low_value), value)
        high_value = torch.where(crossed, value, torch.where(side < 0, high_value / 2, high_value))
        low, high = torch.where(crossed, low, trial), torch.where(crossed, trial, high)
        side = torch.where(crossed, 1.0, -1.0)
    return high


def confirmed_crossing(
    model: AttackedModel, clean: Tensor, far: Tensor, labels: Tensor, cap: float | None = None, steps: int = 4
) -> tuple[Tensor, Tensor]:
    """Images just beyond the boundary, and whether each was found misclassified in both precisions; bool (B,).

    Where no point tried is, the image is ``far``.
    """
    share = first_crossing(model, clean, far, labels, steps)
    result, confirmed = far.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for nudge in NUDGES:
        trial = share * (1 + nudge)
        todo = (~confirmed & (trial <= 1)).nonzero().flatten()
        if not todo.numel():
            break
        images = between(clean[todo], far[todo], trial[todo]).clamp(max=torch.inf if cap is None else cap)
        fooled = model.fooled(images, labels[todo])
        result[todo[fooled]], confirmed[todo[fooled]] = images[fooled], True
    return result, confirmed
