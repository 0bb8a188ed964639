"""What every attack's images go through before they are returned: repair, then the exact check."""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.attack.model import AttackedModel
from flowverify.attack.segment import confirmed_crossing
from flowverify.transport.distance import channel_masses
from flowverify.witness import pull_back, repair, replay, surplus


def confirm(
    model: AttackedModel,
    images: Tensor,  # (B, C, H, W), float64
    labels: Tensor,  # (B,)
    logits: Tensor,  # (B, classes), of the clean images
    candidates: Tensor,  # (B, C, H, W)
    ground: str,
    cap: float | None,
    *,
    radius: Tensor | None = None,  # (B,)
    shorten: bool = True,
) -> tuple[Tensor, Tensor]:
    """Checked adversarial images with their exact W1 (B,), in pixels; the clean image and infinity where there is none.

    A candidate that lies beyond its radius is pulled back to it along the segment from the clean image; with
    ``shorten`` each is pulled back to where it is only just misclassified.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    final = repair(images, candidates, cap)
    changed = (final != images).flatten(1).any(1)
    away = model.logits(final) if bool(changed.any()) else logits
    good = changed & (surplus(away, labels) >= 0)
    if radius is not None and bool(good.any()):
        chosen = good.nonzero().flatten()
        final[chosen] = pull_back(images[chosen], final[chosen], ground, radius[chosen])
        away[chosen] = model.logits(final[chosen])
        good[chosen] = surplus(away[chosen], labels[chosen]) >= 0
    if shorten and bool(good.any()):
        chosen = good.nonzero().flatten()
        final[chosen] = confirmed_crossing(
            model, images[chosen], final[chosen], labels[chosen], (logits[chosen], away[chosen]), cap
        )
    if cap is not None:
        final = final.clamp(max=cap)  # changes nothing in an image of the threat model
    distance = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    chosen = (good & (channel_masses(images).sum(-1) > 0)).nonzero().flatten()
    if chosen.numel():
        limit = None if radius is None else radius[chosen]
        distance[chosen] = replay(model, images[chosen], labels[chosen], final[chosen], ground, cap, limit)
    kept = torch.isfinite(distance)
    return torch.where(kept[:, None, None, None], final, images), distance
