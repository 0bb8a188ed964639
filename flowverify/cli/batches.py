"""Certification of many images, batch by batch: what is done is handed on before the next batch starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flowverify.cli.report import one_line, print_error
from flowverify.results import Certificate, Interrupted, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from flowverify.ball import WassersteinBall
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset

Result = tuple[int, Certificate]  # an image's position in the data set, and what was shown about it


def certify_batches(
    certifier: BaseCertifier,
    data: Dataset,
    positions: Sequence[int],
    ball: WassersteinBall | None,
    ground: str,
    batch_size: int,
    cap: float | None = None,
) -> Iterator[list[Result]]:
    """Certificates of the images at ``positions``, ``batch_size`` at a time.

    With a ball they are decided at its radius, without one the largest certified radius of each is searched.
    A batch that breaks down gives the verdict ``error`` for its images, and the next one is tried.

    Raises:
        InvalidInputError: an image or a label is not valid for the network; nothing has been computed then.
        DependencyError, FoldError, UnsupportedOperationError, BoundError: the network cannot be bounded at all.
    """
    from flowverify.ball import Threat

    chosen = data[list(positions)]
    images, labels = certifier.check(chosen.images, chosen.labels, Threat(ground, cap))
    certifier.prepare(ground, cap)
    for start in range(0, len(positions), batch_size):
        part = slice(start, start + batch_size)
        begin = time.perf_counter()
        try:
            if ball is None:
                certificates = certifier.search(images[part], labels[part], ground, cap)
            else:
                certificates = certifier.certify(images[part], labels[part], ball)
        except Interrupted as stopped:
            yield list(zip(positions[part], stopped.certificates, strict=False))
            raise
        except Exception as error:  # whatever a certifier dies of must not cost the other batches
            name, last = positions[start], positions[min(start + batch_size, len(positions)) - 1]
            reason = f"{type(error).__name__}: {one_line(error)}"
            print_error(f"images {name} to {last}: {reason}")
            seconds = (time.perf_counter() - begin) / len(labels[part])
            certificates = _failures(certifier, images[part], labels[part], ball, ground, cap, seconds, reason)
        yield list(zip(positions[part], certificates, strict=True))


def _failures(
    certifier: BaseCertifier,
    images: Tensor,
    labels: Tensor,
    ball: WassersteinBall | None,
    ground: str,
    cap: float | None,
    seconds: float,
    reason: str,
) -> list[Certificate]:
    predictions = certifier.network(images.to(certifier.network.dtype)).argmax(1)
    return [
        Certificate(
            verdict=Verdict.ERROR,
            label=label,
            prediction=prediction,
            method=certifier.method,
            bound=certifier.bound,
            ground=ground,
            radius=0.0 if ball is None else ball.radius,
            margin=None,
            seconds=seconds,
            note=reason,
            cap=cap,
        )
        for label, prediction in zip(labels.tolist(), predictions.tolist(), strict=True)
    ]
