"""A counterexample: in its ball, misclassified, measured. Once, for everybody.

What makes an image misclassified is the rule of :mod:`flowverify.network.subject`; the way into the ball is
:meth:`flowverify.ball.Threat.repair` and :meth:`flowverify.ball.Ball.pull_back`. Nothing that a search says of its
images is believed: they count only after they were replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.ball import Ball
from flowverify.network.subject import Subject


def replay(subject: Subject, ball: Ball, labels: Tensor, others: Tensor) -> Tensor:
    """The distances of the counterexamples among other images, as :func:`replayed_price`.

    Returns:
        W_p of normalised images, in pixels, by an exact solver: float64 (B,).
    """
    return ball.with_budget(replayed_price(subject, ball, labels, others)).radius


def replayed_price(subject: Subject, ball: Ball, labels: Tensor, others: Tensor) -> Tensor:
    """What plans to the counterexamples among other images cost; infinite where one is none, or beyond its ball.

    Args:
        ball: around B images in float64; :meth:`~flowverify.ball.Threat.unlimited` for those at any distance.
        labels: (B,).
        others: float64 (B, C, H, W).

    Returns:
        The cost of the cheapest plans, in mass times ground cost, by an exact solver: float64 (B,).

    Raises:
        SolverError: an exact distance could not be computed.
    """
    found = torch.full((len(ball),), torch.inf, dtype=torch.float64, device=ball.images.device)
    rows = ball.threat.admits(ball.images, others).nonzero().flatten()
    rows = rows[subject.fooled(others[rows], labels[rows])] if rows.numel() else rows
    if rows.numel():
        price = ball.threat.price(ball.images[rows], others[rows])
        found[rows] = torch.where(price <= ball.budget[rows], price, torch.inf)
    return found
