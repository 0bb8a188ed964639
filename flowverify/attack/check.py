"""What every attack's images go through before they are returned: repair, then the exact check."""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.attack.batch import Batch
from flowverify.attack.model import AttackedModel
from flowverify.attack.segment import confirmed_crossing
from flowverify.network.subject import surplus
from flowverify.witness import replay


def confirm(model: AttackedModel, batch: Batch, candidates: Tensor, *, shorten: bool = True) -> tuple[Tensor, Tensor]:
    """Checked adversarial images with their exact W_p (B,), in pixels; the clean one and infinity where there is none.

    A candidate (C, H, W) that lies beyond its ball is pulled back to it along the segment from the clean image; with
    ``shorten`` each is pulled back to where it is only just misclassified.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    ball, labels, logits = batch.ball, batch.labels, batch.logits
    final = ball.threat.repair(ball.images, candidates)
    changed = (final != ball.images).flatten(1).any(1)
    away = model.logits(final) if bool(changed.any()) else logits
    good = changed & (surplus(away, labels) >= 0)
    limited = (good & torch.isfinite(ball.budget)).nonzero().flatten()
    if limited.numel():
        final[limited] = ball[limited].pull_back(final[limited])
        away[limited] = model.logits(final[limited])
        good[limited] = surplus(away[limited], labels[limited]) >= 0
    chosen = good.nonzero().flatten()
    if shorten and chosen.numel():
        final[chosen] = confirmed_crossing(
            model, ball.images[chosen], final[chosen], labels[chosen], (logits[chosen], away[chosen]), ball.threat.cap
        )
    if ball.threat.cap is not None:
        final = final.clamp(max=ball.threat.cap)  # changes nothing in an image of the threat
    distance = torch.full((len(batch),), torch.inf, dtype=torch.float64, device=final.device)
    if chosen.numel():
        distance[chosen] = replay(model, ball[chosen], labels[chosen], final[chosen])
    kept = torch.isfinite(distance)
    return torch.where(kept[:, None, None, None], final, ball.images), distance
