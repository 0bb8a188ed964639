"""Complete methods on the command line: their options, what the progress bar says of them, their witnesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowverify.certifiers.methods import COMPLETE_METHODS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from flowverify.cli.batches import Result
    from flowverify.network import Network


class Watch:
    """Shows the bracket and the open nodes of a running search beside the name of the progress bar."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""

    def attach(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._name = bar, task, str(bar.tasks[task].description)

    def show(self, state: Any) -> None:
        """Takes a :class:`~flowverify.certifiers.complete.radius_search.Progress`."""
        if self._bar is None or self._task is None:
            return
        upper = f"{state.upper_radius:.4f}" if math.isfinite(state.upper_radius) else "?"
        self._bar.update(
            self._task,
            description=f"{self._name}: radius {state.radius:.4f} to {upper}, {state.open_nodes} open nodes at "
            f"{state.trial:.4f}",
        )


def complete_options(network: Network, method: str, timeout: float | None, show: Callable[[Any], None]) -> Any:
    """The options of a complete method, with the strongest attack for first counterexamples; None for others.

    Raises:
        InvalidInputError: a timeout that is not positive.
    """
    if method not in COMPLETE_METHODS:
        return None
    from flowverify.attack import make_attack
    from flowverify.certifiers.complete.certifier import TIMEOUT, CompleteOptions

    limit = TIMEOUT if timeout is None else timeout
    return CompleteOptions(timeout=limit, adversary=make_attack("minimal", network), progress=show)


def write_witnesses(path: Path, results: Sequence[Result]) -> None:
    """Images, their positions in the data set and their labels, as ``images``, ``index``, ``labels``."""
    import numpy as np

    found = [(position, one) for position, one in results if one.witness is not None]
    images = [one.witness.cpu().numpy() for _, one in found if one.witness is not None]
    np.savez(
        path,
        images=np.stack(images) if images else np.zeros((0, 1, 1, 1)),
        index=np.array([position for position, _ in found], dtype=np.int64),
        labels=np.array([one.label for _, one in found], dtype=np.int64),
    )
