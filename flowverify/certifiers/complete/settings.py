"""How the search goes about its work: numbers that change how fast it is, and never what it proves.

Defaults are what was measured to close most brackets (benchmarks/README.md); tests make searches short or hasty with
others. Users' options are :class:`~flowverify.certifiers.complete.certifier.CompleteOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _is(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class AffineMapSettings:
    """The network as matrices."""

    most_entries: int = _is(1 << 26, "of all matrices; larger networks are refused")
    chunk_entries: int = _is(1 << 23, "that are computed at a time")


@dataclass(frozen=True)
class AscentSettings:
    """Adam on the multipliers of bounds."""

    slope_step: float = _is(0.03, "for the slopes of unstable neurons")
    split_step: float = _is(0.2, "for the prices of splits")
    limit_step: float = _is(0.05, "for the prices of joint limits")
    decay: float = _is(0.98, "of all steps, from one to the next")
    averages: tuple[float, float] = _is((0.9, 0.99), "of gradients and of their squares: what is kept of the last")
    rough_tolerance: float = _is(1e-3, "of the minimum over the ball, on the way; bounds are sound at any")
    tolerance: float = _is(1e-6, "of the last bound's minimum over the ball")
    unsure: float = _is(100.0, "units in the last place of a bound's terms: what the steps' precision may be off")
    going_share: float = _is(0.7, "when so few are left to do, the others are put aside")
    window: int = _is(3, "pixels around the mass that the steps look at: the moves of an optimal plan are short")


@dataclass(frozen=True)
class NeuronBoundSettings:
    """Bounds of what ReLUs read."""

    iterations: int = _is(20, "for each side of each unstable neuron")
    child_iterations: int = _is(6, "after a split")
    chunk: int = _is(256, "bounds at a time")
    tolerance: float = _is(1e-6, "of the minimum over the ball")
    tightening_tolerance: float = _is(1e-2, "of the minimum over the ball, in the nodes of a tree")
    rounds: int = _is(24, "splits for each side of each unstable neuron")
    most_refined: int = _is(512, "unstable neurons; beyond, their trees cost more than they give")
    refining_share: float = _is(0.15, "of the time left")


@dataclass(frozen=True)
class JointLimitSettings:
    """Joint limits of several neurons; groups and their members are pairs."""

    first_layer: tuple[int, int] = _is((5, 6), "groups and members in the first layer")
    upper_layers: tuple[int, int] = _is((4, 8), "groups and members in a layer above")
    neuron_bounds: tuple[int, int] = _is((4, 6), "groups and members in the first layer, for bounds of neurons")
    iterations: int = _is(8, "for limits above the first layer")
    chunk: int = _is(4096, "linear functions at a time")
    tolerance: float = _is(0.1, "of the maxima over the ball; limits are sound at any")
    spent_share: float = _is(0.75, "of what relaxations cost alone: limits that cost more are renewed")
    renewed_every: int = _is(3, "splits")


@dataclass(frozen=True)
class BranchingSettings:
    """Which neuron is split."""

    candidates: int = _is(3, "of each layer")
    root_candidates: int = _is(10, "of each layer, for few nodes")
    few_nodes: int = _is(32, "so many, near the roots of a tree")
    better_child: float = _is(1.0, "its weight beside the worse one's")
    tolerance: float = _is(1e-2, "of the minimum over the ball")
    tightened: int = _is(6, "neurons of every layer that get new bounds after a split below them")


@dataclass(frozen=True)
class TreeSettings:
    """One tree of branch and bound."""

    root_iterations: int = _is(30, "for the bounds of roots")
    iterations: int = _is(10, "for the bounds of children")
    leaf_iterations: int = _is(50, "for nodes whose ReLUs are all decided")
    leaf_paces: tuple[float, ...] = _is((0.15, 2.0, 20.0), "factors of the steps, one after the other, at these")
    few_open: int = _is(24, "unstable neurons: nodes with no more are polished")
    polishing_iterations: int = _is(40, "for those")
    polishing_pace: float = _is(0.15, "factor of the steps for those")
    batch: int = _is(128, "nodes at a time for each thread")
    descent_every: int = _is(16, "batches: how often minimisers of bounds are starts of a descent")
    tied: float = _is(1e-8, "of the largest logit at the image: a bound below zero by more is no tie")
    solver_tolerance: float = _is(1e-10, "of HiGHS, whose word proves nothing")


@dataclass(frozen=True)
class ScheduleSettings:
    """Which radius is tried next."""

    bisections: int = _is(10, "for the largest radius that a root proves")
    first_radius: float = _is(0.05, "pixels: where those begin")
    first: float = _is(0.6, "of the way from there to the nearest counterexample: where the first tree stands")
    growth: float = _is(24.0, "1 + x times the radius costs exp(growth x) times as much, until trees have told")
    growth_range: tuple[float, float] = _is((16.0, 40.0), "what trees can tell")
    safe: float = _is(0.45, "of the budget left: what a tree that closes the bracket may cost by the forecast")
    middle: float = _is(0.7, "and one on the way")
    near: float = _is(0.955, "of the nearest counterexample: a bracket below 5%, to be had before the rest is tried")
    step: float = _is(0.02, "radii that are nearer to each other are not worth a tree each")
    small: int = _is(500, "nodes: smaller trees tell nothing about the growth")
    late: tuple[float, ...] = _is((0.6, 0.75, 0.88), "shares of the budget after which unfinished trees shrink")
    lowered: float = _is(0.4, "by this share of the way to what is proven")
    closing: float = _is(0.95, "of the tolerance: what the last tree leaves between itself and the counterexample")
    easy_nodes: int = _is(400, "after which a tree is worth better bounds of the neurons")
    least_radius: float = _is(1e-9, "pixels: a search that has proven nothing at this radius ends")


@dataclass(frozen=True)
class CounterexampleSettings:
    """Counterexamples: descent, and the way back to the boundary."""

    descent_steps: int = _is(8, "linearisations")
    overshoot: float = _is(1.02, "factor of the change that the linearisation asks for")
    farther: float = _is(1.2, "than the nearest counterexample: not worth a look")
    halvings: int = _is(40, "on the way back")
    nudges: tuple[float, ...] = _is(
        (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3), "beyond the boundary, of the way to it"
    )
    retries: int = _is(64, "points farther out, where the network's own precision answers the label at all of these")
    nearest: int = _is(3, "points of a batch that are looked at")


@dataclass(frozen=True)
class ProgramSettings:
    """Mixed-integer programming."""

    shares: tuple[float, ...] = _is((1 - 1e-6, 0.999, 0.99, 0.9), "of the least distance: what is tried to prove")
    solver_share: float = _is(0.5, "of the time left: the rest is for the proof")
    apart: float = _is(1e-9, "of an open neuron's bound: nearer to a ReLU, fixing its binary gains nothing")
    solver_tolerance: float = _is(1e-10, "of HiGHS, whose word proves nothing")


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
    compiled: bool = _is(True, "numba's kernels on the CPU; without, what runs on a GPU runs there too")


DEFAULTS = SearchSettings()
