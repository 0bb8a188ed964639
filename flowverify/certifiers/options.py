"""The options of methods and of outside engines; nothing heavy is imported, so that help texts can be read from here.

:class:`SearchSettings` change how fast a complete search is, and never what it proves. Defaults are what was measured
to close most brackets (benchmarks/README.md); tests make searches short or hasty with others. Users' options are
:class:`CompleteOptions`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowverify.bounds.recipes import BOUNDS, check_bound
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import option

if TYPE_CHECKING:
    from flowverify.certifiers.complete.counterexamples import Adversary
    from flowverify.certifiers.complete.radius_search import Progress
    from flowverify.deadline import Deadline

DOMAINS = ("auto", "image", "flow")


@dataclass(frozen=True)
class IncompleteOptions:
    """How bounds over a ball are computed, and how far a radius is searched.

    Raises:
        UnknownNameError: an unknown bound or domain.
        InvalidInputError: a tolerance outside (0, 1), or a batch size below 1.
    """

    bound: str = option("best", f"{', '.join(list(BOUNDS)[:-1])} or {list(BOUNDS)[-1]}.")
    domain: str = option("auto", f"Where CROWN runs: {', '.join(DOMAINS[:-1])} or {DOMAINS[-1]}.")
    tolerance: float = option(0.01, "Of a searched radius, relative; ends are predicted to it.")
    batch_size: int = option(100, "Images whose radii are searched together.")

    def __post_init__(self) -> None:
        check_bound(self.bound)
        if self.domain not in DOMAINS:
            raise UnknownNameError("domain", self.domain, DOMAINS)
        if not 0 < self.tolerance < 1:
            raise InvalidInputError(f"tolerance {self.tolerance!r}: expected a number between 0 and 1")
        if self.batch_size < 1:
            raise InvalidInputError(f"batch size {self.batch_size!r}: expected at least 1")


@dataclass(frozen=True)
class AffineMapSettings:
    """The network as matrices."""

    most_entries: int = option(1 << 26, "of all matrices; larger networks are refused")


@dataclass(frozen=True)
class AscentSettings:
    """Adam on the multipliers of bounds."""

    slope_step: float = option(0.03, "for the slopes of unstable neurons")
    split_step: float = option(0.2, "for the prices of splits")
    limit_step: float = option(0.05, "for the prices of joint limits")
    share_step: float = option(0.2, "for the shares of rows of moves")
    first_share: float = option(0.9, "of rows of moves, where a bound begins")
    decay: float = option(0.98, "of all steps, from one to the next")
    averages: tuple[float, float] = option((0.9, 0.99), "of gradients and of their squares: what is kept of the last")
    rough_tolerance: float = option(1e-3, "of the minimum over the ball, on the way; bounds are sound at any")
    tolerance: float = option(1e-6, "of the last bound's minimum over the ball")
    unsure: float = option(100.0, "units in the last place of a bound's terms: what the steps' precision may be off")
    going_share: float = option(0.7, "when so few are left to do, the others are put aside")
    window: int = option(3, "pixels around the mass that the steps look at: the moves of an optimal plan are short")


@dataclass(frozen=True)
class NeuronBoundSettings:
    """Bounds of what ReLUs read."""

    iterations: int = option(20, "for each side of each unstable neuron")
    child_iterations: int = option(6, "after a split")
    chunk: int = option(256, "bounds at a time")
    tolerance: float = option(1e-6, "of the minimum over the ball")
    tightening_tolerance: float = option(1e-2, "of the minimum over the ball, in the nodes of a tree")
    rounds: int = option(24, "splits for each side of each unstable neuron")
    most_refined: int = option(512, "unstable neurons; beyond, their trees cost more than they give")
    refining_share: float = option(0.15, "of the time left")


@dataclass(frozen=True)
class JointLimitSettings:
    """Joint limits of several neurons; groups and their members are pairs."""

    first_layer: tuple[int, int] = option((5, 6), "groups and members in the first layer")
    upper_layers: tuple[int, int] = option((4, 8), "groups and members in a layer above")
    neuron_bounds: tuple[int, int] = option((4, 6), "groups and members in the first layer, for bounds of neurons")
    iterations: int = option(8, "for limits above the first layer")
    chunk: int = option(4096, "linear functions at a time")
    tolerance: float = option(0.1, "of the maxima over the ball; limits are sound at any")
    spent_share: float = option(0.75, "of what relaxations cost alone: limits that cost more are renewed")
    renewed_every: int = option(3, "splits")


@dataclass(frozen=True)
class BranchingSettings:
    """Which neuron is split."""

    candidates: int = option(3, "of each layer")
    root_candidates: int = option(10, "of each layer, for few nodes")
    few_nodes: int = option(32, "so many, near the roots of a tree")
    better_child: float = option(1.0, "its weight beside the worse one's")
    tolerance: float = option(1e-2, "of the minimum over the ball")
    tightened: int = option(6, "neurons of every layer that get new bounds after a split below them, without rows")


@dataclass(frozen=True)
class TreeSettings:
    """One tree of branch and bound."""

    root_iterations: int = option(30, "for the bounds of roots")
    iterations: int = option(10, "for the bounds of children")
    row_iterations: int = option(5, "for those that rows of moves bound as well")
    leaf_iterations: int = option(50, "for nodes whose ReLUs are all decided")
    leaf_paces: tuple[float, ...] = option((0.15, 2.0, 20.0), "factors of the steps, one after the other, at these")
    few_open: int = option(24, "unstable neurons: nodes with no more are polished, where there are no rows of moves")
    polishing_iterations: int = option(40, "for those")
    polishing_pace: float = option(0.15, "factor of the steps for those")
    batch: int = option(128, "nodes at a time for each thread")
    descent_every: int = option(16, "batches: how often minimisers of bounds are starts of a descent")
    tied: float = option(1e-8, "of the largest logit at the image: a bound below zero by more is no tie")
    solver_tolerance: float = option(1e-10, "of HiGHS, whose word proves nothing")


@dataclass(frozen=True)
class ScheduleSettings:
    """Which radius is tried next."""

    root_trials: int = option(8, "for the largest radius that a root proves")
    root_tolerance: float = option(0.02, "of that radius, relative")
    first_radius: float = option(0.05, "pixels: where those begin")
    first: float = option(0.1, "of the way from there to the nearest counterexample: where the first tree stands")
    blind: float = option(1.5, "times the radius proven: where a tree stands while there is no counterexample")
    growth: float = option(24.0, "1 + x times the radius costs exp(growth x) times as much, until trees have told")
    growth_range: tuple[float, float] = option((16.0, 40.0), "what trees can tell")
    safe: float = option(0.45, "of the budget left: what a tree that closes the bracket may cost by the forecast")
    middle: float = option(0.7, "and one on the way")
    near: float = option(0.955, "of the nearest counterexample: a bracket below 5%, to be had before the rest is tried")
    step: float = option(0.02, "radii that are nearer to each other are not worth a tree each")
    small: int = option(500, "nodes: smaller trees tell nothing about the growth")
    late: tuple[float, ...] = option((0.6, 0.75, 0.88), "shares of the budget after which unfinished trees shrink")
    lowered: float = option(0.4, "by this share of the way to what is proven")
    closing: float = option(0.95, "of the tolerance: what the last tree leaves between itself and the counterexample")
    easy_nodes: int = option(400, "after which a tree without rows is worth better bounds of the neurons")
    least_radius: float = option(1e-9, "pixels: a search that has proven nothing at this radius ends")


@dataclass(frozen=True)
class CounterexampleSettings:
    """Counterexamples: descent, and the way back to the boundary."""

    descent_steps: int = option(8, "linearisations")
    overshoot: float = option(1.02, "factor of the change that the linearisation asks for")
    farther: float = option(1.2, "than the nearest counterexample: not worth a look")
    sections: int = option(16, "of the way back, and again of the one in which the class changes")
    nudges: tuple[float, ...] = option(
        (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3), "beyond the boundary, of the way to it"
    )
    retries: int = option(64, "points farther out, where the network's own precision answers the label at all of these")
    nearest: int = option(3, "points of a batch that are looked at")


@dataclass(frozen=True)
class ProgramSettings:
    """Mixed-integer programming."""

    shares: tuple[float, ...] = option((1 - 1e-6, 0.999, 0.99, 0.9), "of the least distance: what is tried to prove")
    solver_share: float = option(0.5, "of the time left: the rest is for the proof")
    apart: float = option(1e-9, "of an open neuron's bound: nearer to a ReLU, fixing its binary gains nothing")
    solver_tolerance: float = option(1e-10, "of HiGHS, whose word proves nothing")


@dataclass(frozen=True)
class SearchSettings:
    """All of them."""

    maps: AffineMapSettings = AffineMapSettings()
    ascent: AscentSettings = AscentSettings()
    neurons: NeuronBoundSettings = NeuronBoundSettings()
    joint: JointLimitSettings = JointLimitSettings()
    branching: BranchingSettings = BranchingSettings()
    tree: TreeSettings = TreeSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    counterexamples: CounterexampleSettings = CounterexampleSettings()
    program: ProgramSettings = ProgramSettings()
    bound: str = option("lifted", "whose engines bound neurons and margins at the roots")
    row_entries: int = option(1 << 24, "of rows of moves above ReLUs; none are made use of where there are more")
    compiled: bool = option(True, "numba's kernels on the CPU; without, what runs on a GPU runs there too")


DEFAULTS = SearchSettings()


@dataclass(frozen=True)
class CompleteOptions:
    """How far a complete method goes.

    Attributes:
        adversary: such as :class:`flowverify.attack.frank_wolfe.MinimalRadius`; :func:`flowverify.api.make_certifier`
            takes the name of an attack, too.
        progress: told what is known, now and then.
        clock: what seconds are counted by.
        settings: how the search goes about its work; nothing that is proven.

    Raises:
        InvalidInputError: a timeout or a number of nodes that is not positive, a tolerance outside (0, 1).
    """

    timeout: float | None = option(60.0, "Seconds for an image, and radius; none for no limit.")
    nodes: int | None = option(None, "Nodes of the search trees of each image; none for no limit.")
    tolerance: float = option(0.01, "Of the bracket that a radius search closes, relative.")
    adversary: Adversary | None = field(
        default=None, metadata={"help": "An attack for first counterexamples; without, the search finds its own."}
    )
    progress: Callable[[Progress], None] | None = None
    clock: Callable[[], float] = time.perf_counter
    settings: SearchSettings = field(default=SearchSettings())

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInputError(f"timeout: given {self.timeout!r}, expected seconds > 0")
        if self.nodes is not None and self.nodes < 1:
            raise InvalidInputError(f"nodes: given {self.nodes!r}, expected at least 1")
        if not 0 < self.tolerance < 1:
            raise InvalidInputError(f"tolerance: given {self.tolerance!r}, expected a number between 0 and 1")

    def deadline(self) -> Deadline:
        """For one image, from now on."""
        from flowverify.deadline import Deadline

        return Deadline(self.timeout, self.nodes, self.clock)


MARABOU_ENCODINGS = ("cuts", "linear", "outputs", "penalty")


@dataclass(frozen=True)
class MarabouOptions:
    """How Marabou is asked, and how long.

    Raises:
        UnknownNameError: another encoding.
        InvalidInputError: a timeout that is not positive.
    """

    encoding: str = option(
        "cuts", "How marabou is asked: cuts (class by class), or by files: linear, outputs or penalty."
    )
    timeout: float = option(300.0, "Seconds for an image and a radius.")

    def __post_init__(self) -> None:
        _check_outside("marabou", self.encoding, MARABOU_ENCODINGS, self.timeout)


ABCROWN_ENCODINGS = ("both", "l1-penalty", "penalty")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class AlphaBetaCrownOptions:
    """How alpha-beta-CROWN is run and asked, and how long.

    Raises:
        UnknownNameError: another encoding or device.
        InvalidInputError: a timeout that is not positive.
    """

    encoding: str = option(
        "both", "How alpha-beta-crown is asked: l1-penalty (its own L1 ball), penalty (a box), or both in turn."
    )
    timeout: float = option(300.0, "Seconds for an image and a radius.")
    program: str = option("", "Its abcrown.py, or a program that runs it; else that of FLOWVERIFY_ABCROWN.")
    python: str = option(
        "", "The Python that has what abcrown.py needs; else that of FLOWVERIFY_ABCROWN_PYTHON, else this one."
    )
    device: str = option("cpu", "Where it computes: cpu or cuda.")
    config: str = option("", "YAML with more of its settings: general and solver; for penalty bab and attack, too.")

    def __post_init__(self) -> None:
        _check_outside("alpha-beta-crown", self.encoding, ABCROWN_ENCODINGS, self.timeout)
        if self.device not in DEVICES:
            raise UnknownNameError("device of alpha-beta-crown", self.device, DEVICES)


def _check_outside(engine: str, encoding: str, encodings: tuple[str, ...], timeout: float) -> None:
    if encoding not in encodings:
        raise UnknownNameError(f"encoding for {engine}", encoding, encodings)
    if not timeout > 0:
        raise InvalidInputError(f"timeout: given {timeout!r}, expected seconds > 0")
