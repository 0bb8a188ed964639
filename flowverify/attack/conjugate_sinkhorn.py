"""The conjugate Sinkhorn iteration: an upper bound of the support function (Wong et al. 2019, Appendix D).

With beta fixed at lambda c, the dual (32) of the entropic problem (29) has alpha in closed form, and what is left is

    h_lambda(psi) = psi eps + sum_i mu_i (1 / lambda) log sum_j exp(lambda (c_j - psi d(i, j))),

a soft maximum in place of the dilation (theory, section 5; psi here is the paper's psi / lambda). A soft maximum is
never below the maximum, so every psi >= 0 gives an upper bound of the support function h(c), and the excess is at
most mass * log(pixels) / lambda. Weak duality needs plans between all pixels of a channel: local plans would bound a
smaller set. The paper omits the entropy's own constant, which this form includes; without it (32) is no bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.transport.ground import ground_cost

ITERATIONS = 60
CHUNK = 1 << 23  # entries of one (sources, pixels) table


def conjugate_sinkhorn(
    coefficients: Tensor,  # c, (B, C, H, W)
    images: Tensor,  # mu, (B, C, H, W)
    budget: Tensor,  # eps, (B,), in mass times pixels
    ground: str = "l1",
    *,
    regularisation: float = 1000.0,
    iterations: int = ITERATIONS,
) -> Tensor:
    """An upper bound of max c . nu over {nu >= 0 : W1(mu, nu) <= eps}, float64 (B,).

    ``regularisation`` is lambda for coefficients whose range (largest minus smallest) is 1; they are scaled to it.
    Newton's method on psi, safeguarded by a bracket; the best value seen is returned, and is a bound at any point.

    Raises:
        InvalidInputError: shapes that do not fit, a negative budget or a regularisation that is not positive.
        UnknownNameError: the ground cost is unknown.
    """
    if images.ndim != 4 or coefficients.shape != images.shape or tuple(budget.shape) != (len(images),):
        raise InvalidInputError(
            f"coefficients {tuple(coefficients.shape)}, images {tuple(images.shape)}, budget {tuple(budget.shape)}: "
            "expected (B, C, H, W) twice and (B,)"
        )
    if not 0 < regularisation < float("inf") or bool((budget < 0).any()):
        raise InvalidInputError(f"regularisation {regularisation}, budget {budget.tolist()}: expected > 0 and >= 0")
    costs = ground_cost((images.shape[2], images.shape[3]), ground).to(images.device)
    bounds = [
        _bound(c.double(), mu.double(), float(eps), costs, regularisation, iterations)
        for c, mu, eps in zip(coefficients, images, budget, strict=True)
    ]
    return torch.stack(bounds)


def _bound(c: Tensor, mu: Tensor, eps: float, costs: Tensor, regularisation: float, iterations: int) -> Tensor:
    scale = (c.max() - c.min()).clamp(min=1e-300)
    channels = [
        (row / scale, mass[mass > 0], costs[mass > 0]) for row, mass in zip(c.flatten(1), mu.flatten(1), strict=True)
    ]

    def value_and_slopes(psi: float) -> tuple[Tensor, float, float]:
        value = torch.tensor(psi * eps, dtype=torch.float64, device=c.device)
        slope, curvature = eps, 0.0
        for row, mass, cost in channels:
            for start in range(0, len(mass), max(1, CHUNK // max(1, cost.shape[1]))):
                part = slice(start, start + max(1, CHUNK // max(1, cost.shape[1])))
                soft = regularisation * (row - psi * cost[part])
                value = value + (mass[part] * torch.logsumexp(soft, 1)).sum() / regularisation
                weight = torch.softmax(soft, 1)
                mean = (weight * cost[part]).sum(1)
                slope -= float((mass[part] * mean).sum())
                spread = (weight * cost[part] ** 2).sum(1) - mean**2
                curvature += regularisation * float((mass[part] * spread).sum())
        return value, slope, curvature

    psi, low, high = 1.0, 0.0, float("inf")
    best, slope, curvature = value_and_slopes(psi)
    for _ in range(iterations):
        if slope > 0:
            high = min(high, psi)
        else:
            low = max(low, psi)
        step = psi - slope / curvature if curvature > 0 else psi
        if not low < step < high:
            step = 2 * psi + 1e-6 if high == float("inf") else (low + high) / 2
        if abs(step - psi) <= 1e-12 * (1 + psi):
            break
        psi = step
        value, slope, curvature = value_and_slopes(psi)
        best = torch.minimum(best, value)
    return best * scale
