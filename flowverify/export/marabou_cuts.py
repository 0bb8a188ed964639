"""Decides a reduced question with Marabou, class by class, adding cuts until it is proven or an image is found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from flowverify.export.cuts import ReducedQuestion
from flowverify.export.marabou_process import MarabouProcess

ROUNDS = 20  # for one class; each cut says less than the last, and each question takes longer

Shown = TypeVar("Shown")


@dataclass(frozen=True, eq=False)
class Decision(Generic[Shown]):
    """What an image showed; or the positions of the classes that are open, ascending, and the last word on one."""

    shown: Shown | None
    undecided: tuple[int, ...] = ()
    message: str = ""


def decide_by_cuts(
    question: ReducedQuestion,
    process: MarabouProcess,
    folder: Path,
    end: float,
    show: Callable[[Tensor], Shown | None],
    clock: Callable[[], float] = time.perf_counter,
) -> Decision[Shown]:
    """Asks about every class t != label, the hardest first.

    Only ``unsat`` settles a class. Nothing undecided and nothing shown: the label is certified.

    Args:
        folder: for the files of the process.
        end: on the clock.
        show: what an image of the ball, (C, H, W), shows, None for nothing.
    """
    undecided: list[int] = []
    message = ""
    for target in question.margins.argsort().tolist():
        proven = False
        for _ in range(ROUNDS):
            left = end - clock()
            if left <= 0:
                message = message or "no time was left for it"
                break
            path = folder / "program.npz"
            question.program(target).save(path)
            outcome = process.solve_program(path, left)
            proven = outcome.result == "unsat"
            if outcome.result != "sat" or outcome.values is None:
                message = message if proven else outcome.message or f"the engine answered {outcome.result}"
                break
            refinement = question.refine(target, outcome.values)
            for image in refinement.images:
                shown = show(image)
                if shown is not None:
                    return Decision(shown)
            message = "the counterexamples are no images"
            if not refinement.cut:
                break
        if not proven:
            undecided.append(target)
    return Decision(None, tuple(sorted(undecided)), message)
