"""The largest certified radius of each image, by a bracketing search batched over images."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from flowverify.ball import Threat
from flowverify.bounds.warm_start import WarmStart
from flowverify.certifiers.bracket import Bracket
from flowverify.certifiers.verify import Certifier, Cover
from flowverify.errors import InvalidInputError
from flowverify.results import Certificate, Verdict
from flowverify.transport.ground import parse_ground

RELATIVE_TOLERANCE = 0.01
FIRST_RADIUS = 0.05  # pixels; the order of radii on plainly trained networks (theory, section 20)
SMALLEST_RADIUS = 1e-7
RAISE = 1.25  # from trial to trial, above a radius that a looser bound has certified

MarginFunction = Callable[[Tensor, Tensor], Tensor]  # (indices, radii) -> margins


def search_radius(
    certifier: Certifier,
    images: Tensor,
    labels: Tensor,
    ground: str = "l1",
    *,
    tolerance: float = RELATIVE_TOLERANCE,
    batch_size: int = 100,
    progress: Callable[[int], None] | None = None,
    references: Tensor | None = None,
    cap: float | None = None,
) -> list[Certificate]:
    """The largest certified radius of each image, to ``tolerance`` relative.

    The search runs in float32, with multipliers carried from radius to radius; the radius that it finds is
    then confirmed in float64, or lowered until it is. It is raised to that of a looser bound
    (:meth:`~flowverify.certifiers.verify.Certifier.covers`: vanilla, the l1 ball around the ball, no cap) where that
    one is larger by more than the tolerance. Certificates hold below and at the radius, because the balls are nested.

    Args:
        images: (B, C, H, W), in any number; they are taken ``batch_size`` at a time.
        progress: called with the number of images that each batch has finished.
        references: R for each image, (B, C, H, W), for a certifier with ``domain="flow"``; see
            :mod:`flowverify.certifiers.references`.
        cap: largest value of a pixel in the balls; None for no limit.

    Raises:
        InvalidInputError: as :meth:`Certifier.check`, a tolerance outside (0, 1), or a batch size < 1.
        UnknownNameError: an unknown ground cost.
    """
    threat = Threat(ground, cap)
    ground = threat.ground
    if not 0 < tolerance < 1:
        raise InvalidInputError(f"tolerance {tolerance!r}: expected a number between 0 and 1")
    if batch_size < 1:
        raise InvalidInputError(f"batch size {batch_size!r}: expected at least 1")
    images, labels = certifier.check(images, labels, threat)
    result: list[Certificate] = []
    for start in range(0, images.shape[0], batch_size):
        part = slice(start, start + batch_size)
        own = None if references is None else references[part]
        found = _search_batch(certifier, images[part], labels[part], ground, cap, tolerance, own)
        result.extend(found)
        if progress is not None:
            progress(len(found))
    return result


def _search_batch(
    certifier: Certifier,
    images: Tensor,
    labels: Tensor,
    ground: str,
    cap: float | None,
    tolerance: float,
    references: Tensor | None,
) -> list[Certificate]:
    begin = time.perf_counter()
    predictions, correct = certifier.clean(images, labels)
    chosen = correct.nonzero().flatten()
    count = chosen.numel()
    own_images, own_labels = images[chosen], labels[chosen]
    own_references = None if references is None else references[chosen]
    # What is searched is the budget for each unit of mass, radius^p: margins fall with it about linearly.
    cost = parse_ground(ground)
    limit = cost.largest_distance(*images.shape[-2:]) ** cost.power
    tolerance = (1 + tolerance) ** cost.power - 1

    def margins(dtype: torch.dtype, cover: Cover, warm_start: WarmStart | None) -> MarginFunction:
        def evaluate(index: Tensor, budget: Tensor) -> Tensor:
            if warm_start is not None:
                warm_start.at(None, index)
            return certifier.margins(
                own_images[index],
                own_labels[index],
                cover.radius(cost.radius(budget)),
                dtype=dtype,
                method=cover.method,
                ground=cover.ground,
                cap=cover.cap,
                warm_start=warm_start,
                references=None if own_references is None else own_references[index],
            ).cpu()

        return evaluate

    budget = torch.zeros(count, dtype=torch.float64)
    margin = torch.zeros(count, dtype=torch.float64)
    if count:
        zero = torch.zeros(count, dtype=torch.float64)
        with torch.no_grad():
            logits = certifier.precise(own_images.double())
        other = logits.scatter(1, own_labels[:, None], -torch.inf).amax(1)
        margin = (logits.gather(1, own_labels[:, None]).squeeze(1) - other).cpu()
        margin -= certifier.allowance(own_images).cpu()
        clean = margin.clone()
        first, *others = _cheapest_first(certifier.covers(ground, cap))
        budget = _bracket(margins(torch.float32, first, WarmStart(count)), zero, clean, limit, tolerance)
        budget, margin = confirm(margins(torch.float64, first, None), budget, clean, tolerance)
        for cover in others:
            floor = (budget * (1 + tolerance)).clamp(min=SMALLEST_RADIUS, max=limit)
            at_floor = margins(torch.float32, cover, None)(torch.arange(count), floor)
            better = ((at_floor > 0) & (floor > budget)).nonzero().flatten()
            if better.numel():
                search, exact = (
                    _of_rows(margins(*precision), better)
                    for precision in ((torch.float32, cover, WarmStart(count)), (torch.float64, cover, None))
                )
                raised = _bracket(search, floor[better], at_floor[better], limit, tolerance, growth=RAISE)
                raised, proven = confirm(exact, raised, clean[better], tolerance)
                kept = raised > budget[better]
                budget[better[kept]], margin[better[kept]] = raised[kept], proven[kept]
    radius = cost.radius(budget)
    seconds = (time.perf_counter() - begin) / images.shape[0]
    place = {int(image): k for k, image in enumerate(chosen)}
    result = []
    for index in range(images.shape[0]):
        k = place.get(index)
        found = 0.0 if k is None else float(radius[k])
        still = limit == 0 and k is not None and bool(margin[k] > 0)  # nothing can move
        shown = Verdict.CERTIFIED if found > 0 or still else Verdict.UNKNOWN
        verdict = Verdict.MISCLASSIFIED if k is None else shown
        result.append(
            certifier.certificate(
                labels[index],
                predictions[index],
                verdict,
                ground,
                found,
                seconds,
                cap=cap,
                margin=None if k is None else float(margin[k]),
                note=certifier.notes(),
            )
        )
    return result


def _cheapest_first(covers: list[Cover]) -> list[Cover]:
    """A cap takes many times as long as none: from the radius without one, few steps are left to search."""
    return sorted(covers[:2], key=lambda cover: cover.cap is not None) + covers[2:]


def _of_rows(evaluate: MarginFunction, rows: Tensor) -> MarginFunction:
    """The same function, of indices among ``rows``."""
    return lambda index, radius: evaluate(rows[index], radius)


def _bracket(
    evaluate: MarginFunction, start: Tensor, at_start: Tensor, limit: float, tolerance: float, growth: float = 2.0
) -> Tensor:
    """Largest radii with a positive margin, to ``tolerance``, from radii ``start`` with the margins ``at_start``."""
    brackets = [
        Bracket(low, margin, limit, tolerance, FIRST_RADIUS, SMALLEST_RADIUS, growth)
        for low, margin in zip(start.tolist(), at_start.tolist(), strict=True)
    ]
    while active := [index for index, bracket in enumerate(brackets) if not bracket.finished]:
        trials = [brackets[index].trial() for index in active]
        margins = evaluate(torch.tensor(active), torch.tensor(trials, dtype=torch.float64)).tolist()
        for index, trial, margin in zip(active, trials, margins, strict=True):
            brackets[index].update(trial, margin)
    return torch.tensor([bracket.low for bracket in brackets], dtype=torch.float64)


def confirm(evaluate: MarginFunction, radius: Tensor, clean: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Lowers each radius until its margin is positive in this evaluation; radius 0 keeps the clean margin."""
    radius, margin = radius.clone(), clean.clone()
    active = (radius > 0).nonzero().flatten()
    step = tolerance / 4
    while active.numel():
        value = evaluate(active, radius[active])
        margin[active] = value
        active = active[~(value > 0)]
        radius[active] *= 1 - step
        step = min(2 * step, 0.5)
        gone = active[radius[active] < SMALLEST_RADIUS]
        radius[gone], margin[gone] = 0.0, clean[gone]
        active = active[radius[active] > 0]
    return radius, margin
